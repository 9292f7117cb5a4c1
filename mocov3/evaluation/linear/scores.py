"""Scores of linear classifiers on a validation set, exact over ranks; a linear file's, and a published one's."""

import dataclasses
import json
import time
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mocov3.config import LinclsConfig
from mocov3.data import Source
from mocov3.data.device.sending import send
from mocov3.data.loading.labelled import open_evaluated, open_judged
from mocov3.data.loading.loader import loader_workers
from mocov3.data.sources.groups import chosen, groups_in
from mocov3.data.sources.labels import matched, with_labels
from mocov3.distributed import World
from mocov3.errors import UserError
from mocov3.evaluation import measures
from mocov3.evaluation.features import Context, first_of, grid, refuse_not_finite, refuse_unreadable, stream
from mocov3.evaluation.frozen import Frozen, open_frozen
from mocov3.evaluation.linear import files
from mocov3.evaluation.linear.heads import Heads, HeadSpec
from mocov3.evaluation.linear.inputs import PUBLISHED
from mocov3.evaluation.linear.log import CLASSES, HeadResult, Titles, scores, titles
from mocov3.evaluation.linear.setup import find
from mocov3.metrics import JsonLine, Meter, Progress
from mocov3.models.precision import frozen_precision
from mocov3.output.log import warn
from mocov3.output.terminal import Terminal
from mocov3.running.job import Job
from mocov3.weights import Contents, our_entry

Batches = list[tuple[Tensor, Tensor]]
"""This rank's features and classes, batch by batch."""
_IMAGENET = 1000
_AGREE = 0.15  # points: the published figures are rounded to 0.1


def validation_features(
    frozen: Frozen, source: Source, labels: Tensor, world: World, title: str, *, workers: int, autocast: Context
) -> tuple[Batches, dict[int, str]]:
    """Features and classes of this rank's part of the validation set, and the unreadable images of all, left out.

    Raises:
        UserError: if a feature is not finite or no image can be read, naming the images.
    """
    batches: Batches = []
    unreadable: dict[int, str] = {}
    mine = grid(len(source), 256, world)
    for part in stream(frozen.extractor, source, mine, device=world.device, workers=workers, autocast=autocast):
        refuse_not_finite(part, source)
        unreadable |= part.corrupt
        x, index = part.features, send(part.indices, world.device)
        if part.corrupt:
            keep = torch.from_numpy(part.readable).to(world.device)
            x, index = x[keep], index[keep]
        batches.append((x, labels[index]))
    unreadable = {i: reason for bad in world.gather(unreadable) for i, reason in bad.items()}
    refuse_unreadable(unreadable, source, title)
    return batches, unreadable


def evaluated(
    heads: Heads, batches: Batches, world: World, terminal: Terminal, print_freq: int, called: Titles = CLASSES
) -> list[tuple[float, float, float]]:
    """Loss, top-1 and top-5 in % of every head: counts summed over ranks, divided once.

    Of findings the mean AUROC and average precision take the places of the last two.
    """
    wide = torch.float32 if world.device.type == "mps" else torch.float64
    counts = torch.zeros(len(heads.specs), 4, dtype=wide, device=world.device)
    began = time.perf_counter()
    for i, (x, target) in enumerate(batches):
        sums = heads.evaluate(x, target)
        counts += torch.cat([sums, sums.new_full((len(sums), 1), float(len(target)))], dim=1)
        if i % print_freq == 0:
            seconds, values = (time.perf_counter() - began) / (i + 1), rates(counts[0].tolist())
            meters = [Meter("Time", "6.3f", seconds, seconds, 1), *scores(called)]
            for meter, value in zip(meters[1:], values, strict=False):
                meter.update(value)
            terminal.line(Progress(len(batches), meters).line(None, i))
    found = [rates(row) for row in world.sum(counts).tolist()]
    if called is CLASSES:
        return found
    every, truth = _outputs(heads, range(len(heads.specs)), batches, world)
    areas = [(_mean(measures.auroc(s, truth)), _mean(measures.average_precision(s, truth))) for s in every]
    return [(loss, *area) for (loss, _, _), area in zip(found, areas, strict=True)]


def measured(
    heads: Heads, head: int, batches: Batches, world: World, source: Source, unreadable: Collection[int], group_by: str
) -> JsonLine:
    """Further measures (``mocov3.evaluation.measures``) of a head on the validation set; the main rank's hold.

    Args:
        heads: every rank calls it with the same.
        head: number of it.
        batches: as ``validation_features`` gives them.
        world: this rank.
        source: the validation images.
        unreadable: those that are not in ``batches``.
        group_by: as ``--group-by``.
    """
    (scores_of_all,), truth = _outputs(heads, [head], batches, world)
    if not world.main:
        return {}
    groups = groups_in(source, group_by)
    groups = chosen(groups, np.delete(np.arange(len(source)), list(unreadable)))
    if truth.ndim == 2:
        return measures.of_findings(scores_of_all, truth, source.classes, groups)
    return measures.of_classes(torch.from_numpy(scores_of_all).softmax(1).numpy(), truth, groups)


@torch.no_grad()
def _outputs(heads: Heads, which: Sequence[int], batches: Batches, world: World) -> tuple[list[np.ndarray], np.ndarray]:
    """Scores (images, classes) of some heads, and the truth, of all ranks in the order of the images."""
    mine = []
    for x, target in batches:
        every = heads.scores(x.to(heads.weights[0].dtype))
        mine.append(([every[i].double().cpu().numpy() for i in which], target.cpu().numpy()))
    parts = [part for rank in world.gather(mine) for part in rank]
    joined = [np.concatenate([scores_of_batch[i] for scores_of_batch, _ in parts]) for i in range(len(which))]
    return joined, np.concatenate([target for _, target in parts])


def _mean(values: np.ndarray) -> float:
    """In %; 0 where nothing is known."""
    return 100 * float(np.nanmean(values)) if not np.isnan(values).all() else 0.0


def rates(row: Sequence[float]) -> tuple[float, float, float]:
    """(sum of losses, right at 1, right at 5, images) → mean loss, top-1 and top-5 in %."""
    loss, first, fifth, n = row
    n = max(n, 1.0)
    return loss / n, 100 * first / n, 100 * fifth / n


def evaluate_file(world: World, job: Job[LinclsConfig]) -> int:
    """``-e``: the accuracy of a linear file on the validation set."""
    c = job.config
    source = open_judged(c.data, c.group_by, c.labels)
    score = _score(world, job, source)
    result, called = score.result, score.called
    if world.main:
        if c.json and not c.quiet:
            more = {"measures": score.measures} if score.measures else {}
            print(
                json.dumps(
                    {"file": c.resume, "backbone": score.about, **called.named(dataclasses.asdict(result)), **more}
                )
            )
        else:
            print(f" * {called.first} {result.acc1:.3f} {called.second} {result.acc5:.3f}", flush=True)
            print(
                "\n".join(measures.described(score.measures, source.classes)),
                end="\n" if score.measures else "",
                flush=True,
            )
    return 0


class Score(NamedTuple):
    """What a linear file comes to."""

    result: HeadResult
    contents: Contents
    about: str
    """Its backbone, for people."""
    called: Titles
    measures: JsonLine
    """Further ones, as far as asked for."""


def verify_file(world: World, job: Job[LinclsConfig]) -> int:
    """The accuracy of a published linear file beside the published figure; 0 if they agree, else 1."""
    score = _score(world, job, open_evaluated(job.config.data))
    result, contents = score.result, score.contents
    if not world.main:
        return 0
    arch, claimed = str(contents["arch"]), files.best_acc1(contents)
    print(f"{job.config.resume} ({arch}) on {job.config.data}:")
    print(f"  measured here        {result.acc1:7.3f}  (Acc@5 {result.acc5:.3f})")
    print(f"  written in the file  {claimed:7.3f}")
    classes = len(files.classifier(contents, job.config.resume).weight)
    if arch not in PUBLISHED or classes != _IMAGENET:
        print(f"  published            no figure for {arch} with {classes} classes")
        return 0
    epochs, figure = min(PUBLISHED[arch].items(), key=lambda item: abs(item[1] - claimed))
    agree = abs(result.acc1 - figure) <= _AGREE
    print(f"  published            {figure:7.1f}  (reference, {arch}, {epochs} epochs of pre-training)")
    print(f"  {'agrees' if agree else 'differs'}: {result.acc1 - figure:+.3f} points")
    return 0 if agree else 1


def _score(world: World, job: Job[LinclsConfig], source: Source) -> Score:
    c = job.config
    path, contents = find(c)
    assert contents is not None
    where = f"--resume {path}"
    if source.labels is None:
        raise UserError(f"data {c.data}: needs images with classes: val/CLASS/…, or labels")
    if bool(our_entry(contents).get("findings")) != (source.labels.ndim == 2):
        asked = "findings: give --labels CSV" if source.labels.ndim == 1 else "one class an image: leave out --labels"
        raise UserError(f"{where}: was trained on {asked}")
    saved_classifier = files.classifier(contents, where)
    classes = our_entry(contents).get("classes")
    source = matched(classes, source, f"{where}, data {c.data}") if isinstance(classes, list) else with_labels(source)
    frozen = open_frozen(
        path, flag="--resume", arch=c.arch, image_size=c.image_size, view_preset=c.view_preset, heads=c.heads
    )
    width = frozen.width
    files.check_shape(saved_classifier, len(source.classes), width, where)
    heads = Heads(
        [HeadSpec("linear", 0.0, 0.0)], width=width, classes=len(source.classes), seed=0, momentum=0.0, world=world
    )
    heads.set(0, saved_classifier.weight, saved_classifier.bias)
    frozen.to(world.device)
    labels = torch.as_tensor(source.labels, dtype=torch.long, device=world.device)
    precision = frozen_precision(c.precision, world.device)
    title, workers = f"data {c.data} (val)", loader_workers(c.workers, world.local_size)
    batches, bad = validation_features(
        frozen, source, labels, world, title, workers=workers, autocast=precision.autocast
    )
    if bad and world.main:
        warn(f"{len(bad)} unreadable images left out, first: {first_of(bad, source)}")
    style = "quiet" if c.quiet or c.json else "lines"
    terminal = Terminal(style, epochs=1, iterations=1, active=world.main)
    result = HeadResult("linear", 0.0, 0.0)
    called = titles(labels)
    values = evaluated(heads, batches, world, terminal, c.print_freq, called)[0]
    result.update(*values, epoch=int(contents["epoch"]) - 1)
    wanted = c.measures or labels.ndim == 2
    more = measured(heads, 0, batches, world, source, bad, c.group_by) if wanted else {}
    return Score(result, contents, frozen.about, called, more)
