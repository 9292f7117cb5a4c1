"""Which rank is lost: every rank writes a heartbeat to the shared store, and a thread watches.

A collective call only reports that some rank is missing, after up to half an hour. Rank 0 watches all,
the others watch rank 0, so that the traffic grows with the number of ranks only.
"""

import contextlib
import os
import sys
import threading
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from mocov3.errors import RankLost

PERIOD = 1.0
"""Seconds between signs of life."""
_LEFT = "left "


class Heartbeat:
    """Heartbeats of one rank, and what it knows of the others'.

    Args:
        rank: of this process.
        size: number of ranks.
        group: name of this meeting of ranks; the store may hold signs of former ones.
        silence: seconds without a sign of life after which a rank counts as lost, and this process ends.
        patience: seconds after another rank has ended by an error, or has said that one is lost, after which this
            process ends too, as its main thread hangs; 0: a collective call fails by itself.
    """

    def __init__(self, rank: int, size: int, *, group: str, silence: float, patience: float = 0.0) -> None:
        self.rank, self.size, self.group, self.silence, self.patience = rank, size, group, silence, patience
        self._store = _own_connection()
        self._seen: dict[int, tuple[str, float]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        if self._store is not None:
            self._thread.start()

    def leave(self, reason: str) -> None:
        """Announce that this rank ends ('' for a regular end), and stop watching."""
        self._stop.set()
        if self._store is not None:
            self._thread.join(timeout=5 * PERIOD)
            with contextlib.suppress(Exception):  # the store may be gone already
                self._store.set(self._key(self.rank), _LEFT + reason)

    def blame(self, within: float = 8 * PERIOD) -> str:
        """Which rank is lost, in words, after a collective call failed; '' if none seems to be."""
        if self._store is None:
            return ""
        end = time.monotonic() + within
        while time.monotonic() < end:
            for rank in self._watched(everyone=True):
                value, silent = self._look(rank)
                if value.startswith(_LEFT) and len(value) > len(_LEFT):
                    return f"rank {rank} stopped: {value.removeprefix(_LEFT)}"
                if silent > 4 * PERIOD:
                    return f"rank {rank} is gone (killed, stopped, or its machine is lost)"
            time.sleep(PERIOD / 2)
        return ""

    def _beat(self) -> None:
        count = 0
        while not self._stop.wait(PERIOD):
            count += 1
            with contextlib.suppress(Exception):  # seen below as the silence of rank 0, at whose place the store is
                self._store.set(self._key(self.rank), str(count))
            for rank in self._watched(everyone=self.rank == 0):
                value, silent = self._look(rank)
                if self._stop.is_set():
                    return
                if value.startswith(_LEFT):
                    if self.patience and value != _LEFT and silent > self.patience:
                        self._end(f"rank {rank} stopped: {value.removeprefix(_LEFT)}")
                elif silent > self.silence:
                    self._end(f"rank {rank} has not been heard of for {silent:.0f} s (stopped, or its machine is lost)")

    def _end(self, text: str) -> None:
        # the main thread may hang in a call that never returns; others learn the reason while the store is there
        with contextlib.suppress(Exception):
            self._store.set(self._key(self.rank), _LEFT + text)
            time.sleep(3 * PERIOD if self.patience else 0)
        print(f"mocov3: error: {text}; rank {self.rank} ends; continue with --resume auto", file=sys.stderr, flush=True)
        os._exit(RankLost.exit_code)

    def _watched(self, *, everyone: bool) -> list[int]:
        return [r for r in range(self.size) if r != self.rank and (everyone or r == 0)]

    def _look(self, rank: int) -> tuple[str, float]:
        """The last sign of a rank, and for how many seconds there was no other."""
        old, since = self._seen.get(rank, ("", time.monotonic()))
        try:
            key = self._key(rank)
            value = self._store.get(key).decode() if self._store.check([key]) else old
        except Exception:
            value = old
        if value != old or rank not in self._seen:
            self._seen[rank] = (value, time.monotonic())
            return value, 0.0
        return value, time.monotonic() - since

    def _key(self, rank: int) -> str:
        return f"{self.group}/heartbeat/{rank}"


def _own_connection() -> Any:
    # a connection of its own: the one of the process group is locked while the main thread waits in it
    store: Any = dist.distributed_c10d._get_default_store()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    if not isinstance(store, dist.TCPStore):
        return None
    return dist.TCPStore(
        store.host, store.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=5 * PERIOD)
    )
