"""Checkpoints written while training continues: a snapshot in host memory, then a thread that writes it.

The step waits only for the snapshot. A disk that is full or gone costs no run: the thread warns, tries again, and
never touches the last good file.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mocov3.weights import Contents, tensorfiles

FIRST_PAUSE, LONGEST_PAUSE = 10.0, 300.0
"""Seconds until a failed write is tried again; doubled after every failure."""


class Writer:
    """Writes snapshots in a thread of its own, one at a time, the newest that is due.

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
        self._job: tuple[str, dict[str, Any]] | None = None
        self._failure = ""
        self._due = self._busy = self._closed = False
        self._changed = threading.Condition()
        self._buffers: list[Tensor] = []
        self._copied: Any = None
        self._thread = threading.Thread(target=self._serve, name="checkpoint writer", daemon=True)
        self._thread.start()

    def save(self, name: str, contents: Contents) -> None:
        """Take a snapshot of ``contents`` and write it as ``name``; returns once the snapshot is taken.

        Waits for a write in progress; takes the place of one that failed and waits for its next try.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._busy)
            self._job = (name, self._snapshot(contents))
            self._due = True
            self._changed.notify_all()

    def flush(self) -> str:
        """Wait until the newest snapshot is on the disk, with one more try if the last one failed.

        Returns why it is not there, or ''.
        """
        with self._changed:
            self._due = self._job is not None
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
                if self._job is None:
                    continue
                name, contents = self._job
                self._busy = True
            failure = self._write(name, contents)
            pause = min(2 * pause or self.first_pause, LONGEST_PAUSE) if failure else 0.0
            if failure:
                again = f"the run continues, next attempt in {pause:.0f} s"
                self.warn(f"checkpoint {name} could not be written ({failure}); {again}")
            with self._changed:
                self._busy, self._failure = False, failure
                self._job = self._job if failure else None
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

    def _snapshot(self, contents: Contents) -> dict[str, Any]:
        # buffers are used again: fresh memory costs a page fault every 4 KB, pinned memory far more
        old, self._buffers = self._buffers[::-1], []

        def copied(value: Any) -> Any:
            if isinstance(value, Tensor):
                buffer = old.pop() if old else None
                if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
                    buffer = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda, requires_grad=False)
                buffer.copy_(value.detach(), non_blocking=value.is_cuda)
                self._buffers.append(buffer)
                return buffer
            if isinstance(value, dict):
                return {k: copied(v) for k, v in value.items()}
            if isinstance(value, list | tuple):
                return type(value)(copied(v) for v in value)
            return value

        snapshot: dict[str, Any] = copied(contents)
        if any(t.is_pinned() for t in self._buffers[:1]):
            self._copied = torch.cuda.Event()
            self._copied.record()
        return snapshot
