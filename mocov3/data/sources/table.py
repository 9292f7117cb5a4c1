"""Rows of a CSV file about images, each matched to the images it means: for labels, findings and groups alike."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mocov3.data.sources.opening import Source, called, file_name
from mocov3.data.sources.rows import Place, Rows, read_rows
from mocov3.errors import UserError, nearest, no_file, printable

_TABLES = (".csv", ".tsv")


@dataclass(frozen=True)
class Table:
    """A CSV file, and which images its rows are about."""

    file: Path
    rows: Rows
    images: list[list[int]]
    """Of each row: the images that it may mean, numbered through all parts; none where it is of other images."""

    def column(self, name: str, flag: str) -> list[str]:
        """The cells of a column; a cell that a short row lacks is empty.

        Raises:
            UserError: if there is no such column, naming those that there are.
        """
        names = self.rows.names or []
        lower = [known.lower() for known in names]
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
    full = [file_name(part, i) for part in parts for i in range(len(part))]
    short = [called(part, i) for part in parts for i in range(len(part))]
    private = short[0] != next(part for part in parts if len(part)).name(0)
    for names in map(Names, (full, short)):  # the second for paths of another machine
        rows = read_rows(file, names.places(), flag)
        spelled = [os.fsdecode(path).replace("\\", "/") for path in rows.paths]
        images = [names.ending_in(name) for name in spelled]
        if any(images):
            break
    else:
        first = "a path" if private else printable(spelled[0])
        raise UserError(f"{flag} {file}: names none of the {len(full)} images, first: line {rows.lines[0]}: {first}")
    several = next((i for i, found in enumerate(images) if len(found) > 1), None)
    if several is not None:
        title = "the image" if private else printable(spelled[several])
        raise UserError(
            f"{flag} {file}: line {rows.lines[several]}: {title} is the end of several paths; "
            "write the path below the folder"
        )
    return Table(file, rows, images)


class Names:
    """Names of images by which a file may call them."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = [name.replace("\\", "/") for name in names]
        self._by_last: dict[str, list[int]] = {}
        for i, name in enumerate(self._names):
            self._by_last.setdefault(_last(name), []).append(i)

    def ending_in(self, name: str) -> list[int]:
        """Images of this name, or else those whose path is an end of it or the other way round."""
        same = self._by_last.get(_last(name), [])
        exact = [i for i in same if self._names[i] == name]
        return exact or [i for i in same if _is_end(self._names[i], name) or _is_end(name, self._names[i])]

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
