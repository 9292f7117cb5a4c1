"""Lists of images: text, CSV and JSON lines that name files and maybe their classes (``rows``: in which forms).

Paths are relative to the list's folder, or absolute. Where that finds none, they are looked for from the folder above
and from the working directory, then by name, with or without ending, in the list's folder and those in it. A list is
trusted as a command line is: it may name any file that the user may read; what is not a regular file is refused when it
is read.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from unicodedata import normalize

from mocov3.data.sources.classes import numbered, remarks_on_missing
from mocov3.data.sources.index import Index
from mocov3.data.sources.rows import JSON_LINES, Place, read_rows
from mocov3.data.sources.scan import list_folder
from mocov3.errors import UserError

ENDINGS = (".txt", ".lst", ".list", ".csv", ".tsv", JSON_LINES)
_MOST_FOLDERS = 100


def read_list(file: Path) -> tuple[str, Index, list[str], list[str]]:
    """Folder, index and classes of a list, and remarks on it.

    Raises:
        UserError: if it cannot be read, names nothing, or none of the files it names is there.
    """
    rows = read_rows(file, _places(file))
    if not rows.found:
        first = os.fsdecode(rows.paths[0])
        raise UserError(
            f"data {file}: none of the files it names exists, first: line {rows.lines[0]}: {first}; "
            f"paths are relative to {file.parent or '.'} or absolute"
        )
    numbers, classes = numbered(rows.labels)
    remarks = [*rows.remarks, *remarks_on_missing(str(file), numbers)]
    return os.fsdecode(rows.place.root), Index.build(rows.paths, numbers), classes, remarks


def _places(file: Path) -> Iterator[Place]:
    folder = os.fsencode(file.parent)
    yield _below(folder)
    for other in (os.path.dirname(os.path.abspath(folder)), os.fsencode(os.getcwd())):
        yield _below(other, f"paths are relative to {os.fsdecode(other)}")
    by_name = _by_name(folder, os.fsencode(file.stem))
    yield Place(by_name.get, folder, looked_up=True, said="images are found by their names beside the list")


def _below(root: bytes, said: str = "") -> Place:
    def find(path: bytes) -> bytes | None:
        return next((p for p in _spellings(path) if os.path.isfile(os.path.join(root, p))), None)

    return Place(find, root, said=said)


def _spellings(path: bytes) -> Iterator[bytes]:
    """The path as it stands, then in the forms of Unicode: macOS and others write é in different ones."""
    yield path
    if not path.isascii():
        yield from (os.fsencode(normalize(form, os.fsdecode(path))) for form in ("NFC", "NFD"))


def _by_name(folder: bytes, first: bytes) -> dict[bytes, bytes | None]:
    """Name of an image with and without ending → its path, of those in a folder and in the folders in it.

    ``None`` where several have the name, unless one lies in the folder itself or in that called ``first``.
    """
    known: dict[bytes, bytes | None] = {}
    for inner in (b"", first, *(name for name in list_folder(folder).folders[:_MOST_FOLDERS] if name != first)):
        for name in list_folder(folder, inner).images:
            path = inner + b"/" + name if inner else name
            for key in {name, os.path.splitext(name)[0], os.path.splitext(path)[0]}:
                before = known.setdefault(key, path)
                if before not in (None, path) and os.path.dirname(before or b"") not in {b"", first} - {inner}:
                    known[key] = None
    return known
