"""Paths and labels of many images as one array, which processes share, and what is remembered of folders on disk.

A large index is a file of the user's cache folder, memory-mapped. Beside it lies what it was made from: every folder
with the time of its last change, so that opening a tree again asks each folder once and reads no names. Data folders
are never written to.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from mocov3.errors import UserError

_SHARE_FROM = 1 << 20  # bytes of index (about 20,000 images) from which it is a file of the cache folder
_RACY = 2_000_000_000  # ns: a folder changed so shortly before it was read may change again within the same timestamp
_FORMAT = 3


@dataclass(frozen=True)
class Chunk:
    """Images of one folder: lengths of their paths, the paths joined, their label (−1: none)."""

    lengths: np.ndarray
    joined: bytes
    label: int


@dataclass
class Index:
    """Paths and labels in one uint8 array: count, offsets (int64), labels (int32, −1 for none), path bytes."""

    array: np.ndarray
    file: str | None = None
    known_digest: str | None = None

    @classmethod
    def build(cls, paths: Sequence[bytes], labels: np.ndarray | None) -> "Index":
        """Pack ``paths``; above a size the array is a memory-mapped file of the cache folder."""
        lengths = np.fromiter(map(len, paths), np.int64, len(paths))
        numbers = np.full(len(paths), -1, np.int32) if labels is None else labels.astype(np.int32)
        return cls._packed(lengths, numbers, [b"".join(paths)])

    @classmethod
    def of_chunks(cls, chunks: Sequence[Chunk]) -> "Index":
        """Pack the images of several folders, in order."""
        lengths = np.concatenate([c.lengths for c in chunks]).astype(np.int64)
        numbers = np.repeat(np.array([c.label for c in chunks], np.int32), [len(c.lengths) for c in chunks])
        return cls._packed(lengths, numbers, [c.joined for c in chunks])

    @classmethod
    def _packed(cls, lengths: np.ndarray, labels: np.ndarray, joined: Sequence[bytes]) -> "Index":
        n = len(lengths)
        base = 16 + 12 * n
        array = np.empty(base + sum(map(len, joined)), np.uint8)
        array[:8].view(np.int64)[0] = n
        offsets = array[8 : 16 + 8 * n].view(np.int64)
        offsets[0] = 0
        np.cumsum(lengths, out=offsets[1:])
        array[16 + 8 * n : base].view(np.int32)[:] = labels
        place = base
        for part in joined:
            array[place : place + len(part)] = np.frombuffer(part, np.uint8)
            place += len(part)
        index = cls(array)
        return index.shared() if array.nbytes >= _SHARE_FROM else index

    def shared(self) -> "Index":
        """The same index as a memory-mapped file, which pickles to its name; itself where that cannot be written."""
        try:
            file = cache_folder() / f"index-{self.digest[:32]}.npy"
            if not file.exists():
                write_atomically(file, lambda f: np.save(f, self.array))
        except (OSError, UserError):  # no room: every process holds its own
            return self
        return Index(np.load(file, mmap_mode="r"), str(file), self.digest)

    def __getstate__(self) -> dict[str, object]:
        there = self.file is not None and os.path.exists(self.file)  # else the cache folder was emptied meanwhile
        array = None if there else np.array(self.array)
        return {"array": array, "file": self.file if there else None, "known_digest": self.known_digest}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.file = state["file"]  # type: ignore[assignment]
        self.known_digest = state["known_digest"]  # type: ignore[assignment]
        self.array = np.load(self.file, mmap_mode="r") if self.file else state["array"]  # type: ignore[assignment]

    def __len__(self) -> int:
        return int(self.array[:8].view(np.int64)[0])

    def path(self, index: int) -> bytes:
        """Path of an image, relative to its root or absolute."""
        n = len(self)
        start, end = self.array[8 : 16 + 8 * n].view(np.int64)[index : index + 2].tolist()
        base = 16 + 12 * n
        return self.array[base + start : base + end].tobytes()

    @cached_property
    def labels(self) -> np.ndarray | None:
        """int32 classes (−1 for none), or ``None`` where there are none."""
        n = len(self)
        labels = self.array[16 + 8 * n : 16 + 12 * n].view(np.int32)
        return None if n and labels.max() < 0 else labels

    @property
    def digest(self) -> str:
        """sha256 of the whole index."""
        if self.known_digest is None:
            self.known_digest = hashlib.sha256(np.ascontiguousarray(self.array).data).hexdigest()
        return self.known_digest


# --- what is remembered of a tree -------------------------------------------------------------------------


def remember(
    root: bytes,
    settings: str,
    began_ns: int,
    changed_ns: dict[bytes, int],
    classes: list[str],
    remarks: list[str],
    index: Index,
) -> None:
    """Keep that the tree below ``root`` gave ``index``, with every folder (relative) and its time of last change.

    ``began_ns`` is the time before the first folder was read. Small indices and unwritable caches are left alone.
    """
    if index.file is None:
        return
    folders = sorted(changed_ns)
    entry = {
        "format": _FORMAT,
        "root": os.fsdecode(root),
        "settings": settings,
        "began_ns": began_ns,
        "digest": index.digest,
        "file": os.path.basename(index.file),
        "classes": classes,
        "remarks": remarks,
        "folders": [os.fsdecode(f) for f in folders],
        "changed_ns": [changed_ns[f] for f in folders],
    }
    try:
        write_atomically(_entry_file(root, settings), lambda f: f.write(json.dumps(entry).encode("ascii")))
    except OSError:
        return


def recall(root: bytes, settings: str) -> tuple[Index, list[str], list[str]] | None:
    """Index, classes and remarks of the tree below ``root`` if it is as it was when it was remembered."""
    try:
        entry = json.loads(_entry_file(root, settings).read_bytes())
        if (entry["format"], entry["root"], entry["settings"]) != (_FORMAT, os.fsdecode(root), settings):
            return None
        limit = entry["began_ns"] - _RACY
        for folder, changed in zip(entry["folders"], entry["changed_ns"], strict=True):
            if changed > limit or os.stat(os.path.join(root, os.fsencode(folder))).st_mtime_ns != changed:
                return None
        file = cache_folder() / os.path.basename(entry["file"])
        array = np.load(file, mmap_mode="r")
        n = int(array[:8].view(np.int64)[0])
        # a file cut short or of another program: the last offset must be its last byte
        if array.dtype != np.uint8 or 16 + 12 * n + int(array[8 : 16 + 8 * n].view(np.int64)[n]) != len(array):
            return None
        return Index(array, str(file), str(entry["digest"])), list(entry["classes"]), list(entry["remarks"])
    except (OSError, ValueError, KeyError, TypeError, IndexError, UserError):
        return None


def _entry_file(root: bytes, settings: str) -> Path:
    name = hashlib.sha256(os.path.realpath(root) + b"\0" + settings.encode()).hexdigest()[:32]
    return cache_folder() / f"tree-{name}.json"


def write_atomically(file: Path, write: object) -> None:
    """Let ``write(open binary file)`` make ``file`` atomically.

    Raises:
        OSError: if the folder cannot be written or is full.
    """
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as f:
            write(f)  # type: ignore[operator]
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def cache_folder() -> Path:
    """The user's cache folder of this program, made if missing; a temporary one where that cannot be written."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    for place in (Path(base), Path(tempfile.gettempdir())):
        folder = place / "mocov3"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    raise UserError(f"neither {base} nor {tempfile.gettempdir()} can be written; set XDG_CACHE_HOME")
