"""Tables read in random order: their images are unpacked once into a file of the cache folder, which all processes map.

A Parquet file gives an image only with its whole row group, of 100 or 1,000 images in compressed pages: training that
shuffles reads a hundred times what it uses. The copy holds the same bytes uncompressed (Arrow's file format, a batch a
row group), so an image is one slice of a mapped file.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from mocov3.data.sources.index import cache_folder
from mocov3.errors import UserError

SHARE = 10
"""All copies may take one part in so many of the disk's free space."""
_STALE = 600
"""Seconds after which a copy that nobody goes on writing counts as abandoned."""


def mapped(table: Any, file: str, column: str) -> list[Any] | None:
    """Images of each row group of a table, from its copy, which is made if it is missing.

    Args:
        table: the open table.
        file: where it lies.
        column: of images, as bytes or in Hugging Face's structure.

    Returns:
        Arrays of binary values over a mapped file, one a row group; ``None`` where there is no copy: another process is
        writing it, there is no room, or no cache.
    """
    import pyarrow as pa

    try:
        copy = cache_folder() / "tables" / f"{_key(file, column)}.arrow"
        if not copy.exists() and not _make(copy, table, column):
            return None
        return _batches(copy, table)
    except (OSError, ValueError, UserError, pa.ArrowException):  # full, unwritable, or the table is damaged
        return None


def _key(file: str, column: str) -> str:
    stat = os.stat(file)
    facts = f"{os.path.realpath(file)}\n{stat.st_size} {stat.st_mtime_ns}\n{column}"
    return hashlib.sha256(facts.encode(errors="surrogateescape")).hexdigest()[:32]


def _batches(copy: Path, table: Any) -> list[Any] | None:
    import pyarrow as pa

    try:
        with pa.memory_map(str(copy)) as held:
            reader = pa.ipc.open_file(held)
            batches = [reader.get_batch(i).column(0) for i in range(reader.num_record_batches)]
    except pa.ArrowException:
        batches = []
    rows = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
    if [len(batch) for batch in batches] != rows:  # damaged: made again the next time
        copy.unlink(missing_ok=True)
        return None
    os.utime(copy)  # the last to be removed
    return batches


def _make(copy: Path, table: Any, column: str) -> bool:
    """Write the copy, if there is room and nobody else is at it; whether it is there now."""
    import pyarrow as pa

    partial = copy.with_suffix(".partial")
    copy.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError):
        if time.time() - partial.stat().st_mtime > _STALE:
            partial.unlink()
    if not _make_room(copy.parent, _size(table, column)):
        return False
    schema = pa.schema([("image", pa.large_binary())])
    try:
        held = partial.open("xb")
    except FileExistsError:
        return False
    try:
        with held:
            with pa.ipc.new_file(held, schema) as writer:
                for values in _groups(table, column):
                    writer.write_batch(pa.record_batch([values], schema=schema))
            held.flush()
            os.fsync(held.fileno())  # a copy with a name is whole, whenever the power goes
        os.replace(partial, copy)
    finally:
        partial.unlink(missing_ok=True)
    return True


def _groups(table: Any, column: str) -> Iterator[Any]:
    """Binary values of every row group."""
    import pyarrow as pa

    for group in range(table.num_row_groups):
        values = table.read_row_group(group, [column]).column(column).combine_chunks()
        if pa.types.is_struct(values.type):
            values = values.flatten()[values.type.get_field_index("bytes")]  # of a missing row: a missing value
        yield values.cast(pa.large_binary())


def _size(table: Any, column: str) -> int:
    """Bytes of the column, unpacked."""
    groups = [table.metadata.row_group(group) for group in range(table.num_row_groups)]
    chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] == column)


def _make_room(folder: Path, size: int) -> bool:
    """Remove the copies that were used least recently until one more fits; whether it does."""
    kept = []
    for file in folder.glob("*.arrow"):
        with suppress(OSError):
            stat = file.stat()
            kept.append((stat.st_mtime, stat.st_size, file))
    used = sum(bytes_of for _, bytes_of, _ in kept)
    most = (shutil.disk_usage(folder).free + used) // SHARE
    if size > most:
        return False
    for _, bytes_of, file in sorted(kept):
        if used + size <= most:
            break
        file.unlink(missing_ok=True)  # who has it mapped keeps it
        used -= bytes_of
    return True
