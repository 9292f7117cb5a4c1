"""Which images belong together (slices of a patient, frames of a film, tiles of a slide): the one owner of that.

``--group-by`` says it: ``FILE.csv:COLUMN``; a field that the images' own files hold, as a column of a Parquet table; or
a regular expression on names. Unless it is given, the groups that images have by themselves count, where they have
some (``mocov3.data.sources.opening.Grouped``); ``none`` asks for no groups.
"""

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mocov3.data.sources.opening import Source, Subset, called, field_groups, hides_paths
from mocov3.data.sources.table import read_table, split_name
from mocov3.errors import UserError, printable

FLAG = "--group-by"
NONE = "none"
_NUMBERED = r"\d)[-_ .]+[A-Za-z]*[-_ .]?\d+\.\w+$"
# a class is called so too, and by WordNet's numbers
_FOLDERS = r"(?!class|label|category|n\d{8}/)[A-Za-z]+[-_ ]?\d+)/[^/]+$"
_FEWEST = 3


def groups_of(parts: Sequence[Source], by: str, *, needed: bool = True) -> list[np.ndarray] | None:
    """int32 group of every image of each part, numbered through all parts: a group may have images in several.

    Args:
        parts: what is compared with each other.
        by: as ``--group-by``.
        needed: refuse what says nothing of any image; else that is the same as no groups.

    Returns:
        ``None`` where there are no groups, or the images' own ones are a single one.

    Raises:
        UserError: if ``by`` cannot be used, leaves an image out, or puts all images into one group.
    """
    named = named_groups(parts, by, needed=needed)
    if named is None:
        return None
    seen: dict[str, int] = {}
    alone = 0
    numbers = []
    for names in named:
        numbers.append(np.empty(len(names), np.int32))
        for i, name in enumerate(names.tolist()):
            if name:
                numbers[-1][i] = seen.setdefault(name, len(seen) + alone)
            else:
                numbers[-1][i] = len(seen) + alone
                alone += 1
    if len(seen) + alone < 2:
        if not by:  # one slide, or one patient: nothing to tell apart
            return None
        raise UserError(f"{FLAG} {by!r}: puts all images into one group; name others, or give {FLAG} {NONE}")
    return numbers


def groups_in(source: Source, by: str, *, needed: bool = True) -> np.ndarray | None:
    """``groups_of`` one source."""
    found = groups_of([source], by, needed=needed)
    return None if found is None else found[0]


def chosen(groups: np.ndarray | None, rows: np.ndarray) -> np.ndarray | None:
    """Groups of some of the images, where there are groups."""
    return None if groups is None else groups[rows]


def named_groups(parts: Sequence[Source], by: str, *, needed: bool = True) -> list[np.ndarray] | None:
    """As ``groups_of``, the groups' names; empty for an image that is a group of its own."""
    if by == NONE or not sum(map(len, parts)):
        return None
    if by and split_name(by)[0]:
        return _hidden(parts, _of_table(parts, by, needed))
    fields = [field_groups(part, by) for part in parts]
    if any(names is not None for names in fields):
        return [np.full(len(p), "") if names is None else names for p, names in zip(parts, fields, strict=True)]
    return _hidden(parts, _of_names(parts, by, needed)) if by else None


def _hidden(parts: Sequence[Source], named: list[np.ndarray] | None) -> list[np.ndarray] | None:
    """Hashes in place of names, if the images of a part have paths that are not to be shown, as a patient's name."""
    if named is None or not any(map(hides_paths, parts)):
        return named
    hashed = {name: name and hashlib.sha256(name.encode()).hexdigest()[:16] for names in named for name in names}
    return [np.array([hashed[name] for name in names], object) for names in named]


def _of_names(parts: Sequence[Source], pattern: str, needed: bool) -> list[np.ndarray] | None:
    try:
        expression = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"{FLAG} {pattern!r}: is not a regular expression ({error})") from None
    named = [[_matched(expression, called(part, i)) for i in range(len(part))] for part in parts]
    if not any(map(any, named)):
        if not needed:
            return None
        raise UserError(
            f"{FLAG} {pattern!r}: as a regular expression it matches no name, as {printable(parts[0].name(0))}, and "
            "no field of the files is called so"
        )
    return [np.array(names, object) for names in named]


def _matched(expression: "re.Pattern[str]", name: str) -> str:
    """What the first bracket matches, where it has one; else the whole match."""
    match = expression.search(name.replace(os.sep, "/"))
    return "" if match is None else "~" + (match[1] or "" if expression.groups else match[0])


def _of_table(parts: Sequence[Source], by: str, needed: bool) -> list[np.ndarray] | None:
    """By a column; every image needs a row, in which an empty cell makes it a group of its own."""
    file, column = split_name(by)
    if not column:
        raise UserError(f"{FLAG} {by}: name a column of it, as {FLAG} {by}:patient")
    try:
        table = read_table(Path(file), parts, FLAG)
    except UserError:
        if needed or not Path(file).is_file():
            raise
        return None
    cells = table.column(column, FLAG)
    names = np.full(sum(map(len, parts)), None, object)
    for cell, images, line in zip(cells, table.images, table.rows.lines, strict=True):
        for i in images:
            if names[i] not in (None, cell):
                raise UserError(f"{FLAG} {file}: line {line}: puts an image into another group than a line before it")
            names[i] = cell
    ends = np.cumsum([len(part) for part in parts])
    missing = np.flatnonzero([name is None for name in names])
    if len(missing):
        place = int(np.searchsorted(ends, missing[0], side="right"))
        first = parts[place].name(int(missing[0] - (ends[place - 1] if place else 0)))
        raise UserError(
            f"{FLAG} {file}: {len(missing)} of {len(names)} images have no row, first {printable(first)}; add them, "
            "with an empty cell where an image is a group of its own"
        )
    return np.split(names, ends[:-1])


def suggested(names: Sequence[str], *, in_classes: bool = False) -> tuple[str, int] | None:
    """A regular expression by which names look like groups, and how many groups it makes; ``None`` where none do.

    Two are tried: a number before the running number (``patient12_slice003.png``), and folders called by a word and a
    number (``patient12/003.png``). They count where most images then have company, of three groups or more none holds
    most of the images, and the first form says more than the folders do, which may be classes.

    Args:
        names: of the images.
        in_classes: folders are classes; so images of one group may lie in several.
    """
    names = [name.replace(os.sep, "/") for name in names]
    folders = len({os.path.dirname(name) for name in names})
    numbered, called = ("(?:^|/)([^/]*", "(?:^|/)(") if in_classes else ("^(.*", "^((?:.*/)?")
    for pattern in (numbered + _NUMBERED, called + _FOLDERS):
        expression = re.compile(pattern)
        matched = [(os.path.dirname(name), match[1]) for name in names if (match := expression.search(name))]
        sizes = np.unique([group for _, group in matched], return_counts=True)[1] if matched else np.zeros(1)
        if 2 * sizes[sizes > 1].sum() < len(names) or len(sizes) < _FEWEST or 2 * sizes.max() > len(names):
            continue
        if pattern.endswith(_NUMBERED) and len(set(matched)) <= folders:
            continue
        return pattern, len(sizes)
    return None


def without_shared(val: Source, train: Source, by: str, where: str) -> Source:
    """The images to judge by that are of no group which is trained on; what is left out is said in ``skipped``.

    Raises:
        UserError: if that leaves none.
    """
    groups = groups_of((train, val), by)
    if groups is None:
        if named_groups((train, val), by) is None:
            return val
        said = f"{where}: all images, of training too, are of one group of their own; they are judged within it"
        return Said(val, np.arange(len(val)), said)
    own = ~np.isin(groups[1], groups[0])
    if own.all():
        return val
    count = int((~own).sum())
    said = f"{where}: {count} of {len(val)} validation images are of groups that training has"
    if not own.any():
        raise UserError(f"{said} ({FLAG}); split by group")
    return Said(val, np.flatnonzero(own), f"{said}; left out ({FLAG})")


class Said(Subset):
    """Some images of a source, and why not the others."""

    def __init__(self, whole: Source, indices: np.ndarray, remark: str) -> None:
        super().__init__(whole, indices)
        self._remark = remark

    @property
    def skipped(self) -> list[str]:
        """What is left out or remarkable, a line each."""
        return [*super().skipped, self._remark]
