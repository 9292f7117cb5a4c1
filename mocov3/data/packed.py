"""Which data are archives or tables: named by a pattern, or all in a folder."""

import os

from mocov3.data import parquet, shards
from mocov3.data.sources import Source
from mocov3.data.splits import remark_on_mix
from mocov3.errors import UserError


def open_packed(data: str, split: str) -> Source | None:
    """Pictures in ``data`` if it names archives or tables, one, by a glob or by braces: all of them, as named.

    Raises:
        UserError: if they cannot be used, or the validation part is wanted.
    """
    if os.path.isdir(data) or not (shards.is_shards(data) or parquet.is_parquet(data)):
        return None
    if split == "val":
        raise UserError(f"data {data}: has no val part; name a folder that holds train/ and val/")
    files = shards.expand(data)
    return open_files(files, remark_on_mix(data, files))


def open_files(files: list[str], remarks: list[str]) -> Source:
    """Pictures in archives or in tables; ``remarks`` come before those on the files.

    Raises:
        UserError: if they cannot be used.
    """
    source = parquet.Parquet(files) if parquet.is_parquet(files[0]) else shards.open_shards(files)
    source.skipped = [*remarks, *source.skipped]
    return source
