"""The compiled kernel of views and draws (``views.c``), where it was built; set MOCOV3_NATIVE=0 to disable it.

It is a plain library, not a Python module: found beside this file and called by ctypes, which releases the
interpreter's lock meanwhile. Nothing outside the given arrays is read or written: bounds are checked here.
"""

import ctypes
import functools
import os
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_LARGEST_SIDE = 1 << 15
_MOST_BLUR = 60.0  # pixels; wider ones are left to OpenCV


@functools.cache
def available() -> bool:
    """Whether the kernel was built and may be used."""
    return _wanted() and _load() is not None


def remark() -> str:
    """What to tell the user about a kernel that is missing, or nothing."""
    if available() or not _wanted():
        return ""
    return "views are made by OpenCV, at about half the speed: the compiled kernel was not built (no C compiler?)"


def _wanted() -> bool:
    return os.environ.get("MOCOV3_NATIVE", "1") != "0"


@functools.cache
def _load(folder: str | None = None) -> Any:
    place = Path(folder) if folder else Path(__file__).parent
    array, number, length = ctypes.c_void_p, ctypes.c_int, ctypes.c_ssize_t
    for suffix in EXTENSION_SUFFIXES:
        file = place / f"_views{suffix}"
        if file.is_file():
            try:
                library = ctypes.CDLL(str(file))
                library.mocov3_views.argtypes = [array, length, number, number, number, array, array]
                library.mocov3_draws.argtypes = [ctypes.c_uint64] * 3 + [number, number, number, array, array]
                library.mocov3_centre.argtypes = [array, length, *[number] * 6, array, number, number]
            except (OSError, AttributeError):  # of another machine, or of another version
                continue
            return library
    return None


DRAW, SETTINGS = 19, 24
"""Numbers of a draw, and of what it is drawn from."""
_UNJITTERED = ((0, 1, 2, 3), 1.0, 1.0, 1.0, 0.0)


def takes(factors: tuple[float, float, float], blur: float) -> bool:
    """Whether the kernel's arithmetic covers these jitter factors and this blur (it does for every usual preset)."""
    return max(factors) < 3.99 and min(factors) >= 0 and blur < _MOST_BLUR


class View(NamedTuple):
    """What is cut out of an image, and done to it, for one view."""

    box: tuple[float, float, float, float]
    """Top, left, height, width of the crop, in pixels; fractions are allowed."""
    flip: bool
    """Mirror left and right."""
    jitter: tuple[tuple[int, int, int, int], float, float, float, float] | None
    """Order and factors, as in ``Draw``."""
    gray: bool
    blur: float
    """Standard deviation in pixels of the view; 0 for none."""
    solarize: bool
    """Invert values from 128 on."""


def views(pixels: np.ndarray, wanted: Sequence[View], out: Sequence[np.ndarray]) -> None:
    """Write views of ``pixels`` to ``out``.

    Args:
        pixels: uint8 (height, width, 3), whose pixels lie side by side; rows may be apart.
        wanted: the views.
        out: for each uint8 (size, size, 3), contiguous.

    Raises:
        ValueError: if an array is not as described or a box lies outside.
        MemoryError: if there is none.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.strides[1:] != (3, 1):
        raise ValueError("pixels must be uint8 (height, width, 3), side by side")
    numbers: list[float] = []
    places = []
    for (box, flip, jitter, gray, blur, solarize), place in zip(wanted, out, strict=True):
        size = place.shape[0]
        flags = place.flags
        if place.dtype != np.uint8 or place.shape != (size, size, 3) or not (flags.c_contiguous and flags.writeable):
            raise ValueError("out must be uint8 (size, size, 3), contiguous and writable")
        if not 0 < size <= _LARGEST_SIDE:
            raise ValueError(f"views have 1 to {_LARGEST_SIDE} pixels a side, not {size}")
        order, *factors = jitter or _UNJITTERED
        numbers += (size, *box, flip, jitter is not None, gray, solarize, *order, *factors, blur)
        places.append(place.__array_interface__["data"][0])
    height, width, _ = pixels.shape
    failed = _load().mocov3_views(
        pixels.__array_interface__["data"][0],
        pixels.strides[0],
        height,
        width,
        len(places),
        (ctypes.c_double * len(numbers))(*numbers),
        (ctypes.c_void_p * len(places))(*places),
    )
    if failed == 2:
        raise ValueError(f"a box of {[view.box for view in wanted]} does not lie in {width}×{height} pixels")
    if failed:
        raise MemoryError("no memory for a view")


def draws(settings: Any, width: int, height: int, *, seed: int, epoch: int, index: int) -> list[float]:
    """Numbers of the draws of all views of an image, as ``mocov3_draws`` in ``views.c`` describes them.

    Args:
        settings: an array of ctypes, ``SETTINGS`` numbers a view.
        width: of the image.
        height: likewise.
        seed: with epoch and index, where the numbers come from.
        epoch: see there.
        index: see there.
    """
    views = len(settings) // SETTINGS
    numbers = (ctypes.c_double * (DRAW * views))()
    _load().mocov3_draws(seed, index, epoch, width, height, views, settings, numbers)
    return list(numbers)


def centre(
    pixels: np.ndarray, resized: tuple[int, int], corner: tuple[int, int], size: int, *, cubic: bool = False
) -> np.ndarray:
    """The square at ``corner`` of ``pixels`` as Pillow resizes them, bit by bit, without making the rest.

    Args:
        pixels: uint8 (height, width, 3), whose pixels lie side by side; rows may be apart.
        resized: height and width that the whole image is resized to.
        corner: top and left of the square in that.
        size: its side.
        cubic: bicubic instead of bilinear, both widened where the image shrinks.

    Raises:
        ValueError: if an array is not as described or the square lies outside.
        MemoryError: if there is none.
    """
    (height, width), (tall, wide), (top, left) = pixels.shape[:2], resized, corner
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.strides[1:] != (3, 1):
        raise ValueError("pixels must be uint8 (height, width, 3), side by side")
    if not (0 <= top <= tall - size and 0 <= left <= wide - size and 0 < size <= _LARGEST_SIDE and min(pixels.shape)):
        raise ValueError(f"the square of {size} at {corner} does not lie in {resized}")
    out = np.empty((size, size, 3), np.uint8)
    source, stride = pixels.__array_interface__["data"][0], pixels.strides[0]
    to = out.__array_interface__["data"][0]
    if _load().mocov3_centre(source, stride, height, width, tall, wide, top, left, to, size, cubic):
        raise MemoryError("no memory for a view")
    return out
