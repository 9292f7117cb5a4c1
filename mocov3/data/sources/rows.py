"""What a text or CSV list says: rows of a path and maybe a label, in the forms in which people have them.

A form is a spelling of paths, a way to part a line, and the column of paths. Which one a list has is found by trial:
the first form by which most of some probed rows name an image. So a list is read as it stands wherever that works.
"""

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from mocov3.data.sources.scan import EXTENSIONS
from mocov3.errors import UserError, printable

PATH_COLUMNS = (
    *("path", "file", "filename", "filepath", "file_name", "file_path", "image", "img", "image_path", "img_path"),
    *("imagepath", "imgpath", "image_file", "image_name", "img_name", "picture", "name", "image_id", "img_id", "id"),
)
LABEL_COLUMNS = (
    *("label", "labels", "class", "class_name", "classname", "category", "target", "label_name", "fine_label"),
    *("class_id", "y", "cls"),
)
JSON_LINES = ".jsonl"
_NO_LABEL = ("nan", "null", "<na>")
_PROBED = 50
_MOST_COLUMNS = 1000  # that are tried: a damaged line may have a million
_ODD = re.compile(r"^\s|\s$|[\"'\\]|^~", re.MULTILINE)  # what another spelling may mend
_ENDING = "|".join(re.escape(ending) for ending in EXTENSIONS)
_IMAGE = re.compile(rf".*({_ENDING})[\s\"']*", re.IGNORECASE)
_HOLDS_IMAGE = re.compile(rf"({_ENDING})(?!\w)", re.IGNORECASE)
_BEFORE_LABEL = re.compile(rf"(.*(?:{_ENDING})[\"']?)\s+(.*)", re.IGNORECASE)
_VALUES = re.compile(r"-?[\d.]+([\s,;]+-?[\d.]+)+")

Record = str | list[str]
"""A line of a text list, or the cells of a row of a CSV file."""


@dataclass(frozen=True)
class Place:
    """Where the paths of a list may lead."""

    find: Callable[[bytes], bytes | None]
    """Path as a list has it → the image's, ``None`` if there is none."""
    root: bytes = b""
    looked_up: bool = False
    """Whether ``find`` gives other paths than it is given."""
    said: str = ""
    """How it differs from what a list says."""


@dataclass
class Rows:
    """What a list says, row by row."""

    paths: list[bytes]
    labels: list[str]
    """Empty where there is none."""
    lines: list[int]
    """Numbers of the lines."""
    place: Place
    found: int
    """Of the probed rows, how many name an image."""
    cells: list[list[str]]
    """Of every column."""
    column: int
    """Which of them is the path."""
    names: list[str] | None
    """Of the columns, where the first line says them."""
    remarks: list[str] = field(default_factory=list)
    """How it was read, where that is not as it stands; a line each."""


@dataclass(frozen=True)
class _Form:
    place: Place
    spell: Callable[[str], str]
    part: Callable[[Record], list[str]]
    column: int = 0
    found: int = 0
    also: int | None = None
    """Another column that names as many images, where none is called so."""

    def image(self, cell: str) -> bytes | None:
        return self.place.find(_encoded(self.spell(cell)))


def read_rows(file: Path, places: Iterator[Place], flag: str = "data", labels_in: Sequence[str] | None = None) -> Rows:
    """Rows of a list, read in the form by which most of them name an image of the first of ``places`` that has them.

    Args:
        file: the list.
        places: where its paths may lead, at least one.
        flag: names the file in messages.
        labels_in: columns that may hold labels; otherwise one may be called by any name.

    Raises:
        UserError: naming the file, and the line where one is at fault.
    """
    where = f"{flag} {file}"
    text = _text(file, where)
    is_csv = file.suffix.lower() in (".csv", ".tsv", JSON_LINES)
    first = next(places)
    numbers, records, comments = _records(text, file, where, first, is_csv)
    form = _choose(records, first, places, is_csv) if records else None
    names = _header(records, form, is_csv) if form else None
    numbers, body = (numbers[1:], records[1:]) if names else (numbers, records)
    if form is None or not body:
        raise UserError(f"{where}: names no image; write a path a line")
    if form.also is not None:
        columns = " and ".join(names[i] if names else str(i + 1) for i in sorted((form.column, form.also)))
        raise UserError(f"{where}: columns {columns} both name images; call the one to use path in the first line")
    cells = [form.part(record) for record in body]
    column = _label_column(names, form.column, cells, labels_in)
    remarks = [_read_as(form, names, cells, column, comments)]
    labels = [""] * len(cells)
    if column is not None:
        labels = [row[column].strip() if column < len(row) else "" for row in cells]
        labels = ["" if label.lower() in _NO_LABEL else label for label in labels]
    several = next((i for i, label in enumerate(labels) if label and _VALUES.fullmatch(label)), None)
    if several is not None:
        remarks.append(f"line {numbers[several]} holds several values ({labels[several]}); none is taken for a class")
        labels = [""] * len(labels)
    said = [printable(f"{file}: {line}") for line in remarks if line]
    return Rows(
        _paths(form, cells, numbers, where), labels, numbers, form.place, form.found, cells, form.column, names, said
    )


def _paths(form: "_Form", cells: list[list[str]], numbers: list[int], where: str) -> list[bytes]:
    spell, column = form.spell, form.column
    spelled = [spell(row[column]) if column < len(row) else "" for row in cells]
    if "" in spelled:
        line = numbers[spelled.index("")]
        raise UserError(f"{where}: line {line} holds no path (column {form.column + 1}); write one, or remove the line")
    if "://" in spelled[0]:
        raise UserError(f"{where}: line {numbers[0]} names an address ({spelled[0]}); fetch the images first")
    paths, find = list(map(_encoded, spelled)), form.place.find
    accented = islice((path for path in paths if not path.isascii()), _PROBED)
    if form.place.looked_up or any(find(path) not in (None, path) for path in accented):
        return [find(path) or path for path in paths]
    return paths


def _text(file: Path, where: str) -> str:
    try:
        data = file.read_bytes()
        if data.startswith((b"\xff\xfe", b"\xfe\xff")):  # written by Windows programs
            data = data.decode("utf-16").encode()
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror}); give a list of paths") from None
    except UnicodeError:
        raise UserError(f"{where}: is damaged UTF-16; save it as UTF-8") from None
    if b"\0" in data:
        raise UserError(f"{where}: is not a list of paths (holds zero bytes)")
    return data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", errors="surrogateescape").replace("\r\n", "\n")


def _records(text: str, file: Path, where: str, place: Place, is_csv: bool) -> tuple[list[int], list[Record], int]:
    """Numbers of lines, records without comments, and the number of comments."""
    rows: list[tuple[int, Record]]
    if file.suffix.lower() == JSON_LINES:
        rows = list(_json_rows(text, where))
    elif is_csv:
        head = next((line for line in text.split("\n") if line.strip() and not line.startswith("# ")), "")
        delimiter = "\t" if file.suffix.lower() == ".tsv" else max(",;\t|", key=head.count)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
        try:
            rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(map(str.strip, row))]
        except csv.Error as error:
            raise UserError(f"{where}: line {reader.line_num} is not CSV ({error}); mend it") from None
    else:
        rows = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    kept = [row for row in rows if not _is_comment(row[1], place)] if "#" in text else rows
    return [number for number, _ in kept], [record for _, record in kept], len(rows) - len(kept)


def _json_rows(text: str, where: str) -> Iterator[tuple[int, Record]]:
    """Cells of the objects of JSON lines, after their keys."""
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    objects: list[tuple[int, dict[str, object]]] = []
    for number, line in lines:
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise UserError(f"{where}: line {number} is no JSON object; mend it")
        objects.append((number, found))
    keys = list(dict.fromkeys(key for _, found in objects for key in found))
    if len(keys) > _MOST_COLUMNS:
        raise UserError(f"{where}: its objects have {len(keys)} keys, more than {_MOST_COLUMNS}; leave some out")
    if keys:
        yield 0, keys
    for number, found in objects:
        yield number, [_json_cell(found.get(key)) for key in keys]


def _json_cell(value: object) -> str:
    if isinstance(value, list):
        return ",".join(map(_json_cell, value))
    return "" if value is None else str(int(value)) if isinstance(value, bool) else str(value).strip()


def _is_comment(record: Record, place: Place) -> bool:
    """Whether a record begins with # and neither names an image nor is a header."""
    cells = [record] if isinstance(record, str) else record
    if not cells[0].startswith("#"):
        return False
    cells = cells + _parted_by_blanks(cells[0])
    return _named(cells[0]) not in PATH_COLUMNS and not any(place.find(_encoded(cell)) for cell in cells)


# --- which form ---------------------------------------------------------------------------------------------------


def _choose(records: list[Record], first: Place, places: Iterator[Place], is_csv: bool) -> _Form:
    """The first form by which most of some probed records name an image; a plausible one if none does."""
    probes = records[:: len(records) // _PROBED + 1]
    odd = (r for r in records[:: len(records) // 1000 + 1] if _ODD.search(r if isinstance(r, str) else "\n".join(r)))
    probes += islice(odd, _PROBED)
    parts = [_as_cells] if is_csv else _PARTS
    best: _Form | None = None
    for place in chain([first], places):
        for spell in (_as_written, _mended):
            for part in parts:
                form = _best_column(_Form(place, spell, part), records[0], [part(record) for record in probes])
                if best is None or form.found > best.found:
                    best = form
                if best.found and best.found + (not _shows_image(best, probes[0])) == len(probes):
                    return best
        if best is not None and 2 * best.found >= len(probes):
            return best
    assert best is not None
    if not best.found:
        part = next((p for p in parts if any(_IMAGE.fullmatch(cell) for cell in p(probes[0]))), parts[0])
        cells = part(probes[0])
        named = _columns(part(records[0]), PATH_COLUMNS)
        column = next((i for i, cell in enumerate(cells) if _IMAGE.fullmatch(cell)), 0)
        return _Form(first, _mended, part, named[0] if named else column)
    return best


def _best_column(form: _Form, head: Record, rows: list[list[str]]) -> _Form:
    """The form with the column by which most rows name an image; those called so come first."""
    named = _columns(form.part(head), PATH_COLUMNS)
    columns = named + [i for i in range(min(max(map(len, rows)), _MOST_COLUMNS)) if i not in named]
    counts = [sum(i < len(row) and form.image(row[i]) is not None for row in rows) for i in columns]
    most = counts.index(max(counts))
    column = columns[most]
    also = next((i for i, n in zip(columns, counts, strict=True) if i != column and n == counts[most]), None)
    if column in named or not counts[most]:
        also = None
    return _Form(form.place, form.spell, form.part, column, counts[most], also)


def _encoded(path: str) -> bytes:
    return path.encode("utf-8", errors="surrogateescape")  # the bytes of the list


def _as_written(path: str) -> str:
    return path.replace("\\", "/") if os.name == "nt" else path


def _mended(path: str) -> str:
    """Without blanks and quotes around it, with / for \\, ~ spelled out, and without ./ before it."""
    path = path.strip()
    if len(path) > 1 and path[0] == path[-1] and path[0] in "\"'":
        path = path[1:-1].strip()
    return os.path.expanduser(path).replace("\\", "/").removeprefix("./")


def _as_cells(record: Record) -> list[str]:
    return record if isinstance(record, list) else [record]


def _parted_by_blanks(record: Record) -> list[str]:
    """``a b.jpg red fox`` → path and label: the path ends in the ending of an image, else before the last word."""
    line = str(record).strip()
    if match := _BEFORE_LABEL.fullmatch(line):
        return [match[1], match[2]]
    return [line] if _IMAGE.fullmatch(line) else line.rsplit(None, 1)


def _after_a_word(record: Record) -> list[str]:
    """``17 a b.jpg`` → number or label, then the path."""
    word, _, rest = str(record).strip().partition(" ")
    return [word, *_parted_by_blanks(rest)] if rest.strip() else [word]


def _parted_by(delimiter: str) -> Callable[[Record], list[str]]:
    def part(record: Record) -> list[str]:
        try:
            return [cell.strip() for cell in next(csv.reader([str(record)], delimiter=delimiter, strict=True))]
        except csv.Error:
            return [str(record)]

    return part


_PARTS = [_as_cells, *map(_parted_by, "\t,;"), _parted_by_blanks, _after_a_word]


# --- columns ------------------------------------------------------------------------------------------------------


def _named(cell: str) -> str:
    return re.sub(r"[\s-]+", "_", cell.strip().lstrip("#").strip("\"' ").lower())


def _columns(cells: Sequence[str], known: Sequence[str]) -> list[int]:
    """Columns that are called by one of the known names, in the order of these."""
    names = [_named(cell) for cell in cells]
    return [names.index(name) for name in known if name in names]


def _shows_image(form: _Form, record: Record) -> bool:
    """Whether a record names an image, or what would be called like one."""
    cells = form.part(record)
    return any(map(_HOLDS_IMAGE.search, cells)) or (
        form.column < len(cells) and form.image(cells[form.column]) is not None
    )


def _header(records: list[Record], form: _Form, is_csv: bool) -> list[str] | None:
    """Names of the columns, if the first record tells them instead of an image."""
    cells = form.part(records[0])
    if _shows_image(form, records[0]):
        return None
    known = _columns(cells, (*PATH_COLUMNS, *LABEL_COLUMNS))
    guessed = form.found and len(records) > 1 and (is_csv or len(cells) > 1)
    return [cell.strip().lstrip("#").strip() for cell in cells] if known or guessed else None


def _label_column(
    names: list[str] | None, path: int, rows: list[list[str]], labels_in: Sequence[str] | None
) -> int | None:
    """The column of labels: called so, or the only other one; without a header that behind the path."""
    if names and (known := [i for i in _columns(names, LABEL_COLUMNS) if i != path]):
        return known[0]
    if labels_in is not None:
        return None
    width = len(names) if names else max(map(len, rows))
    if not names and path + 1 < width:
        return path + 1
    others = [
        i for i in range(width) if i != path and not (names and _named(names[i]) in ("", "id", "index", "unnamed:_0"))
    ]
    if len(others) != 1:
        return None
    values = [row[others[0]] for row in rows if others[0] < len(row)]
    return others[0] if len(set(values)) < len(values) else None  # names of single images are no classes


def _read_as(form: _Form, names: list[str] | None, rows: list[list[str]], label: int | None, comments: int) -> str:
    """How a list was read, where it is not a path a line, or columns that are called so."""

    def title(column: int) -> str:
        return f"column {(names[column] if names and column < len(names) else '') or column + 1}"

    said = [form.place.said] if form.place.said else []
    if form.spell is _mended and any(
        _mended(row[form.column]) != _as_written(row[form.column]) for row in rows if form.column < len(row)
    ):
        said.append("blanks, quotes, ~, ./ and \\ in paths are resolved")
    if form.part is not _as_cells or len(rows[0]) > 2 or (names and not _columns(names, PATH_COLUMNS)):
        labels = "no labels" if label is None else f"labels from {title(label)}"
        said.append(f"paths from {title(form.column)}, {labels}")
    if comments:
        said.append(f"{comments} lines that begin with # are passed over")
    return "; ".join(said)
