"""The compiled kernel of the views (``views.c``), where it was built; set MOCOV3_NATIVE=0 to disable it.

It is a plain library, not a Python module: found beside this file and called by ctypes, which releases the
interpreter's lock meanwhile. Nothing outside the given arrays is read or written: bounds are checked here.
"""

import ctypes
import functools
import os
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

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
                library.mocov3_view.argtypes = [array, length, number, number, array, array, number, array, array]
                library.mocov3_centre.argtypes = [array, length, *[number] * 6, array, number, number]
            except (OSError, AttributeError):  # of another machine, or of another version
                continue
            return library
    return None


_What = ctypes.c_int * 8
_How = ctypes.c_double * 5
_Box = ctypes.c_double * 4


def takes(factors: tuple[float, float, float], blur: float) -> bool:
    """Whether the kernel's arithmetic covers these jitter factors and this blur (it does for every usual preset)."""
    return max(factors) < 3.99 and min(factors) >= 0 and blur < _MOST_BLUR


def view(
    pixels: np.ndarray,
    box: tuple[float, float, float, float],
    out: np.ndarray,
    *,
    flip: bool,
    jitter: tuple[tuple[int, int, int, int], float, float, float, float] | None,
    gray: bool,
    blur: float,
    solarize: bool,
) -> None:
    """Write one view of ``pixels`` to ``out``.

    Args:
        pixels: uint8 (height, width, 3), whose pixels lie side by side; rows may be apart.
        box: top, left, height, width of the crop, in pixels; fractions are allowed.
        out: uint8 (size, size, 3), contiguous.
        flip: mirror left and right.
        jitter: order and factors, as in ``Draw``.
        gray: make grey.
        blur: standard deviation in pixels of the view; 0 for none.
        solarize: invert values from 128 on.

    Raises:
        ValueError: if an array is not as described or the box lies outside.
        MemoryError: if there is none.
    """
    size = out.shape[0]
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.strides[1:] != (3, 1):
        raise ValueError("pixels must be uint8 (height, width, 3), side by side")
    if out.dtype != np.uint8 or out.shape != (size, size, 3) or not out.flags.c_contiguous or not out.flags.writeable:
        raise ValueError("out must be uint8 (size, size, 3), contiguous and writable")
    top, left, height, width = box
    first, begin = int(top), int(left)
    last, end = -int(-(top + height) // 1), -int(-(left + width) // 1)
    if not (0 <= first < last <= pixels.shape[0] and 0 <= begin < end <= pixels.shape[1] and 0 < size <= _LARGEST_SIDE):
        raise ValueError(f"box {box} does not lie in {pixels.shape[1]}×{pixels.shape[0]} pixels")
    order, *factors = jitter or ((0, 1, 2, 3), 1.0, 1.0, 1.0, 0.0)
    stride = pixels.strides[0]
    failed = _load().mocov3_view(
        pixels.__array_interface__["data"][0] + first * stride + 3 * begin,
        stride,
        last - first,
        end - begin,
        _Box(top - first, left - begin, height, width),
        out.__array_interface__["data"][0],
        size,
        _What(flip, jitter is not None, gray, solarize, *order),
        _How(*factors, blur),
    )
    if failed:
        raise MemoryError("no memory for a view")


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
