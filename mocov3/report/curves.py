"""Curves of a run as numbers: thinned without losing a peak, smoothed, spikes and dips found. numpy alone."""

import warnings

import numpy as np
from jaxtyping import Bool, Float, Int

BUCKETS = 1000
"""Curves of more than twice so many points keep the lowest and the highest point of each of so many stretches."""
SPIKE = 3.0
"""A gradient norm so many times the medians before and after it is a spike."""
WINDOW = 25
"""Lines before, and lines after, that these medians are of."""
DIP = 1.0
"""A k-NN accuracy so many points below the best so far, and below the next, is a dip."""
_SMOOTH = 20  # parts of the run that the smoothed curve averages over


def thin(
    x: Float[np.ndarray, "points"], y: Float[np.ndarray, "points"], buckets: int = BUCKETS
) -> Int[np.ndarray, "kept"]:
    """Which points to draw, increasing: all up to ``2 · buckets``; else the first, the last, and the lowest and highest
    of each stretch of equally many points. Points without a value are left out.
    """
    there = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    if len(there) <= 2 * buckets:
        return there
    parts = np.array_split(there, buckets)
    ends = [part[f(y[part])] for part in parts for f in (np.argmin, np.argmax)]
    return np.unique(np.array([there[0], there[-1], *ends]))


def smooth(y: Float[np.ndarray, "points"]) -> Float[np.ndarray, "points"]:
    """Mean over a centred window of a twentieth of the run, at least 5 points; narrower at both ends."""
    half = max(len(y) // _SMOOTH // 2, 2)
    sums = np.concatenate([[0.0], np.cumsum(np.nan_to_num(y))])
    counts = np.concatenate([[0.0], np.cumsum(np.isfinite(y))])
    at = np.arange(len(y))
    reach = np.minimum(np.minimum(at, len(y) - 1 - at), half)
    low, high = at - reach, at + reach + 1
    with np.errstate(invalid="ignore", divide="ignore"):
        return (sums[high] - sums[low]) / (counts[high] - counts[low])


def surroundings(y: Float[np.ndarray, "points"]) -> Float[np.ndarray, "points"]:
    """The larger of two medians: of the ``WINDOW`` values before and of those after each.

    So neither a curve that falls from its start nor a step to another level stands out. NaN for the first three, which
    nothing precedes.
    """
    gap = np.full(WINDOW, np.nan)
    padded = np.concatenate([gap, y, gap])
    before, after = padded[: len(y) + WINDOW - 1], padded[WINDOW + 1 :]
    higher = np.fmax(_medians(before, len(y)), _medians(after, len(y)))
    higher[:3] = np.nan
    return higher


def _medians(padded: np.ndarray, n: int) -> np.ndarray:
    if not n:
        return np.empty(0)
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[:n]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # windows without a value
        gaps = np.isnan(windows).any(axis=1)
        medians = np.empty(n)
        medians[~gaps] = np.median(windows[~gaps], axis=1)  # many times as fast as nanmedian
        medians[gaps] = np.nanmedian(windows[gaps], axis=1)
        return medians


def spikes(y: Float[np.ndarray, "points"], factor: float = SPIKE) -> Bool[np.ndarray, "points"]:
    """Where a value is more than ``factor`` times the medians before and after it."""
    with np.errstate(invalid="ignore"):
        return y > factor * surroundings(y)


def dips(knn: Float[np.ndarray, "evaluations"]) -> Int[np.ndarray, "dips"]:
    """Evaluations that are ``DIP`` points below the best before and recover by as much until the end (paper, fig.
    4)."""
    if len(knn) < 3:
        return np.empty(0, int)
    before = np.maximum.accumulate(knn)[:-2]
    after = np.maximum.accumulate(knn[::-1])[::-1][2:]
    return np.flatnonzero((before - knn[1:-1] >= DIP) & (after - knn[1:-1] >= DIP)) + 1
