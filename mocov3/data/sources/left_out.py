"""What is left out of a data set: folders and files that are passed over, and files that are not taken for images.

One rule for folders, archives and tables; ``LeftOut`` counts the files by ending and says what to do about them.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from mocov3.data.views import formats
from mocov3.errors import printable

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
"""Archives whose members cannot be reached one by one."""
_CURES = (
    (
        "unpack, or re-pack as plain .tar: no random access into these",
        f"{' '.join(COMPRESSED)} .tar.lz4 .zip .rar .7z .gz .bz2 .xz .zst",
    ),
    ("name the files, or the folder that holds them", ".tar .parquet"),
    (
        "write their images to files, .tar or .parquet",
        ".arrow .feather .tfrecord .lmdb .mdb .rec .h5 .hdf5 .npy .npz .mat .pkl .pickle .pt .beton",
    ),
    (
        "convert to .png, .tif or .jpg",
        ".dng .cr2 .cr3 .nef .arw .raf .orf .rw2 .nii .nii.gz .svs .ndpi .mrxs .czi .nd2 .lif "
        ".svg .pdf .eps .psd .xcf .exr .hdr .jxr .fits",
    ),
    ("weights", ".pth.tar .pt.tar"),
    ("save their frames as images", ".mp4 .mov .avi .mkv .webm .m4v .mpg .mpeg .wmv"),
)
"""What to do about files that may hold images, and their endings; ``formats`` knows of those that need its extra."""
_CURE = {ending: cure for cure, endings in _CURES for ending in endings.split()}
_OTHERS = "not taken for images, by their names; to use them, rename to .jpg or the like, or name them in a list"
_PASSED_OVER = {
    "__macosx",
    "@eadir",
    "@__thumb",
    "@recycle",
    "#recycle",
    "$recycle.bin",
    "system volume information",
    "lost+found",
}
"""Folders made by macOS, Windows, Linux and NAS systems: their images are not the user's."""
MAY_BE_PASSED_OVER = f"(?i)(^|/)(\\.|{'|'.join(map(re.escape, sorted(_PASSED_OVER)))})"
"""An expression that every path matches which is passed over: quicker to ask for many."""
_SYSTEM_FILES = {b"Thumbs.db", b"thumbs.db", b"Desktop.ini", b"desktop.ini"}
_SYSTEM_FILES |= {b"metadata.csv", b"metadata.jsonl", b"README.md", b"dataset_infos.json"}  # read, if it is (hub)
_USUAL = re.compile("[0-9]*[a-z][0-9a-z_~-]{0,11}")
_DOUBLE = {case for ending in (b".tar", b".gz", b".bz2", b".xz", b".zst", b".lz4") for case in (ending, ending.upper())}
_NAMED = 5
PASSED_OVER = "{} in hidden folders, or added by macOS or NAS systems, are passed over"
"""What is said of members and rows; {} stands for how many of which."""


def cure(file: str) -> str | None:
    """What to do about a file that is named but not read; ``None`` where its ending does not tell."""
    ending = _ending(file)
    return formats.cure(ending) or _CURE.get(ending)


def has_ending(file: bytes) -> bool:
    """Whether a name ends in what is usually an ending, and not in a part of a name or number."""
    return bool(_ending(os.fsdecode(file[file.rfind(b".") :] if b"." in file else b"")))


def hidden(folder: bytes) -> bool:
    """Whether a folder of this name is passed over."""
    return folder.startswith(b".") or os.fsdecode(folder).lower() in _PASSED_OVER


def passed_over(parts: Sequence[str]) -> bool:
    """Whether a member of an archive or table, given as the parts of its path, is one that a folder's scan skips."""
    *folders, base = parts or ("",)
    ways = (".", "..", "/")  # no hidden folders
    return base.startswith("._") or any(hidden(os.fsencode(f)) for f in folders if f not in ways)


@dataclass
class LeftOut:
    """Files that are not taken for images."""

    counts: dict[str, tuple[int, str]] = field(default_factory=dict)
    """By ending: how many, and the first by name."""

    def add(self, files: Iterable[bytes], place: str = "") -> None:
        """More files of one folder; ``place`` goes before their names."""
        names = sorted(set(files) - _SYSTEM_FILES)
        ends = [name[name.rfind(b".") :] for name in names]
        if not _DOUBLE.isdisjoint(ends):  # .tar.gz
            ends = [b".".join(n.rsplit(b".", 2)[-2:]) if e in _DOUBLE else e for n, e in zip(names, ends, strict=True)]
        first = dict(zip(reversed(ends), reversed(names), strict=True))
        for end, number in Counter(ends).items():
            self._count(_ending(os.fsdecode(end)), number, place + os.fsdecode(first[end]))

    def merge(self, other: "LeftOut", place: str) -> None:
        """Those of a folder, too."""
        for ending, (number, first) in other.counts.items():
            self._count(ending, number, place + first)

    def _count(self, ending: str, number: int, name: str) -> None:
        before, first = self.counts.get(ending, (0, name))
        self.counts[ending] = before + number, name if name < first else first

    def lines(self, *, others: bool = True) -> list[str]:
        """A line for each thing to do, that for the most files first; ``others``: those of unknown endings too."""
        by_cure: dict[str, list[tuple[int, str, str]]] = {}
        for ending, (number, first) in self.counts.items():
            by_cure.setdefault(cure(ending) or _OTHERS, []).append((-number, ending, first))
        groups = sorted((sum(number for number, _, _ in kinds), cure, sorted(kinds)) for cure, kinds in by_cure.items())
        return [_line(cure, kinds) for _, cure, kinds in groups if others or cure != _OTHERS]


def _line(cure: str, kinds: list[tuple[int, str, str]]) -> str:
    named = [f"{-number} {ending or 'without an ending'}" for number, ending, _ in kinds[:_NAMED]]
    if rest := -sum(number for number, _, _ in kinds[_NAMED:]):
        named.append(f"{rest} of other endings")
    return f"left out {', '.join(named)}: {cure}; first: {printable(kinds[0][2])}"


def _ending(end: str) -> str:
    """The ending that a name ends in, in lower case; empty where that is no usual one, but a part of a name."""
    *_, before, last = ("", "", *end.lower().split("."))
    double, single = f".{before}.{last}", f".{last}"
    return double if double in _CURE else single if "." in end and _USUAL.fullmatch(last) else ""
