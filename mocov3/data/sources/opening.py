"""Where images come from: folders, lists, several of them with fractions, or the embedded Fashion-MNIST.

Reading is by index. What is found on disk is one array (``mocov3.data.sources.index``), shared by all processes.
"""

import hashlib
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from mocov3.data.sources import archives, dicom, hub, tables
from mocov3.data.sources.classes import ordered, renumbered
from mocov3.data.sources.embedded import BUILT_IN, FashionMnist
from mocov3.data.sources.index import Index
from mocov3.data.sources.left_out import PASSED_OVER, cure
from mocov3.data.sources.lists import ENDINGS, read_list
from mocov3.data.sources.scan import EXTENSIONS, scan_tree
from mocov3.data.sources.splits import apart, choose, no_part, remark_on_mix
from mocov3.data.sources.tiles import Tiles, is_tiles
from mocov3.errors import UserError, no_file

SEPARATOR = "\n"
"""Between several sources in one text."""


@runtime_checkable
class Source(Protocol):
    """Images by index. Sent to loader processes, so it must pickle to something small."""

    @property
    def labels(self) -> np.ndarray | None:
        """int32 class of every image, −1 where it has none; ``None`` where none has one.

        Of several findings an image (``mocov3.data.sources.findings``): (images, findings), 1, 0, −1 if not known.
        """

    @property
    def classes(self) -> list[str]:
        """Names of the classes; empty without labels."""

    @property
    def digest(self) -> str:
        """sha256 over names and labels: tells whether a resumed run sees the same images."""

    def __len__(self) -> int:
        """Number of images."""

    def read(self, index: int) -> bytes | np.ndarray:
        """File bytes or uint8 pixels of an image. Raises OSError if the file is gone."""

    def name(self, index: int) -> str:
        """What to call the image in messages."""


@runtime_checkable
class Grouped(Protocol):
    """A source that can say which of its images belong together: what a source may have beside the rest."""

    def groups(self, field: str) -> np.ndarray | None:
        """Name of every image's group, empty where it has none, by a field of this name; ``None`` without such a field.

        ``""`` asks for the groups that the images have by themselves, which count unless others are asked for.
        """


def open_source(data: str, split: str = "train") -> Source:
    """The images named by ``data``: a folder, a list, archives, tables, or the built-in ``fashion-mnist[:ROOT]``; or
    several, a line each, with the fraction of their images that an epoch uses: ``DIR1``, ``DIR2:0.3``.

    Which images of a folder are its ``train`` and its ``val`` part, ``mocov3.data.sources.splits`` decides: DIR/train
    and DIR/val where they are. What is left out or remarkable is said in ``source.skipped``, a line each.

    Raises:
        UserError: if one is missing, unreadable, or holds no image.
    """
    names = [name for name in data.split(SEPARATOR) if name]
    if not names:
        raise UserError("no data: name a folder of images, or fashion-mnist")
    parts = [_fraction(name) for name in names]
    sources = [_open_one(name, split) for name, _ in parts]
    if len(parts) == 1 and parts[0][1] == 1:
        return sources[0]
    return Roots(sources, [fraction for _, fraction in parts])


def has_unseen(data: str) -> bool:
    """Whether every source named by ``data`` has validation images that are not those of its ``train`` part."""
    return all(_has_unseen(_fraction(name)[0]) for name in data.split(SEPARATOR) if name)


def _has_unseen(data: str) -> bool:
    return apart(data) if os.path.isdir(data) else data.partition(":")[0] == BUILT_IN


def open_unseen(data: str) -> Source:
    """The ``val`` part of ``data``, where it is not what ``train`` gives (as of a folder with a test part only).

    Raises:
        UserError: if there is none.
    """
    source = open_source(data, "val")
    if not has_unseen(data):
        raise UserError(
            f"data {data.replace(SEPARATOR, ' ')}: has one part only, so there are no other images to "
            "validate on; name a folder that holds train/ and val/"
        )
    return source


def _fraction(name: str) -> tuple[str, float]:
    """``DIR:0.3`` → (DIR, 0.3); a name that exists as it stands has fraction 1."""
    head, _, tail = name.rpartition(":")
    if not head or os.path.exists(name) or not re.fullmatch(r"[-+.\d][-+.\deE]*", tail):
        return name, 1.0
    try:
        fraction = float(tail)
    except ValueError:
        return name, 1.0
    if not 0 < fraction <= 1:
        raise UserError(
            f"data {name}: the fraction of a folder's images in an epoch is above 0 and at most 1, "
            f"not {tail}; to raise one folder, lower the others"
        )
    return head, fraction


def _open_one(data: str, split: str) -> Source:
    name, _, root = data.partition(":")
    if name == BUILT_IN and not os.path.exists(data):
        return FashionMnist(split, root or None)
    place = Path(data)
    # os.path answers no for a name that is too long or holds a zero byte, where Path raises
    is_folder = os.path.isdir(data)
    if os.path.isfile(data) and place.suffix.lower() in ENDINGS:
        if split == "val":
            raise UserError(f"data {data}: is a list and has no val part; name a folder that holds train and val")
        return _told(Folder(*read_list(place)), by_folder=False)
    if packed := open_packed(data, split):
        return packed
    if not is_folder:
        if os.path.exists(data):
            if not os.path.isfile(data):
                raise UserError(f"data {data}: {no_file(data)}")
            image = place.suffix.lower() in EXTENSIONS
            lists = f"a list ends in {', '.join(ENDINGS)}"
            hint = "name the folder that holds the images" if image else cure(place.name) or lists
            raise UserError(f"data {data}: is not a folder; {hint}")
        raise UserError(f"data {data}: there is no such folder; name a folder of images, or fashion-mnist")
    part = choose(data, split)
    if part is None:
        raise no_part(data, split)
    names = hub.class_names(data)
    if part.files:
        return open_files(list(part.files), list(part.remarks), names)
    folder = Folder(*scan_tree(Path(part.place), part.without))
    beside = hub.labelled(data, part.place, folder.index, names)
    if beside is None:
        return _told(folder, part.remarks)
    index, classes, said = beside
    if not classes:
        return _told(folder, [*part.remarks, *said])
    folder.index, folder.classes = index, classes
    folder.skipped = [line for line in folder.skipped if " class folders: " not in line]
    return _told(folder, [*part.remarks, *said], by_folder=False)


def _told(folder: "Folder", remarks: Sequence[str] = (), *, by_folder: bool = True) -> Source:
    """A folder or list as what it is by its files, with remarks on it; ``by_folder``: its subfolders are classes."""
    special = dicom.opened(folder.root, folder.index, folder.classes, folder.skipped, by_folder=by_folder)
    if special is None:
        folder.skipped = [*remarks, *folder.skipped]
        return folder
    if remarks:  # they name folders and files
        said = f"{folder.root}: {len(remarks)} remarks are not shown, as names in them may be patients'"
        special.skipped.insert(0, said)
    return special


def scan(folder: Path) -> "Folder":
    """Every image below ``folder``, sorted by path; its subfolders are the classes.

    Raises:
        UserError: if the folder is missing, unreadable, or holds no image.
    """
    return Folder(*scan_tree(folder))


@dataclass
class Folder:
    """Images below a folder."""

    root: str
    index: Index
    classes: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """What is left out or remarkable, a line each."""

    def __len__(self) -> int:
        return len(self.index)

    @property
    def labels(self) -> np.ndarray | None:
        """Class of every image, or ``None``."""
        return self.index.labels

    @property
    def digest(self) -> str:
        """sha256 over names and labels."""
        return self.index.digest

    def path(self, index: int) -> bytes:
        """The file, as the system names it."""
        return os.path.join(os.fsencode(self.root), self.index.path(index))

    def read(self, index: int) -> bytes:
        """The file's bytes."""
        path = self.path(index)
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would wait for ever, a device never end
            raise OSError("is not a regular file")
        with open(path, "rb") as file:
            return file.read()

    def file_bytes(self, index: int) -> int:
        """Size of the file, without reading it."""
        return os.stat(self.path(index)).st_size

    def name(self, index: int) -> str:
        """The path below the folder."""
        return os.fsdecode(self.index.path(index))


class Roots:
    """Several sources after each other; an epoch uses a fraction of each one's images, drawn afresh each time.

    Classes of one name are one class.
    """

    def __init__(self, parts: Sequence[Source], fractions: Sequence[float]) -> None:
        self.parts, self.fractions = list(parts), list(fractions)
        self._ends = np.cumsum([len(p) for p in self.parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @cached_property
    def classes(self) -> list[str]:
        """Names of the classes: those of the first part, if all parts have the same, else of all in their order."""
        first = self.parts[0].classes
        return (
            first if all(p.classes == first for p in self.parts) else ordered(n for p in self.parts for n in p.classes)
        )

    @cached_property
    def labels(self) -> np.ndarray | None:
        """Class of every image, or ``None``."""
        return (
            np.concatenate([renumbered(p.labels, p.classes, self.classes, len(p)) for p in self.parts])
            if self.classes
            else None
        )

    @property
    def digest(self) -> str:
        """sha256 over the parts and their fractions."""
        text = "\n".join(f"{p.digest} {fraction}" for p, fraction in zip(self.parts, self.fractions, strict=True))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def skipped(self) -> list[str]:
        """What is left out of the parts or remarkable, a line each."""
        return [line for part in self.parts for line in getattr(part, "skipped", [])]

    def _place(self, index: int) -> tuple[int, int]:
        part = int(np.searchsorted(self._ends, index, side="right"))
        return part, index - (int(self._ends[part - 1]) if part else 0)

    def read(self, index: int) -> bytes | np.ndarray:
        """Bytes or pixels of an image."""
        part, place = self._place(index)
        return self.parts[part].read(place)

    def file_bytes(self, index: int) -> int:
        """As the part says."""
        part, place = self._place(index)
        return file_bytes(self.parts[part], place)

    def groups(self, field: str) -> np.ndarray | None:
        """As the parts say; an image of a part without such a field has no group."""
        named = [field_groups(part, field) for part in self.parts]
        if all(names is None for names in named):
            return None
        return np.concatenate(
            [np.full(len(p), "") if n is None else n for p, n in zip(self.parts, named, strict=True)], dtype=object
        )

    def name(self, index: int) -> str:
        """The part's number and the image's name in it."""
        part, place = self._place(index)
        return f"{part + 1}:{self.parts[part].name(place)}"

    def path_name(self, index: int) -> str:
        """As ``name``, of what a list may call the image."""
        part, place = self._place(index)
        return f"{part + 1}:{called(self.parts[part], place)}"


class Subset:
    """Some images of a source, by increasing index."""

    def __init__(self, whole: Source, indices: np.ndarray) -> None:
        self.whole, self.indices = whole, np.asarray(indices)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def classes(self) -> list[str]:
        """Names of the classes."""
        return self.whole.classes

    @property
    def labels(self) -> np.ndarray | None:
        """Class of every image, or ``None``."""
        return None if self.whole.labels is None else self.whole.labels[self.indices]

    @property
    def digest(self) -> str:
        """sha256 over the whole and which of it."""
        chosen = np.ascontiguousarray(self.indices.astype(np.int64))
        return hashlib.sha256(self.whole.digest.encode() + chosen.tobytes()).hexdigest()

    @property
    def skipped(self) -> list[str]:
        """What is left out of the whole or remarkable, a line each."""
        return list(getattr(self.whole, "skipped", []))

    def read(self, index: int) -> bytes | np.ndarray:
        """Bytes or pixels of an image."""
        return self.whole.read(int(self.indices[index]))

    def file_bytes(self, index: int) -> int:
        """As the whole says."""
        return file_bytes(self.whole, int(self.indices[index]))

    def groups(self, field: str) -> np.ndarray | None:
        """As the whole says."""
        named = field_groups(self.whole, field)
        return None if named is None else named[self.indices]

    def name(self, index: int) -> str:
        """The image's name in the whole."""
        return self.whole.name(int(self.indices[index]))

    def path_name(self, index: int) -> str:
        """What a list may call the image."""
        return called(self.whole, int(self.indices[index]))


def called(source: Source, index: int) -> str:
    """What a list of the user's may call an image: its name, or a path that is not to be shown (``path_name``)."""
    known = getattr(source, "path_name", None)
    return str(known(index)) if known is not None else source.name(index)


def hides_paths(source: Source) -> bool:
    """Whether the paths of a source's images are not to be shown, as a patient's name may be among them."""
    return len(source) > 0 and called(source, 0) != source.name(0)


def file_bytes(source: Source, index: int) -> int:
    """Size of an image's file where the source knows it without reading, else 0."""
    known = getattr(source, "file_bytes", None)
    return int(known(index)) if known is not None else 0


def field_groups(source: Source, field: str) -> np.ndarray | None:
    """Names of the images' groups by a field, where the source has it; see ``Grouped``."""
    return source.groups(field) if isinstance(source, Grouped) else None


def file_name(source: Source, index: int) -> str:
    """The whole path of an image's file, where it has one, else what a list calls it; maybe not to be shown."""
    while True:
        if isinstance(source, Subset):
            index = int(source.indices[index])
            source = source.whole
        elif isinstance(source, Roots):
            part, index = source._place(index)
            source = source.parts[part]
        else:
            break
    known = getattr(source, "path", None)
    return os.path.abspath(os.fsdecode(known(index))) if known is not None else called(source, index)


def fractions(source: Source) -> list[tuple[int, float]]:
    """(images, fraction an epoch uses) of each part of a source, in order."""
    if isinstance(source, Roots):
        return [(len(p), fraction) for p, fraction in zip(source.parts, source.fractions, strict=True)]
    if isinstance(source, Subset) and isinstance(source.whole, Roots):
        counts = np.diff(np.searchsorted(source.indices, source.whole._ends, side="left"), prepend=0)
        return list(zip(counts.tolist(), source.whole.fractions, strict=True))
    return [(len(source), 1.0)]


def open_packed(data: str, split: str) -> Source | None:
    """Images in ``data`` if it names archives or tables, one, by a glob or by braces: all of them, as named.

    Raises:
        UserError: if they cannot be used, or the validation part is wanted.
    """
    if os.path.isdir(data) or not (archives.is_shards(data) or tables.is_parquet(data)):
        return None
    if split == "val":
        raise UserError(f"data {data}: has no val part; name a folder that holds train/ and val/")
    files = archives.expand(data)
    return open_files(files, remark_on_mix(data, files))


def open_files(files: list[str], remarks: list[str], names: Sequence[str] = ()) -> Source:
    """Images in archives or in tables; ``remarks`` come before those on the files, ``names`` are those of classes.

    Raises:
        UserError: if they cannot be used.
    """
    if not tables.is_parquet(files[0]):
        shards = archives.open_shards(files)
        shards.skipped = [*remarks, *shards.skipped]
        return shards
    if is_tiles(tables.columns(files[0])):
        tiles = Tiles(files)
        tiles.skipped = [*remarks, *tiles.skipped]
        return tiles
    table = tables.Parquet(files, names)
    rows = tables.used_rows(table)
    passed = [f"{files[0]}: {PASSED_OVER.format(f'{n} rows')}"] if (n := len(table) - len(rows)) else []
    table.skipped = [*remarks, *passed, *table.skipped]
    return Subset(table, rows) if passed else table
