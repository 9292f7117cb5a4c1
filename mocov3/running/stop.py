"""Why and when a run stops before its end: signals, limits, too many unreadable images. Ranks agree each step."""

import signal
import time
from typing import Any

from mocov3.distributed import World
from mocov3.errors import stop_signals

_LIMIT, _REFUSED = 1000, 1001  # above every signal's number
_AGAIN = 0.5  # seconds: a key pressed once reaches spawned ranks twice, from the terminal and from the process above


class Stop:
    """Collects reasons to stop; the loop checks after every step.

    Args:
        max_steps: stop once so many steps are done in all (0: never).
        max_hours: stop after this time (0: never).
    """

    def __init__(self, *, max_steps: int, max_hours: float) -> None:
        self.refusal = ""
        self._reason, self._asked = 0, 0.0
        self._steps, self._seconds = max_steps, 3600 * max_hours
        self._began = time.monotonic()
        self._handlers: dict[int, Any] = {}
        for number in stop_signals():
            try:
                self._handlers[number] = signal.signal(number, self._signalled)
            except ValueError:  # not in the main thread: the caller handles signals
                break

    def _signalled(self, number: int, _: object) -> None:
        if self._reason != number:
            self._reason, self._asked = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._asked > _AGAIN:
            raise KeyboardInterrupt  # asked twice: at once

    def refuse(self, text: str) -> None:
        """Ask to stop because the input is unsuitable."""
        self._reason, self.refusal = self._reason or _REFUSED, text

    def finish(self) -> None:
        """Ask to stop because no further gain is expected."""
        self._reason = self._reason or _LIMIT

    def steps_done(self, step: int) -> bool:
        """Whether the limit of steps is reached."""
        return bool(self._steps) and step >= self._steps

    def agreed(self, world: World, step: int) -> bool:
        """Whether any rank has a reason; afterwards all have the same. The device is not read."""
        late = self._seconds and time.monotonic() - self._began > self._seconds
        if not self._reason and (late or self.steps_done(step)):
            self._reason = _LIMIT
        agreed = world.any(self._reason)
        if agreed:  # else a signal that came during the call would be overwritten; it is told at the next step
            self._reason = agreed
        return bool(agreed)

    @property
    def signal(self) -> int:
        """Number of the signal that stopped the run, or 0."""
        return self._reason if self._reason < _LIMIT else 0

    def close(self) -> None:
        """Restore the signal handlers."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
