"""How long reading an image and making its views takes, as a mean over images of all sizes of file.

A few samples miss the giants: nine of 8,000 files can take half of an epoch. Files are divided by size, halves of what
is left each time, so that the largest are looked at however few they are.
"""

import time
from collections.abc import Callable

import numpy as np

from mocov3.config import PretrainConfig
from mocov3.data import Source, TwoViews
from mocov3.data.sources.opening import file_bytes
from mocov3.data.sources.survey import scattered
from mocov3.data.views.decode import DecodeError
from mocov3.pretraining.inputs import copies_of

_ASKED = 20_000
"""Files whose size is asked for."""
_OF_EACH = 4
"""Images of a part that are read."""
_LONGEST = 4.0
"""Seconds after which larger files are judged by those before them."""
_EPOCHS = 10
"""Epochs over which what happens once, making smaller copies, is spread."""

Timer = Callable[[int], tuple[float, float] | None]
"""Index of an image → seconds it takes the first time and later; ``None`` where it cannot be read."""


def image_seconds(config: PretrainConfig, source: Source) -> float:
    """Seconds that one process takes to read an image and make its views, in the mean over all."""
    views = TwoViews(
        config.image_size, config.crop_min, config.preset, config.views, local=config.local, copies=copies_of(config, 1)
    )

    def timed(index: int) -> tuple[float, float] | None:
        try:
            first = _seconds(lambda: views(source.read(index), seed=0, epoch=0, index=index))
            if views.copy_factor(source.read(index)) == 1:
                return first, first  # files that do not fit the memory are read anew
            return first, _seconds(lambda: views(source.read(index), seed=0, epoch=1, index=index))
        except (DecodeError, OSError):
            return None

    timed(0)  # the first one also loads what decoding needs
    indices = scattered(len(source), _ASKED)
    sizes = np.array([_size(source, i) for i in indices.tolist()])
    return mean_seconds(sizes, lambda place: timed(int(indices[place])))


def mean_seconds(sizes: np.ndarray, timed: Timer, longest: float = _LONGEST) -> float:
    """Mean over files of (later seconds + a share of what the first time takes more).

    Args:
        sizes: of the files in bytes; all 0 where they are not known.
        timed: times the file at a place of ``sizes``.
        longest: seconds after which no more files are timed.
    """
    total, spent, a_byte = 0.0, 0.0, 0.0
    for part in parts_by_size(sizes):
        cost = None
        if spent < longest:
            cost, took = _part_seconds(part, timed, longest - spent)
            spent += took
        mean_size = float(sizes[part].mean())
        if cost is None:  # not timed, or unreadable: as the files before, by their size
            cost = a_byte * mean_size
        a_byte = cost / mean_size if mean_size else 0.0
        total += cost * len(part)
    return total / max(len(sizes), 1)


def parts_by_size(sizes: np.ndarray) -> list[np.ndarray]:
    """Places of files by size: the smaller half, half of the rest, and so on to the largest; one part where all are
    alike."""
    order = np.argsort(sizes, kind="stable")
    if not len(order) or sizes[order[0]] == sizes[order[-1]]:
        return [order] if len(order) else []
    parts = []
    while len(order):
        count = max(len(order) // 2, 1)
        parts.append(order[:count])
        order = order[count:]
    return parts


def _part_seconds(part: np.ndarray, timed: Timer, left: float) -> tuple[float | None, float]:
    """Mean cost of a part by a few of its files, ``None`` where none can be read, and the seconds that took."""
    # where sizes tell nothing there is one part only, of which more are read
    chosen = part[scattered(len(part), 8 * _OF_EACH if len(part) > 8 * _OF_EACH else _OF_EACH)]
    costs: list[float] = []
    spent = 0.0
    for place in chosen.tolist():
        if spent > left:
            break
        if (seconds := timed(place)) is not None:
            first, later = seconds
            spent += first + later
            costs.append(later + (first - later) / _EPOCHS)
    return (float(np.mean(costs)) if costs else None), spent


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _size(source: Source, index: int) -> int:
    try:
        return file_bytes(source, index)
    except OSError:
        return 0
