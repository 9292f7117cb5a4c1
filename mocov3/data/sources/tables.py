"""Images in Parquet tables, as Hugging Face keeps data sets: a column of file bytes, and optionally one of classes.

Needs pyarrow (``pip install mocov3[parquet]``). An image is reached by reading the row group it lies in; where row
groups come to be read again, as in shuffled training, an unpacked copy is read (``mocov3.data.sources.unpacked``).
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from mocov3.data.sources.classes import ordered, remarks_on_missing, renumbered
from mocov3.data.sources.left_out import MAY_BE_PASSED_OVER, passed_over
from mocov3.data.sources.row_groups import RowGroups, opened
from mocov3.data.sources.rows import LABEL_COLUMNS
from mocov3.data.views.decode import DecodeError, ImageBytes
from mocov3.errors import UserError, printable

if TYPE_CHECKING:
    import pyarrow.parquet

_IMAGES = ("image", "img", "jpg", "jpeg", "png", "picture", "bytes")
_MOST_NUMBERS = 100_000
_MOST_ROWS = 100  # a byte of a file: of images that are all one, and packed
_NUMBER = re.compile("0|-?[1-9][0-9]{0,17}")
_TRIED = 8  # rows by which a column is told to hold images


def is_parquet(data: str) -> bool:
    """Whether ``data`` names Parquet files."""
    return data.lower().endswith(".parquet")


class Parquet:
    """Rows of tables.

    Args:
        files: the tables.
        names: of numbered classes, where the tables do not declare them themselves.

    Raises:
        UserError: if pyarrow is missing, or a file is damaged or has no column of images.
    """

    def __init__(self, files: list[str], names: Sequence[str] = ()) -> None:
        self.files = files
        self.skipped: list[str] = []
        self._groups: list[tuple[int, int]] = []
        ends, labels, name_hash = [], [], hashlib.sha256()
        for number, file in enumerate(files):
            with opened(file) as table:
                if number == 0:
                    self.column, self._label = _image_column(table, file, self.skipped), _label_column(table)
                elif not {self.column, self._label or self.column} <= set(table.schema_arrow.names):
                    raise UserError(f"data {file}: has other columns than {files[0]}")
                rows = _rows(table, file)
                self._groups += [(number, group) for group in range(len(rows))]
                ends += rows
                if self._label:
                    labels.append(_read_labels(table, self._label, sum(rows), names))
            name_hash.update(f"{os.path.basename(file)}:{os.path.getsize(file)}\n".encode(errors="surrogateescape"))
        self.ends = np.cumsum(ends, dtype=np.int64)
        if not len(self):
            raise UserError(f"data {files[0]}: holds no row")
        self.labels, self.classes = self._joined(labels)
        if self.labels is not None:
            name_hash.update(self.labels.tobytes())
        self.digest = name_hash.hexdigest()
        self._reader = RowGroups(files, self.column)

    def _joined(self, labels: "list[_Labels | None]") -> tuple[np.ndarray | None, list[str]]:
        """int32 class of every row, and the names of the classes, of the labels of all files."""
        known = [part for part in labels if part is not None]
        if len(known) < len(labels):
            self.skipped.append(f"{self.files[0]}: column {self._label} does not hold one class a row: none is used")
        if not known or len(known) < len(labels):
            return None, []
        first = known[0].names
        declared = first if all(part.declared and part.names == first for part in known) else None
        used = {part.names[i] for part in known for i in np.unique(part.numbers[part.numbers >= 0]).tolist()}
        classes = declared or _names(used)
        numbers = np.concatenate([renumbered(p.numbers, p.names, classes, len(p.numbers)) for p in known])
        self.skipped += remarks_on_missing(self.files[0], numbers)
        if not (numbers >= 0).any():
            self.skipped.append(f"{self.files[0]}: column {self._label} holds no label")
            return None, []
        return numbers, classes

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def read(self, index: int) -> bytes:
        """The image's file bytes.

        Raises:
            OSError: if the table cannot be read any more, or the row is empty.
        """
        group = int(np.searchsorted(self.ends, index, side="right"))
        rows = self._reader.read(*self._groups[group])
        row = index - (int(self.ends[group - 1]) if group else 0)
        data = _bytes_of(rows[row]) if row < len(rows) else None
        if not isinstance(data, bytes) or not data:
            raise OSError("the row holds no bytes")
        return data

    def groups(self, field: str) -> np.ndarray | None:
        """Text of a column of single values, row by row; tables have no groups by themselves."""
        import pyarrow as pa

        parts = []
        for file in self.files:
            with opened(file) as table:
                if not field or field == self.column or field not in table.schema_arrow.names:
                    return None
                kind = table.schema_arrow.field(field).type
                if pa.types.is_nested(kind) or pa.types.is_binary(kind):
                    raise UserError(f"data {file}: column {printable(field)} does not hold one value a row")
                values = table.read([field]).column(0).to_pylist()
            parts.append(np.array(["" if value is None else str(value) for value in values], object))
        return np.concatenate(parts)

    def name(self, index: int) -> str:
        """The table and the row in all tables."""
        group = int(np.searchsorted(self.ends, index, side="right"))
        return f"{os.path.basename(self.files[self._groups[group][0]])}:{index}"


def columns(file: str) -> list[str]:
    """Names of a table's columns.

    Raises:
        UserError: if pyarrow is missing, or the file is damaged.
    """
    with opened(file) as table:
        return list(table.schema_arrow.names)


def _rows(table: Any, file: str) -> list[int]:
    """Rows of each group, by the footer, which a damaged file may have claim any number."""
    rows = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
    if min(rows, default=0) < 0 or sum(rows) > _MOST_ROWS * os.path.getsize(file):
        raise UserError(f"data {file}: claims {sum(rows)} rows, more than it can hold; it is damaged")
    return rows


# --- columns ----------------------------------------------------------------------------------------------------


def _image_column(table: "pyarrow.parquet.ParquetFile", file: str, said: list[str]) -> str:
    """The column of images: of those of file bytes the one whose first rows are images; one called so, if several."""
    names: list[str] = table.schema_arrow.names
    able = [name for name in names if _holds_bytes(table.schema_arrow.field(name).type)]
    called = sorted((name for name in able if name.lower() in _IMAGES), key=lambda name: _IMAGES.index(name.lower()))
    if len(able) == 1 and called:
        return called[0]
    holding = [name for name in able if _holds_images(table, name)]
    best = [name for name in called if name in holding] or holding or called
    if not best:
        some = printable(", ".join(names[:10]))
        raise UserError(f"data {file}: has no column of images as file bytes (its columns: {some})")
    if len(best) > 1 and best[0] not in called:
        both = printable(" and ".join(best[:2]))
        raise UserError(f"data {file}: columns {both} both hold images; call the one to use image, or leave one out")
    if others := [name for name in holding if name != best[0]]:
        said.append(printable(f"{file}: images are those of column {best[0]}; left out: column {', '.join(others)}"))
    return best[0]


def _holds_bytes(kind: "pyarrow.DataType") -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _holds_images(table: "pyarrow.parquet.ParquetFile", name: str) -> bool:
    """Whether one of the first rows is an image."""
    for batch in table.iter_batches(batch_size=_TRIED, columns=[name]):
        for value in batch.column(0):
            try:
                ImageBytes(_bytes_of(value) or b"")
            except DecodeError:
                continue
            return True
        break
    return False


def _bytes_of(value: "pyarrow.Scalar") -> Any:
    value = value.as_py()
    return value.get("bytes") if isinstance(value, dict) else value


@dataclass(frozen=True)
class _Labels:
    """Labels of one file."""

    numbers: np.ndarray
    """Index of each row's name, −1 where it has none."""
    names: list[str]
    declared: bool
    """Whether the file declares the names, those without images too."""


def _label_column(table: "pyarrow.parquet.ParquetFile") -> str | None:
    """The column of labels: called so, or the only one that Hugging Face's data sets library declares to be classes."""
    lower = {name.lower(): name for name in reversed(table.schema_arrow.names)}
    declared = list(_declared(table))
    return next((lower[n] for n in LABEL_COLUMNS if n in lower), declared[0] if len(declared) == 1 else None)


def _declared(table: "pyarrow.parquet.ParquetFile") -> dict[str, list[str]]:
    """Column → names of its classes, as the metadata of Hugging Face's data sets library have them (ClassLabel)."""
    try:
        features = json.loads(table.schema_arrow.metadata[b"huggingface"])["info"]["features"]
        return {
            column: [str(name) for name in about["names"]]
            for column, about in features.items()
            if isinstance(about, dict) and about.get("_type") == "ClassLabel" and about.get("names")
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _names(used: set[str]) -> list[str]:
    """Classes of the labels of a column; whole numbers from 0 on stay what they are."""
    if not all(map(_NUMBER.fullmatch, used)):
        return ordered(used)
    if used != {"-1", "1"}:
        used = used - {"-1"}  # the number for no label, unless it is one of a pair
    least, most = min(map(int, used), default=0), max(map(int, used), default=-1)
    return [str(i) for i in range(most + 1)] if least >= 0 and most < _MOST_NUMBERS else ordered(used)


def _read_labels(table: "pyarrow.parquet.ParquetFile", column: str, rows: int, beside: Sequence[str]) -> _Labels | None:
    """The labels of a file; ``None`` if they are not one class a row."""
    import pyarrow as pa

    values = table.read([column]).column(0).combine_chunks()
    if len(values) != rows:
        raise ValueError(f"{len(values)} labels of {rows} rows")
    names = _declared(table).get(column)
    kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    if names is None and beside and pa.types.is_integer(kind) and values.type == kind:
        most = values.fill_null(-1).to_numpy(zero_copy_only=False).max(initial=-1)
        names = list(beside) if most < len(beside) else None
    if names is not None and pa.types.is_integer(kind):
        numbers = values.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        return _Labels(numbers.clip(min=-1), names, True) if numbers.max(initial=-1) < len(names) else None
    tests = (
        pa.types.is_integer,
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_boolean,
        pa.types.is_floating,
    )
    if not any(is_kind(kind) for is_kind in tests):
        return None
    coded = values if pa.types.is_dictionary(values.type) else values.dictionary_encode()
    texts = [_label_text(value) for value in coded.dictionary.to_pylist()]
    numbers = coded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    return _Labels(np.where(np.array([*texts, ""])[numbers] == "", -1, numbers), texts, False)


def _label_text(value: object) -> str:
    if value is None or value != value:  # NaN: what is missing in a column of numbers
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def used_rows(tables: Parquet) -> np.ndarray:
    """Rows of tables, but for images whose path (in Hugging Face's structure) is one that a folder's scan skips."""
    import pyarrow as pa
    import pyarrow.compute as pc

    passed, begin = [np.empty(0, np.int64)], 0
    for file in tables.files:
        with opened(file) as table:
            kind = table.schema_arrow.field(tables.column).type
            if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0:
                paths = table.read([f"{tables.column}.path"]).column(0).combine_chunks().field("path")
                if pa.types.is_string(paths.type):
                    rows = np.flatnonzero(pc.match_substring_regex(paths, MAY_BE_PASSED_OVER).fill_null(False))
                    names = paths.take(pa.array(rows)).to_pylist()
                    out = [passed_over(PurePosixPath(name).parts) for name in names]
                    passed.append(begin + rows[np.array(out, bool)])
            begin += sum(_rows(table, file))
    return np.delete(np.arange(len(tables)), np.concatenate(passed))
