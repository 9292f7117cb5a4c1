"""What ``mocov3 knn`` measures and prints: every rank votes on a part of the queries, answers are put together."""

import dataclasses
import json
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mocov3.config import KnnConfig
from mocov3.data import Source
from mocov3.data.loading.loader import loader_workers
from mocov3.data.sources.groups import groups_of
from mocov3.distributed import World
from mocov3.evaluation import measures
from mocov3.evaluation.features import collect, first_of
from mocov3.evaluation.frozen import Frozen, open_configured
from mocov3.evaluation.intervals import interval_of
from mocov3.evaluation.knn_inputs import limits, open_sets
from mocov3.evaluation.neighbours import Groups, Neighbours, nearest, recalled, shares, vote
from mocov3.metrics import JsonLine
from mocov3.models.precision import frozen_precision
from mocov3.output.log import warn

Key = tuple[int, float]
"""k and temperature."""


class Images(NamedTuple):
    """Readable images of a source, on the CPU."""

    features: Tensor
    labels: Tensor
    """int64: (images,), or of findings (images, findings)."""
    read: np.ndarray
    """Their indices."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What was measured."""

    score: dict[Key, float]
    """Accuracy in %, or of findings the mean AUROC in %."""
    interval: dict[Key, tuple[float, float]]
    """95 %; of findings only the best has one."""
    recall: dict[int, float]
    best: Key
    more: JsonLine
    """Further measures of the best, as far as asked for."""


def measure(world: World, config: KnnConfig) -> int:
    """Measure on this rank's part of the queries; the main rank prints what all found."""
    frozen = open_configured(config).to(world.device)
    bank_source, queries = open_sets(config.data, config.labels)
    groups = groups_of((bank_source, *([queries] if queries else [])), config.group_by)
    bank = _images(world, frozen, config, bank_source, "bank")
    asked = bank if queries is None else _images(world, frozen, config, queries, "val")
    of_asked = None if groups is None else groups[-1][asked.read]
    own = (
        Groups.among(of_asked, len(bank.features))
        if queries is None
        else Groups.between(None if groups is None else (groups[0][bank.read], groups[1][asked.read]))
    )
    ks, recalls, notes = limits(config, own.available if own else len(bank.features))
    mine = torch.from_numpy(np.array_split(np.arange(len(asked.features)), world.size)[world.rank])
    k = max(*ks, *recalls, 1)
    among = own and own.of_queries(mine)
    found = nearest(bank.features, asked.features[mine], k, groups=among, device=world.device)
    if bank.labels.ndim == 2:
        result = _findings(world, config, found, bank, asked, bank_source.classes, ks, of_asked)
    else:
        result = _classes(world, config, found, bank, asked, mine, len(bank_source.classes), (ks, recalls), of_asked)
    if world.main:
        used = dataclasses.replace(config, precision=frozen_precision(config.precision, world.device).name)
        about = {"bank": len(bank.features), "queries": len(asked.features), "leave_one_out": queries is None}
        about |= {} if of_asked is None else {"groups": len(np.unique(of_asked))}
        _report(used, frozen, about, bank_source.classes, result, notes)
    return 0


def _images(world: World, frozen: Frozen, config: KnnConfig, source: Source, part: str) -> Images:
    precision = frozen_precision(config.precision, world.device)
    collected = collect(
        frozen.extractor,
        source,
        world=world,
        batch_size=config.batch_size,
        workers=loader_workers(config.workers, world.local_size, len(source)),
        autocast=precision.autocast,
        title=f"data {config.data} ({part})",
    )
    labels = torch.as_tensor(source.labels, dtype=torch.long)
    if not collected.corrupt:
        return Images(collected.features, labels, np.arange(len(source)))
    if world.main:
        warn(
            f"{part}: {len(collected.corrupt)} unreadable images left out, first: {first_of(collected.corrupt, source)}"
        )
    keep = torch.from_numpy(collected.readable)
    return Images(collected.features[keep], labels[keep], np.flatnonzero(collected.readable))


def _classes(
    world: World,
    config: KnnConfig,
    found: Neighbours,
    bank: Images,
    asked: Images,
    mine: Tensor,
    classes: int,
    ks: tuple[tuple[int, ...], tuple[int, ...]],
    groups: np.ndarray | None,
) -> Result:
    """One class an image; ``found`` are the neighbours of the queries ``mine``, ``ks`` those of vote and recall."""
    answers = asked.labels[mine]
    voted = vote(found, bank.labels, ks[0], config.temperature, classes=classes)
    here = torch.stack([predicted == answers for predicted in voted.values()])
    everyone = world.gather((here, recalled(found, bank.labels, answers, ks[1])))
    right = torch.cat([part for part, _ in everyone], 1).numpy()
    score = {key: 100 * int(row.sum()) / len(row) for key, row in zip(voted, right, strict=True)}
    best = max(score, key=lambda key: score[key])
    n = right.shape[1]
    recall = {k: 100 * sum(counts[i] for _, counts in everyone) / n for i, k in enumerate(ks[1])}
    more: JsonLine = {}
    if config.measures:
        one_hot = torch.nn.functional.one_hot(bank.labels, classes)
        parts = world.gather((shares(found, one_hot, *best), voted[best]))
        scores, chosen = (torch.cat([part[i] for part in parts]).numpy() for i in range(2))
        more = measures.of_classes(scores, asked.labels.numpy(), groups, chosen) if world.main else {}
    rows = right if world.main else right[:0]
    interval = {key: interval_of(row, groups) for key, row in zip(voted, rows, strict=False)}
    return Result(score, interval, recall, best, more)


def _findings(
    world: World,
    config: KnnConfig,
    found: Neighbours,
    bank: Images,
    asked: Images,
    names: list[str],
    ks: tuple[int, ...],
    groups: np.ndarray | None,
) -> Result:
    """Several findings an image, each voted on by the neighbours of which it is known."""
    truth, scores, score = asked.labels.numpy(), {}, {}
    for key in ((k, t) for k in ks for t in config.temperature):
        scores[key] = torch.cat(world.gather(shares(found, bank.labels, *key))).numpy()
        areas = measures.auroc(scores[key], truth)
        score[key] = 100 * float(np.nanmean(areas)) if not np.isnan(areas).all() else float("nan")
    best = max(score, key=lambda key: (not np.isnan(score[key]), score[key]))
    more = measures.of_findings(scores[best], truth, names, groups) if world.main else {}
    found_interval = more.get("auroc_interval")
    interval = {best: (found_interval[0], found_interval[1])} if found_interval else {}
    return Result(score, interval, {}, best, more)


def _report(
    config: KnnConfig, frozen: Frozen, about: JsonLine, classes: list[str], result: Result, notes: list[str]
) -> None:
    view, findings = frozen.view, "findings" in result.more
    what = "auroc" if findings else "accuracy"
    settings = {
        "backbone": frozen.about,
        "layer": config.layer or "backbone feature",
        **about,
        "findings" if findings else "classes": len(classes),
        "similarity": "cosine",
        "vote": "sum of exp(similarity / temperature)",
        "image_size": view.image_size,
        "resize": round(view.image_size * view.zoom),
        "precision": config.precision,
        "data": config.data,
    }
    if config.json:
        rows = [
            {"k": k, "temperature": t, what: value, "interval": result.interval.get((k, t))}
            for (k, t), value in result.score.items()
        ]
        recall = {} if findings else {"recall": {str(k): v for k, v in result.recall.items()}}
        more = {"measures": result.more} if result.more else {}
        print(json.dumps({**settings, what: rows, **recall, **more, "notes": notes}))
        return
    print(f"k-NN of {frozen.about}")
    asked = about["queries"]
    left_out = "group" if "groups" in about else "each"
    how = (
        f"{asked} images, {left_out} left out in turn"
        if about["leave_one_out"]
        else f"bank {about['bank']}, {asked} queries"
    )
    grouped = f", {about['groups']} groups that never vote for their own" if "groups" in about else ""
    print(
        f"{how}, {len(classes)} {'findings' if findings else 'classes'}{grouped}; cosine, vote exp(similarity/τ); "
        f"shorter side to {settings['resize']} px, centre {view.image_size}; {settings['layer']}"
    )
    _print_scores(result, "mean AUROC in %" if findings else "", asked)
    if result.recall:
        print("recall  " + "  ".join(f"@{k} {value:.3f}" for k, value in result.recall.items()))
    for line in measures.described(result.more, classes):
        print(line)
    for note in notes:
        print(f"note: {note}")


def _print_scores(result: Result, what: str, asked: int) -> None:
    """A row a k, a column a temperature."""
    temperatures = list(dict.fromkeys(t for _, t in result.score))
    print("     k" + "".join(f"  τ {t:<7g}" for t in temperatures) + (f" {what}" if what else ""))
    for k in dict.fromkeys(k for k, _ in result.score):
        cells = (f"{result.score[k, t]:8.3f}{'*' if (k, t) == result.best else ' '} " for t in temperatures)
        print(f"{k:6d}" + "".join(cells).rstrip())
    if result.best in result.interval:
        low, high = result.interval[result.best]
        print(f"*: the best; 95 % interval {low:.1f}–{high:.1f}, for the choice of these {asked} images")
