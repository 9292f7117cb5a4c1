"""Disk → index: finds every image below a folder, several folders at a time, and never writes to it."""

import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path

import numpy as np

from mocov3.data.sources.classes import remarks_on_missing
from mocov3.data.sources.index import Chunk, Index, recall, remember
from mocov3.data.sources.left_out import LeftOut, has_ending, hidden
from mocov3.data.views import formats
from mocov3.data.views.bare import DICOM_HEAD, is_dicom
from mocov3.errors import UserError

EXTENSIONS = (
    ".jpg",
    ".jpeg",
    ".png",
    ".ppm",
    ".pgm",
    ".bmp",
    ".tif",
    ".tiff",
    ".webp",
    ".gif",
    ".jfif",
    ".jpe",
    ".jp2",
    ".j2k",
    ".pbm",
    ".pnm",
    ".tga",
    ".dib",
    ".pcx",
    ".qoi",
    ".sgi",
    ".apng",
    ".mpo",
    *formats.endings(),
)
"""Endings taken for images; what is in a file is decided by its content. ``formats.cure`` knows of further ones."""
_ENDINGS = tuple(e.encode() for e in EXTENSIONS)
_WEIGHTS = (b".pth.tar", b".pt.tar")  # torch's: no archives of images
_SETTINGS = " ".join(EXTENSIONS)
_THREADS = 16  # waiting for disks or the network, not computing
_AT_ONCE = 64 * _THREADS  # folders

Identity = tuple[int, int] | bytes
"""Device and inode of a folder; its real path where a file system has no inodes."""


@dataclass
class Listing:
    """What one folder holds."""

    changed_ns: int = 0
    identity: Identity | None = None
    images: list[bytes] = field(default_factory=list)
    folders: list[bytes] = field(default_factory=list)
    """Sorted, with the links among them."""
    links: dict[bytes, Identity] = field(default_factory=dict)
    """Those folders that are links, and what they lead to."""
    back: list[bytes] = field(default_factory=list)
    """Links to a folder that they lie in."""
    broken: list[bytes] = field(default_factory=list)
    """Links that lead nowhere."""
    special: list[bytes] = field(default_factory=list)
    """Pipes, sockets, devices, and links to them."""
    others: list[bytes] = field(default_factory=list)
    """Files of further endings that were asked for."""
    left_out: LeftOut = field(default_factory=LeftOut)
    error: OSError | None = None


def scan_tree(folder: Path, without: Sequence[str] = ()) -> tuple[str, Index, list[str], list[str]]:
    """Root, index of every image below ``folder`` sorted by path, its classes (its subfolders), and remarks.

    Subfolders named in ``without`` are left out, and those that ``left_out`` passes over. Every folder is read once:
    by its path without links; else by the link that is nearest to the root, of these the first by name.

    Raises:
        UserError: if the folder is missing, unreadable, or holds no image.
    """
    if not folder.is_dir():
        raise UserError(f"data {folder}: there is no such folder")
    root = os.fsencode(folder)
    settings = "\0".join([_SETTINGS, *sorted(without)])
    known = recall(root, settings)
    if known is not None:
        return os.fsdecode(root), *known
    began = time.time_ns()
    listings, again = _list_all(root, frozenset(map(os.fsencode, without)))
    chunks, heads = _assembled(listings)
    failed = [(path, listing.error) for path, listing in sorted(listings.items()) if listing.error is not None]
    if failed and not chunks:
        raise UserError(f"data {folder}: cannot be read ({failed[0][1].strerror})")
    broken = [_join(path, name) for path, listing in listings.items() for name in listing.broken]
    remarks = _remarks(listings, failed, broken, again)
    if not chunks:
        raise UserError("; ".join([f"data {folder}: holds no image ({', '.join(EXTENSIONS[:10])} …)", *remarks]))
    classes = sorted(set(heads) - {b""})
    if b"" in heads and len(classes) < 2:  # a folder beside images is no class
        classes = []
    number = {head: i for i, head in enumerate(classes)}
    labelled = [Chunk(c.lengths, c.joined, number.get(h, -1)) for c, h in zip(chunks, heads, strict=True)]
    index = Index.of_chunks(labelled)
    names = [os.fsdecode(c) for c in classes]
    remarks = [f"{folder}: {line}" for line in remarks]
    remarks += remarks_on_missing(f"{folder}: images beside its {len(classes)} class folders", index.labels)
    if not failed and not broken:  # what is behind them may come without a change of their folder
        remember(root, settings, began, {p: e.changed_ns for p, e in listings.items()}, names, remarks, index)
    return os.fsdecode(root), index, names, remarks


def _remarks(
    listings: dict[bytes, Listing], failed: list[tuple[bytes, OSError]], broken: list[bytes], again: list[bytes]
) -> list[str]:
    left_out = LeftOut()
    for path, listing in listings.items():
        left_out.merge(listing.left_out, os.fsdecode(_join(path, b"")) if path else "")
    lines = left_out.lines()
    if failed:
        first, error = failed[0]
        lines.append(f"{len(failed)} folders cannot be read ({error.strerror}); first: {os.fsdecode(first)}")
    if broken:
        lines.append(f"{len(broken)} links lead nowhere; first: {os.fsdecode(min(broken))}")
    if special := [_join(path, name) for path, listing in listings.items() for name in listing.special]:
        lines.append(f"{len(special)} pipes, sockets or devices are left out; first: {os.fsdecode(min(special))}")
    if again:
        lines.append(
            f"{len(again)} links to folders are not followed: these are read by another path, or hold the link; "
            f"first: {os.fsdecode(min(again))}"
        )
    return lines


def _list_all(root: bytes, without: frozenset[bytes] = frozenset()) -> tuple[dict[bytes, Listing], list[bytes]]:
    """Listings by folder, relative to ``root`` (b"" is the root itself), and paths of folders not read again."""
    listings: dict[bytes, Listing] = {}
    seen = {list_folder(root, name, first=True).identity for name in without}
    todo, links = deque([b""]), dict[bytes, Identity]()
    again: list[bytes] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        while todo or links:
            if not todo:  # all that is reached without these links is read
                for path in sorted(links, key=lambda p: (p.count(b"/"), p)):
                    (again if links[path] in seen else todo).append(path)
                links = {}
            batch = [todo.popleft() for _ in range(min(len(todo), _AT_ONCE))]
            for path, listing in zip(batch, pool.map(list_folder, repeat(root), batch), strict=True):
                if listing.identity in seen and listing.identity:
                    again.append(path)
                    continue
                seen.add(listing.identity)
                listings[path] = listing
                again += [_join(path, name) for name in listing.back]
                for name in listing.folders:
                    if name in listing.links:
                        links[_join(path, name)] = listing.links[name]
                    elif path or name not in without:
                        todo.append(_join(path, name))
    return listings, again


def list_folder(root: bytes, relative: bytes = b"", also: tuple[bytes, ...] = (), *, first: bool = False) -> Listing:
    """What is directly in a folder, without what a scan skips.

    Args:
        root: folder of the tree.
        relative: path below it.
        also: endings of further files to list.
        first: stop at the first file that is found.
    """
    place = os.path.join(root, relative) if relative else root
    listing = Listing()
    left_out: list[bytes] = []
    endings = _ENDINGS + also
    try:
        status = os.stat(place)
        listing.changed_ns, listing.identity = status.st_mtime_ns, _identity(status, place)
        with os.scandir(place) as entries:
            for entry in entries:
                name = entry.name
                try:
                    lower = name.lower()
                    if (
                        lower.endswith(endings)
                        and not lower.endswith(_WEIGHTS)
                        and not name.startswith(b"._")
                        and entry.is_file()
                    ):
                        (listing.images if lower.endswith(_ENDINGS) else listing.others).append(name)
                        if first:
                            break
                    elif name.startswith(b"."):
                        continue
                    elif entry.is_file():
                        (listing.images if _is_nameless_dicom(entry) else left_out).append(name)
                    elif entry.is_dir():
                        if not hidden(name):
                            _add_folder(listing, entry, place)
                    elif entry.is_symlink() and not os.path.exists(entry.path):
                        listing.broken.append(name)
                    else:
                        listing.special.append(name)
                except OSError:  # a link to itself, or to where nothing may be read
                    listing.broken.append(name)
    except OSError as error:
        listing.error = error
    listing.images.sort()
    listing.folders.sort()
    listing.left_out.add(left_out)
    return listing


def _is_nameless_dicom(entry: "os.DirEntry[bytes]") -> bool:
    """Whether a file without an ending is DICOM that can be read here: scanners write them so."""
    if has_ending(entry.name) or formats.cure(formats.DICOM[0]):
        return False
    with open(entry.path, "rb") as file:
        return is_dicom(file.read(DICOM_HEAD))


def _add_folder(listing: Listing, entry: "os.DirEntry[bytes]", place: bytes) -> None:
    if entry.is_symlink():
        path = os.path.join(place, entry.name)
        if _leads_back(place, path):
            listing.back.append(entry.name)
            return
        listing.links[entry.name] = _identity(entry.stat(), path)
    listing.folders.append(entry.name)


def _identity(status: os.stat_result, path: bytes) -> Identity:
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)


def _leads_back(place: bytes, path: bytes) -> bool:
    here, target = os.path.realpath(place), os.path.realpath(path)
    return here == target or here.startswith(target.rstrip(b"/") + b"/")


def _join(relative: bytes, name: bytes) -> bytes:
    return relative + b"/" + name if relative else name


def _assembled(listings: dict[bytes, Listing]) -> tuple[list[Chunk], list[bytes]]:
    """Images in the order of their whole paths, and the first folder of each chunk."""
    chunks: list[Chunk] = []
    heads: list[bytes] = []
    for relative, names in _runs(listings):
        prefix = relative + b"/" if relative else b""
        lengths = np.fromiter(map(len, names), np.int64, len(names)) + len(prefix)
        chunks.append(Chunk(lengths, b"".join([prefix + name for name in names]), -1))
        heads.append(relative.split(b"/", 1)[0])
        names.clear()
    return chunks, heads


def _runs(listings: dict[bytes, Listing]) -> Iterator[tuple[bytes, list[bytes]]]:
    """(folder, names of its images that follow each other) so that whole paths are sorted."""
    stack: list[tuple[bytes, list[bytes] | None]] = [(b"", None)]
    while stack:
        relative, names = stack.pop()
        if names is not None:
            yield relative, names
            continue
        listing = listings[relative]
        if not listing.folders:
            if listing.images:
                yield relative, listing.images
            continue
        # a folder sorts as its name with the slash that follows it in every path below
        entries = sorted([(name, False) for name in listing.images] + [(f + b"/", True) for f in listing.folders])
        parts: list[tuple[bytes, list[bytes] | None]] = []
        for name, is_folder in entries:
            if is_folder:
                child = _join(relative, name[:-1])
                if child in listings:
                    parts.append((child, None))
            elif parts and parts[-1][1] is not None:
                parts[-1][1].append(name)
            else:
                parts.append((relative, [name]))
        stack.extend(reversed(parts))
