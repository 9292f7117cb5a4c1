"""Slides and maps as TIFF, in every layout: tissue on glass, by tifffile, with segments that others compressed."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import tifffile
from PIL import Image

SIDE = 64
"""Of a tile of these files."""


def tissue(width: int = 700, height: int = 500, seed: int = 0) -> np.ndarray:
    """uint8 RGB: glass, and a coloured disc of fine structure left of the middle."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    inside = (columns - width * 0.35) ** 2 + (rows - height * 0.5) ** 2 < (0.36 * height) ** 2
    coarse = rng.integers(0, 90, (height // 5 + 1, width // 5 + 1, 3)).astype(np.uint8)
    structure = np.asarray(Image.fromarray(coarse).resize((width, height)))
    glass = 236 + rng.integers(0, 4, (height, width, 1))
    stained = np.array([150, 40, 120]) + structure
    return np.where(inside[..., None], stained, np.repeat(glass, 3, 2)).clip(0, 255).astype(np.uint8)


def _tiles(image: np.ndarray, encode: Callable[[np.ndarray], bytes]) -> Iterator[bytes]:
    for y in range(0, image.shape[0], SIDE):
        for x in range(0, image.shape[1], SIDE):
            tile = np.zeros((SIDE, SIDE, image.shape[2]), np.uint8)
            part = image[y : y + SIDE, x : x + SIDE]
            tile[: part.shape[0], : part.shape[1]] = part
            yield encode(tile)


def _lzw(tile: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(tile).save(file, "TIFF", compression="tiff_lzw")
    file.seek(0)
    with tifffile.TiffFile(file) as tiff:
        page = tiff.pages[0]
        assert len(page.dataoffsets) == 1
        place = page.dataoffsets[0]
        return file.getvalue()[place : place + page.databytecounts[0]]


def pyramid(path: Path, image: np.ndarray, kind: str = "deflate", levels: int = 3, **first: Any) -> Path:
    """A tiled pyramid of halved levels, ``kind`` of compression ``deflate``, ``jpeg`` or ``lzw``."""
    tag, photometric, encode = {
        "deflate": (None, None, None),
        "jpeg": (7, 6, lambda tile: simplejpeg.encode_jpeg(tile, 90, "RGB", "420")),
        "lzw": (5, 2, _lzw),
    }[kind]
    with tifffile.TiffWriter(path) as writer:
        for level in range(levels):
            part = np.ascontiguousarray(image[:: 1 << level, :: 1 << level])
            options: dict[str, Any] = {"tile": (SIDE, SIDE), "compression": "deflate", "photometric": "rgb"}
            options |= first if level == 0 else {"subfiletype": 1}
            if encode is None:
                writer.write(part, **options)
            else:
                more = [(530, 3, 2, (2, 2), True)] if kind == "jpeg" else []
                shape = {"shape": part.shape, "dtype": np.uint8, "extratags": more}
                writer.write(_tiles(part, encode), **options, **shape)
    if tag:  # tifffile alone compresses by deflate only: it wrote the segments as they were given
        with tifffile.TiffFile(path, mode="r+b") as file:
            for page in file.pages:
                page.tags["Compression"].overwrite(tag)
                page.tags["PhotometricInterpretation"].overwrite(photometric)
    return path


HALF_MICRON = {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}
