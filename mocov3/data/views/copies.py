"""Smaller copies of large images: a drawing of 150 million pixels is decoded once, not in every epoch.

An image many times larger than any view can use is kept as a copy whose smallest possible crop still has ``MARGIN``
times the pixels of the view, a side. Views are cut from the copy at once, whether there is room to keep it or not, so
that they do not depend on what the cache holds. Copies are lossless PNGs, by the digest of the file's bytes.
"""

import hashlib
import math
import os
import shutil
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import simplejpeg

from mocov3.config.presets import Reading, ViewPreset
from mocov3.data.views.bare import JPEG, PNG
from mocov3.data.views.decode import SHRINKS, ImageBytes
from mocov3.data.views.formats import opened

GIANT = 90_000_000
"""Pixels of images that take seconds to decode."""

MARGIN = 2.0
"""Pixels of the smallest crop for each of the view, a side; JPEGs are decoded down to 1.5."""
LEAST = 4
"""How many times smaller, a side, a copy must be."""
MOST = 2 << 30
"""Bytes of all copies, or a tenth of the free disk if that is less."""
_FEW = 1 << 16
"""Bytes up to which files other than PNG and JPEG are not asked for their size."""
_HEAD = struct.Struct("<4sII")
_MAGIC = b"mc31"


@dataclass
class Copies:
    """The copies of one process.

    Args:
        folder: where they lie.
        room: bytes that this process may add.
    """

    folder: str
    room: int
    added: int = field(default=0, init=False)

    def pixels(
        self, data: bytes, reading: Reading, factor: int
    ) -> tuple[np.ndarray, tuple[int, int], tuple[float, float]]:
        """Pixels of a copy ``factor`` times smaller, found or made; width and height of the image; by how much the copy
        is smaller, down and across.

        Raises:
            DecodeError: if the image cannot be read.
        """
        facts = f"{reading.channels} {reading.window} {factor}".encode()
        key = hashlib.blake2b(data, digest_size=16, key=hashlib.sha256(facts).digest()[:16]).hexdigest()
        file = Path(self.folder, key[:2], f"{key}.copy")
        found = _read(file)
        if found is None:
            found = _smaller(data, reading, factor)
            self._keep(file, *found)
        pixels, (width, height) = found
        return pixels, (width, height), (height / pixels.shape[0], width / pixels.shape[1])

    def _keep(self, file: Path, pixels: np.ndarray, size: tuple[int, int]) -> None:
        done, png = cv2.imencode(".png", pixels, (cv2.IMWRITE_PNG_COMPRESSION, 1))
        if not done or self.added + len(png) > self.room:
            return
        partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
        with suppress(OSError):  # a full disk, a folder of others: the image is decoded again next time
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                partial.write_bytes(_HEAD.pack(_MAGIC, *size) + png.tobytes())
                os.replace(partial, file)
                self.added += _HEAD.size + len(png)
            finally:
                partial.unlink(missing_ok=True)


def _read(file: Path) -> tuple[np.ndarray, tuple[int, int]] | None:
    try:
        content = file.read_bytes()
        magic, width, height = _HEAD.unpack_from(content)
        pixels = cv2.imdecode(np.frombuffer(content, np.uint8, offset=_HEAD.size), cv2.IMREAD_UNCHANGED)
    except (OSError, struct.error, ValueError, cv2.error):
        return None
    if magic != _MAGIC or pixels is None:  # damaged: made again
        return None
    return (pixels if pixels.ndim == 3 else pixels[..., None]), (width, height)


def _smaller(data: bytes, reading: Reading, factor: int) -> tuple[np.ndarray, tuple[int, int]]:
    image = ImageBytes(data, reading)
    pixels, _ = image.pixels(next((s for s in SHRINKS if 2 * s <= factor), 1))
    side = -(-image.width // factor), -(-image.height // factor)
    small = cv2.resize(pixels, side, interpolation=cv2.INTER_AREA)
    return (small if small.ndim == 3 else small[..., None]), (image.width, image.height)


def factor_of(data: bytes, preset: ViewPreset, views: Sequence[tuple[float, int]]) -> int:
    """How many times smaller, a side, an image may be kept; 1 where it is not worth it, or cannot be.

    Args:
        data: bytes of the file.
        preset: of the views; none with a border around images is cut from copies.
        views: smallest crop, as a share of the image, and side of the views.
    """
    if preset.pad or preset.reading.channels not in (1, 3):
        return 1
    size = size_of(data)
    if size is None:
        return 1
    narrow = min(preset.ratio[0], 1 / preset.ratio[1], 1.0)
    room = min(min(math.sqrt(share * size[0] * size[1] * narrow), *size) / (MARGIN * side) for share, side in views)
    return int(room) if room >= LEAST else 1


def size_of(data: bytes) -> tuple[int, int] | None:
    """Width and height as stored, without decoding; ``None`` where that is not known cheaply."""
    if data[:8] == PNG and len(data) > 24:
        return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    try:
        if data[:3] == JPEG:
            height, width, *_ = simplejpeg.decode_jpeg_header(data, strict=False)
            return int(width), int(height)
        if len(data) > _FEW:
            with opened(data) as image:
                return image.size
    except Exception:  # as in decode: whatever a malformed file makes its reader stumble over
        return None
    return None


def is_giant(data: bytes | np.ndarray) -> bool:
    """Whether an image has more than ``GIANT`` pixels, by its header; not where that does not tell."""
    size = size_of(data) if isinstance(data, bytes) else None
    return size is not None and size[0] * size[1] > GIANT


def opened_copies(base: Path, processes: int) -> Copies:
    """The copies below a cache folder, for one of so many processes; the oldest are removed where they are too many."""
    folder = base / "smaller"
    most, used = limit(base), 0
    kept: list[tuple[float, int, Path]] = []
    for file in folder.glob("*/*"):
        with suppress(OSError):
            stat = file.stat()
            kept.append((stat.st_mtime, stat.st_size, file))
    kept.sort(reverse=True)
    for _, size, file in kept:
        if used + size > 0.75 * most:
            with suppress(OSError):  # of another user
                file.unlink()
                continue
        used += size
    return Copies(str(folder), max(most - used, 0) // max(processes, 1))


def not_kept() -> Copies:
    """Copies where there is no cache: views are cut from them as well, so that they are the same."""
    return Copies(os.devnull, 0)


def limit(base: Path) -> int:
    """Bytes that all copies may take."""
    return min(MOST, shutil.disk_usage(base).free // 10)


def used(folder: str) -> tuple[int, int]:
    """How many copies there are, and their bytes."""
    sizes = []
    for file in Path(folder).glob("*/*.copy"):
        with suppress(OSError):
            sizes.append(file.stat().st_size)
    return len(sizes), sum(sizes)
