"""What can be measured on pictures without a network: sizes, formats, colours, fingerprints, and why one can't be read.

``examine`` reads pictures by several processes; ``mocov3.data.survey`` adds the facts up.
"""

import hashlib
import io
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mocov3.data.decode import DecodeError, decode
from mocov3.data.sources import Source
from mocov3.errors import printable

THUMB = 16
"""Side of the thumbnails that fingerprints are made of."""
_GRAY_SPREAD = 8  # largest difference of colour channels that JPEG leaves in a grey picture
_STATISTICS_SIDE = 64
_CHUNK = 64


@dataclass(frozen=True)
class Fact:
    """One picture."""

    index: int
    error: str = ""
    """Why it cannot be read; nothing below holds then."""
    format: str = ""
    mode: str = ""
    """As Pillow names them, of the file."""
    width: int = 0
    height: int = 0
    file_bytes: int = 0
    digest: bytes = b""
    """Of the file's bytes: equal for copies."""
    gray: bool = False
    turned: bool = False
    """Whether EXIF says that it is shown turned."""
    thumb: np.ndarray | None = None
    """uint8, (16, 16, 3)."""
    sums: tuple[float, ...] = ()
    """Of a small version's pixels: per channel the mean of x and of x², x in 0–1."""


def examine(source: Source, indices: Sequence[int], *, workers: int) -> Iterator[Fact]:
    """Facts of the pictures ``indices``, in order."""
    chunks = [list(indices[i : i + _CHUNK]) for i in range(0, len(indices), _CHUNK)]
    if workers < 2 or len(chunks) < 2 * workers:
        for chunk in chunks:
            yield from _examine_chunk(source, chunk)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_keep, initargs=(source,)) as pool:
        for facts in pool.map(_examine_kept, chunks):
            yield from facts


_kept: list[Source] = []


def _keep(source: Source) -> None:
    _kept[:] = [source]


def _examine_kept(indices: list[int]) -> list[Fact]:
    return _examine_chunk(_kept[0], indices)


def _examine_chunk(source: Source, indices: list[int]) -> list[Fact]:
    return [_fact(source, index) for index in indices]


def _fact(source: Source, index: int) -> Fact:
    try:
        data = source.read(index)
        image = decode(data)
    except (DecodeError, OSError) as error:
        return Fact(index, error=printable(str(error.strerror if isinstance(error, OSError) and error.strerror
                                               else error))[:200])  # fmt: skip
    pixels = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
    width, height = pixels.size
    kind, mode, turned, size = "pixels", pixels.mode, False, pixels.size[0] * pixels.size[1]
    if isinstance(data, bytes):
        size = len(data)
        with Image.open(io.BytesIO(data)) as header:
            kind, mode = header.format or "?", header.mode
            turned = _turned(header)
    small = np.asarray(pixels.resize((_STATISTICS_SIDE, _STATISTICS_SIDE), Image.Resampling.BOX).convert("RGB"))
    channels = small.astype(np.int16)
    spread = channels.max(2) - channels.min(2)
    scaled = small.reshape(-1, 3) / 255.0
    return Fact(
        index,
        format=kind,
        mode=mode,
        width=width,
        height=height,
        file_bytes=size,
        digest=hashlib.blake2b(data if isinstance(data, bytes) else data.tobytes(), digest_size=16).digest(),
        gray=bool(np.percentile(spread, 99) <= _GRAY_SPREAD),
        turned=turned,
        thumb=small.reshape(THUMB, _STATISTICS_SIDE // THUMB, THUMB, -1, 3).mean((1, 3)).astype(np.uint8),
        sums=(*scaled.mean(0).tolist(), *(scaled**2).mean(0).tolist()),
    )


def _turned(header: Image.Image) -> bool:
    try:
        return header.getexif().get(0x0112, 1) not in (0, 1)
    except Exception:  # malformed EXIF makes Pillow stumble in many ways; the picture itself was read
        return False
