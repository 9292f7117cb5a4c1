"""Nearest neighbours of features by cosine: exact search, weighted vote, retrieval; and nearest centroids.

The search runs in float32 tile by tile, and decides in float64: the result, ties included, does not
depend on tiles, on the number of ranks or on how many queries are searched together.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mocov3.errors import UserError

K, TEMPERATURE = 20, 0.07
_TILE, _ROWS = 131072, 512  # bank rows and queries whose similarities are held at a time
_SCORED = 16  # queries whose candidates are scored in float64 at a time
_SPARE = 32  # candidates beyond k that are scored again
_SHARED = 2**24  # neighbours × columns whose votes are held at a time
_GRID = 2.0**40  # similarities are rounded to 1/grid, so that equal features are equally similar


class Neighbours(NamedTuple):
    """The k nearest bank rows of every query: by decreasing similarity, ties by increasing index."""

    similarity: Float[Tensor, "queries k"]
    """Cosine, float64."""
    index: Int[Tensor, "queries k"]  # type: ignore[assignment]  # hides tuple.index, which is not used here


class Groups(NamedTuple):
    """Which images belong together: a query finds no bank row of its own group."""

    bank: Int[Tensor, "bank"]
    queries: Int[Tensor, "queries"]

    @classmethod
    def among(cls, groups: np.ndarray | None, images: int) -> "Groups":
        """Of images that are their own bank; without groups each is left out for itself alone."""
        numbers = torch.arange(images) if groups is None else torch.as_tensor(groups, dtype=torch.long)
        return cls(numbers, numbers)

    @classmethod
    def between(cls, groups: Sequence[np.ndarray] | None) -> "Groups | None":
        """Of a bank and other queries."""
        return None if groups is None else cls(*(torch.as_tensor(numbers, dtype=torch.long) for numbers in groups))

    @property
    def available(self) -> int:
        """Rows that every query may find, at least."""
        if not len(self.queries):
            return len(self.bank)
        known, counts = self.bank.unique(return_counts=True)
        own = counts[torch.isin(known, self.queries)]
        return len(self.bank) - int(own.max()) if len(own) else len(self.bank)

    def of_queries(self, rows: Tensor) -> "Groups":
        """The same for some of the queries."""
        return Groups(self.bank, self.queries[rows])


def nearest(
    bank: Float[Tensor, "bank dim"],
    queries: Float[Tensor, "queries dim"],
    k: int,
    *,
    self_index: Int[Tensor, "queries"] | None = None,
    groups: Groups | None = None,
    device: torch.device | None = None,
) -> Neighbours:
    """The ``k`` nearest bank rows of every query by cosine, exactly.

    Beside its arguments it takes about 2.5 GB at most, whatever the size of the bank (``benchmarks/evaluation.py``).

    Args:
        bank: features, finite.
        queries: features, finite.
        k: how many.
        self_index: bank row of each query that is left out (leave-one-out).
        groups: instead of it, those of which a query's own is left out.
        device: where similarities are computed; that of the bank unless given.

    Raises:
        ValueError: if the bank has no k rows.
    """
    own = groups if self_index is None else Groups(torch.arange(len(bank)), self_index)
    available = own.available if own else len(bank)
    if not 1 <= k <= available:
        raise ValueError(f"k must lie between 1 and the bank's {available} images, not {k}")
    wanted = min(k + _SPARE, len(bank))
    lengths = _lengths(bank)
    value, index = _candidates(bank, lengths, queries, wanted, own, device or bank.device)
    similarity, indices = [], []
    score = _Scorer(bank, lengths, wanted)
    for rows in torch.arange(len(queries)).split(_SCORED):
        mine = own and own.of_queries(rows)
        exact, numbers = (t[:, :k] for t in score(queries[rows], index[rows], mine))
        if wanted < len(bank):  # beyond the candidates nothing may be as near as the last one taken
            error = 8 * bank.shape[1] ** 0.5 * 2.0**-24  # of a float32 product of unit vectors, amply
            unsure = (value[rows, -1].double() + error >= exact[:, -1]).nonzero().flatten()
            if len(unsure):
                mine = mine and mine.of_queries(unsure)
                exact, numbers = exact.clone(), numbers.clone()
                exact[unsure], numbers[unsure] = _scored_all(bank, lengths, queries[rows][unsure], k, mine)
        similarity.append(exact)
        indices.append(numbers)
    if not similarity:
        return Neighbours(torch.empty(0, k, dtype=torch.float64), torch.empty(0, k, dtype=torch.long))
    return Neighbours(torch.cat(similarity), torch.cat(indices))


def _lengths(x: Tensor) -> Tensor:
    """Euclidean lengths in float64, at least 1e-12."""
    if not len(x):
        return x.new_empty(0, dtype=torch.float64)
    # in pieces that stay in the cache: ten times faster than vector_norm(dtype=float64)
    return torch.cat([torch.linalg.vector_norm(part.double(), dim=1) for part in x.split(256)]).clamp_min(1e-12)


def _candidates(
    bank: Tensor, lengths: Tensor, queries: Tensor, wanted: int, own: Groups | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The ``wanted`` nearest in float32, by falling similarity; those of a query's own group are at −∞."""
    home = bank.device
    value = torch.full((len(queries), wanted), -torch.inf, device=home)
    index = torch.zeros(len(queries), wanted, dtype=torch.long, device=home)
    for start in range(0, len(bank), _TILE):
        tile = bank[start : start + _TILE].to(device).float()
        scale = (1 / lengths[start : start + _TILE]).float().to(device)
        for rows in torch.arange(len(queries)).split(_ROWS):
            part = F.normalize(queries[rows].to(device).float(), dim=1) @ tile.T
            part.mul_(scale)
            if own is not None:
                others = own.bank[start : start + _TILE].to(device)
                part.masked_fill_(own.queries[rows].to(device)[:, None] == others, -torch.inf)
            best, place = part.topk(min(wanted, part.shape[1]), dim=1)
            best, place = best.to(home), place.to(home) + start
            if start:
                best, place = torch.cat([value[rows], best], dim=1), torch.cat([index[rows], place], dim=1)
                best, order = best.topk(wanted, dim=1)
                place = place.gather(1, order)
            value[rows, : best.shape[1]], index[rows, : best.shape[1]] = best, place
    return value, index


class _Scorer:
    """Candidates of some queries in float64 and in their exact order; its buffers are used again and again."""

    def __init__(self, bank: Tensor, lengths: Tensor, wanted: int) -> None:
        self.bank, self.lengths = bank, lengths
        shape = (_SCORED * wanted, bank.shape[1])
        self._rows, self._wide = bank.new_empty(shape), bank.new_empty(shape, dtype=torch.float64)

    def __call__(self, queries: Tensor, index: Tensor, own: Groups | None) -> tuple[Tensor, Tensor]:
        flat = index.flatten()
        rows = torch.index_select(self.bank, 0, flat, out=self._rows[: len(flat)])
        wide = self._wide[: len(flat)].copy_(rows).view(*index.shape, -1)
        similarity = torch.bmm(wide, _unit(queries)[:, :, None]).squeeze(2) / self.lengths[index]
        return _sorted(similarity, index, own)


def _unit(x: Tensor) -> Tensor:
    return x.double() / _lengths(x)[:, None]


def _sorted(similarity: Tensor, index: Tensor, own: Groups | None) -> tuple[Tensor, Tensor]:
    similarity = (similarity * _GRID).round() / _GRID
    if own is not None:
        similarity = similarity.masked_fill(own.bank[index] == own.queries[:, None], -torch.inf)
    index, order = index.sort(dim=1)
    similarity, by = similarity.gather(1, order).sort(dim=1, descending=True, stable=True)
    return similarity, index.gather(1, by)


def _scored_all(bank: Tensor, lengths: Tensor, queries: Tensor, k: int, own: Groups | None) -> tuple[Tensor, Tensor]:
    """The whole bank in float64: for queries with more equals than candidates."""
    asked = _unit(queries)
    best: tuple[Tensor, Tensor] | None = None
    for start in range(0, len(bank), _TILE // 8):
        part = asked @ bank[start : start + _TILE // 8].double().T / lengths[start : start + _TILE // 8]
        number = torch.arange(start, start + part.shape[1], device=bank.device).expand_as(part)
        if best is not None:
            part, number = torch.cat([best[0], part], dim=1), torch.cat([best[1], number], dim=1)
        similarity, index = _sorted(part, number, own)
        best = similarity[:, :k], index[:, :k]
    assert best is not None
    return best


def vote(
    neighbours: Neighbours,
    bank_labels: Int[Tensor, "bank"],
    ks: Sequence[int],
    temperatures: Sequence[float],
    *,
    classes: int,
) -> dict[tuple[int, float], Int[Tensor, "queries"]]:
    """Classes by weighted vote of the first k neighbours, weights exp(similarity / temperature), for all at once.

    Wu et al. 2018 (§3.4); DINO (Caron et al. 2021) has the same. Equal votes: the lower class.
    """
    predicted: dict[tuple[int, float], list[Tensor]] = {(k, t): [] for k in ks for t in temperatures}
    for similarity, index in zip(neighbours.similarity.split(1024), neighbours.index.split(1024), strict=True):
        labels = bank_labels[index].long()
        for t in temperatures:
            # weights relative to the nearest: the vote is the same, and small temperatures cannot overflow
            weights = ((similarity - similarity[:, :1]) / t).exp()
            votes = torch.zeros(len(labels), classes, dtype=weights.dtype, device=weights.device)
            taken = 0
            for k in sorted(set(ks)):
                votes.scatter_add_(1, labels[:, taken:k], weights[:, taken:k])
                predicted[k, t].append(votes.argmax(1))
                taken = k
    return {key: torch.cat(parts) if parts else torch.empty(0, dtype=torch.long) for key, parts in predicted.items()}


def shares(
    neighbours: Neighbours, bank_truth: Int[Tensor, "bank columns"], k: int, temperature: float
) -> Float[Tensor, "queries columns"]:
    """Share of the weighted vote for each column among the first k neighbours: what ``vote`` takes the highest of.

    Of findings (1, 0, or −1 where it is not known) those neighbours vote of which the finding is known; where there is
    none, the share is that of the whole bank.
    """
    known = bank_truth >= 0
    whole = (bank_truth.clamp(min=0).sum(0).double() / known.sum(0).clamp(min=1))[None]
    parts = []
    rows = max(1, _SHARED // max(k * bank_truth.shape[1], 1))
    for similarity, index in zip(neighbours.similarity.split(rows), neighbours.index.split(rows), strict=True):
        weights = ((similarity[:, :k] - similarity[:, :1]) / temperature).exp()[:, :, None]
        voters = weights * known[index[:, :k]]
        total = voters.sum(1)
        for_it = (voters * bank_truth[index[:, :k]].clamp(min=0)).sum(1)
        parts.append(torch.where(total > 0, for_it / total.clamp(min=1e-300), whole))
    return torch.cat(parts) if parts else whole[:0]


def recalled(
    neighbours: Neighbours, bank_labels: Int[Tensor, "bank"], labels: Int[Tensor, "queries"], ks: Sequence[int]
) -> list[int]:
    """How many queries have one of their own class among the first k neighbours, for every k (recall@k)."""
    same = bank_labels[neighbours.index] == labels[:, None].to(bank_labels.dtype)
    return [int(same[:, :k].any(1).sum()) for k in ks]


def nearest_others(
    features: Float[Tensor, "images dim"], groups: np.ndarray | None, k: int = K, device: torch.device | None = None
) -> tuple[Neighbours, int]:
    """The nearest of every image among the others, its own group left out, and how many: k, or all that there are.

    ``device`` is where they are searched for.

    Raises:
        UserError: if all images are of one group.
    """
    own = Groups.among(groups, len(features))
    if not own.available:
        raise UserError(f"all {len(features)} labelled images are of one group, so none can be judged by others")
    k = min(k, own.available)
    return nearest(features, features, k, groups=own, device=device), k


def right_among(
    features: Float[Tensor, "images dim"],
    labels: Int[Tensor, "images"],
    groups: np.ndarray | None = None,
    device: torch.device | None = None,
) -> Bool[Tensor, "images"]:
    """Whether each image has the class that its nearest others vote for, others of its group left out with it.

    ``device`` is where they are searched for.

    Raises:
        UserError: if all images are of one group.
    """
    neighbours, k = nearest_others(features, groups, device=device)
    return vote(neighbours, labels, [k], [TEMPERATURE], classes=int(labels.max()) + 1)[k, TEMPERATURE] == labels


def shared_neighbours(
    first: Float[Tensor, "images dim"],
    second: Float[Tensor, "images other"],
    k: int = K,
    *,
    groups: np.ndarray | None = None,
    device: torch.device | None = None,
) -> float:
    """Share in % of every image's k nearest others by the first features that are so by the second too; NaN where
    features are not finite. k is at most a quarter of the others, since all others would always be the same. Images of
    an image's own group are no others. ``device`` is where they are searched for.
    """
    if not bool(torch.isfinite(first).all() & torch.isfinite(second).all()):
        return float("nan")
    own = Groups.among(groups, len(first))
    if not own.available:
        return float("nan")
    k = min(k, max(own.available // 4, 1))
    one, two = (nearest(x, x, k, groups=own, device=device).index for x in (first, second))
    return 100 * float((one[:, :, None] == two[:, None, :]).any(2).double().mean())


def knn_predict(
    bank: Float[Tensor, "bank dim"],
    bank_labels: Int[Tensor, "bank"],
    queries: Float[Tensor, "queries dim"],
    *,
    k: int = K,
    temperature: float = TEMPERATURE,
    groups: Groups | None = None,
    device: torch.device | None = None,
) -> Int[Tensor, "queries"]:
    """Classes by weighted vote of the k nearest, see ``nearest`` and ``vote``."""
    neighbours = nearest(bank, queries, k, groups=groups, device=device)
    return vote(neighbours, bank_labels, [k], [temperature], classes=int(bank_labels.max()) + 1)[k, temperature]


def knn_accuracy(
    bank: Float[Tensor, "bank dim"],
    bank_labels: Int[Tensor, "bank"],
    queries: Float[Tensor, "queries dim"],
    labels: Int[Tensor, "queries"],
    *,
    k: int = K,
    temperature: float = TEMPERATURE,
) -> float:
    """Accuracy in % of ``knn_predict``; k is at most the size of the bank."""
    k = min(k, len(bank))
    predicted = knn_predict(bank, bank_labels, queries, k=k, temperature=temperature)
    return 100 * int((predicted == labels).sum()) / len(labels)


def centroid_predict(
    labelled: Float[Tensor, "labelled dim"],
    labels: Int[Tensor, "labelled"],
    queries: Float[Tensor, "queries dim"],
    *,
    centre: Float[Tensor, "dim"],
) -> Int[Tensor, "queries"]:
    """Classes by the nearest class mean, by cosine after ``centre`` is subtracted."""
    labelled = F.normalize(labelled - centre, dim=1)
    classes = int(labels.max()) + 1
    sums = torch.zeros(classes, labelled.shape[1], dtype=labelled.dtype).index_add_(0, labels.long(), labelled)
    return (F.normalize(queries - centre, dim=1) @ F.normalize(sums, dim=1).T).argmax(1)
