"""``mocov3 pack DIR --out SHARDS``: images into tar archives that can be read fast and moved as a few files.

The archives are WebDataset's: ``folder/name.jpg`` beside ``folder/name.cls`` (number of the class, where there are
classes). The training and validation part of DIR become SHARDS/train and SHARDS/val. ``mocov3 pretrain SHARDS`` reads
them.
"""

import argparse
import contextlib
import io
import os
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from mocov3.config.fields import Parser, path
from mocov3.config.presets import Reading
from mocov3.data import Source, open_source
from mocov3.data.loading.loader import usable_cores
from mocov3.data.sources.archives import CLASSES_FILE
from mocov3.data.sources.scan import EXTENSIONS
from mocov3.data.sources.splits import parts_of
from mocov3.data.views import bands, formats
from mocov3.data.views.bare import is_dicom
from mocov3.data.views.decode import DecodeError, ImageBytes
from mocov3.data.views.formats import opened
from mocov3.errors import UserError, printable, reason
from mocov3.output.log import warn, warn_left_out, warn_once

_LISTED = 10  # unreadable images named one by one
_AHEAD = 8  # images a thread that are prepared ahead


def main(argv: Sequence[str]) -> int:
    """Pack every part of DIR; returns the exit code."""
    args = _parse(argv)
    data, out = args.data, Path(args.out)
    folder = Path(data)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: exists and is not empty; name a new folder")
    if folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"--out {out}: lies in {folder}; name a folder outside")
    parts = parts_of(data) if folder.is_dir() else []
    sources = [(open_source(data, part or "train"), out / part) for part in parts or [""]]
    warn_left_out(*(source for source, _ in sources))
    for source, place in sources:
        _pack(source, place, args)
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="mocov3 pack", description=__doc__)
    parser.add_argument("data", type=path, metavar="DIR", help="folder of images, or whatever else pretrain takes")
    parser.add_argument("--out", type=path, required=True, metavar="SHARDS", help="folder to write; new or empty")
    parser.add_argument(
        "--resize", type=int, default=0, metavar="PX", help="shorten the shorter side to PX where longer"
    )
    parser.add_argument("--quality", type=int, default=92, help="JPEG quality of resized images (default 92)")
    parser.add_argument("--shard-mb", type=int, default=256, metavar="MB", help="size of an archive (default 256)")
    parser.add_argument("-j", "--workers", type=int, default=usable_cores(), help="threads that read and resize")
    args = parser.parse_args(list(argv))
    for name, low, high in (
        ("resize", 0, 1 << 15),
        ("quality", 1, 100),
        ("shard_mb", 1, 1 << 20),
        ("workers", 1, 1024),
    ):
        if not low <= getattr(args, name) <= high:
            raise UserError(f"--{name.replace('_', '-')} must lie between {low} and {high}, not {getattr(args, name)}")
    return args


def _pack(source: Source, place: Path, args: argparse.Namespace) -> None:
    labels, taken, bad = source.labels, set[str](), list[str]()
    writer = _Writer(place, args.shard_mb << 20)
    written = 0
    try:
        place.mkdir(parents=True, exist_ok=True)
        for index, prepared in _prepared(source, args):
            if isinstance(prepared, Exception):
                bad.append(f"{printable(source.name(index))}: {printable(reason(prepared))}")
                continue
            ending, data = prepared
            label = None if labels is None or labels[index] < 0 else int(labels[index])
            writer.add(_key(source.name(index), taken), ending, data, label)
            written += 1
        writer.close()
        if source.classes:
            (place / CLASSES_FILE).write_text("".join(f"{printable(c)}\n" for c in source.classes), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {place}: cannot be written ({reason(error)})") from None
    finally:
        writer.abandon()
    for line in bad[:_LISTED]:
        warn(f"left out: {line}")
    if len(bad) > _LISTED:
        warn(f"left out: {len(bad) - _LISTED} more")
    if not written:
        raise UserError(f"data {args.data}: none of {len(source)} images can be read")
    print(f"{printable(str(place))}: {written} images in {writer.number} archive(s), {writer.total / 1e6:.1f} MB")


def _prepared(source: Source, args: argparse.Namespace) -> Iterator[tuple[int, tuple[str, bytes] | Exception]]:
    """Every image's ending and bytes, or the reason against it, in order; a bounded number is ahead."""
    ahead: list[tuple[int, Future[tuple[str, bytes] | Exception]]] = []
    with ThreadPoolExecutor(args.workers) as pool:
        for index in range(len(source)):
            ahead.append((index, pool.submit(_prepare, source, index, args.resize, args.quality)))
            if len(ahead) >= _AHEAD * args.workers:
                first, future = ahead.pop(0)
                yield first, future.result()
        for first, future in ahead:
            yield first, future.result()


def _prepare(source: Source, index: int, side: int, quality: int) -> tuple[str, bytes] | Exception:
    try:
        data = source.read(index)
        image, more = _image(data)
        short = min(image.width, image.height)
        if more and side and short > side:
            warn_once("images of more than 8 bits, or of many channels, are not resized: JPEGs cannot hold them")
        elif side and short > side:
            shrink = next((s for s in (8, 4, 2) if short >= 2 * side * s), 1)
            loaded = Image.fromarray(image.pixels(shrink)[0])
            size = round(side * image.width / short), round(side * image.height / short)
            return ".jpg", _saved(loaded.resize(size, Image.Resampling.BICUBIC), "JPEG", quality=quality)
        if isinstance(data, np.ndarray):
            return ".png", _saved(Image.fromarray(data), "PNG")
        ending = os.path.splitext(source.name(index))[1].lower()
        return ending if ending in EXTENSIONS else _ending(data), data
    except (DecodeError, OSError) as error:
        return error


def _image(data: bytes | np.ndarray) -> tuple[ImageBytes, bool]:
    """The image, and whether it holds more than a JPEG can."""
    channels, deep = (bands.stored(data) if isinstance(data, bytes) else None) or (3, False)
    try:
        return ImageBytes(data), deep
    except DecodeError:
        if channels in (1, 3):
            raise
        return ImageBytes(data, Reading(channels)), True


def _ending(data: bytes) -> str:
    if is_dicom(data):
        return formats.DICOM[0]
    with opened(data) as image:
        return f".{(image.format or 'png').lower()}".replace("jpeg", "jpg")


def _saved(image: Image.Image, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _key(name: str, taken: set[str]) -> str:
    """A sample's key: the name without ending, without dots (which end a key) and without ways out; not used before."""
    stem, ending = os.path.splitext(name.replace("\\", "/"))
    stem = (stem if ending.lower() in EXTENSIONS else name).replace(".", "_").replace(":", "_").strip("/")
    key, number = stem, 1
    while key in taken:
        number += 1
        key = f"{stem}-{number}"
    taken.add(key)
    return key


class _Writer:
    """Archives of a size, each complete under its name or not there."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size
        self.number = self.total = 0
        self._tar: tarfile.TarFile | None = None

    def add(self, key: str, ending: str, data: bytes, label: int | None) -> None:
        """One image and its class, in the same archive."""
        if self._tar is not None and self._tar.offset + len(data) > self.size:
            self.close()
        if self._tar is None:
            self._name = self.folder / f"shard-{self.number:06d}.tar"
            self._partial = self._name.with_name(f"{self._name.name}.partial")
            self._tar = tarfile.open(self._partial, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115 (closed by close)
        self._member(key + ending, data)
        if label is not None:
            self._member(f"{key}.cls", str(label).encode())

    def _member(self, name: str, data: bytes) -> None:
        assert self._tar is not None
        info = tarfile.TarInfo(name)  # no times, no owners: the same images make the same bytes
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))

    def close(self) -> None:
        """Complete the archive."""
        if self._tar is not None:
            self._tar.close()
            self.total += self._partial.stat().st_size
            os.replace(self._partial, self._name)
            self._tar = None
            self.number += 1

    def abandon(self) -> None:
        """Leave nothing of an archive that was not completed."""
        if self._tar is not None:
            with contextlib.suppress(OSError):  # the disk is full
                self._tar.close()
            self._partial.unlink(missing_ok=True)
            self._tar = None
