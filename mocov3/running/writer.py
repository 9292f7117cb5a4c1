"""Checkpoints written while training continues: a snapshot in host memory, then a thread that writes it.

The step waits only for the snapshot. A disk that is full or gone costs no run: the thread warns, tries again, and
never touches the last good file.
"""

import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mocov3.weights import Contents, tensorfiles

FIRST_PAUSE, LONGEST_PAUSE = 10.0, 300.0
"""Seconds until a failed write is tried again; doubled after every failure."""


class Writer:
    """Writes snapshots in a thread of its own, one file at a time, of each the newest that is due.

    Args:
        folder: where files go.
        before: called in the thread before each file takes its name (what must be on the disk by then).
        after: called in the thread with the name of each file that is complete.
        warn: called in the thread with a line about a failure.
        first_pause: seconds until the first new try.
    """

    def __init__(
        self,
        folder: Path,
        *,
        before: Callable[[], None],
        after: Callable[[str], None],
        warn: Callable[[str], None],
        first_pause: float = FIRST_PAUSE,
    ) -> None:
        self.folder, self.before, self.after, self.warn = folder, before, after, warn
        self.first_pause = first_pause
        self._files: dict[str, Contents] = {}
        self._failure = ""
        self._due = self._busy = self._closed = False
        self._changed = threading.Condition()
        self._buffers: dict[str, list[Tensor]] = {}
        self._copied: Any = None
        self._thread = threading.Thread(target=self._serve, name="checkpoint writer", daemon=True)
        self._thread.start()

    def save(self, files: Mapping[str, Contents]) -> None:
        """Take a snapshot of ``files`` (name → contents) to be written in this order; returns once it is taken.

        Waits for a write in progress. A file that failed and waits for its next try is written as well, or in its
        newer form; a numbered one (a checkpoint of an epoch) is given up for a newer one.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._busy)
            slots = {_slot(name) for name in files}
            waiting = {name: contents for name, contents in self._files.items() if _slot(name) not in slots}
            taken: dict[int, Contents] = {}  # several names may be given to the same contents
            for name, contents in files.items():
                if id(contents) not in taken:
                    taken[id(contents)] = self._snapshot(name, contents)
                waiting[name] = taken[id(contents)]
            self._files = waiting
            self._due = True
            self._changed.notify_all()

    def flush(self) -> str:
        """Wait until the newest snapshot is on the disk, with one more try if the last one failed.

        Returns why it is not there, or ''.
        """
        with self._changed:
            self._due = bool(self._files)
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._due and not self._busy)
            return self._failure

    def close(self) -> str:
        """``flush``, then end the thread."""
        failure = self.flush()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        return failure

    def _serve(self) -> None:
        pause = 0.0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._due or self._closed, timeout=pause or None)
                if self._closed:
                    return
                self._due = False
                if not self._files:
                    continue
                name, contents = next(iter(self._files.items()))
                self._busy = True
            failure = self._write(name, contents)
            pause = min(2 * pause or self.first_pause, LONGEST_PAUSE) if failure else 0.0
            if failure:
                again = f"the run continues, next attempt in {pause:.0f} s"
                self.warn(f"checkpoint {name} could not be written ({failure}); {again}")
            with self._changed:
                self._busy, self._failure = False, failure
                if not failure:
                    del self._files[name]
                    self._due = self._due or bool(self._files)
                self._changed.notify_all()

    def _write(self, name: str, contents: Contents) -> str:
        try:
            if self._copied is not None:
                self._copied.synchronize()  # the step did not wait for the copies to the host
            self.before()
            tensorfiles.write(self.folder / name, contents)
            self.after(name)
        except OSError as error:
            return str(error.strerror or error)
        except Exception as error:  # the thread must outlive whatever a file system thinks up
            return f"{type(error).__name__}: {error}"
        return ""

    def _snapshot(self, name: str, contents: Contents) -> Contents:
        # buffers are used again: fresh memory costs a page fault every 4 KB, pinned memory far more
        buffers: list[Tensor] = []
        old, self._buffers[_slot(name)] = self._buffers.get(_slot(name), [])[::-1], buffers

        def copied(value: object) -> Any:
            if isinstance(value, Tensor):
                buffer = old.pop() if old else None
                if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
                    buffer = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda, requires_grad=False)
                buffer.copy_(value.detach(), non_blocking=value.is_cuda)
                buffers.append(buffer)
                return buffer
            if isinstance(value, dict):
                return {k: copied(v) for k, v in value.items()}
            if isinstance(value, list | tuple):
                return type(value)(copied(v) for v in value)
            return value

        snapshot: Contents = copied(contents)
        if any(t.is_pinned() for t in buffers[:1]):
            self._copied = torch.cuda.Event()
            self._copied.record()
        return snapshot


def _slot(name: str) -> str:
    """What files have in common of which only the newest matters: their name up to a number."""
    return re.split(r"\d", name, maxsplit=1)[0]
