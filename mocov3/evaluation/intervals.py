"""How certain a fraction is, and how strongly two measures correlate."""

import math
from collections.abc import Sequence

import numpy as np


def interval(hits: int, n: int) -> tuple[float, float]:
    """95 % interval in % of a share of ``hits`` in ``n`` (Wilson 1927)."""
    z = 1.959964
    centre = (hits + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(hits * (n - hits) / n + z * z / 4)
    return max(100 * (centre - half), 0.0), min(100 * (centre + half), 100.0)


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's: the correlation of ranks, ties sharing their mean rank."""
    ranks = []
    for values in (np.asarray(x, float), np.asarray(y, float)):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        mean_rank = np.cumsum(counts) - (counts - 1) / 2
        ranks.append(mean_rank[inverse])
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])
