"""Images in tar archives, as WebDataset keeps them: ``key.jpg`` beside ``key.cls`` (its class, a number).

An archive is read once for an index of its members (archive, offset, size), which is kept in the cache folder; then
any image is one read at its place. So an epoch's order, its split over ranks and processes, and a resume are what
they are for a folder. Nothing is ever unpacked, so no name can point outside; what cannot be used is skipped
and listed.
"""

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mocov3.data.sources.classes import remarks_on_missing
from mocov3.data.sources.index import cache_folder
from mocov3.data.sources.left_out import COMPRESSED
from mocov3.data.sources.members import Remarks, read_members
from mocov3.data.sources.scan import EXTENSIONS
from mocov3.errors import UserError, no_file

CLASSES_FILE = "classes.txt"
"""Beside the archives: names of the classes, a line each."""

_ENDINGS = (".tar",)
_MOST_FILES = 100_000
_VERSION = "4"  # of the index: it grows when other members or classes are found in the same archives
_SHARE_FROM = 8 << 20  # bytes of index from which processes share memory-mapped files
_RECORD = np.dtype([("archive", "<i4"), ("label", "<i4"), ("offset", "<i8"), ("size", "<i8"), ("name_end", "<i8")])


def is_shards(data: str) -> bool:
    """Whether ``data`` names archives: ``x.tar``, a glob, or a brace list of them."""
    return data.lower().endswith((*_ENDINGS, *COMPRESSED))


def expand(pattern: str) -> list[str]:
    """Files meant by a pattern with brace lists (``{000..127}``, ``{a,b}``) and globs, in order.

    Raises:
        UserError: if one is missing, or they are too many.
    """
    files: list[str] = []
    for name in _braces(pattern):
        matches = sorted(glob.glob(name)) if glob.has_magic(name) and not os.path.exists(name) else [name]
        if not matches:
            raise UserError(f"data {pattern}: no file is called {name}")
        files += matches
        if len(files) > _MOST_FILES:
            raise UserError(f"data {pattern}: means more than {_MOST_FILES} files")
    for name in files:
        if not os.path.isfile(name):
            raise UserError(f"data {pattern}: {name}: {no_file(name)}")
    return files


def _braces(pattern: str) -> Iterator[str]:
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if not braces or os.path.exists(pattern):
        yield pattern
        return
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", braces[1])
    if numbers:
        first, last = int(numbers[1]), int(numbers[2])
        if last < first or last - first >= _MOST_FILES:
            raise UserError(f"data {pattern}: {{{braces[1]}}} must increase, over at most {_MOST_FILES} numbers")
        choices = [str(i).zfill(len(numbers[1])) for i in range(first, last + 1)]
    else:
        choices = braces[1].split(",")
    for choice in choices:
        yield from _braces(pattern[: braces.start()] + choice + pattern[braces.end() :])


@dataclass
class Shards:
    """Images in archives."""

    archives: list[str]
    records: np.ndarray
    names: np.ndarray
    """uint8: the members' names, one after the other."""
    skipped: list[str]
    """What is left out or remarkable, a line each."""
    classes: list[str]
    file: str | None = None

    def __len__(self) -> int:
        return len(self.records)

    @property
    def labels(self) -> np.ndarray | None:
        """int32 class of every image (−1 for none), or ``None`` where there are none."""
        labels = self.records["label"]
        return None if not len(labels) or labels.max() < 0 else np.ascontiguousarray(labels)

    @property
    def digest(self) -> str:
        """sha256 over names, sizes and labels, in order."""
        parts = (self.names, self.records["size"], self.records["label"])
        return hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)).hexdigest()

    def file_bytes(self, index: int) -> int:
        """Size of the member."""
        return int(self.records[index]["size"])

    def read(self, index: int) -> bytes:
        """The member's bytes.

        Raises:
            OSError: if the archive is gone or has become shorter.
        """
        record = self.records[index]
        size = int(record["size"])
        with open(self.archives[record["archive"]], "rb") as file:
            file.seek(int(record["offset"]))
            data = file.read(size)
        if len(data) != size:
            raise OSError("the archive has become shorter than its index")
        return data

    def name(self, index: int) -> str:
        """The archive's name and the member's."""
        begin = int(self.records["name_end"][index - 1]) if index else 0
        member = self.names[begin : int(self.records["name_end"][index])].tobytes()
        return f"{os.path.basename(self.archives[self.records['archive'][index]])}/{os.fsdecode(member)}"

    def __getstate__(self) -> dict[str, object]:
        state = dict(self.__dict__)
        if self.file:
            state["records"] = state["names"] = None
        return state

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        if self.file:
            self.records, self.names = _mapped(self.file)


def open_shards(files: list[str]) -> Shards:
    """The images in ``files``, by their index, made now or found in the cache folder.

    Raises:
        UserError: if there is no image, or an archive is compressed.
    """
    for file in files:
        if file.lower().endswith(COMPRESSED):
            raise UserError(f"data {file}: is compressed; images in it cannot be reached one by one: unpack it to .tar")
    stamps = [(os.path.abspath(f), os.stat(f).st_size, os.stat(f).st_mtime_ns) for f in files]
    key = hashlib.sha256(json.dumps([_VERSION, EXTENSIONS, stamps]).encode()).hexdigest()[:32]
    base = str(cache_folder() / f"shards-{key}")
    try:
        records, names = _mapped(base)
        skipped = json.loads(Path(base + ".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        records, names, skipped = _index(files)
        _keep(base, records, names, skipped)
    if not len(records):
        why = f" ({skipped[0]})" if skipped else ""
        raise UserError(f"data {files[0]}: holds no image ({', '.join(EXTENSIONS[:10])} …){why}")
    skipped = [*skipped, *remarks_on_missing(files[0], records["label"])]
    shared = records.nbytes + names.nbytes >= _SHARE_FROM and os.path.exists(base + ".json")
    if not shared:
        records, names = np.array(records), np.array(names)
    return Shards(files, records, names, skipped, _classes(files[0], records["label"]), base if shared else None)


def _classes(first: str, labels: np.ndarray) -> list[str]:
    if labels.max() < 0:
        return []
    try:
        classes = (Path(first).parent / CLASSES_FILE).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        classes = []
    return classes if len(classes) > labels.max() else [str(i) for i in range(int(labels.max()) + 1)]


def _mapped(base: str) -> tuple[np.ndarray, np.ndarray]:
    records = np.load(base + "-records.npy", mmap_mode="r")
    names = np.load(base + "-names.npy", mmap_mode="r")
    if records.dtype != _RECORD or (len(records) and records["name_end"][-1] != len(names)):
        raise ValueError("not an index")
    return records, names


def _keep(base: str, records: np.ndarray, names: np.ndarray, skipped: list[str]) -> None:
    for ending, write in (
        ("-records.npy", lambda file: np.save(file, records)),
        ("-names.npy", lambda file: np.save(file, names)),
        (".json", lambda file: file.write(json.dumps(skipped).encode())),
    ):
        partial = f"{base}{ending}.{os.getpid()}.partial"
        try:
            with open(partial, "wb") as file:
                write(file)
            os.replace(partial, base + ending)
        except OSError:  # no cache: the next start reads the archives again
            return


def _index(files: list[str]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    rows: list[tuple[int, int, int, int, int]] = []
    names: list[bytes] = []
    remarks = Remarks()
    length = 0
    for number, file in enumerate(files):
        members, _ = read_members(file, remarks)
        for member in members:
            length += len(member.name)
            names.append(member.name)
            rows.append((number, member.label, member.offset, member.size, length))
    return np.array(rows, dtype=_RECORD), np.frombuffer(b"".join(names), np.uint8), remarks.all()
