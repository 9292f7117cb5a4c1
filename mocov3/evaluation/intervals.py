"""How certain a fraction is, and how strongly two measures correlate."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

DRAWS = 2000
"""Resamplings of the bootstrap."""
_SEED = 0


def interval(hits: int, n: int) -> tuple[float, float]:
    """95 % interval in % of a share of ``hits`` in ``n`` (Wilson 1927)."""
    z = 1.959964
    centre = (hits + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(hits * (n - hits) / n + z * z / 4)
    return max(100 * (centre - half), 0.0), min(100 * (centre + half), 100.0)


def resamplings(groups: np.ndarray, draws: int = DRAWS) -> Iterator[np.ndarray]:
    """How often each image counts in resamplings of whole groups with replacement (the cluster bootstrap, Field & Welsh
    2007), by fixed draws: int64, (images,).
    """
    _, place = np.unique(groups, return_inverse=True)
    count = int(place.max()) + 1
    generator = np.random.default_rng(_SEED)
    for _ in range(draws):
        yield np.bincount(generator.integers(count, size=count), minlength=count)[place]


def mean_by_groups(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Means of ``values`` (images,) over resamplings of whole groups, (draws,)."""
    _, place = np.unique(groups, return_inverse=True)
    sums, sizes = np.bincount(place, values), np.bincount(place)
    generator = np.random.default_rng(_SEED)
    chosen = (generator.integers(len(sums), size=len(sums)) for _ in range(DRAWS))
    return np.array([sums[rows].sum() / sizes[rows].sum() for rows in chosen])


def interval_of(right: np.ndarray, groups: np.ndarray | None) -> tuple[float, float]:
    """95 % interval in % of the share of answers that are right: ``interval``, or with groups the cluster bootstrap.

    Where all are right or all wrong, which no resampling changes, it is ``interval`` of as many images as groups.
    """
    hits, n = int(right.sum()), len(right)
    if groups is None:
        return interval(hits, n)
    if hits in (0, n):
        count = len(np.unique(groups))
        return interval(count if hits else 0, count)
    low, high = np.percentile(100 * mean_by_groups(right.astype(float), groups), [2.5, 97.5]).tolist()
    return low, high


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's: the correlation of ranks, ties sharing their mean rank."""
    ranks = []
    for values in (np.asarray(x, float), np.asarray(y, float)):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        mean_rank = np.cumsum(counts) - (counts - 1) / 2
        ranks.append(mean_rank[inverse])
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])
