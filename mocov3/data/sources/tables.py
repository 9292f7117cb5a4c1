"""Images in Parquet tables, as Hugging Face keeps data sets: a column of file bytes, and optionally one of classes.

Needs pyarrow (``pip install mocov3[parquet]``). An image is reached by reading the row group it lies in, so shuffled
training reads much more than it uses; for many epochs, ``mocov3 pack`` the tables into archives first.
"""

import hashlib
import os
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from mocov3.data.sources.left_out import MAY_BE_PASSED_OVER, passed_over
from mocov3.errors import UserError, printable

_IMAGES = ("image", "img", "jpg", "jpeg", "png", "picture", "bytes")
_LABELS = ("label", "labels", "cls", "class", "fine_label")
_KEPT = 4  # row groups a process holds


def is_parquet(data: str) -> bool:
    """Whether ``data`` names Parquet files."""
    return data.lower().endswith(".parquet")


class Parquet:
    """Rows of tables.

    Raises:
        UserError: if pyarrow is missing, or a file is damaged or has no column of images.
    """

    def __init__(self, files: list[str]) -> None:
        self.files = files
        self.skipped: list[str] = []
        pq = _pyarrow()
        self._groups: list[tuple[int, int]] = []
        ends, labels, name_hash = [], [], hashlib.sha256()
        for number, file in enumerate(files):
            try:
                with pq.ParquetFile(file) as table:
                    schema = table.schema_arrow
                    image, label = _column(schema, file), next((n for n in _LABELS if n in schema.names), None)
                    if number == 0:
                        self.column, self._label = image, label
                    elif (image, label) != (self.column, self._label):
                        raise UserError(f"data {file}: has other columns than {files[0]}")
                    for group in range(table.num_row_groups):
                        self._groups.append((number, group))
                        ends.append(table.metadata.row_group(group).num_rows)
                    if label:
                        labels.append(np.asarray(table.read([label]).column(label)))
            except (OSError, ValueError) as error:
                raise UserError(f"data {file}: cannot be read as Parquet ({str(error).splitlines()[0]})") from None
            name_hash.update(f"{os.path.basename(file)}:{os.path.getsize(file)}\n".encode(errors="surrogateescape"))
        self.ends = np.cumsum(ends, dtype=np.int64)
        if not len(self):
            raise UserError(f"data {files[0]}: holds no row")
        self.labels = _as_labels(np.concatenate(labels)) if labels else None
        if labels and self.labels is None:
            self.skipped.append(
                f"{files[0]}: column {self._label} does not hold numbers from 0 on in every row: no classes are used"
            )
        self.classes = [] if self.labels is None else [str(i) for i in range(int(self.labels.max()) + 1)]
        if self.labels is not None:
            name_hash.update(self.labels.tobytes())
        self.digest = name_hash.hexdigest()
        self._kept: dict[int, Any] = {}

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_kept": {}}

    def read(self, index: int) -> bytes:
        """The image's file bytes.

        Raises:
            OSError: if the table cannot be read any more, or the row is empty.
        """
        group = int(np.searchsorted(self.ends, index, side="right"))
        if group not in self._kept:
            number, part = self._groups[group]
            try:
                with _pyarrow().ParquetFile(self.files[number]) as table:
                    rows = table.read_row_group(part, [self.column]).column(self.column).combine_chunks()
            except ValueError as error:
                raise OSError(str(error).splitlines()[0]) from None
            while len(self._kept) >= _KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[group] = rows
        value = self._kept[group][index - (int(self.ends[group - 1]) if group else 0)].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes) or not data:
            raise OSError("the row holds no bytes")
        return data

    def name(self, index: int) -> str:
        """The table and the row in all tables."""
        group = int(np.searchsorted(self.ends, index, side="right"))
        return f"{os.path.basename(self.files[self._groups[group][0]])}:{index}"


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError("Parquet files need pyarrow: pip install mocov3[parquet]") from None
    return pq


def _column(schema: Any, file: str) -> str:
    import pyarrow as pa

    def holds_bytes(kind: Any) -> bool:
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    names: list[str] = schema.names
    for name in sorted(names, key=lambda n: (n not in _IMAGES, _IMAGES.index(n) if n in _IMAGES else 0)):
        kind = schema.field(name).type
        if holds_bytes(kind):
            return name
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and holds_bytes(kind.field("bytes").type):
            return name
    some = printable(", ".join(names[:10]))
    raise UserError(f"data {file}: has no column of images as file bytes (its columns: {some})")


def _as_labels(values: np.ndarray) -> np.ndarray | None:
    usable = values.dtype.kind in "iu" and values.size and values.min() >= 0 and values.max() < 2**31
    return values.astype(np.int32) if usable else None


def used_rows(tables: Parquet) -> np.ndarray:
    """Rows of tables, but for images whose path (in Hugging Face's structure) is one that a folder's scan skips."""
    import pyarrow as pa
    import pyarrow.compute as pc

    passed, begin = [np.empty(0, np.int64)], 0
    for file in tables.files:
        with _pyarrow().ParquetFile(file) as table:
            kind = table.schema_arrow.field(tables.column).type
            if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0:
                paths = table.read([f"{tables.column}.path"]).column(0).combine_chunks().field("path")
                if pa.types.is_string(paths.type):
                    rows = np.flatnonzero(pc.match_substring_regex(paths, MAY_BE_PASSED_OVER).fill_null(False))
                    names = paths.take(pa.array(rows)).to_pylist()
                    out = [passed_over(PurePosixPath(name).parts) for name in names]
                    passed.append(begin + rows[np.array(out, bool)])
            begin += table.metadata.num_rows
    return np.delete(np.arange(len(tables)), np.concatenate(passed))
