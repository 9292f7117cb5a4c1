"""Loader processes that write uint8 views into shared slots.

Which images are in a batch, and how each is cut and coloured, is decided by the order and by (seed, epoch, index);
processes only do the work, so their number does not matter. Processes are spawned (as on macOS and Windows), import
no torch, and communicate with this one over a pipe each: there is no lock that a killed process could leave held.
"""

import ctypes
import multiprocessing
import multiprocessing.connection
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from mocov3.config.presets import RGB
from mocov3.data.loading.dispatch import Answer, Dispatch, Follow, Part
from mocov3.data.loading.filling import Filler, Transform, Unreadable
from mocov3.data.loading.order import Order
from mocov3.data.loading.slots import Batch, Corrupt, Layout, Work
from mocov3.data.sources.opening import Source
from mocov3.data.views import remarks
from mocov3.errors import UserError, reason, stop_signals

_LARGE_SLOT = 256 << 20  # bytes above which one batch less is prepared ahead
_AHEAD = 48 << 20  # bytes of small batches that are prepared ahead, so that a slow image can be waited for
_MOST_AHEAD = 32
_PARTS = 4  # of a batch for each process: whichever is free takes the next
_SMALLEST_PART = 8  # images; smaller ones would be messages more than work
_FEW = 2000  # images up to which starting processes takes longer than they save


def batches(
    n: int,
    *,
    seed: int,
    batch_size: int,
    rank: int,
    ranks: int,
    start: tuple[int, int],
    epochs: int,
    order: Order | None = None,
) -> Iterator[Work]:
    """The batches of this rank from ``start`` (epoch, iteration) on: its part of every global batch.

    The global batch of a step does not depend on the number of ranks. The last part batch is dropped. ``order``
    says which images an epoch holds; all ``n`` unless given.
    """
    local = batch_size // ranks
    epoch, iteration = start
    order = order or Order(n, batch_size)
    for e in range(epoch, epochs):
        indices = order.epoch(seed, e)
        for i in range(iteration if e == epoch else 0, order.iterations):
            first = i * batch_size + rank * local
            yield Work(e, i, indices[first : first + local])


class Loader:
    """Makes batches by ``workers`` processes (0: in this one).

    Args:
        source: the images.
        transform: what is made of each.
        batch_size: largest number of images of a batch of this rank.
        seed: seed of the draws.
        workers: number of processes.
        replace: use another image for one that cannot be read, as training does; else it is left black.
        say: told once, at the end, of how many images something was remarked, and the first of them.
        spare: processes that are given work only while batches are waited for.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        *,
        batch_size: int,
        seed: int,
        workers: int,
        replace: bool = True,
        say: Callable[[str], None] | None = None,
        spare: int = 0,
    ) -> None:
        self._spare = spare
        self.source, self._filler = source, Filler(source, transform, seed, replace)
        self._say, self._tally = say, remarks.Tally()
        beside, channels = getattr(transform, "colour_draws", 0), getattr(transform, "reading", RGB).channels
        local = getattr(transform, "local", None)
        more = (local.count, local.pixels) if local else (0, 0)
        layout = Layout(transform.count, batch_size, transform.image_size, beside, channels, more)
        self.memory: np.ndarray
        """Bytes of all slots."""
        self._processes: list[Any] = []
        self._pipes: list[multiprocessing.connection.Connection] = []
        self._dispatch: Dispatch | None = None
        self._start(min(workers, batch_size), layout)

    def _start(self, workers: int, layout: Layout) -> None:
        if not workers:
            self.memory = np.zeros(layout.bytes, dtype=np.uint8)
            self._slots = layout.slots(self.memory)
            return
        context = multiprocessing.get_context("spawn")
        # an unlinked memory-mapped file: falls back from /dev/shm where that is small, leaves nothing when killed
        size = slots_ahead(layout.bytes) * layout.bytes
        try:
            memory: Any = context.RawArray(ctypes.c_uint8, size)
        except OSError as error:
            raise UserError(
                f"--workers: no {size >> 20} MB of memory to share with loader processes ({reason(error)}); "
                "give --workers 0, or set TMPDIR to a folder with room"
            ) from None
        self.memory = np.frombuffer(memoryview(memory), dtype=np.uint8)
        self._slots = layout.slots(self.memory)
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, memory, layout, self._filler), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        if self._dispatch is not None:
            self._dispatch.close()
            self._dispatch = None
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(timeout=2)
            if process.is_alive():
                process.kill()
                process.join()
        self._processes, self._pipes = [], []
        if self._say is not None:
            self._tally.say(self.source.name, self._say)

    def run(self, works: Iterable[Work]) -> Iterator[Batch]:
        """The batches of ``works``, in order, prepared ahead.

        Raises:
            Unreadable: if an image and all its replacements cannot be read.
            RuntimeError: if a loader process died or failed.
        """
        return self._run_here(works) if not self._processes else self._run_in_processes(works)

    def _run_here(self, works: Iterable[Work]) -> Iterator[Batch]:
        slot = self._slots[0]
        for work in works:
            corrupt, remarked = self._filler(slot, 0, work.indices.tolist(), work.epoch)
            self._tally.add(remarked, len(self.source))
            yield slot.batch(work, corrupt)

    def _run_in_processes(self, works: Iterable[Work]) -> Iterator[Batch]:
        coming = iter(works)
        free = deque(range(len(self._slots)))
        ahead: deque[tuple[int, Work]] = deque()  # slots in the order of their batches
        count = len(self._pipes)
        follow = Follow(max(count - self._spare, 1), count)
        dispatch = self._dispatching(follow.active)
        while True:
            while free and (work := next(coming, None)) is not None:
                slot = free.popleft()
                ahead.append((slot, work))
                dispatch.add(slot, _parts(slot, work, count))
            if not ahead:
                return
            slot, work = ahead.popleft()
            began = time.monotonic()
            corrupt = dispatch.wait(slot)
            dispatch.active = follow.waited(time.monotonic() - began)
            yield self._slots[slot].batch(work, corrupt)
            free.append(slot)

    def _dispatching(self, active: int) -> Dispatch:
        if self._dispatch is None:
            self._dispatch = Dispatch(self._pipes, active, answered=self._answered, died=self._died)
        return self._dispatch

    def _answered(self, answer: Answer) -> list[Corrupt]:
        kind, _, corrupt, remarked = answer
        if kind == "unreadable":
            raise Unreadable(corrupt)
        if kind == "failed":
            raise RuntimeError(f"a loader process failed:\n{corrupt}")
        self._tally.add(remarked, len(self.source))
        return list(corrupt)

    def _died(self, number: int) -> None:
        process = self._processes[number]
        process.join(timeout=5)
        code = process.exitcode
        how = f"was killed by signal {-code} (out of memory?)" if code and code < 0 else f"ended with code {code}"
        raise RuntimeError(f"loader process {number} (pid {process.pid}) {how}")


def _serve(
    pipe: multiprocessing.connection.Connection, memory: "ctypes.Array[ctypes.c_uint8]", layout: Layout, filler: Filler
) -> None:
    """Body of a loader process: fills parts of slots until the pipe closes."""
    for number in stop_signals():  # the main process decides when to stop
        signal.signal(number, signal.SIG_IGN)
    import cv2

    cv2.setNumThreads(0)  # one process a core already
    slots = layout.slots(np.frombuffer(memoryview(memory), dtype=np.uint8))
    while True:
        try:
            slot, epoch, first, indices = pipe.recv()
        except (EOFError, OSError):
            return
        answer: tuple[Any, ...]
        try:
            answer = ("done", slot, *filler(slots[slot], first, indices, epoch))
        except Unreadable as error:
            answer = ("unreadable", slot, str(error), [])
        except Exception:
            answer = ("failed", slot, traceback.format_exc(), [])
        try:
            pipe.send(answer)
        except OSError:
            return


def slots_ahead(size: int) -> int:
    """How many batches of a size in bytes have memory: more of small ones."""
    return max(min(_AHEAD // max(size, 1), _MOST_AHEAD), 3 if size < _LARGE_SLOT else 2)


def _parts(slot: int, work: Work, processes: int) -> list[Part]:
    n = len(work.indices)
    size = max(-(-n // (_PARTS * processes)), min(_SMALLEST_PART, -(-n // processes)))
    return [(slot, work.epoch, i, work.indices[i : i + size].tolist()) for i in range(0, n, size)]


def usable_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def loader_workers(asked: int, processes: int = 1, images: int | None = None) -> int:
    """Loader processes of one of ``processes`` on this machine: at most its share of the cores, none for few images."""
    if images is not None and images <= _FEW:
        return 0
    return min(asked, max(usable_cores() // processes, 1))
