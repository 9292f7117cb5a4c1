"""Files of embeddings: a spool that a stopped pass resumes from, the finished ``.npy`` or ``.parquet``, duplicates.

The spool lies beside the output: ``.NAME.spool.npy`` (features), ``.NAME.done`` (a byte a batch), ``.NAME.key.json``
(what made them) and ``.NAME.errors.jsonl`` (unreadable images).
"""

import contextlib
import errno
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from mocov3.data import Source
from mocov3.data.sources.index import write_atomically
from mocov3.distributed import World
from mocov3.errors import UserError
from mocov3.evaluation.neighbours import nearest
from mocov3.metrics import JsonLine

_FLUSH_SECONDS = 5.0
_ROW_GROUP = 16384
_NEIGHBOURS = 20  # looked at for duplicates; larger groups are joined by their members


class Spool:
    """Features as they come, by all ranks of one machine.

    Args:
        output: the file that is to be.
        key: what makes the features; a spool of another key is begun afresh.
        images: how many.
        shape: of one image's features.
        batch: images a batch.
        world: this rank.
    """

    def __init__(
        self, output: Path, key: JsonLine, *, images: int, shape: tuple[int, ...], batch: int, world: World
    ) -> None:
        self.output, self.world, self.batch, self.images = output, world, batch, images
        self.batches = -(-images // batch)
        names = ("spool.npy", "done", "key.json", "errors.jsonl")
        self._features_file, self._done_file, self._key_file, self._errors_file = (
            output.with_name(f".{output.name}.{name}") for name in names
        )
        if world.main:
            self._prepare({**key, "shape": list(shape), "pictures_n": images}, shape)
        world.barrier()
        self._features: Any = np.load(self._features_file, mmap_mode="r+")
        self._done: Any = np.memmap(self._done_file, dtype=np.uint8, mode="r+", shape=(self.batches,))
        self.count_done = int(self._done.sum())
        self._pending: list[int] = []
        self._flushed = time.monotonic()

    def _prepare(self, key: JsonLine, shape: tuple[int, ...]) -> None:
        try:
            saved = json.loads(self._key_file.read_text())
        except (OSError, ValueError):
            saved = None
        whole = self._features_file.exists() and self._done_file.exists()
        if saved == key and whole and self._done_file.stat().st_size == self.batches:
            return
        self.remove()
        with self._writing():
            try:
                np.lib.format.open_memmap(self._features_file, mode="w+", dtype=np.float32, shape=(self.images, *shape))
                _reserve(self._features_file)
                self._done_file.write_bytes(bytes(self.batches))
                self._key_file.write_text(json.dumps(key))  # last: without it the others do not count
            except OSError:
                self.remove()
                raise

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"--output {self.output}: cannot be written ({error.strerror or error})") from None

    def todo(self) -> list[np.ndarray]:
        """This rank's part of the batches that are not there yet."""
        missing = np.flatnonzero(self._done == 0)
        self.world.barrier()  # before anyone marks one
        mine = np.array_split(missing, self.world.size)[self.world.rank]
        return [np.arange(b * self.batch, min((b + 1) * self.batch, self.images)) for b in mine.tolist()]

    def put(self, indices: np.ndarray, features: np.ndarray, errors: dict[int, str]) -> None:
        """Write a batch, and which of its images could not be read."""
        first = int(indices[0])
        self._features[first : first + len(indices)] = features
        if errors:
            with self._writing(), self._errors_file.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps([i, reason]) + "\n" for i, reason in errors.items()))
        self._pending.append(first // self.batch)
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Features reach the disk before their batches count as done."""
        with self._writing():
            self._features.flush()
            self._done[self._pending] = 1
            self._done.flush()
        self._pending.clear()
        self._flushed = time.monotonic()

    def finish(self, source: Source, about: str, errors: dict[int, str], groups: np.ndarray | None = None) -> None:
        """Make the output, remove the spool; ``groups`` are the names of the images' groups."""
        del self._features, self._done
        with self._writing():
            if self.output.suffix == ".parquet":
                write_atomically(
                    self.output, lambda sink: _write_parquet(sink, self._features_file, source, about, errors, groups)
                )
            else:
                lines = _lines(source, errors, groups)
                write_atomically(self.output.with_suffix(".jsonl"), lambda file: file.writelines(lines))
                os.replace(self._features_file, self.output)
            self.remove()

    def remove(self) -> None:
        """Remove the spool."""
        for file in (self._key_file, self._done_file, self._features_file, self._errors_file):
            file.unlink(missing_ok=True)

    def errors(self) -> dict[int, str]:
        """The images that could not be read, of all ranks: index → reason."""
        if not self._errors_file.exists():
            return {}
        reasons = {}
        for line in self._errors_file.read_text(encoding="utf-8").splitlines():
            try:
                index, reason = json.loads(line)
                reasons[int(index)] = str(reason)
            except ValueError:  # cut short by a kill; its batch was not done and came again
                continue
        return reasons


def _reserve(file: Path) -> None:
    """Take the space of a file that is written through memory, where a full disk would kill the process."""
    if hasattr(os, "posix_fallocate"):
        with file.open("r+b") as target:
            try:
                os.posix_fallocate(target.fileno(), 0, file.stat().st_size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):  # it cannot be asked for there
                    raise


def _lines(source: Source, errors: dict[int, str], groups: np.ndarray | None) -> Iterator[bytes]:
    """A JSON line an image: what its row is of."""
    for i, name in enumerate(class_names(source)):
        error = {"error": errors[i]} if i in errors else {}
        group = {} if groups is None else {"group": groups[i]}
        yield json.dumps({"path": source.name(i), "class": name, **group, **error}).encode() + b"\n"


def class_names(source: Source) -> list[str]:
    """Name of every image's class, empty where it has none; without classes that of the folder it lies in."""
    if source.labels is not None:
        names = [*source.classes, ""]
        return [names[label] for label in source.labels.tolist()]
    is_files = hasattr(source, "root") and hasattr(source, "index")
    return [
        PurePosixPath(source.name(i).replace(os.sep, "/")).parent.name if is_files else "" for i in range(len(source))
    ]


def _write_parquet(
    sink: Any, spool: Path, source: Source, about: str, errors: dict[int, str], groups: np.ndarray | None
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    features, classes = np.load(spool, mmap_mode="r"), class_names(source)
    width = int(np.prod(features.shape[1:]))
    schema = pa.schema(
        [
            ("path", pa.string()),
            ("class", pa.string()),
            ("error", pa.string()),
            *([] if groups is None else [("group", pa.string())]),
            ("feature", pa.list_(pa.float32(), width)),
        ],
        metadata={"backbone": _utf8(about), "shape": json.dumps(list(features.shape[1:])), "made_by": "mocov3 embed"},
    )
    with pq.ParquetWriter(sink, schema) as writer:
        for start in range(0, len(features), _ROW_GROUP):
            numbers = range(start, min(start + _ROW_GROUP, len(features)))
            values = pa.array(np.ascontiguousarray(features[start : numbers.stop]).reshape(-1))
            columns = [
                pa.array([_utf8(source.name(i)) for i in numbers]),
                pa.array([_utf8(classes[i]) for i in numbers]),
                pa.array([errors.get(i) for i in numbers], pa.string()),
                *([] if groups is None else [pa.array([_utf8(groups[i]) for i in numbers], pa.string())]),
                pa.FixedSizeListArray.from_arrays(values, width),
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def _utf8(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def load(path: Path) -> torch.Tensor:
    """Features of a finished file, (images, …)."""
    if path.suffix == ".npy":
        return torch.from_numpy(np.load(path, mmap_mode="c"))
    import pyarrow.parquet as pq

    with path.open("rb") as file:
        table = pq.read_table(file, columns=["feature"])
    column = table.column("feature").combine_chunks()
    values = column.flatten().to_numpy(zero_copy_only=False)
    return torch.from_numpy(values.reshape(len(table), -1).copy())


def duplicate_groups(
    features: torch.Tensor, threshold: float, *, leave_out: set[int], device: torch.device | None = None
) -> list[tuple[float, list[int]]]:
    """Groups of images joined by a cosine of at least ``threshold``: (least cosine of a joining pair, members).

    Largest groups first. An image is compared with its 20 nearest, sought on ``device``.
    """
    readable = torch.tensor([i for i in range(len(features)) if i not in leave_out], dtype=torch.long)
    if len(readable) < 2:
        return []
    x = features[readable] if leave_out else features
    neighbours = nearest(x, x, min(_NEIGHBOURS, len(x) - 1), self_index=torch.arange(len(x)), device=device)
    parent = list(range(len(x)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    near = (neighbours.similarity >= threshold).nonzero().tolist()
    for i, place in near:
        parent[root(int(neighbours.index[i, place]))] = root(i)
    groups: dict[int, list[int]] = {}
    least: dict[int, float] = {}
    for i, place in near:
        r = root(i)
        least[r] = min(least.get(r, 1.0), float(neighbours.similarity[i, place]))
    for i in sorted({i for i, _ in near} | {int(neighbours.index[i, place]) for i, place in near}):
        groups.setdefault(root(i), []).append(int(readable[i]))
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[1][0]))
    return [(least[r], members) for r, members in ordered]
