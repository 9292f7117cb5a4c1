"""Accuracy of a classifier on test images, split over ranks: counts, divided at the end."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mocov3.data import Source
from mocov3.distributed import World
from mocov3.evaluation.features import Extractor, collect, first_of, stream
from mocov3.evaluation.measures import auroc, average_precision
from mocov3.losses import answers_loss
from mocov3.models.precision import Precision


@dataclass(frozen=True)
class Scored:
    """Scores of all test images that could be read, in their order, on every rank."""

    scores: np.ndarray
    """(images, classes), float64."""
    truth: np.ndarray
    """(images,), or of findings (images, findings)."""
    read: np.ndarray
    """Indices of the images."""
    left_out: str
    """As of ``Accuracy``."""

    def accuracy(self, classes: int) -> "Accuracy":
        """Counts of right ones, of one class an image."""
        counts = count(torch.from_numpy(self.scores), torch.from_numpy(self.truth), classes)
        return Accuracy.of(counts.numpy(), classes, self.left_out)


@dataclass(frozen=True)
class Areas:
    """How several findings an image are told."""

    auroc: float
    """Mean over findings in %."""
    average_precision: float
    loss: float
    """Mean of ``answers_loss`` over images."""
    total: int
    left_out: str
    """As of ``Accuracy``."""

    @classmethod
    def of(cls, found: Scored) -> "Areas":
        """Of the scores of all images."""
        scores, truth = torch.from_numpy(found.scores), torch.from_numpy(found.truth)
        first, second = (
            100 * float(np.nanmean(measure(found.scores, found.truth))) for measure in (auroc, average_precision)
        )
        return cls(first, second, float(answers_loss(scores, truth)) / len(truth), len(truth), found.left_out)

    @property
    def score(self) -> float:
        """What the best weights are chosen by."""
        return self.auroc

    @property
    def values(self) -> dict[str, float]:
        """By the names of ``metrics.jsonl``."""
        return {"auroc": self.auroc, "average_precision": self.average_precision, "test_loss": self.loss}


@dataclass(frozen=True)
class Accuracy:
    """Counts over all test images that could be read."""

    hits: Int[np.ndarray, "classes"]
    """Images of a class whose first guess was right."""
    hits5: int
    images: Int[np.ndarray, "classes"]
    """Images of a class."""
    loss_sum: float
    left_out: str = ""
    """How many images could not be read, and the first, in words."""

    @property
    def total(self) -> int:
        """Images evaluated."""
        return int(self.images.sum())

    @property
    def acc1(self) -> float:
        """Top-1 accuracy in %."""
        return 100 * int(self.hits.sum()) / max(self.total, 1)

    @property
    def acc5(self) -> float:
        """Top-5 accuracy in % (of as many guesses as there are classes, if fewer)."""
        return 100 * self.hits5 / max(self.total, 1)

    @property
    def mean_class_acc1(self) -> float:
        """Mean over the classes that have images of their top-1 accuracy, in %."""
        present = self.images > 0
        return 100 * float((self.hits[present] / self.images[present]).mean()) if present.any() else 0.0

    @property
    def loss(self) -> float:
        """Mean cross entropy."""
        return self.loss_sum / max(self.total, 1)

    @property
    def score(self) -> float:
        """What the best weights are chosen by."""
        return self.acc1

    @property
    def values(self) -> dict[str, float]:
        """By the names of ``metrics.jsonl``."""
        found = {"acc1": self.acc1, "acc5": self.acc5, "mean_class_acc1": self.mean_class_acc1}
        return {**found, "test_loss": self.loss}

    @classmethod
    def of(cls, counts: Float[np.ndarray, "counts"], classes: int, left_out: str) -> "Accuracy":
        """From sums of ``count``."""
        whole = counts.astype(np.int64)
        hits, images = whole[:classes], whole[classes : 2 * classes]
        return cls(hits, int(whole[-2]), images, float(counts[-1]), left_out)


def evaluate(
    classifier: Extractor, source: Source, *, world: World, precision: Precision, batch_size: int, workers: int
) -> Accuracy:
    """Counts over a labelled source, in evaluation mode, the same on every rank; the features are class scores.

    An image that cannot be read is left out of the counts.
    """
    labels = source.labels
    assert labels is not None
    classes = len(source.classes)
    counts = torch.zeros(2 * classes + 2, dtype=torch.float64)
    corrupt: dict[int, str] = {}
    mine = np.array_split(np.arange(len(source)), world.size)[world.rank]
    batches = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    scored = stream(classifier, source, batches, device=world.device, workers=workers, autocast=precision.autocast)
    for part in scored:
        corrupt |= part.corrupt
        target = torch.from_numpy(labels[part.indices[part.readable]].astype(np.int64))
        counts += count(part.arriving.wait().double()[torch.from_numpy(part.readable)], target, classes)
    # counts are whole numbers and the loss is summed in float64; sums go over the host, in float64 on every device
    parts = world.gather((counts.tolist(), corrupt))
    total = np.sum([sums for sums, _ in parts], axis=0)
    corrupt = {i: reason for _, bad in parts for i, reason in bad.items()}
    return Accuracy.of(total, classes, _left_out(corrupt, source))


def score_all(
    classifier: Extractor, source: Source, *, world: World, precision: Precision, batch_size: int, workers: int
) -> Scored:
    """As ``evaluate``, but the scores themselves."""
    found = collect(
        classifier,
        source,
        world=world,
        batch_size=batch_size,
        check=False,
        title="test images",
        workers=workers,
        autocast=precision.autocast,
    )
    truth, read = source.labels, np.flatnonzero(found.readable)
    assert truth is not None
    scores = np.nan_to_num(found.features.double().numpy()[read], nan=0.0, posinf=1e30, neginf=-1e30)
    return Scored(scores, truth[read].astype(np.int64), read, _left_out(found.corrupt, source))


def _left_out(corrupt: dict[int, str], source: Source) -> str:
    return f"{len(corrupt)} unreadable left out, first: {first_of(corrupt, source)}" if corrupt else ""


def count(
    scores: Float[Tensor, "batch classes"], target: Int[Tensor, "batch"], classes: int
) -> Float[Tensor, "counts"]:
    """Right first guesses by class, images by class, right ones among five guesses, summed cross entropy."""
    ranked = scores.topk(min(5, classes), dim=1).indices == target[:, None]
    hits = torch.bincount(target[ranked[:, 0]], minlength=classes)
    loss = nn.functional.cross_entropy(scores, target, reduction="sum")
    parts = [hits, torch.bincount(target, minlength=classes), ranked.any(1).sum()[None], loss[None]]
    return torch.cat([part.double() for part in parts])
