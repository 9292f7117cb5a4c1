"""Several findings an image, from a CSV file: a column a finding, 1 or 0 where it is known.

A table of them is kept as labels of two dimensions: int32, (images, findings), 1, 0, or −1 where it is not known.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mocov3.data.sources.labels import Labelled, Labels
from mocov3.data.sources.opening import Source
from mocov3.data.sources.rows import LABEL_COLUMNS
from mocov3.data.sources.table import Table, read_table, split_name
from mocov3.errors import UserError, printable

_VALUES = {"1": 1, "1.0": 1, "true": 1, "0": 0, "0.0": 0, "false": 0}
_UNKNOWN = ("", "nan", "null", "<na>", "-1", "-1.0")  # −1: uncertain, as in CheXpert


class Findings(Labelled):
    """The images of which at least one finding is known."""

    @property
    def digest(self) -> str:
        """sha256 over images and findings."""
        table = np.ascontiguousarray(self.labels)
        return hashlib.sha256(super().digest.encode() + table.tobytes()).hexdigest()


def names_findings(text: str, parts: Sequence[Source], flag: str) -> bool:
    """Whether ``FILE.csv``, by its columns, or ``FILE.csv:COLUMN,COLUMN`` means findings and not one class an image.

    Raises:
        UserError: if it cannot be read, or names none of the images.
    """
    file, columns = split_name(text)
    if columns or not file:
        return bool(columns)
    return len(_columns(read_table(Path(file), parts, flag))) > 1


def with_findings(text: str, parts: Sequence[Source], flag: str = "--labels") -> list[Source]:
    """The images of each part of which findings are known; see ``known_findings``."""
    return [Findings(part, known) for part, known in zip(parts, known_findings(text, parts, flag), strict=True)]


def known_findings(text: str, parts: Sequence[Source], flag: str = "--labels") -> list[Labels]:
    """What is known of the images of each part; those without a row, or with an empty one, are left out.

    Args:
        text: ``FILE.csv``, or ``FILE.csv:COLUMN,COLUMN`` where not all columns of 1 and 0 are findings.
        parts: the images.
        flag: names the file in messages.

    Raises:
        UserError: if a cell is neither 1 nor 0 nor empty, rows differ on an image, or nothing is known of any.
    """
    file, wanted = split_name(text)
    if not file:
        raise UserError(f"{flag} {text}: names no CSV file; give FILE.csv, or FILE.csv:COLUMN,COLUMN")
    table = read_table(Path(file), parts, flag)
    names = [name.strip() for name in wanted.split(",")] if wanted else _columns(table)
    if not names:
        raise UserError(
            f"{flag} {file}: has no columns of 1 and 0; name those of findings after a colon (one class an image comes "
            "from folders, lists or tables)"
        )
    columns = [table.column(name, flag) for name in names]
    values = np.full((sum(map(len, parts)), len(names)), -1, np.int32)
    seen: dict[int, int] = {}
    for row, images in enumerate(table.images):
        cells = [
            _value(column[row], f"{flag} {file}: line {table.rows.lines[row]}, column {name}", table.private)
            for column, name in zip(columns, names, strict=True)
        ]
        for i in images:
            if i in seen and values[i].tolist() != cells:
                raise UserError(f"{flag} {file}: lines {seen[i]} and {table.rows.lines[row]} differ on one image")
            seen[i], values[i] = table.rows.lines[row], cells
    said = (*table.rows.remarks, printable(f"{file}: {len(names)} findings an image: {', '.join(names)}"))
    known: list[Labels] = []
    begin = 0
    for part in parts:
        own = values[begin : begin + len(part)]
        begin += len(part)
        chosen = np.flatnonzero((own >= 0).any(1))
        left = len(part) - len(chosen)
        more = (
            (printable(f"{file}: {left} of {len(part)} images have no finding that is known; left out"),)
            if left
            else ()
        )
        known.append(Labels(chosen, own[chosen], names, (*said, *more)))
    if not any(len(labels.indices) for labels in known):
        raise UserError(f"{flag} {file}: no finding is known of any image")
    return known


def findings_of(text: str, parts: Sequence[Source], flag: str = "--labels") -> list[Source]:
    """``with_findings`` of parts that are trained on and judged: each must have some.

    Raises:
        UserError: if the file does not name findings, or says nothing of a part.
    """
    found = with_findings(text, parts, flag)
    empty = next((part for part, own in zip(parts, found, strict=True) if not len(own)), None)
    if empty is not None:
        raise UserError(f"{flag} {text}: says nothing of {len(empty)} images, first {printable(empty.name(0))}")
    return found


def refuse_one_sided(source: Source, where: str) -> None:
    """Refuse to judge by images of which every finding is always there or never, so that none has an AUROC.

    Raises:
        UserError: naming the findings.
    """
    truth = source.labels
    if truth is not None and truth.ndim == 2 and not ((truth == 1).any(0) & (truth == 0).any(0)).any():
        raise UserError(
            f"{where}: no finding ({', '.join(source.classes)}) has images with it and without it to judge by"
        )


def _value(cell: str, where: str, private: bool) -> int:
    if cell.lower() in _UNKNOWN:
        return -1
    if cell.lower() not in _VALUES:
        what = "something else" if private else printable(cell)
        raise UserError(f"{where}: holds {what}; write 1, 0 or nothing, or name the columns to use after a colon")
    return _VALUES[cell.lower()]


def _columns(table: Table) -> list[str]:
    """Columns of 1 and 0 beside the path; none where a column is called a label."""
    rows = table.rows
    names = rows.names or []
    if any(name.strip().lower().replace(" ", "_") in LABEL_COLUMNS for i, name in enumerate(names) if i != rows.column):
        return []
    found, known = [], False
    for i, name in enumerate(names):
        cells = {row[i].strip().lower() if i < len(row) else "" for row in rows.cells} if i != rows.column else {"x"}
        if cells <= {*_VALUES, *_UNKNOWN}:
            found.append(name)
            known |= bool(cells & set(_VALUES))
    return found if known else []
