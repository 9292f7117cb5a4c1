"""Parts of batches, handed to loader processes as each becomes free, so that a slow image holds up no other part.

A thread of the main process does it: training does not look after the pipes. Which process makes a part changes
nothing of it. How many processes are given work follows the share of the time that training waits.
"""

import multiprocessing.connection
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from mocov3.data.loading.slots import Corrupt

Part = tuple[int, int, int, list[int]]
"""Slot, epoch, first place, images by index."""
Answer = tuple[str, int, Any, list[tuple[int, str]]]
"""done, unreadable or failed; the slot; unreadable images or the reason; remarks."""
_QUEUED = 2
"""Parts that a process has at once: while one is sent, the other is made."""


class Dispatch:
    """Hands out parts and collects answers.

    Args:
        pipes: to the processes.
        active: how many of them are given work at first.
        answered: told (in the thread) each answer; what it raises, ``wait`` raises.
        died: told (in the thread) the number of a process whose pipe is closed; raises.
    """

    def __init__(
        self,
        pipes: Sequence[multiprocessing.connection.Connection],
        active: int,
        *,
        answered: Callable[[Answer], list[Corrupt]],
        died: Callable[[int], None],
    ) -> None:
        self.active, self._pipes, self._answered, self._died = active, list(pipes), answered, died
        self._parts: deque[Part] = deque()
        self._sent = [0] * len(pipes)
        self._missing: dict[int, int] = {}
        self._corrupt: dict[int, list[Corrupt]] = {}
        self._failure: BaseException | None = None
        self._changed = threading.Condition()
        self._wake, self._woken = multiprocessing.connection.Pipe()
        self._thread = threading.Thread(target=self._serve, name="loader", daemon=True)
        self._thread.start()

    def add(self, slot: int, parts: Sequence[Part]) -> None:
        """Have a slot filled."""
        with self._changed:
            self._missing[slot], self._corrupt[slot] = len(parts), []
            self._parts.extend(parts)
            self._hand_out()

    def wait(self, slot: int) -> list[Corrupt]:
        """Wait until a slot is full; its unreadable images.

        Raises:
            Exception: what an answer or a dead process raised.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or not self._missing[slot])
            if self._failure is not None:
                raise self._failure
            return sorted(self._corrupt.pop(slot), key=lambda c: c.index)

    def close(self) -> None:
        """End the thread; call it before the pipes are closed."""
        with suppress(OSError):
            self._wake.send_bytes(b"")
        self._thread.join()
        self._wake.close()
        self._woken.close()

    def _hand_out(self) -> None:
        while self._parts and self._failure is None:
            number = min(range(self.active), key=self._sent.__getitem__)
            if self._sent[number] >= _QUEUED:
                return
            try:
                self._pipes[number].send(self._parts[0])
            except OSError:
                self._fail(number)
                return
            self._parts.popleft()
            self._sent[number] += 1

    def _fail(self, number: int) -> None:
        try:
            self._died(number)
        except Exception as error:
            self._failure = error
            self._changed.notify_all()

    def _serve(self) -> None:
        try:
            while self._failure is None:
                ready = multiprocessing.connection.wait([*self._pipes, self._woken])
                if self._woken in ready:
                    return
                with self._changed:
                    for number, pipe in enumerate(self._pipes):
                        if pipe in ready:
                            self._take(number)
                    self._hand_out()
                    self._changed.notify_all()
        except BaseException as error:  # who waits must not wait for ever
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _take(self, number: int) -> None:
        try:
            answer: Answer = self._pipes[number].recv()
        except (EOFError, OSError):
            self._fail(number)
            return
        self._sent[number] -= 1
        try:
            corrupt = self._answered(answer)
        except Exception as error:
            self._failure = error
            return
        self._missing[answer[1]] -= 1
        self._corrupt[answer[1]].extend(corrupt)


class Follow:
    """How many processes are given work: one more where training waits, one less where it does not.

    A number at which training waited is not gone back to for a while.

    Args:
        active: at first.
        most: processes there are.
        now: tells seconds.
    """

    WAITS, IDLE = 0.10, 0.01
    """Shares of the time above and below which the number changes."""
    WINDOW = 2.0
    """Seconds over which they are measured."""
    AGAIN = 30
    """Windows until a number that was too small is tried again."""

    def __init__(self, active: int, most: int, now: Callable[[], float] = time.monotonic) -> None:
        self.active, self._most, self._now = active, most, now
        self._since, self._waited, self._windows = now(), 0.0, 0
        self._too_few: dict[int, int] = {}

    def waited(self, seconds: float) -> int:
        """Note a wait for a batch; how many processes should be given work from now on."""
        self._waited += seconds
        passed = self._now() - self._since
        if passed >= self.WINDOW:
            self._windows += 1
            self._decide(self._waited / passed)
            self._since, self._waited = self._now(), 0.0
        return self.active

    def _decide(self, share: float) -> None:
        if share > self.WAITS and self.active < self._most:
            self._too_few[self.active] = self._windows
            self.active += 1
        elif share < self.IDLE and self.active > 1:
            tried = self._too_few.get(self.active - 1)
            if tried is None or self._windows - tried > self.AGAIN:
                self.active -= 1
