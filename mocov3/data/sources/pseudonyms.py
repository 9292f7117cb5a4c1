"""Hashes in place of what would tell who an image is of: elements of DICOM, names of files and folders."""

import hashlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pydicom

DIGITS = 16
"""Of a hash."""


def key_of(ds: "pydicom.Dataset", names: Sequence[str]) -> str:
    """A hash of the first of some elements that says something; '' where none does."""
    for name in names:
        if value := str(ds.get(name) or "").strip():
            return _hashed(f"{name}\0{value}".encode(errors="surrogatepass"))
    return ""


def own_key(path: bytes) -> str:
    """The key of a file that names no patient: a group of its own."""
    return _hashed(b"file\0" + path)


def told_apart(place: bytes, path: bytes, group: str) -> str:
    """A group's key; a file's own by its whole path, as another folder may have a file of the same path below it.

    An index keeps it by the path below the folder, so that a set may be moved between a run and its resuming.
    """
    return own_key(os.path.join(place, path)) if group == own_key(path) else group


def image_name(place: str, path: bytes, frame: int) -> str:
    """What to call an image: by the folder's own name and the path below it, and the frame of a file of several.

    So images of two parts of a set are called differently, wherever the set lies.
    """
    folder = os.path.basename(os.path.abspath(os.fsencode(place)))
    hashed = _hashed(os.path.join(folder, path))
    return f"dicom-{hashed}:{frame}" if frame > 0 else f"dicom-{hashed}"


def nameless(remark: str) -> str:
    """A remark on a folder without the example at its end, whose name may be a patient's."""
    return remark.partition("; first: ")[0]


def _hashed(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:DIGITS]
