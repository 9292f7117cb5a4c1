"""Reaching images: time to open a tree again, memory of ten million paths with sixteen loader processes, tables read in
random order by row groups and by their unpacked copy.

    python benchmarks/sources.py tree 1280000    # makes and removes a tree of empty files in the temporary folder
    python benchmarks/sources.py paths 10000000
    python benchmarks/sources.py tables 20000

``paths``: Linux only (reads proportional set sizes from /proc).
"""

import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from mocov3.data import open_source
from mocov3.data.loading.order import Order
from mocov3.data.sources.index import Chunk, Index
from mocov3.data.sources.opening import Folder
from mocov3.data.sources.tables import Parquet

_PROCESSES = 16


def tree(count: int) -> None:
    """Time to scan a tree of ``count`` empty files in 1,000 folders, and to open it again."""
    root = Path(tempfile.mkdtemp(prefix="mocov3-tree-"))
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")
    data = root / "data"
    try:
        for folder in range(1000):
            place = data / f"n{folder:08d}"
            place.mkdir(parents=True)
            for i in range(count // 1000):
                (place / f"n{folder:08d}_{i:06d}.JPEG").touch()
            os.utime(place, (1e9, 1e9))  # as long ago as any real data
        os.utime(data, (1e9, 1e9))
        first = _timed(str(data))
        again = [_timed(str(data)) for _ in range(3)]
        print(f"{count} files: scanned in {first:.2f} s, opened again in {sorted(again)[1]:.2f} s (median of 3)")
    finally:
        shutil.rmtree(root)


def _timed(data: str) -> float:
    began = time.perf_counter()
    source = open_source(data)
    assert source.digest
    assert source.labels is not None
    return time.perf_counter() - began


def tables(count: int) -> None:
    """Time to read ``count`` images of 2,500 bytes in random order, in row groups of 100 (Hugging Face's)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tempfile.mkdtemp(prefix="mocov3-tables-")
    os.environ["XDG_CACHE_HOME"] = folder
    try:
        rng = np.random.default_rng(0)
        pq.write_table(pa.table({"image": [rng.bytes(2500) for _ in range(count)]}), f"{folder}/a.parquet", 100)
        order = rng.permutation(count).tolist()
        by_groups, by_copy = Parquet([f"{folder}/a.parquet"]), Parquet([f"{folder}/a.parquet"])
        few = order[: max(count // 20, 1)]  # by row groups it takes minutes
        began = time.perf_counter()
        for index in few:
            by_groups._reader.read(0, index // 100)
            by_groups._reader._read.clear()  # no copy
        groups = (time.perf_counter() - began) / len(few)
        began = time.perf_counter()
        for index in order:
            by_copy.read(index)
        copy = (time.perf_counter() - began) / count
        print(
            f"{count} images in a table: {1e3 * groups:.3f} ms an image by row groups, {1e3 * copy:.3f} by a copy, "
            f"making it included (ratio {groups / copy:.0f})"
        )
    finally:
        shutil.rmtree(folder)


def paths(count: int) -> None:
    """Proportional set sizes of this process and sixteen more that each read paths of one shared index."""
    folder = tempfile.mkdtemp(prefix="mocov3-paths-")
    os.environ["XDG_CACHE_HOME"] = folder
    try:
        chunks = []
        for start in range(0, count, 10_000):
            names = [f"camera{start // 1000000:03d}/2024/{i:010d}.jpg".encode() for i in range(start, start + 10_000)]
            chunks.append(Chunk(np.array([len(n) for n in names]), b"".join(names), 0))
        source = Folder(folder, Index.of_chunks(chunks), ["all"])
        del chunks
        context = multiprocessing.get_context("spawn")
        results, go = context.Queue(), context.Event()
        processes = [context.Process(target=_read, args=(source, number, results, go)) for number in range(_PROCESSES)]
        for process in processes:
            process.start()
        order = Order(count, 4096).epoch(0, 0)
        for _ in processes:
            results.get()
        sizes = [_proportional(process.pid or 0) for process in processes]
        this_process = _proportional(os.getpid())
        go.set()
        for process in processes:
            process.join()
        print(
            f"{count} paths, {_PROCESSES} loader processes: {(this_process + sum(sizes)) / 1e9:.2f} GB in all "
            f"(this process {this_process / 1e9:.2f}, with an epoch's order of {order.nbytes / 1e9:.2f}; "
            f"each other {np.mean(sizes) / 1e6:.0f} MB)"
        )
    finally:
        shutil.rmtree(folder)


def _read(source: Folder, number: int, results: "multiprocessing.Queue[int]", go: "multiprocessing.Event") -> None:  # type: ignore[valid-type]
    import mocov3.data.loading.loader
    import mocov3.data.views.two_views  # noqa: F401  (what a loader process loads)

    # every path is read by some process, as in an epoch
    results.put(sum(len(source.index.path(i)) for i in range(number, len(source), _PROCESSES * 7)))
    go.wait()  # type: ignore[attr-defined]


def _proportional(pid: int) -> int:
    """Bytes of a process, shared ones divided by the number of processes that share them."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("no Pss in smaps_rollup")


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("tree", "paths", "tables"):
        sys.exit(__doc__)
    {"tree": tree, "paths": paths, "tables": tables}[sys.argv[1]](int(sys.argv[2]))
