"""Tables of tiles: a row says which square of a slide is an image; it is read from the slide itself, at every use.

Written by ``mocov3 tiles``; Parquet with these columns:

| column | holds |
|---|---|
| `path` | the slide's file, relative to the table or absolute |
| `slide` | its name: the group of the tile |
| `level` | the level that is read |
| `x`, `y` | left upper corner, in pixels of the largest level |
| `read` | side in pixels of the level |
| `size` | side of the image, which the square is resized to (by area) |
| `digest` | of the slide's size and ends: a slide that was changed is refused |
| `label` | optional: a class, as text |
"""

import os
import struct
from collections.abc import Iterable
from typing import Any

import cv2
import numpy as np

from mocov3.data.sources.classes import numbered, remarks_on_missing
from mocov3.data.sources.index import Index
from mocov3.data.sources.slides import OpenSlides, digest
from mocov3.data.views.bands import Unfit
from mocov3.errors import UserError, reason

COLUMNS = ("path", "slide", "level", "x", "y", "read", "size", "digest")
WINDOW = b"mocov3.window"
"""Entry of the table's metadata: LOW,HIGH of samples of more than 8 bits."""
_ENTRY = struct.Struct("<IBqqII")
_MOST_SIDE = 1 << 14
_ROWS = 1 << 16  # read at once


class Tiles:
    """Tiles of slides.

    Args:
        files: tables.

    Raises:
        UserError: if a table or a slide is damaged, missing, or not what it was.
    """

    def __init__(self, files: list[str]) -> None:
        self.skipped: list[str] = []
        self._paths: list[str] = []
        self._names: list[str] = []
        self._window: tuple[float, float] | None = None
        entries, labels = self._read_tables(files)
        if not entries:
            raise UserError(f"data {files[0]}: holds no row")
        numbers, self.classes = numbered(labels)
        self.skipped += remarks_on_missing(files[0], numbers)
        self._index = Index.build(entries, numbers)
        self._slides = OpenSlides(self._window)

    def _read_tables(self, files: list[str]) -> tuple[list[bytes], list[str]]:
        import pyarrow.parquet as pq

        known: dict[tuple[str, str, str, str], int] = {}
        entries: list[bytes] = []
        labels: list[str] = []
        for file in files:
            try:
                with pq.ParquetFile(file) as table:
                    self._window = _window(table.schema_arrow.metadata or {})
                    columns = [*COLUMNS, *({"label"} & set(table.schema_arrow.names))]
                    for batch in table.iter_batches(_ROWS, columns=columns):
                        rows = batch.to_pydict()
                        entries += self._entries(file, rows, known)
                        labels += [str(label or "") for label in rows.get("label", [""] * batch.num_rows)]
            except UserError:
                raise
            except Exception as error:  # damage makes pyarrow raise errors of many kinds
                why = (str(error) or type(error).__name__).splitlines()[0]
                raise UserError(f"data {file}: cannot be read as a table of tiles ({why})") from None
        return entries, labels

    def _entries(self, file: str, rows: dict[str, Any], known: dict[tuple[str, str, str, str], int]) -> Iterable[bytes]:
        numbers = (rows[name] for name in ("level", "x", "y", "read", "size"))
        texts = (rows[name] for name in ("path", "slide", "digest"))
        for path, slide, said, *where in zip(*texts, *numbers, strict=True):
            key = (file, path, slide, said)
            if key not in known:
                known[key] = len(self._paths)
                self._paths.append(_checked(file, path, said))
                self._names.append(slide)
            if not (0 < where[3] <= _MOST_SIDE and 0 < where[4] <= _MOST_SIDE):
                raise UserError(f"data {file}: a tile of {where[3]} pixels as one of {where[4]}: at most {_MOST_SIDE}")
            yield _ENTRY.pack(known[key], *where)

    def __len__(self) -> int:
        return len(self._index)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_slides": OpenSlides(self._window)}

    @property
    def labels(self) -> np.ndarray | None:
        """Class of every tile, or ``None``."""
        return self._index.labels

    @property
    def digest(self) -> str:
        """sha256 over all places and labels."""
        return self._index.digest

    def groups(self, field: str) -> np.ndarray | None:
        """The slide of every tile, by itself or as ``slide``; ``None`` of another field."""
        if field not in ("", "slide"):
            return None
        return np.array([self._names[_ENTRY.unpack(self._index.path(i))[0]] for i in range(len(self))], object)

    def name(self, index: int) -> str:
        """The slide, and level and corner of the tile."""
        number, level, x, y, _, _ = _ENTRY.unpack(self._index.path(index))
        return f"{self._names[number]}:{level}:{x},{y}"

    def read(self, index: int) -> np.ndarray:
        """uint8 (size, size, channels).

        Raises:
            OSError: if the slide cannot be read there.
        """
        number, level, x, y, side, size = _ENTRY.unpack(self._index.path(index))
        try:
            slide = self._slides.get(self._paths[number])
            if level >= len(slide.sizes):
                raise Unfit(f"has no level {level}")
            width, height = slide.sizes[level]
            scale = slide.sizes[0][0] / width
            ends = (length - scale * side + 1 for length in slide.sizes[0])  # 1: of rounding
            if not all(0 <= place < max(end, 1) for place, end in zip((x, y), ends, strict=True)):
                raise Unfit("reaches over the edge of its slide")
            corner = min(round(x / scale), width - side), min(round(y / scale), height - side)
            pixels = slide.read(level, *corner, side, side)
        except Unfit as error:
            raise OSError(str(error)) from None
        if side != size:
            way = cv2.INTER_AREA if side > size else cv2.INTER_LINEAR
            pixels = cv2.resize(pixels, (size, size), interpolation=way)
            pixels = pixels if pixels.ndim == 3 else pixels[..., None]
        return np.ascontiguousarray(pixels)


def is_tiles(names: Iterable[str]) -> bool:
    """Whether a table of these columns is one of tiles."""
    return set(COLUMNS) <= set(names)


def _window(metadata: dict[bytes, bytes]) -> tuple[float, float] | None:
    if WINDOW not in metadata:
        return None
    low, high = map(float, metadata[WINDOW].split(b","))
    return low, high


def _checked(table: str, path: str, said: str) -> str:
    """The file of a slide, if it is as it was."""
    file = os.path.join(os.path.dirname(table), path)
    try:
        found = digest(file)
    except OSError as error:
        raise UserError(f"data {table}: slide {file}: {reason(error)}; paths are relative to the table") from None
    if found != said:
        raise UserError(f"data {table}: slide {file} is not what it was; run mocov3 tiles again")
    return file
