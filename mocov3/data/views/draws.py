"""Random choices as data: order, crops and colour factors are functions of (seed, epoch, sample, view) alone.

Nothing here depends on workers, ranks or what was drawn before, so any run can be resumed at any step. Drawing is
apart from applying: ``mocov3.data.views.two_views`` turns a ``Draw`` into pixels.
"""

import ctypes
import functools
import math
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mocov3.config.presets import ViewPreset
from mocov3.data.views import native

_ORDER, _VIEW, _REPLACEMENT, _TOKENS = (0, 1, 2, 4)  # separate streams of one seed
"""Views add twice their number: the two views also use 3 and 6, local ones 5, 7, …"""
_TRIES = 10
_of_thread = threading.local()
_BLOCK = 2 * _TRIES + 18  # uniform numbers a view; a fixed number keeps every choice at its own place


class Draw(NamedTuple):
    """What happens to one view of one image, in this order: crop, jitter, grey, blur, solarise, flips, turn."""

    top: int
    left: int
    height: int
    width: int
    """The crop, in pixels of the (padded) image."""
    jitter: tuple[tuple[int, int, int, int], float, float, float, float] | None
    """Order (0 brightness, 1 contrast, 2 saturation, 3 hue) and the four factors."""
    gray: bool
    blur_sigma: float | None
    solarize: bool
    flip: bool
    flip_vertical: bool = False
    turns: int = 0
    """Quarter turns, counter-clockwise."""


COLOUR_DRAWS = 12
"""Numbers that ``colour_draw`` gives."""


def colour_draw(choice: Draw) -> list[float]:
    """All but the geometry of a draw, as numbers: jitter (0 or 1), its order, its factors, grey, sigma, solarise."""
    order, *factors = choice.jitter or ((0, 1, 2, 3), 1.0, 1.0, 1.0, 0.0)
    return [choice.jitter is not None, *order, *factors, choice.gray, choice.blur_sigma or 0.0, choice.solarize]


def without_colour(choice: Draw) -> Draw:
    """The geometry of a draw alone."""
    return choice._replace(jitter=None, gray=False, blur_sigma=None, solarize=False)


def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of ``n`` images in an epoch, as int64. From raw bits, so that it never changes with numpy."""
    bits = np.random.Philox(key=[seed, _ORDER], counter=[0, 0, 0, epoch])
    return np.argsort(bits.random_raw(n), kind="stable")


def replacement(seed: int, epoch: int, index: int, attempt: int, n: int) -> int:
    """The image used instead of the unreadable image ``index`` at the given attempt."""
    bits = np.random.Philox(key=[seed, _REPLACEMENT], counter=[0, attempt, index, epoch])
    return int(bits.random_raw() % n)


def kept_tokens(tokens: int, keep: int, *, seed: int, epoch: int, indices: np.ndarray, view: int) -> np.ndarray:
    """Which ``keep`` of a view's ``tokens`` are kept of each image, as int64 (images, keep), ascending."""
    bits = [_philox(seed, _TOKENS + 2 * view, int(index), epoch).random_raw(tokens) for index in indices]
    order = np.argsort(np.array(bits, dtype=np.uint64).reshape(len(indices), tokens), axis=1, kind="stable")
    return np.sort(order[:, :keep], axis=1)


def pad_pixels(preset: ViewPreset, width: int, height: int) -> int:
    """Width in pixels of the border that the preset adds on each side."""
    return round(preset.pad * min(width, height))


def draw(
    preset: ViewPreset,
    crop_min: float,
    width: int,
    height: int,
    *,
    seed: int,
    epoch: int,
    index: int,
    view: int,
    crop_max: float = 1.0,
) -> Draw:
    """The draw of one view of image ``index``, whose size before padding is width × height pixels.

    Views 0 and 1 are the two views, those from 2 on local; colours of these are as of view 1 and view 2 in turn.
    Crops have from ``crop_min`` to ``crop_max`` of the image's area.
    """
    bits = _philox(seed, _VIEW + 2 * view, index, epoch)
    # 53 bits each, as numpy's own random(), written out because only raw bits are promised not to change
    u = ((bits.random_raw(_BLOCK) >> np.uint64(11)) * 2.0**-53).tolist()
    pad = 2 * pad_pixels(preset, width, height)
    top, left, h, w = _crop(u, preset, (crop_min, crop_max), width + pad, height + pad)
    c = u[2 * _TRIES + 2 :]
    jitter = None
    if c[0] < preset.jitter_probability:
        ranks = sorted(range(4), key=lambda i: c[1 + i])
        jitter = (
            (ranks[0], ranks[1], ranks[2], ranks[3]),
            _uniform(c[5], max(0.0, 1 - preset.brightness), 1 + preset.brightness),
            _uniform(c[6], max(0.0, 1 - preset.contrast), 1 + preset.contrast),
            _uniform(c[7], max(0.0, 1 - preset.saturation), 1 + preset.saturation),
            _uniform(c[8], -preset.hue, preset.hue),
        )
    return Draw(
        top,
        left,
        h,
        w,
        jitter,
        gray=c[9] < preset.gray_probability,
        blur_sigma=_uniform(c[11], *preset.blur_sigma) if c[10] < preset.blur_probability[view % 2] else None,
        solarize=c[12] < preset.solarize_probability[view % 2],
        flip=c[13] < preset.flip_probability,
        flip_vertical=c[14] < preset.vertical_flip_probability,
        turns=1 + int(3 * c[15] / preset.turn_probability) if c[15] < preset.turn_probability else 0,
    )


def draw_all(
    preset: ViewPreset,
    crops: Sequence[tuple[float, float]],
    width: int,
    height: int,
    *,
    seed: int,
    epoch: int,
    index: int,
) -> list[Draw]:
    """The draws of all views of an image, as ``draw`` gives them; by the compiled kernel, where it was built.

    Args:
        preset: strengths and chances.
        crops: for each view the smallest and largest share of the image's area.
        width: of the image before padding.
        height: likewise.
        seed: of the run.
        epoch: of the run.
        index: of the image.
    """
    where = {"seed": seed, "epoch": epoch, "index": index}
    if not native.available():
        return [
            draw(preset, low, width, height, view=view, crop_max=most, **where)
            for view, (low, most) in enumerate(crops)
        ]
    pad = 2 * pad_pixels(preset, width, height)
    numbers = native.draws(_settings(preset, tuple(crops)), width + pad, height + pad, **where)
    return [_from_numbers(numbers[at : at + native.DRAW]) for at in range(0, len(numbers), native.DRAW)]


@functools.lru_cache(16)
def _settings(preset: ViewPreset, crops: tuple[tuple[float, float], ...]) -> Any:
    """What the kernel draws from."""
    numbers: list[float] = []
    for view, crop in enumerate(crops):
        numbers += (_VIEW + 2 * view, *crop, *preset.ratio, *map(math.log, preset.ratio), preset.jitter_probability)
        for strength in (preset.brightness, preset.contrast, preset.saturation):
            numbers += (max(0.0, 1 - strength), 1 + strength)
        numbers += (-preset.hue, preset.hue, preset.gray_probability)
        numbers += (preset.blur_probability[view % 2], preset.solarize_probability[view % 2], preset.flip_probability)
        numbers += (preset.vertical_flip_probability, preset.turn_probability, *preset.blur_sigma)
    assert len(numbers) == native.SETTINGS * len(crops)
    return (ctypes.c_double * len(numbers))(*numbers)


def _from_numbers(numbers: Sequence[float]) -> Draw:
    top, left, height, width, jitter, a, b, c, d, *factors, gray, blur, solarize, flip, upside_down, turns = numbers
    order = (int(a), int(b), int(c), int(d))
    return Draw(
        int(top),
        int(left),
        int(height),
        int(width),
        (order, factors[0], factors[1], factors[2], factors[3]) if jitter else None,
        gray != 0,
        None if blur < 0 else blur,
        solarize != 0,
        flip != 0,
        upside_down != 0,
        int(turns),
    )


def _philox(seed: int, stream: int, index: int, epoch: int) -> np.random.Philox:
    # np.random.Philox(key=[seed, stream], counter=[0, 0, index, epoch]) at a fifth of its cost: one a thread, reset
    bits: np.random.Philox
    try:
        bits, state = _of_thread.philox
    except AttributeError:
        bits = np.random.Philox(key=[0, 0])
        state = bits.state
        _of_thread.philox = bits, state
    state["state"]["key"][:] = seed, stream
    state["state"]["counter"][2:] = index, epoch
    bits.state = state
    return bits


def _crop(
    u: list[float], preset: ViewPreset, shares: tuple[float, float], width: int, height: int
) -> tuple[int, int, int, int]:
    # ten tries, then the largest centred crop of an allowed ratio: the rejection makes small crops likelier on
    # images that are not square, and is kept for that reason
    low, high = math.log(preset.ratio[0]), math.log(preset.ratio[1])
    place_top, place_left = u[2 * _TRIES], u[2 * _TRIES + 1]
    for i in range(_TRIES):
        area = width * height * _uniform(u[2 * i], *shares)
        ratio = math.exp(_uniform(u[2 * i + 1], low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(place_top * (height - h + 1)), int(place_left * (width - w + 1)), h, w
    ratio = width / height
    if ratio < preset.ratio[0]:
        w, h = width, min(round(width / preset.ratio[0]), height)
    elif ratio > preset.ratio[1]:
        w, h = min(round(height * preset.ratio[1]), width), height
    else:
        w, h = width, height
    h, w = max(h, 1), max(w, 1)
    return (height - h) // 2, (width - w) // 2, h, w


def _uniform(u: float, low: float, high: float) -> float:
    return low + (high - low) * u
