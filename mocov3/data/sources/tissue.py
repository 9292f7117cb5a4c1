"""Where the tiles of a slide lie: a grid at a resolution, without those that show mostly glass."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from mocov3.data.sources.slides import Slide
from mocov3.data.views.bands import Unfit

_CELLS = 8
"""Pixels of the thumbnail a side of a tile, as far as its bounds allow."""
_LEAST, _MOST = 256, 4096  # longer side of a thumbnail
_BLOCK = 1 << 12  # side of what is read at once for it
_SATURATION = 13
"""Of 255, from which on a pixel may be tissue: Otsu's threshold halves the noise of an empty slide, too."""
_UP = 0.9
"""A file's pixels may be larger than asked for by this factor: scanners of 0.5 µm say 0.5022."""


@dataclass(frozen=True)
class Grid:
    """How tiles are cut.

    Args:
        size: side of a tile as training gets it, in pixels.
        mpp: micrometres a pixel of it; 0: the pixels of the largest level.
        tissue: the share of a tile that must be tissue; 0: all tiles.
        file_mpp: micrometres a pixel of files that do not say it.
    """

    size: int = 224
    mpp: float = 0.0
    tissue: float = 0.5
    file_mpp: float = 0.0


@dataclass(frozen=True)
class Tile:
    """A square of a slide."""

    level: int
    x: int
    y: int
    """Its left upper corner, in pixels of the largest level."""
    read: int
    """Its side in pixels of its level."""
    tissue: float


def tiles_of(slide: Slide, grid: Grid) -> Iterator[Tile]:
    """The tiles of a slide, row by row; those at the right and lower edge that would not be whole are left out.

    Raises:
        Unfit: if its resolution is unknown or too low, it is smaller than a tile, or it cannot be read.
    """
    shrink = _shrink(slide, grid)
    width, height = slide.sizes[0]
    if min(width, height) < grid.size * shrink:
        seen = f"{int(width / shrink)}×{int(height / shrink)} pixels" + (f" at --mpp {grid.mpp:g}" if grid.mpp else "")
        raise Unfit(f"has {seen}: it is smaller than a tile of --size {grid.size}")
    level, scale = _level(slide, shrink)
    side, read = grid.size * shrink, max(round(grid.size * shrink / scale), 1)
    mask = _tissue(slide, side) if grid.tissue else None
    for row in range(int(height / side)):
        for column in range(int(width / side)):
            x, y = (min(round(n * side), int(length - scale * read)) for n, length in ((column, width), (row, height)))
            share = 1.0 if mask is None else _share(mask, (x / width, y / height, side / width, side / height))
            if share >= grid.tissue and min(x, y) >= 0:
                yield Tile(level, x, y, read, share)


def _shrink(slide: Slide, grid: Grid) -> float:
    """Pixels of the largest level for one of a tile, a side."""
    if not grid.mpp:
        return 1.0
    mpp = slide.mpp or grid.file_mpp
    if not mpp:
        raise Unfit("does not say how large its pixels are: give --file-mpp, or no --mpp")
    if grid.mpp < _UP * mpp:
        raise Unfit(f"has {mpp:g} µm a pixel, which is coarser than --mpp {grid.mpp:g}")
    return grid.mpp / mpp


def _level(slide: Slide, shrink: float) -> tuple[int, float]:
    """The smallest level that is not coarser than wanted, and how many times smaller it is."""
    scales = [slide.sizes[0][0] / width for width, _ in slide.sizes]
    fitting = [i for i, scale in enumerate(scales) if scale <= max(shrink, 1) * 1.01]
    best = max(fitting, key=lambda i: scales[i])
    return best, scales[best]


# --- tissue -----------------------------------------------------------------------------------------------------


def _tissue(slide: Slide, side: float) -> np.ndarray:
    """Sums over all pixels above and left of each of a thumbnail, 1 where there is tissue: what is coloured, by Otsu.

    Raises:
        Unfit: of a slide without colours.
    """
    channels = slide.read(0, 0, 0, 1, 1).shape[2]
    if channels != 3:
        raise Unfit(f"has {channels} channels, by which tissue is not told: give --tissue 0")
    small = thumbnail(slide, int(np.clip(_CELLS * max(slide.sizes[0]) / side, _LEAST, _MOST)))
    from skimage import filters

    otsu: Any = filters.threshold_otsu
    saturation = cv2.medianBlur(cv2.cvtColor(small, cv2.COLOR_RGB2HSV)[..., 1], 5)
    flat = saturation.min() == saturation.max()
    least = max(0 if flat else int(otsu(saturation)), _SATURATION)
    return cv2.integral((saturation > least).astype(np.uint8))


def _share(sums: np.ndarray, part: tuple[float, float, float, float]) -> float:
    """Of a part of the thumbnail, as shares of its sides: how much is tissue."""
    height, width = (n - 1 for n in sums.shape)
    x, y, w, h = part
    left, top = min(int(x * width), width - 1), min(int(y * height), height - 1)
    right, bottom = max(round((x + w) * width), left + 1), max(round((y + h) * height), top + 1)
    total = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
    share: float = int(total) / ((right - left) * (bottom - top))
    return share


def thumbnail(slide: Slide, longest: int) -> np.ndarray:
    """uint8 (height, width, channels) of the whole slide, its longer side at most ``longest`` pixels.

    It is read block by block from the smallest level that is large enough, so memory does not grow with the slide.
    """
    level = max((i for i, size in enumerate(slide.sizes) if max(size) >= longest), default=0)
    width, height = slide.sizes[level]
    factor = max(-(-max(width, height) // longest), 1)
    block = max(_BLOCK // factor, 1) * factor
    rows = []
    for y in range(0, height, block):
        tall = min(block, height - y)
        parts = []
        for x in range(0, width, block):
            wide = min(block, width - x)
            pixels = slide.read(level, x, y, wide, tall)
            size = max(wide // factor, 1), max(tall // factor, 1)
            small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
            parts.append(small if small.ndim == 3 else small[..., None])
        rows.append(np.concatenate(parts, 1))
    return np.concatenate(rows)
