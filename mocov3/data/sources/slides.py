"""Large images of which parts are read: slides of microscopes by OpenSlide, pyramids and maps in TIFF by tifffile.

OpenSlide (the extra ``slides``) reads the formats of scanners' makers; what is plain TIFF is read without it.
"""

import functools
import glob
import hashlib
import os
from collections import OrderedDict
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from mocov3.data.sources.pyramids import Pyramid, is_tiff
from mocov3.data.views.bands import Unfit
from mocov3.errors import UserError

ENDINGS = (
    *(".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".czi", ".dcm", ".tif", ".tiff", ".btf", ".svslide"),
)
"""Of files of a folder that are taken for slides."""
_OPEN = 8  # slides that a process holds
_ENDS = 1 << 16
_TILE_CACHE = 32 << 20  # bytes of OpenSlide's, for all slides of a process


@runtime_checkable
class Slide(Protocol):
    """An open file."""

    mpp: float
    """Micrometres a pixel of the largest level; 0 where the file does not say."""
    is_map: bool
    """Whether it is a map of the earth: no slide, and without tissue."""

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Width and height of every level, in pixels; the largest first."""

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """uint8 (height, width, channels) of a region, in pixels of its level."""

    def close(self) -> None:
        """Close the file."""


class _OfOpenSlide:
    def __init__(self, path: str) -> None:
        openslide = _openslide()
        try:
            self._slide = openslide.OpenSlide(path)
            self._slide.set_cache(_cache())
            said = self._slide.properties.get(openslide.PROPERTY_NAME_MPP_X)
            self.mpp, self.is_map = float(said or 0), False
        except (openslide.OpenSlideError, ValueError) as error:
            raise Unfit(f"cannot be read by OpenSlide ({error})") from None

    @property
    def sizes(self) -> list[tuple[int, int]]:
        return list(self._slide.level_dimensions)

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        scale = self._slide.level_downsamples[level]
        try:
            region = self._slide.read_region((round(x * scale), round(y * scale)), level, (width, height))
        except _openslide().OpenSlideError as error:
            raise Unfit(f"has damaged pixels ({error})") from None
        white = Image.new("RGB", region.size, "white")
        white.paste(region, mask=region.getchannel("A"))
        return np.asarray(white)

    def close(self) -> None:
        self._slide.close()


def _openslide() -> Any:
    import openslide

    return openslide


@functools.cache
def _cache() -> Any:
    return _openslide().OpenSlideCache(_TILE_CACHE)


@functools.cache
def _has_openslide() -> bool:
    try:
        _openslide()
    except (ImportError, OSError):  # the library that it loads may be missing
        return False
    return True


def open_slide(path: str, window: tuple[float, float] | None = None) -> Slide:
    """The slide in a file; ``window`` as for ``Pyramid``.

    Raises:
        Unfit: if it is none that can be read here.
        OSError: if the file cannot be read.
    """
    with open(path, "rb") as file:
        head = file.read(4)
    if _has_openslide() and (_openslide().OpenSlide.detect_format(path) or "generic-tiff") != "generic-tiff":
        return _OfOpenSlide(path)
    if is_tiff(head):
        return Pyramid(path, window)
    if not _has_openslide():
        raise Unfit("is no TIFF; slides of other formats need pip install 'mocov3[slides]'")
    raise Unfit("is no slide that OpenSlide knows, and no TIFF")


def digest(path: str) -> str:
    """Tells whether a slide is still the one that tiles were laid out on: by its size and both its ends."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        hashed = hashlib.blake2b(str(size).encode() + file.read(_ENDS), digest_size=8)
        file.seek(max(size - _ENDS, 0))
        hashed.update(file.read(_ENDS))
    return hashed.hexdigest()


def slides_in(names: list[str]) -> list[str]:
    """The files of slides that are named: files, globs, and folders, all of whose slides are meant.

    Raises:
        UserError: if one is missing or holds none.
    """
    found: list[str] = []
    for name in names:
        if os.path.isdir(name):
            inner = [os.path.join(folder, file) for folder, _, files in os.walk(name) for file in files]
            matches = sorted(file for file in inner if file.lower().endswith(ENDINGS))
        else:
            matches = [name] if os.path.isfile(name) else sorted(glob.glob(name))
        if not matches:
            raise UserError(f"{name}: holds no slide ({', '.join(ENDINGS)})")
        found += matches
    return list(dict.fromkeys(found))


class OpenSlides:
    """The slides that a process holds open, a bounded number: that used longest ago is closed first."""

    def __init__(self, window: tuple[float, float] | None) -> None:
        self._window = window
        self._open: OrderedDict[str, Slide] = OrderedDict()

    def get(self, path: str) -> Slide:
        """An open slide.

        Raises:
            Unfit: if it cannot be read.
            OSError: likewise.
        """
        if path not in self._open:
            slide = open_slide(path, self._window)
            while len(self._open) >= _OPEN:
                self._open.popitem(last=False)[1].close()
            self._open[path] = slide
        self._open.move_to_end(path)
        return self._open[path]
