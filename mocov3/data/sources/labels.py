"""Known classes of some images: from a CSV file, or from the images' own source; and classes matched by name."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mocov3.data.sources.classes import numbered, remarks_on_missing, renumbered
from mocov3.data.sources.opening import Roots, Source, Subset
from mocov3.data.sources.survey import scattered
from mocov3.data.sources.table import read_table
from mocov3.errors import UserError, printable

_MOST = 2000


@dataclass(frozen=True)
class Labels:
    """Known classes of some images."""

    indices: np.ndarray
    numbers: np.ndarray
    classes: list[str]
    remarks: tuple[str, ...] = ()
    """How they were read, and what is left out; a line each."""


class Labelled(Subset):
    """The images whose classes are known, with these classes."""

    def __init__(self, whole: Source, known: Labels) -> None:
        super().__init__(whole, known.indices)
        self._known = known

    @property
    def classes(self) -> list[str]:
        """Names of the classes."""
        return self._known.classes

    @property
    def labels(self) -> np.ndarray:
        """Class of every image."""
        return self._known.numbers.astype(np.int32)

    @property
    def skipped(self) -> list[str]:
        """What is left out or remarkable, a line each."""
        return [*super().skipped, *self._known.remarks]


def with_labels(source: Source) -> Source:
    """The images of a source that have a class: the source itself, if all have one or none has, or of findings."""
    labels = source.labels
    if labels is None or labels.ndim == 2 or (labels >= 0).all():
        return source
    known = np.flatnonzero(labels >= 0)  # of several sources, those without labels say nothing of themselves
    said = remarks_on_missing("all sources", labels) if isinstance(source, Roots) else []
    return Labelled(source, Labels(known, labels[known], source.classes, tuple(said)))


def matched(classes: list[str], val: Source, where: str) -> Source:
    """The labelled images of ``val``, their classes numbered as ``classes``, which are those of training, by name.

    Raises:
        UserError: if one is of a class that is not among them.
    """
    val = with_labels(val)
    labels = val.labels
    if labels is None or val.classes == classes:
        return val
    if labels.ndim == 2:
        if set(val.classes) != set(classes):
            raise UserError(f"{where}: findings are {', '.join(val.classes)}, not {', '.join(classes)}; name those")
        order = [val.classes.index(name) for name in classes]
        return Labelled(val, Labels(np.arange(len(val)), labels[:, order], classes))
    numbers = renumbered(labels, val.classes, classes, len(val))
    if (numbers < 0).any():
        unknown = sorted({val.classes[i] for i in labels[numbers < 0].tolist()})
        raise UserError(
            f"{where}: {int((numbers < 0).sum())} validation images are of classes that training lacks, first "
            f"{unknown[0]!r}; classes are matched by name: add training images of it, or leave it out of validation"
        )
    left = [classes[i] for i in np.setdiff1d(np.arange(len(classes)), numbers).tolist()]
    said = (
        (f"{where}: {len(left)} of {len(classes)} classes have no validation image, first {left[0]!r}",) if left else ()
    )
    return Labelled(val, Labels(np.arange(len(val)), numbers, classes, said))


def read_labels(file: Path, images: Source, *, flag: str = "--labels", others: Sequence[Source] = ()) -> Labels:
    """Labels of a CSV file for images named as ``images`` names them, or by a unique end of the path.

    ``flag`` names the file in messages. Rows about images of ``others`` are passed over.

    Raises:
        UserError: if an image is not there, is named twice, or there are fewer than two classes.
    """
    table = read_table(file, (images, *others), flag)
    rows = table.rows
    if not any(rows.labels):
        known = printable(", ".join(rows.names or ["no header"]))
        raise UserError(
            f"{flag} {file}: holds no labels; call their column label, or give columns of findings that hold 1, 0 or "
            f"nothing (its columns: {known})"
        )
    label_of: dict[int, str] = {}
    for path, label, line, found in zip(rows.paths, rows.labels, rows.lines, table.images, strict=True):
        title = "the image" if table.private else printable(os.fsdecode(path).replace("\\", "/"))
        if not found:
            where = f"{flag} {file}: line {line}"
            raise UserError(f"{where}: {title} is none of the images judged; write the path below the folder")
        if label and found[0] < len(images) and label_of.setdefault(found[0], label) != label:
            which = "" if table.private else f", {label_of[found[0]]} and {label}"
            raise UserError(f"{flag} {file}: line {line}: {title} has two labels{which}")
    indices = np.array(sorted(label_of), np.int64)
    numbers, classes = numbered([label_of[i] for i in indices.tolist()])
    if numbers is None or len(classes) < 2 or len(label_of) < 4:
        raise UserError(
            f"{flag} {file}: {len(label_of)} images of {len(classes)} classes are too few; "
            "label 10 or more of 2 or more classes"
        )
    missing = remarks_on_missing(str(file), np.array([0 if label else -1 for label in rows.labels]))
    return Labels(indices, numbers, classes, (*rows.remarks, *missing))


def own_labels(images: Source) -> Labels | None:
    """Labels that the images come with, if they are of two or more classes; of as many images as are judged."""
    labels = images.labels
    known = np.flatnonzero(labels >= 0) if labels is not None else np.empty(0)
    if labels is None or len(np.unique(labels[known])) < 2:
        return None
    chosen = known[scattered(len(known), _MOST)]
    return Labels(chosen, labels[chosen], images.classes)
