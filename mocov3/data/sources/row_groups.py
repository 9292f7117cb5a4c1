"""Row groups of Parquet tables, as a process reads them."""

import contextlib
from collections.abc import Iterator
from typing import Any

from mocov3.data.sources.unpacked import mapped
from mocov3.errors import UserError

_KEPT = 4  # row groups a process holds


class RowGroups:
    """Row groups of tables as one process reads them; sent to another process, it begins anew.

    What is read again is read from an unpacked copy.

    Args:
        files: the tables.
        column: of images.
    """

    def __init__(self, files: list[str], column: str) -> None:
        self.files, self.column = files, column
        self._kept: dict[tuple[int, int], Any] = {}
        self._read: set[tuple[int, int]] = set()
        self._again = [0] * len(files)
        self._unpacked: dict[int, list[Any]] = {}

    def __reduce__(self) -> tuple[object, ...]:
        return RowGroups, (self.files, self.column)

    def read(self, number: int, group: int) -> Any:
        """Values of the column in a row group of a file. Raises OSError if the table cannot be read any more."""
        if number in self._unpacked:
            return self._unpacked[number][group]
        place = number, group
        if place not in self._kept:
            try:
                rows = self._read_table(number, group)
            except UserError as error:
                raise OSError(str(error)) from None
            while len(self._kept) >= _KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[place] = rows
        return self._kept[place]

    def _read_table(self, number: int, group: int) -> Any:
        file = self.files[number]
        with opened(file) as table:
            if (number, group) in self._read:
                self._again[number] += 1
                # at the 1st, 2nd, 4th, 8th … time: another process may be writing the copy
                if self._again[number].bit_count() == 1 and (unpacked := mapped(table, file, self.column)):
                    self._unpacked[number] = unpacked
                    return unpacked[group]
            self._read.add((number, group))
            return table.read_row_group(group, [self.column]).column(self.column).combine_chunks()


@contextlib.contextmanager
def opened(file: str) -> Iterator[Any]:
    """A table, to read from.

    Raises:
        UserError: if pyarrow is missing, or the file cannot be read, here or within the context.
    """
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError("Parquet files need pyarrow: pip install mocov3[parquet]") from None
    try:
        with pq.ParquetFile(file) as table:
            yield table
    except UserError:
        raise
    except Exception as error:  # damage makes pyarrow raise errors of many kinds
        reason = str(error) or type(error).__name__
        raise UserError(f"data {file}: cannot be read as Parquet ({reason.splitlines()[0]})") from None
