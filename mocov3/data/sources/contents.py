"""What is in a folder, as far as needed to tell parts of data from classes; no more is read."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

from mocov3.data.sources.left_out import LeftOut
from mocov3.data.sources.scan import Identity, list_folder

_PACKED = (".tar", ".parquet")  # files that hold many images, the preferred first
_PACKED_BYTES = tuple(ending.encode() for ending in _PACKED)
_MOST_COUNTED = 1000
_MOST_FOLDERS = 20_000  # looked into for one image; a tree of more folders without any is no data set


@dataclass(frozen=True)
class Contents:
    """What is directly in a folder."""

    folders: list[str]
    packed: list[str]
    """Archives, or else tables."""
    images: int
    left_out: LeftOut
    """Of the other files."""


def look(folder: str) -> Contents:
    """What is directly in a folder, without what a scan skips."""
    listing = list_folder(os.fsencode(folder), also=_PACKED_BYTES)
    names = sorted(map(os.fsdecode, listing.others))
    packed = next((matches for e in _PACKED if (matches := [n for n in names if n.lower().endswith(e)])), [])
    listing.left_out.add(map(os.fsencode, set(names) - set(packed)))
    files = [os.path.join(folder, name) for name in packed]
    return Contents([os.fsdecode(name) for name in listing.folders], files, len(listing.images), listing.left_out)


def holds(folder: str, *below: str) -> bool:
    """Whether there is an image, archive or table below a folder, or it cannot be read (which is reported later)."""
    return any(True for _ in _counts(os.path.join(folder, *below), first=True))


def _counts(folder: str, *, first: bool = False) -> Iterator[int]:
    """Numbers of images, archives and tables in every folder below that has some, or cannot be read."""
    root, todo, seen = os.fsencode(folder), [b""], set[Identity | None]()
    while todo and len(seen) < _MOST_FOLDERS:
        relative = todo.pop()
        listing = list_folder(root, relative, _PACKED_BYTES, first=first)
        if listing.identity in seen:  # links lead round and round
            continue
        seen.add(listing.identity)
        if listing.images or listing.others or listing.error:
            yield len(listing.images) + len(listing.others)
        todo += [relative + b"/" + name if relative else name for name in reversed(listing.folders)]


def number(folder: str) -> str:
    """How many images are below a folder (an archive counts one), as far as is cheap."""
    total = 0
    for count in _counts(folder):
        total += count
        if total > _MOST_COUNTED:
            return f"over {_MOST_COUNTED} images"
    return f"{total} image{'s' * (total != 1)}"


def has_class_folders(folder: str) -> bool:
    """Whether a subfolder of a folder holds images."""
    return any(holds(folder, name) for name in look(folder).folders)
