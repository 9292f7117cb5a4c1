"""Known classes of some images: from a CSV file, or from class folders."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mocov3.data.sources.lists import read_rows
from mocov3.data.sources.opening import Source, Subset
from mocov3.data.sources.survey import scattered
from mocov3.errors import UserError, printable

_MOST = 2000


@dataclass(frozen=True)
class Labels:
    """Known classes of some images."""

    indices: np.ndarray
    numbers: np.ndarray
    classes: list[str]


class Labelled(Subset):
    """The images whose classes a file tells, with these classes."""

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


def read_labels(file: Path, images: Source) -> Labels:
    """Labels of a CSV file for images named as ``images`` names them, or by a unique end of the path.

    Raises:
        UserError: if an image is not there, is named twice, or there are fewer than two classes.
    """
    if not file.is_file():
        raise UserError(f"--labels {file}: there is no such file; give a CSV of path,label")
    rows = read_rows(file)
    by_name: dict[str, int] = {}
    by_last: dict[str, list[int]] = {}
    for i in range(len(images)):
        name = images.name(i).replace("\\", "/")
        by_name[name] = i
        by_last.setdefault(name.rsplit("/", 1)[-1], []).append(i)
    label_of: dict[int, str] = {}
    for path, label in rows:
        name = path.decode("utf-8", "surrogateescape").replace("\\", "/")
        if not label:
            raise UserError(f"--labels {file}: {printable(name)} has no label; write path,label a line")
        index = by_name.get(name)
        if index is None:
            ends = [
                i
                for i in by_last.get(name.rsplit("/", 1)[-1], [])
                if name.endswith(images.name(i)) or images.name(i).endswith(name)
            ]
            if len(ends) != 1:
                why = "is the end of several paths" if ends else "is none of the images judged"
                raise UserError(f"--labels {file}: {printable(name)} {why}; write the path below the folder")
            index = ends[0]
        if label_of.setdefault(index, label) != label:
            raise UserError(f"--labels {file}: {printable(name)} has two labels, {label_of[index]} and {label}")
    classes = sorted(set(label_of.values()))
    if len(classes) < 2 or len(label_of) < 4:
        raise UserError(
            f"--labels {file}: {len(label_of)} images of {len(classes)} classes are too few; "
            "label 10 or more of 2 or more classes"
        )
    indices = np.array(sorted(label_of))
    return Labels(indices, np.array([classes.index(label_of[i]) for i in indices.tolist()]), classes)


def own_labels(images: Source) -> Labels | None:
    """Labels of class folders, if there are two or more classes; of as many images as are judged."""
    numbers = images.labels
    if numbers is None or len(set(numbers.tolist())) < 2:
        return None
    chosen = scattered(len(images), _MOST)
    return Labels(chosen, numbers[chosen], images.classes)
