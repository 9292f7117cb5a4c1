"""Names of classes and their numbers: the one owner of their order."""

import re
from collections.abc import Iterable, Sequence
from unicodedata import normalize

import numpy as np

from mocov3.errors import printable

_NUMBER = re.compile(r"[-+]?\d+(\.\d+)?")


def ordered(names: Iterable[str]) -> list[str]:
    """Distinct names in the order of their numbers: by value where all are numbers, else by name."""
    distinct = set(names)
    if all(_NUMBER.fullmatch(name) for name in distinct):
        return sorted(distinct, key=lambda name: (float(name), name))
    return sorted(distinct)


def numbered(labels: Sequence[str]) -> tuple[np.ndarray | None, list[str]]:
    """int32 class of every image (−1 where the label is empty; ``None`` if all are), and the classes' names."""
    classes = ordered(label for label in set(labels) if label)
    number = {"": -1} | {name: i for i, name in enumerate(classes)}
    return (np.array([number[label] for label in labels], np.int32) if classes else None), classes


def remarks_on_missing(where: str, labels: np.ndarray | None) -> list[str]:
    """A line where some images, but not all, have no label."""
    missing = 0 if labels is None else int((labels < 0).sum())
    if labels is None or not 0 < missing < len(labels):
        return []
    return [
        f"{printable(where)}: {missing} of {len(labels)} images have no label; left out of what needs classes (k-NN, "
        "linear evaluation, fine-tuning), otherwise used like the others"
    ]


def renumbered(labels: np.ndarray | None, names: Sequence[str], others: Sequence[str], images: int) -> np.ndarray:
    """int32 labels as numbers of ``others`` instead of ``names``; −1 for those that have none there."""
    if labels is None:
        return np.full(images, -1, np.int32)
    # as they stand, else in one form of Unicode: macOS and others write é in different ones
    number = {normalize("NFC", name): i for i, name in enumerate(others)} | {name: i for i, name in enumerate(others)}
    known = (number.get(name, number.get(normalize("NFC", name), -1)) for name in names)
    numbers: np.ndarray = np.array([*known, -1], np.int32)[labels]
    return numbers
