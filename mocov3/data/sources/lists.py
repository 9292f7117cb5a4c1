"""Lists of images: text files (a path a line) and CSV files (a column of paths, optionally one of labels).

Paths are relative to the list's folder, or absolute. A list is trusted as a command line is: it may name any file that
the user may read; what is not a regular file is refused when it is read.
"""

import csv
import io
import os
from pathlib import Path

import numpy as np

from mocov3.data.sources.index import Index
from mocov3.errors import UserError

ENDINGS = (".txt", ".lst", ".list", ".csv", ".tsv")
_PATH_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "image", "img", "picture", "name")
_LABEL_COLUMNS = ("label", "class", "target", "category", "y")
_PROBED = 50  # paths asked for before training: all missing means the list is meant for another folder


def read_list(file: Path) -> tuple[str, Index, list[str], list[str]]:
    """Folder, index and classes of a list, and remarks on it.

    Raises:
        UserError: if it cannot be read, names nothing, or none of the files it names is there.
    """
    rows = read_rows(file)
    root = os.fsencode(file.parent)
    paths = [path for path, _ in rows]
    step = max(len(paths) // _PROBED, 1)
    if not any(os.path.isfile(os.path.join(root, path)) for path in paths[::step]):
        first = os.fsdecode(paths[0])
        raise UserError(
            f"data {file}: none of the files it names exists, first: {first}; "
            f"paths are relative to {file.parent or '.'} or absolute"
        )
    labels = [label for _, label in rows]
    classes = sorted(set(labels)) if all(labels) else []
    number = {name: i for i, name in enumerate(classes)}
    numbers = np.array([number[label] for label in labels], np.int32) if classes else None
    missing = sum(not label for label in labels)
    partly = (
        [f"{file}: {missing} of {len(labels)} images have no label: none is used"] if 0 < missing < len(labels) else []
    )
    return os.fsdecode(root), Index.build(paths, numbers), classes, partly


def read_rows(file: Path) -> list[tuple[bytes, str]]:
    """(path, label) of every line of a text or CSV list; the label is empty where there is none.

    Raises:
        UserError: naming the file, and the line where one is at fault.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"data {file}: cannot be read ({error.strerror}); give a list of paths") from None
    data = data.removeprefix(b"\xef\xbb\xbf")  # written by Windows programs
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"data {file}: is UTF-16; save it as UTF-8")
    if b"\0" in data:
        raise UserError(f"data {file}: is not a list of paths (holds zero bytes)")
    rows = _csv_rows(data, file) if file.suffix.lower() in (".csv", ".tsv") else _text_rows(data)
    if not rows:
        raise UserError(f"data {file}: names no image; write a path a line")
    for path, _ in rows[:1]:
        if b"://" in path:
            raise UserError(f"data {file}: names addresses ({os.fsdecode(path)}); fetch the images first")
    return rows


def _text_rows(data: bytes) -> list[tuple[bytes, str]]:
    lines = (line.rstrip(b"\r") for line in data.split(b"\n"))
    return [(_native(line), "") for line in lines if line.strip()]


def _csv_rows(data: bytes, file: Path) -> list[tuple[bytes, str]]:
    text = data.decode("utf-8", errors="surrogateescape")
    first = text.split("\n", 1)[0]
    delimiter = "\t" if file.suffix.lower() == ".tsv" else max(",;\t", key=first.count)
    try:
        table = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if any(row)]
    except csv.Error as error:
        raise UserError(f"data {file}: is not CSV ({error})") from None
    if not table:
        return []
    header = [cell.strip().lower() for cell in table[0]]
    path_column = next((header.index(n) for n in _PATH_COLUMNS if n in header), None)
    label_column = next((header.index(n) for n in _LABEL_COLUMNS if n in header), None)
    if path_column is None and label_column is None:  # no header: path, label
        path_column, label_column, body, start = 0, (1 if len(header) > 1 else None), table, 1
    else:
        path_column, body, start = path_column or 0, table[1:], 2
    rows = []
    for number, row in enumerate(body, start):
        if len(row) <= path_column or not row[path_column].strip():
            raise UserError(f"data {file}: row {number} holds no path (column {path_column + 1})")
        label = row[label_column].strip() if label_column is not None and label_column < len(row) else ""
        rows.append((_native(row[path_column].strip().encode("utf-8", errors="surrogateescape")), label))
    return rows


def _native(path: bytes) -> bytes:
    return path.replace(b"\\", b"/") if os.name == "nt" else path
