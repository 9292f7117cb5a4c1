"""Copies of tables that are read in random order: the same bytes, whoever makes them, whatever becomes of them."""

import os
import pickle
import shutil
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from mocov3.data.sources import unpacked
from mocov3.data.sources.tables import Parquet

pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
IMAGES = [bytes([i]) * (i + 1) for i in range(60)]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mocov3" / "tables"


@pytest.fixture
def table(tmp_path):
    """Two files of six row groups each, the second in Hugging Face's structure with a row that is missing."""
    rows = [{"bytes": data, "path": str(i)} for i, data in enumerate(IMAGES)]
    files = [str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")]
    pq.write_table(pa.table({"label": range(60), "image": [{"bytes": d, "path": None} for d in IMAGES]}), files[0], 10)
    pq.write_table(pa.table({"label": range(60), "image": [*rows[:7], None, *rows[8:]]}), files[1], 10)
    return files


def read(source, seed=0):
    """Every row in random order, twice; what is missing is None."""
    values = {}
    order = np.random.default_rng(seed)
    for index in [*order.permutation(len(source)).tolist(), *order.permutation(len(source)).tolist()]:
        try:
            values[index] = source.read(index)
        except OSError:
            values[index] = None
    return [values[i] for i in range(len(source))]


EXPECTED = [*IMAGES, *IMAGES[:7], None, *IMAGES[8:]]


def test_the_same_bytes_and_few_row_groups_read(cache, table, monkeypatch):
    source, reads = Parquet(table), []
    whole = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda *a, **k: reads.append(a) or whole(*a, **k))
    assert read(source) == EXPECTED
    assert len(list(cache.iterdir())) == 2
    assert len(reads) < 40, "by row groups 240 would be"
    reads.clear()
    again = pickle.loads(pickle.dumps(source))
    assert read(again, seed=1) == EXPECTED
    assert len(reads) < 14, "the copies that are there were made again"


def test_in_order_nothing_is_copied(cache, table):
    source = Parquet(table)
    for index in range(7):
        source.read(index)
    list(map(source.read, range(8, 60)))
    assert not cache.exists()


def _read_in_process(files):
    return read(Parquet(files), seed=os.getpid())


def test_processes_that_begin_at_once(cache, table):
    with ProcessPoolExecutor(3, get_context("fork")) as pool:
        assert list(pool.map(_read_in_process, [table] * 3)) == [EXPECTED] * 3
    assert sorted(file.suffix for file in cache.iterdir()) == [".arrow"] * 2


@pytest.mark.parametrize("damage", ["cut", "zeros", "other rows"])
def test_a_damaged_copy_is_made_again(damage, cache, table):
    read(Parquet(table))
    copies = sorted(cache.iterdir())
    for copy in copies:
        data = copy.read_bytes()
        if damage == "other rows":
            with pa.ipc.new_file(str(copy), pa.schema([("image", pa.large_binary())])) as writer:
                writer.write_batch(pa.record_batch([pa.array(IMAGES, pa.large_binary())], names=["image"]))
        else:
            copy.write_bytes(data[: len(data) // 2] if damage == "cut" else bytes(len(data)))
    assert read(Parquet(table)) == EXPECTED
    assert read(Parquet(table)) == EXPECTED
    assert sorted(cache.iterdir()) == copies


@pytest.mark.parametrize("why", ["full", "unwritable", "written by another", "abandoned"])
def test_without_a_copy_row_groups_are_read(why, cache, table, monkeypatch):
    if why == "full":
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(1000, 1000, 1000))
    elif why == "unwritable":
        cache.parent.mkdir(parents=True)
        cache.write_text("a file in place of the folder")
    else:
        cache.mkdir(parents=True)
        for file in table:
            partial = cache / f"{unpacked._key(file, 'image')}.partial"
            partial.touch()
            if why == "abandoned":
                os.utime(partial, (1e9, 1e9))
    assert read(Parquet(table)) == EXPECTED
    copies = [] if why == "unwritable" else sorted(file.suffix for file in cache.iterdir()) if cache.exists() else []
    assert copies == {"written by another": [".partial"] * 2, "abandoned": [".arrow"] * 2}.get(why, [])


def test_a_table_that_changed_has_another_copy_and_the_oldest_goes(cache, table, tmp_path, monkeypatch):
    read(Parquet(table))
    first = set(cache.iterdir())
    for copy in first:
        os.utime(copy, (1e9, 1e9))
    used = sum(copy.stat().st_size for copy in first)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(0, 0, unpacked.SHARE * (used + 400) - used))
    pq.write_table(pa.table({"image": IMAGES[::-1]}), table[0], 10)
    assert read(Parquet(table[:1])) == IMAGES[::-1]
    second = set(cache.iterdir())
    assert len(second - first) == 1
    assert second < first | second


def test_a_damaged_row_group_spoils_no_other(cache, table):
    with pq.ParquetFile(table[0]) as held:
        places = [held.metadata.row_group(g).column(1).data_page_offset for g in range(6)]
    data = bytearray(Path(table[0]).read_bytes())
    data[places[3] : places[3] + 20] = b"\xff" * 20
    Path(table[0]).write_bytes(data)
    expected = [None if 30 <= i < 40 else image for i, image in enumerate(IMAGES)]
    assert read(Parquet(table[:1])) == expected
    assert not list(cache.glob("*"))
