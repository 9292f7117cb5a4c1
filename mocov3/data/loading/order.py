"""Which images an epoch holds and in which order: a function of (seed, epoch), whatever ran before.

Without fractions and groups it is ``draws.permutation``. With fractions of folders, each epoch leaves out other images.
Groups keep near-duplicates (frames of one film, views of one object) out of each other's batches, where they would be
false negatives.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mocov3.data.sources.groups import groups_in
from mocov3.data.sources.opening import Source, Subset
from mocov3.data.views.draws import permutation
from mocov3.errors import UserError

_HOLD_OUT_SEED = 2104_02057


@dataclass(frozen=True, eq=False)
class Order:
    """The order of every epoch.

    Args:
        n: images of the source.
        batch_size: images a step, over all ranks.
        parts: (images, fraction an epoch uses) of each part, in order; ``None``: all of one.
        groups: int32 group of every image, of which a batch holds at most one; ``None``: no groups.
    """

    n: int
    batch_size: int
    parts: Sequence[tuple[int, float]] | None = None
    groups: np.ndarray | None = None

    @property
    def images(self) -> int:
        """Images an epoch has to offer, before it is cut into whole batches."""
        return self.n if self.parts is None else sum(_kept(count, fraction) for count, fraction in self.parts)

    @property
    def iterations(self) -> int:
        """Whole batches of an epoch."""
        if self.groups is None:
            return self.images // self.batch_size
        sizes = np.bincount(self.groups)
        # B batches can be filled exactly if the groups offer enough: each at most one image a batch
        low, high = 0, self.n // self.batch_size
        while low < high:
            middle = (low + high + 1) // 2
            if np.minimum(sizes, middle).sum() >= middle * self.batch_size:
                low = middle
            else:
                high = middle - 1
        return low

    def check(self) -> None:
        """Refuse an order that has no batch.

        Raises:
            UserError: saying what to change.
        """
        if self.groups is not None and self.parts is not None and any(fraction < 1 for _, fraction in self.parts):
            raise UserError("--group-by cannot be combined with fractions of folders (DIR:0.3); leave one out")
        if self.iterations:
            return
        if self.images < 2:
            raise UserError("an epoch holds one image, and the loss compares images; give two or more")
        if self.groups is None:
            raise UserError(
                f"--batch-size {self.batch_size} is larger than the {self.images} images of an epoch; "
                f"give --batch-size {self.images} or less"
            )
        raise UserError(
            f"--group-by: there are {int(self.groups.max()) + 1} groups, and a batch holds one image of "
            f"each; give --batch-size {int(self.groups.max()) + 1} or less"
        )

    def epoch(self, seed: int, epoch: int) -> np.ndarray:
        """Indices of the images, int64, in order; the first ``iterations · batch_size`` are used."""
        order = permutation(seed, epoch, self.n)
        if self.parts is not None and any(fraction < 1 for _, fraction in self.parts):
            order = self._shared(order)
        return order if self.groups is None else self._grouped(order)

    def _shared(self, order: np.ndarray) -> np.ndarray:
        assert self.parts is not None
        ends = np.cumsum([count for count, _ in self.parts])
        part = np.searchsorted(ends, order, side="right")
        keep = np.zeros(len(order), bool)
        for number, (count, fraction) in enumerate(self.parts):
            keep[np.flatnonzero(part == number)[: _kept(count, fraction)]] = True  # the first of a random order
        return order[keep]

    def _grouped(self, order: np.ndarray) -> np.ndarray:
        assert self.groups is not None
        batches = self.iterations
        groups = self.groups[order]
        # groups by their first image in the random order, and within a group the images in that order
        _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
        together = np.argsort(first[inverse], kind="stable")
        starts = np.flatnonzero(np.diff(first[inverse][together], prepend=-1))
        rank = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
        chosen = order[together[rank < batches]]
        # dealt round: neighbours of a group come into different batches
        dealt = [chosen[i::batches][: self.batch_size] for i in range(batches)]
        return np.concatenate(dealt)


def _kept(count: int, fraction: float) -> int:
    return count if fraction >= 1 else max(round(count * fraction), min(count, 1))


def hold_out(whole: Source, count: int, group_by: str, *, needed: bool = True) -> tuple[Source, Source]:
    """(images to train on, about ``count`` images kept from it), by a fixed draw: no seed or resume changes it.

    With groups (``group_by`` and ``needed`` as ``groups_of``) whole ones are kept back, so that no near-copy of an
    image that is kept back is trained on.

    Raises:
        UserError: if that would be more than half, or all.
    """
    if count * 2 > len(whole):
        raise UserError(f"--hold-out {count}: at most half of the {len(whole)} images can be held out")
    found = groups_in(whole, group_by, needed=needed)
    groups = np.arange(len(whole)) if found is None else found
    drawn = permutation(_HOLD_OUT_SEED, 0, int(groups.max()) + 1)
    sizes = np.bincount(groups)[drawn]
    chosen = drawn[: max(int(np.searchsorted(np.cumsum(sizes), count, side="right")), 1)]
    kept_back = np.isin(groups, chosen)
    if kept_back.all():
        raise UserError("--hold-out: --group-by puts all images into one group")
    return Subset(whole, np.flatnonzero(~kept_back)), Subset(whole, np.flatnonzero(kept_back))
