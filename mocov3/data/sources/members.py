"""What a tar archive holds: images, the class beside each, and remarks on what is left out.

WebDataset's rule joins the files of one sample: they share a key, the path up to the first dot of the base name. Names
with dots of their own (``frame.0.jpg``, ``frame.1.jpg`` …) break it: all of these share the key ``frame``. So where a
key holds several images or several classes of one ending, the key of these goes up to the last dot. A class that could
belong to more than one image is given to none.
"""

import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import IO, Any

from mocov3.data.sources.left_out import PASSED_OVER, LeftOut, passed_over
from mocov3.data.sources.scan import EXTENSIONS
from mocov3.data.sources.splits import split_of_folder
from mocov3.errors import nature, printable

_LABEL_BYTES = 20
_ANNOTATIONS = {
    "seg",
    "segm",
    "segs",
    "segmentation",
    "mask",
    "masks",
    "depth",
    "disparity",
    "trimap",
    "gt",
    "groundtruth",
    "annot",
    "annotation",
    "annotations",
    "labelids",
    "labelmap",
    "labelmask",
    "instanceids",
    "panoptic",
}
"""Words between the dots of a name (``0001.seg.png``) that say: about an image, not one."""
_BESIDE = _ANNOTATIONS | {
    "label",
    "labels",
    "alpha",
    "matte",
    "normal",
    "normals",
    "flow",
    "edge",
    "edges",
    "semantic",
    "instance",
}
"""Words that say so only where the image itself lies beside: ``x.normal.png`` alone may be an image."""


@dataclass
class Member:
    """An image in an archive."""

    name: bytes
    offset: int
    size: int
    label: int = -1


@dataclass
class Remarks:
    """Remarks on archives: lines on single members, and counts over all archives with the first of each kind."""

    lines: list[str] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)
    _counts: dict[str, tuple[int, str]] = field(default_factory=dict)

    def count(self, kind: str, example: str, number: int = 1) -> None:
        """``number`` members more of a kind; ``kind`` holds {} for the count."""
        before, first = self._counts.get(kind, (0, printable(example)))
        self._counts[kind] = before + number, first

    def all(self) -> list[str]:
        """Lines, then a line a kind."""
        counts = [f"{kind.format(number)}; first: {first}" for kind, (number, first) in self._counts.items()]
        return self.lines + counts + self.left_out.lines()


def read_members(file: str, remarks: Remarks | None = None) -> tuple[list[Member], list[str]]:
    """Images of one archive, with the classes beside them; and remarks, a line each.

    Args:
        file: the archive.
        remarks: where to add those of this archive, so that counts go over several; then the lines are theirs.
    """
    remarks = Remarks() if remarks is None else remarks
    members: list[Member] = []
    classes: list[tuple[str, int]] = []
    where = printable(os.path.basename(file))
    try:
        length = os.path.getsize(file)
        with open(file, "rb") as raw, tarfile.open(fileobj=raw, mode="r:") as archive:
            for info in _members(archive):
                name = printable(info.name)
                path = PurePosixPath(info.name)
                ending = path.suffix.lower()
                if info.isdir():
                    continue
                if passed_over(path.parts):
                    remarks.count(PASSED_OVER.format("{} members"), f"{where}: {name}")
                elif not info.isreg() or info.issparse():
                    remarks.count("{} links, devices or sparse files are left out", f"{where}: {name}")
                elif ".." in path.parts or info.name.startswith(("/", "\\")):
                    remarks.count("{} files are left out, as their names lead out of the archive", f"{where}: {name}")
                elif info.offset_data + info.size > length:
                    remarks.lines.append(f"{where}: {name}: is cut off")
                elif ending in EXTENSIONS:
                    members.append(Member(os.fsencode(info.name), info.offset_data, info.size))
                elif ending == ".cls" and info.size <= _LABEL_BYTES:
                    raw.seek(info.offset_data)
                    text = raw.read(info.size).strip()
                    if text.isdigit() and int(text) < 2**31:
                        classes.append((info.name, int(text)))
                    else:
                        remarks.count("{} .cls files hold no number, which is all they may", f"{where}: {name}")
                elif not path.name.startswith("."):
                    folder = printable(info.name.removesuffix(path.name))
                    remarks.left_out.add([os.fsencode(path.name)], f"{where}: {folder}")
            if members and archive.offset >= length:
                remarks.count("{} archives end without an end mark: were they cut short?", where)
    except Exception as error:  # a damaged header can make the reader stumble anywhere
        reason = printable(str(error) or type(error).__name__)
        remarks.lines.append(f"{where}: {_nature(file) or f'{reason}; {len(members)} images before that are used'}")
    return _samples(members, classes, where, remarks), remarks.all()


def _nature(file: str) -> str:
    with open(file, "rb") as raw:
        return nature(raw.read(64))


def _members(archive: Any) -> Iterator[tarfile.TarInfo]:
    """Members in order, those of archives that were joined by ``cat`` too.

    Raises:
        tarfile.ReadError: at a damaged header, and at one that leads backwards (older Pythons go round for ever).
    """
    place = -1
    while True:
        info = archive.next()
        if info is None:
            following = _after_zeros(archive.fileobj, archive.offset)
            if following is None:
                return
            if following == archive.offset:
                raise tarfile.ReadError("a header is damaged")
            archive.offset = following
            continue
        archive.members = []  # all of them would be kept
        if archive.offset <= place or info.size < 0:
            raise tarfile.ReadError(f"the header of {printable(info.name)} leads backwards")
        place = archive.offset
        yield info


def _after_zeros(raw: IO[bytes], place: int) -> int | None:
    """Where the next block that is not zero begins, from ``place`` on; ``None`` where there is none."""
    raw.seek(place)
    while chunk := raw.read(1 << 16):
        zeros = len(chunk) - len(chunk.lstrip(b"\0"))
        if zeros < len(chunk):
            return place + zeros // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        place += zeros
    return None


# --- members → samples ----------------------------------------------------------------------------------------


@dataclass
class _Sample:
    """Members that share a key: (ending with all its dots, the member) of images, (ending, class) of classes."""

    images: list[tuple[str, Member]] = field(default_factory=list)
    classes: list[tuple[str, int]] = field(default_factory=list)


def _samples(members: list[Member], classes: list[tuple[str, int]], where: str, remarks: Remarks) -> list[Member]:
    """The images that are left in, in the archive's order, with their classes."""
    samples: dict[str, _Sample] = {}
    for member in members:
        key, ending = _key(os.fsdecode(member.name))
        samples.setdefault(key, _Sample()).images.append((ending, member))
    for name, label in classes:
        key, ending = _key(name)
        samples.setdefault(key, _Sample()).classes.append((ending, label))
    out: set[int] = set()
    for key, sample in samples.items():
        out |= _leave_out_annotations(sample, where, remarks)
        _label(key, sample, where, remarks)
    remaining = [member for member in members if member.offset not in out]
    _say_parts(remaining, where, remarks)
    return remaining


def _key(name: str) -> tuple[str, str]:
    """WebDataset's key (the path up to the first dot of its last part), and the ending after it.

    ``./a`` is ``a``, and dots that begin a base name are of the key.
    """
    folder, _, base = name.removeprefix("./").rpartition("/")
    body = base.lstrip(".")
    stem, _, ending = body.partition(".")
    return f"{folder}/{base[: len(base) - len(body)]}{stem}", ending.lower()


def _words(ending: str) -> set[str]:
    """Words between the dots of an ending, in letters only: seg.png → seg."""
    return set(re.findall("[a-z]+", ending.rpartition(".")[0]))


def _leave_out_annotations(sample: _Sample, where: str, remarks: Remarks) -> set[int]:
    """Take masks, depths and the like out of a sample; their places in the archive."""
    if all("." not in ending for ending, _ in sample.images):
        return set()
    beside = any(not _words(ending) & _BESIDE for ending, _ in sample.images)
    about = [(e, m) for e, m in sample.images if _words(e) & (_BESIDE if beside else _ANNOTATIONS)]
    for _, member in about:
        remarks.count(
            "{} masks or the like beside images are left out (.seg.png, .mask.png, .depth.png …)"
            if beside
            else "{} files are left out, as their names say mask or annotation and no image lies beside them",
            f"{where}: {os.fsdecode(member.name)}",
        )
    out = {member.offset for _, member in about}
    sample.images = [(e, m) for e, m in sample.images if m.offset not in out]
    return out


def _label(key: str, sample: _Sample, where: str, remarks: Remarks) -> None:
    """Give the images of a sample their class."""
    for raw, number in Counter(member.name for _, member in sample.images).items():
        if number > 1:
            remarks.count(
                "{} images have the name of an earlier member; all are used", f"{where}: {os.fsdecode(raw)}", number - 1
            )
    if not sample.classes:
        return
    if not sample.images:
        remarks.count(
            "{} .cls files lie beside no image",
            f"{where}: {key.lstrip('/')}.{sample.classes[0][0]}",
            len(sample.classes),
        )
        return
    by_stem: dict[str, set[int]] = {}
    for ending, label in sample.classes:
        by_stem.setdefault(_stem(ending), set()).add(label)
    _say_repeated(key, sample, by_stem, where, remarks)
    if len(by_stem) == 1 and _of_one_sample(next(iter(by_stem)), {ending for ending, _ in sample.images}):
        _give(next(iter(by_stem.values())), [member for _, member in sample.images])
        return
    taken: set[str] = set()
    for ending, member in sample.images:
        stem = _stem(ending)
        taken.add(stem)
        _give(by_stem.get(stem, set()), [member])
    dotted = [member for ending, member in sample.images if _stem(ending) and member.label >= 0]
    if dotted:
        remarks.count(
            "{} images share their name up to the first dot with others: their .cls is the one that is alike "
            "up to the last dot",
            f"{where}: {os.fsdecode(dotted[0].name)}",
            len(dotted),
        )
    if lone := sorted(set(by_stem) - taken):
        name = ".".join(filter(None, (key.lstrip("/"), lone[0], "cls")))
        remarks.count("{} .cls files lie beside no image", f"{where}: {name}", len(lone))


def _stem(ending: str) -> str:
    """What lies between the key and the last dot: 0.jpg → 0, jpg → nothing."""
    return ending.rpartition(".")[0]


def _of_one_sample(stem: str, endings: set[str]) -> bool:
    """Whether the only class of a key is that of all its images.

    It is where it is named by the key alone (``key.cls`` beside ``key.left.jpg`` and ``key.right.jpg``), as all images
    are, or where there is one plain image, ``key.jpg``.
    """
    return not stem or {_stem(ending) for ending in endings} in ({stem}, {""})


def _give(labels: set[int], members: list[Member]) -> None:
    """The class, unless there is none or several contradict each other."""
    if len(labels) == 1:
        for member in members:
            member.label = next(iter(labels))


def _say_repeated(key: str, sample: _Sample, by_stem: dict[str, set[int]], where: str, remarks: Remarks) -> None:
    if len(by_stem) == len(sample.classes):
        return
    for stem, labels in by_stem.items():
        name = ".".join(filter(None, (key.lstrip("/"), stem, "cls")))
        if len(labels) > 1:
            numbers = " and ".join(map(str, sorted(labels)[:3]))
            remarks.lines.append(
                f"{where}: {printable(name)}: is there more than once, with classes {numbers}; its image gets none"
            )
        elif sum(_stem(ending) == stem for ending, _ in sample.classes) > 1:
            remarks.count("{} .cls files are there more than once, with one class", f"{where}: {name}")


def _say_parts(samples: list[Member], where: str, remarks: Remarks) -> None:
    """Say that an archive holds folders of several splits: it is used whole."""
    parts: Counter[str] = Counter()
    for member in samples:
        for folder in os.fsdecode(member.name).split("/")[:-1]:
            if split := split_of_folder(folder):
                parts[split] += 1
                break
    if len(parts) > 1:
        counts = ", ".join(f"{number} {split}" for split, number in parts.items())
        remarks.lines.append(
            f"{where}: holds folders of several splits ({counts} images), all are used; "
            "make an archive of each, or unpack it"
        )
