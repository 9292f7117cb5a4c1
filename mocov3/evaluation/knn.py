"""k-NN evaluation (Wu et al. 2018; Caron et al. 2021): ``mocov3 knn --model FILE DIR``.

With a training and a validation part (DIR/train, DIR/val) the first is the bank, the second the queries. One folder of
classes is its own bank, each image left out in turn; so are the few that ``--labels some.csv`` names.
"""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from mocov3.config import KnnConfig
from mocov3.config.evaluation import KS, RECALLS
from mocov3.data import Source, open_source
from mocov3.data.sources.labels import Labelled, matched, read_labels, with_labels
from mocov3.data.sources.opening import has_unseen
from mocov3.errors import UserError
from mocov3.evaluation.intervals import interval
from mocov3.output.log import warn_left_out

if TYPE_CHECKING:
    from torch import Tensor

    from mocov3.distributed import World
    from mocov3.evaluation.frozen import Frozen
else:
    Tensor = World = Frozen = object  # with torch, which takes seconds to import


def main(config: KnnConfig) -> int:
    """Check, start the ranks, measure, print.

    Raises:
        UserError: for anything the user can fix.
    """
    config.check()
    bank, queries = open_sets(config.data, config.labels)
    limits(config, len(bank) - (queries is None))
    warn_left_out(bank, queries)
    from mocov3.distributed import launch

    return launch(measure, config, device=config.device, processes=config.nprocs_per_node)


def open_sets(data: str, labels: str = "") -> tuple[Source, Source | None]:
    """The bank and the queries; no queries where one labelled folder, or what ``labels`` names, asks itself.

    Raises:
        UserError: if a set is missing or has no classes, or the queries have one that the bank lacks.
    """
    bank = open_source(data, "train")
    if labels:
        return Labelled(bank, read_labels(Path(labels), bank)), None
    queries = open_source(data, "val") if has_unseen(data) else None
    for part, images in (("bank", bank), ("val", queries)):
        if images is not None and (images.labels is None or len(images.classes) < 2):
            raise UserError(
                f"data {data} ({part}): needs two or more class folders, images with labels, or --labels some.csv"
            )
    return with_labels(bank), queries and matched(bank.classes, queries, f"data {data}")


def limits(config: KnnConfig, available: int) -> tuple[tuple[int, ...], tuple[int, ...], list[str]]:
    """The values of k for the vote and recall that the bank allows, and a note on those left out.

    Raises:
        UserError: if a k that was asked for is above the bank.
    """
    notes, allowed = [], []
    for flag, given, default in (("--k", config.k, KS), ("--recall", config.recall, RECALLS)):
        above = [k for k in given if k > available]
        if above and given != default:
            raise UserError(f"{flag} {above[0]} is above the {available} images of the bank; give less")
        if above:
            notes.append(f"{flag} {','.join(map(str, above))} left out: the bank has {available} images")
        allowed.append(tuple(dict.fromkeys(k for k in given if k <= available)))
    if not allowed[0]:
        raise UserError(f"the bank has {available} images, too few for any k")
    return allowed[0], allowed[1], notes


def measure(world: World, config: KnnConfig) -> int:
    """Measure on this rank's part of the queries; the main rank prints the sums."""
    import numpy as np
    import torch

    from mocov3.evaluation.frozen import open_configured
    from mocov3.evaluation.neighbours import nearest, recalled, vote
    from mocov3.models.precision import frozen_precision

    frozen = open_configured(config).to(world.device)
    sources = open_sets(config.data, config.labels)
    bank, labels = _features(world, frozen, config, sources[0], "bank")
    asked, answers = (bank, labels) if sources[1] is None else _features(world, frozen, config, sources[1], "val")
    ks, recalls, notes = limits(config, len(bank) - (sources[1] is None))
    mine = torch.from_numpy(np.array_split(np.arange(len(asked)), world.size)[world.rank])
    self_index = mine if sources[1] is None else None
    neighbours = nearest(bank, asked[mine], max(*ks, *recalls, 1), self_index=self_index, device=world.device)
    voted = vote(neighbours, labels, ks, config.temperature, classes=len(sources[0].classes))
    hits = [int((predicted == answers[mine]).sum()) for predicted in voted.values()]
    counts = world.sum(
        torch.tensor([*hits, *recalled(neighbours, labels, answers[mine], recalls)], device=world.device)
    )
    shares = [100 * n / len(asked) for n in counts.tolist()]
    if world.main:
        accuracy = dict(zip(voted, shares, strict=False))
        recall = dict(zip(recalls, shares[len(voted) :], strict=True))
        sizes = len(bank), len(asked), len(sources[0].classes)
        used = dataclasses.replace(config, precision=frozen_precision(config.precision, world.device).name)
        _report(used, frozen, sizes, accuracy, recall, notes, leave_one_out=sources[1] is None)
    return 0


def _features(world: World, frozen: Frozen, config: KnnConfig, source: Source, part: str) -> tuple[Tensor, Tensor]:
    """Features and classes of the readable images of a source, on the CPU."""
    import torch

    from mocov3.data.loading.loader import loader_workers
    from mocov3.evaluation.features import collect, first_of
    from mocov3.models.precision import frozen_precision
    from mocov3.output.log import warn

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
        return collected.features, labels
    if world.main:
        warn(
            f"{part}: {len(collected.corrupt)} unreadable images left out, first: {first_of(collected.corrupt, source)}"
        )
    keep = torch.from_numpy(collected.readable)
    return collected.features[keep], labels[keep]


def _report(
    config: KnnConfig,
    frozen: Frozen,
    sizes: tuple[int, int, int],
    accuracy: dict[tuple[int, float], float],
    recall: dict[int, float],
    notes: list[str],
    *,
    leave_one_out: bool,
) -> None:
    bank, asked, classes = sizes
    view = frozen.view
    settings = {
        "backbone": frozen.about,
        "layer": config.layer or "backbone feature",
        "bank": bank,
        "queries": asked,
        "leave_one_out": leave_one_out,
        "classes": classes,
        "similarity": "cosine",
        "vote": "sum of exp(similarity / temperature)",
        "image_size": view.image_size,
        "resize": round(view.image_size * view.zoom),
        "precision": config.precision,
        "data": config.data,
    }
    if config.json:
        rows = [
            {"k": k, "temperature": t, "accuracy": value, "interval": interval(round(value * asked / 100), asked)}
            for (k, t), value in accuracy.items()
        ]
        print(
            json.dumps({**settings, "accuracy": rows, "recall": {str(k): v for k, v in recall.items()}, "notes": notes})
        )
        return
    print(f"k-NN of {frozen.about}")
    how = f"{asked} images, each left out in turn" if leave_one_out else f"bank {bank}, {asked} queries"
    print(
        f"{how}, {classes} classes; cosine, vote exp(similarity/τ); shorter side to {settings['resize']} px, "
        f"centre {view.image_size}; {settings['layer']}"
    )
    _print_accuracy(accuracy, asked)
    if recall:
        print("recall  " + "  ".join(f"@{k} {value:.3f}" for k, value in recall.items()))
    for note in notes:
        print(f"note: {note}")


def _print_accuracy(accuracy: dict[tuple[int, float], float], asked: int) -> None:
    """A row a k, a column a temperature."""
    temperatures = list(dict.fromkeys(t for _, t in accuracy))
    best = max(accuracy, key=lambda key: accuracy[key])
    print("     k" + "".join(f"  τ {t:<7g}" for t in temperatures))
    for k in dict.fromkeys(k for k, _ in accuracy):
        cells = (f"{accuracy[k, t]:8.3f}{'*' if (k, t) == best else ' '} " for t in temperatures)
        print(f"{k:6d}" + "".join(cells).rstrip())
    low, high = interval(round(accuracy[best] * asked / 100), asked)
    print(f"*: the best; 95 % interval {low:.1f}–{high:.1f}, for the choice of these {asked} images")
