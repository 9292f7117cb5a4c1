"""What can be measured on images without a network: sizes, formats, colours, fingerprints, and why one can't be read.

``examine`` reads images by several processes; ``mocov3.data.sources.survey`` adds the facts up.
"""

import hashlib
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mocov3.config.presets import RGB, Reading
from mocov3.data.sources.detail import kept_detail
from mocov3.data.sources.opening import Source
from mocov3.data.views import dicom, remarks
from mocov3.data.views.bands import Unfit, deep_samples
from mocov3.data.views.bare import is_dicom
from mocov3.data.views.decode import MAX_PIXELS, DecodeError, ImageBytes
from mocov3.data.views.formats import opened
from mocov3.errors import printable, reason

THUMB = 16
"""Side of the thumbnails that fingerprints are made of."""
_GRAY_SPREAD = 8  # largest difference of colour channels that JPEG leaves in a grey image
_STATISTICS_SIDE = 64
_CHUNK = 64


@dataclass(frozen=True)
class Fact:
    """One image."""

    index: int
    error: str = ""
    """Why it cannot be read; nothing below holds then."""
    remark: str = ""
    """What its decoder remarked."""
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
    deep: tuple[float, float] | None = None
    """Smallest and largest value (but for a thousandth each) of an image of more than 8 bits."""
    thumb: np.ndarray | None = None
    """uint8, (16, 16, 3)."""
    detail: tuple[float, ...] = ()
    """Shares of its edges that smaller sizes keep (``mocov3.data.sources.detail``), where that is asked for."""
    sums: tuple[float, ...] = ()
    """Of a small version's pixels: per channel the mean of x and of x², x in 0–1."""


def examine(
    source: Source, indices: Sequence[int], *, workers: int, reading: Reading = RGB, detail: bool = False
) -> Iterator[Fact]:
    """Facts of the images ``indices``, in order, as read by ``reading``; ``detail``, which takes time, if asked."""
    chunks = [list(indices[i : i + _CHUNK]) for i in range(0, len(indices), _CHUNK)]
    if workers < 2 or len(chunks) < 2 * workers:
        for chunk in chunks:
            yield from _examine_chunk(source, chunk, reading, detail)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_keep, initargs=(source, reading, detail)
    ) as pool:
        for facts in pool.map(_examine_kept, chunks):
            yield from facts


_kept: list[tuple[Source, Reading, bool]] = []


def _keep(source: Source, reading: Reading, detail: bool) -> None:
    _kept[:] = [(source, reading, detail)]


def _examine_kept(indices: list[int]) -> list[Fact]:
    source, reading, detail = _kept[0]
    return _examine_chunk(source, indices, reading, detail)


def _examine_chunk(source: Source, indices: list[int], reading: Reading, detail: bool) -> list[Fact]:
    return [_fact(source, index, reading, detail) for index in indices]


def _fact(source: Source, index: int, reading: Reading, detail: bool) -> Fact:
    try:
        data = source.read(index)
        remarks.taken()
        pixels = ImageBytes(data, reading).pixels()[0]
        remark = remarks.taken()
    except (DecodeError, OSError) as error:
        return Fact(index, error=printable(reason(error))[:200])
    height, width, count = pixels.shape
    kind, mode, turned, size, deep = "pixels", f"{count} × 8 bits", False, height * width, None
    if isinstance(data, bytes):
        size = len(data)
        kind, mode, turned = _header(data, count)
        deep = _deep(data)
    planes = [Image.fromarray(np.ascontiguousarray(pixels[..., c])) for c in range(count)]
    small = np.stack([np.asarray(p.resize((_STATISTICS_SIDE,) * 2, Image.Resampling.BOX)) for p in planes], 2)
    scaled = small.reshape(-1, count) / 255.0
    small = small[..., np.arange(3) % count]  # as RGB
    channels = small.astype(np.int16)
    spread = channels.max(2) - channels.min(2)
    return Fact(
        index,
        remark=remark,
        format=kind,
        mode=mode,
        width=width,
        height=height,
        file_bytes=size,
        digest=hashlib.blake2b(data if isinstance(data, bytes) else data.tobytes(), digest_size=16).digest(),
        gray=bool(np.percentile(spread, 99) <= _GRAY_SPREAD),
        turned=turned,
        deep=deep,
        detail=tuple(kept_detail(pixels).tolist()) if detail else (),
        thumb=small.reshape(THUMB, _STATISTICS_SIDE // THUMB, THUMB, -1, 3).mean((1, 3)).astype(np.uint8),
        sums=(*scaled.mean(0).tolist(), *(scaled**2).mean(0).tolist()),
    )


def _header(data: bytes, count: int) -> tuple[str, str, bool]:
    """Format and mode by Pillow's names, and whether EXIF says that it is shown turned."""
    if is_dicom(data):
        return "DICOM", dicom.kind(data, MAX_PIXELS), False
    try:
        with opened(data) as header:
            return header.format or "?", header.mode, _turned(header)
    except Exception:  # of more channels than Pillow knows: the image itself was read
        return "TIFF", f"{count} channels", False


def _deep(data: bytes) -> tuple[float, float] | None:
    try:
        values = deep_samples(data, MAX_PIXELS)
    except Unfit:  # Pillow read it
        return None
    if values is None:
        return None
    low, high = np.nanpercentile(values, [0.1, 99.9]).tolist()
    return float(low), float(high)


def _turned(header: Image.Image) -> bool:
    try:
        return header.getexif().get(0x0112, 1) not in (0, 1)
    except Exception:  # malformed EXIF makes Pillow stumble in many ways; the image itself was read
        return False
