"""Disk → index: finds every image below a folder, several folders at a time, and never writes to it."""

import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mocov3.data.sources.index import Chunk, Index, recall, remember
from mocov3.data.views import formats
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
_SETTINGS = " ".join(EXTENSIONS)
_SKIPPED = (b"__macosx", b"@eadir")  # made by macOS and NAS systems: their images are not the user's
_THREADS = 16  # waiting for disks or the network, not computing


@dataclass
class Listing:
    """What one folder holds."""

    changed_ns: int = 0
    images: list[bytes] = field(default_factory=list)
    folders: list[bytes] = field(default_factory=list)
    others: list[bytes] = field(default_factory=list)
    """Files of further endings that were asked for."""
    error: OSError | None = None


def scan_tree(folder: Path, without: Sequence[str] = ()) -> tuple[str, Index, list[str]]:
    """Root, index of every image below ``folder`` sorted by path, and its classes (its subfolders).

    Subfolders named in ``without`` are left out; hidden folders and files that macOS and NAS systems add are passed
    over. Links to folders are followed, but never back into a folder they lie in.

    Raises:
        UserError: if the folder is missing, unreadable, or holds no image.
    """
    if not folder.is_dir():
        raise UserError(f"data {folder}: there is no such folder")
    root = os.fsencode(folder)
    out = frozenset(map(os.fsencode, without))
    settings = "\0".join([_SETTINGS, *sorted(without)])
    known = recall(root, settings)
    if known is not None:
        return os.fsdecode(root), *known
    began = time.time_ns()
    listings = _list_all(root, out)
    chunks, heads = _assembled(listings)
    failed = [(path, listing.error) for path, listing in listings.items() if listing.error is not None]
    if not chunks:
        if failed:
            raise UserError(f"data {folder}: cannot be read ({failed[0][1].strerror})")
        raise UserError(f"data {folder}: holds no image ({', '.join(EXTENSIONS[:10])} …)")
    classes = sorted(set(heads)) if b"" not in heads else []
    number = {head: i for i, head in enumerate(classes)}
    labelled = [Chunk(c.lengths, c.joined, number.get(h, -1)) for c, h in zip(chunks, heads, strict=True)]
    index = Index.of_chunks(labelled)
    names = [os.fsdecode(c) for c in classes]
    if not failed:
        remember(root, settings, began, {p: e.changed_ns for p, e in listings.items()}, names, index)
    return os.fsdecode(root), index, names


def unreadable_folders(folder: Path) -> list[tuple[str, str]]:
    """Subfolders that cannot be read, each with the reason; ``mocov3 check`` names them."""
    listings = _list_all(os.fsencode(folder))
    return [(os.fsdecode(p), e.error.strerror or "?") for p, e in sorted(listings.items()) if e.error is not None]


def _list_all(root: bytes, without: frozenset[bytes] = frozenset()) -> dict[bytes, Listing]:
    """Listings by folder, relative to ``root`` (b"" is the root itself)."""
    listings: dict[bytes, Listing] = {}
    todo: deque[bytes] = deque([b""])
    running: dict[Future[Listing], bytes] = {}
    with ThreadPoolExecutor(_THREADS) as pool:
        while todo or running:
            while todo and len(running) < 4 * _THREADS:
                relative = todo.popleft()
                running[pool.submit(list_folder, root, relative)] = relative
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                relative = running.pop(done)
                listing = listings[relative] = done.result()
                if not relative:
                    listing.folders = [name for name in listing.folders if name not in without]
                todo.extend(relative + b"/" + name if relative else name for name in listing.folders)
    return listings


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
    endings = _ENDINGS + also
    try:
        listing.changed_ns = os.stat(place).st_mtime_ns
        with os.scandir(place) as entries:
            for entry in entries:
                name = entry.name
                try:
                    lower = name.lower()
                    if lower.endswith(endings) and not name.startswith(b"._") and entry.is_file():
                        (listing.images if lower.endswith(_ENDINGS) else listing.others).append(name)
                        if first:
                            break
                    elif _wanted(entry, place):
                        listing.folders.append(name)
                except OSError:  # a link to nowhere
                    continue
    except OSError as error:
        listing.error = error
    listing.images.sort()
    return listing


def _wanted(entry: "os.DirEntry[bytes]", place: bytes) -> bool:
    name = entry.name
    if not entry.is_dir() or _hidden(name):
        return False
    return not (entry.is_symlink() and _leads_back(place, name))


def _hidden(folder: bytes) -> bool:
    return folder.startswith(b".") or folder.lower() in _SKIPPED


def passed_over(parts: Sequence[str]) -> bool:
    """Whether a member of an archive, given as the parts of its path, is one that a folder's scan skips."""
    *folders, base = parts or ("",)
    ways = (".", "..", "/")  # no hidden folders
    return base.startswith("._") or any(_hidden(os.fsencode(f)) for f in folders if f not in ways)


def _leads_back(place: bytes, name: bytes) -> bool:
    here, target = os.path.realpath(place), os.path.realpath(os.path.join(place, name))
    return here == target or here.startswith(target.rstrip(b"/") + b"/")


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
                child = relative + b"/" + name[:-1] if relative else name[:-1]
                parts.append((child, None))
            elif parts and parts[-1][1] is not None:
                parts[-1][1].append(name)
            else:
                parts.append((relative, [name]))
        stack.extend(reversed(parts))
