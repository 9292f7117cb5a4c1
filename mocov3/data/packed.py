"""Which data are archives or tables: named by a pattern, or all in a folder."""

import os
from pathlib import Path

from mocov3.data import parquet, shards
from mocov3.data.sources import Source
from mocov3.errors import UserError


def open_packed(data: str, split: str) -> Source | None:
    """Pictures in ``data`` if it names archives or tables, or is a folder of them (or has a part ``split`` that is).

    Raises:
        UserError: if they cannot be used, or have no such part.
    """
    for is_kind, open_kind, ending in (
        (shards.is_shards, shards.open_shards, ".tar"),
        (parquet.is_parquet, parquet.Parquet, ".parquet"),
    ):
        if is_kind(data) and not os.path.isdir(data):
            if split == "val":
                raise UserError(f"data {data}: has no val part; name a folder that holds train/ and val/")
            return open_kind(shards.expand(data))
        folder = Path(data) / split if os.path.isdir(Path(data) / split) else Path(data)
        if split == "val" and folder == Path(data):
            continue
        if os.path.isdir(folder) and (files := sorted(map(str, folder.glob(f"*{ending}")))):
            return open_kind(files)
    return None
