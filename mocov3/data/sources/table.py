"""Rows of a CSV file about images, each matched to the images it means: for labels, findings and groups alike."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mocov3.data.sources.opening import Source, called, file_name, hides_paths
from mocov3.data.sources.rows import Place, Rows, read_rows
from mocov3.data.sources.splits import split_of_folder
from mocov3.errors import UserError, nearest, no_file, printable

_TABLES = (".csv", ".tsv")


@dataclass(frozen=True)
class Table:
    """A CSV file, and which images its rows are about."""

    file: Path
    rows: Rows
    images: list[list[int]]
    """Of each row: the image that it means, numbered through all parts; none where it is of other images."""
    private: bool
    """Whether paths and cells are not to be shown."""

    def column(self, name: str, flag: str) -> list[str]:
        """The cells of a column; a cell that a short row lacks is empty.

        Raises:
            UserError: if there is no such column, naming those that there are.
        """
        names = self.rows.names or []
        lower = [known.lower() for known in names]
        if lower.count(name.lower()) > 1:
            raise UserError(f"{flag} {self.file}: several columns are called {printable(name)}; rename all but one")
        if name not in names and name.lower() not in lower:
            close = nearest(name, names) if names else "it has no header"
            raise UserError(f"{flag} {self.file}: has no column {printable(name)}; {close}")
        place = names.index(name) if name in names else lower.index(name.lower())
        return [row[place].strip() if place < len(row) else "" for row in self.rows.cells]


def split_name(text: str) -> tuple[str, str]:
    """``FILE.csv:COLUMN`` → (FILE.csv, COLUMN), ``FILE.csv`` → (FILE.csv, ""); ("", "") for what names no table."""
    if text.lower().endswith(_TABLES):
        return os.path.expanduser(text), ""
    head, _, tail = text.rpartition(":")
    return (os.path.expanduser(head), tail) if head.lower().endswith(_TABLES) else ("", "")


def read_table(file: Path, parts: Sequence[Source], flag: str) -> Table:
    """Rows of a file about images of ``parts`` and maybe of others, matched by the files' full names or an end of them.

    Raises:
        UserError: if it cannot be read, names none of the images, or a row may mean several.
    """
    if not file.is_file():
        raise UserError(f"{flag} {file}: {no_file(file)}; give a CSV of a row an image")
    private = any(map(hides_paths, parts))
    images: list[list[int]] = []
    for foreign in (False, True):
        names = Names(parts, foreign=foreign)
        rows = read_rows(file, names.places(), flag)
        spelled = [os.fsdecode(path).replace("\\", "/") for path in rows.paths]
        images = [names.ending_in(name) for name in spelled]
        if any(images):
            break
    else:
        first = "a path" if private else printable(spelled[0])
        count = sum(map(len, parts))
        raise UserError(f"{flag} {file}: names none of the {count} images, first: line {rows.lines[0]}: {first}")
    several = next((i for i, found in enumerate(images) if len(found) > 1), None)
    if several is not None:
        title = "the image" if private else printable(spelled[several])
        raise UserError(
            f"{flag} {file}: line {rows.lines[several]}: {title} is the end of several paths; "
            "write the path below the folder"
        )
    return Table(file, rows, images, private)


class Names:
    """Names of images by which a file may call them: their paths or an end of these.

    Args:
        parts: the images.
        foreign: paths may be those of another machine, of which the image's name is an end.
    """

    def __init__(self, parts: Sequence[Source], *, foreign: bool) -> None:
        indices = [(part, i) for part in parts for i in range(len(part))]
        self._names = [called(part, i).replace("\\", "/") for part, i in indices]
        self._paths = [file_name(part, i).replace("\\", "/") for part, i in indices]
        self._foreign = foreign
        self._by_last: dict[str, list[int]] = {}
        for i, name in enumerate(self._names):
            self._by_last.setdefault(_last(name), []).append(i)

    def ending_in(self, name: str) -> list[int]:
        """Images of this name, or else those whose path has it as its end."""
        same = self._by_last.get(_last(name), [])
        exact = [i for i in same if name in (self._names[i], self._paths[i])]
        own = exact or [i for i in same if _is_end(name, self._names[i]) or _is_end(name, self._paths[i])]
        if own or not self._foreign:
            return own
        return [i for i in same if _is_end(self._names[i], name) and not self._of_other_part(i, name)]

    def _of_other_part(self, i: int, path: str) -> bool:
        """Whether a path leads to another part of a set, by the last folder in which it differs from the image's."""
        pairs = zip(reversed(path.split("/")), reversed(self._paths[i].split("/")), strict=False)
        theirs, ours = next(((a, b) for a, b in pairs if a != b), ("", ""))
        parts = split_of_folder(theirs), split_of_folder(ours)
        return None not in parts and parts[0] != parts[1]

    def places(self) -> Iterator[Place]:
        """By name; then by name without ending."""
        yield Place(lambda path: path if len(self.ending_in(os.fsdecode(path))) == 1 else None)
        stems: dict[bytes, bytes | None] = {}
        for name in self._names:
            for stem in {os.fsencode(os.path.splitext(part)[0]) for part in (name, _last(name))}:
                stems[stem] = None if stem in stems else os.fsencode(name)
        yield Place(stems.get, looked_up=True, said="images are named without their endings")


def _last(name: str) -> str:
    return re.split("[/:]", name)[-1]  # a colon: of several sources, and of rows in a table


def _is_end(end: str, name: str) -> bool:
    return name.endswith((f"/{end}", f":{end}"))
