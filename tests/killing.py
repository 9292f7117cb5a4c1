"""The kill driver: runs a resumable training command in real processes, kills it at random moments, starts it again,
and compares what it leaves with the run that was never killed.

A command is a function ``folder → argv`` that trains into ``folder`` and resumes from what it finds there (every task
has ``--resume auto``, which starts afresh where there is nothing). Kills come as SIGKILL to the whole process group,
ranks and loader processes included: nothing in the program can react.

    kills = kill_until_done(command, folder, kills=5, rng=rng)
    assert_same_run(whole, folder)
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from conftest import ROOT
from starting import Started, forkable, start_ranks
from trials import PATIENCE

Command = Callable[[Path], list[str]]
VOLATILE = ("images_per_second", "data_wait", "resumed")
"""Fields of a metrics line that depend on the machine or count resumes."""


@dataclass
class Killed:
    """What happened to one killed run."""

    kills: int = 0
    while_writing: int = 0
    """Kills that came while a file was being written (its temporary sibling was there)."""
    resumes: list[str] = field(default_factory=list)
    """Newest checkpoint at each start, '' where there was none."""


def environment(**more: str) -> dict[str, str]:
    """Environment of a started process: this tree, one thread."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


class Process:
    """A started command in a process group of its own, its output in a file.

    Where processes are forked (starting.py), two ranks are two such commands that start as torchrun starts them; else,
    as in ``make soak``, ``--nprocs-per-node 2`` spawns them.
    """

    def __init__(self, argv: list[str], **env: str) -> None:
        at = argv.index("--nprocs-per-node") if "--nprocs-per-node" in argv else len(argv)
        size = int(argv[at + 1]) if at < len(argv) else 1
        if size > 1 and forkable(argv, environment(**env)):
            self.ranks = start_ranks([*argv[:at], *argv[at + 2 :]], size, env=environment(**env))
        else:
            self.ranks = [Started(argv, env=environment(**env), merged=True)]
        self.popen = self.ranks[0]

    def kill(self) -> None:
        """SIGKILL to the whole group, and wait until it is gone."""
        for rank in self.ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank.pid, signal.SIGKILL)
        for rank in self.ranks:
            rank.wait()

    def poll(self) -> int | None:
        """Exit code of all ranks, one that is not 0 first; None while they run."""
        codes = [rank.poll() for rank in self.ranks]
        return next((code for code in codes if code), None if None in codes else 0)

    def text(self) -> str:
        """What it printed so far."""
        return self.popen.text()

    def finish(self, timeout: float = 240) -> str:
        """Wait for its end, which must be a success; returns what it printed."""
        try:
            code = max((rank.wait(PATIENCE * timeout) for rank in self.ranks), key=abs)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {PATIENCE * timeout} s:\n{self.text()}") from None
        assert code == 0, f"exit code {code}:\n{self.text()}"
        return self.text()

    def wait_until(self, condition: Callable[[], bool], timeout: float = 120, pause: float = 0.005) -> bool:
        """Wait for ``condition``; False if the process ended first."""
        end = time.monotonic() + PATIENCE * timeout
        while time.monotonic() < end:
            if condition():
                return True
            if (code := self.poll()) is not None:
                assert code == 0, f"exit code {code}:\n{self.text()}"
                return False
            time.sleep(pause)
        self.kill()
        raise AssertionError(f"waited {timeout} s in vain:\n{self.text()}")


def kill_until_done(
    command: Command | list[Command],
    folder: Path,
    *,
    kills: int,
    rng: random.Random,
    within: float = 1.0,
    writing: float = 0.3,
    metrics: str = "metrics.jsonl",
    timeout: float = 240,
) -> Killed:
    """Start, kill and start again ``kills`` times, then let it end.

    Args:
        command: what to run; of several, each start takes the next one (other worker counts, other world sizes).
        folder: the run's folder.
        kills: how often.
        rng: draws the moments.
        within: seconds after the first new metrics line within which the kill comes.
        writing: share of kills that wait for a file being written (a temporary sibling ``.*.partial``) instead.
        metrics: file whose growth says that training goes on.
        timeout: seconds the last run may take.

    Returns early (with fewer kills) when the run ends before its kill.
    """
    commands = command if isinstance(command, list) else [command]
    report = Killed()
    for attempt in range(kills + 1):
        newest = max(folder.glob("checkpoint_*"), key=lambda p: p.stat().st_mtime_ns, default=None)
        report.resumes.append(newest.name if newest else "")
        process = Process(commands[attempt % len(commands)](folder))
        if attempt == kills:
            process.finish(timeout)
            break
        try:
            if not process.wait_until(_Growth(folder / metrics)):
                break  # it ended by itself
            if rng.random() < writing:
                _wait_for_writing(process, folder, 3 * within)
                report.while_writing += _writing(folder)
            else:
                time.sleep(rng.uniform(0, within))
        finally:
            ended = process.poll() is not None
            process.kill()
        if ended:
            process.finish()
            break
        report.kills += 1
    return report


class _Growth:
    """Whether a file grew since the process began. A resume first cuts lines off, so only growth counts."""

    def __init__(self, path: Path) -> None:
        self.path, self.began, self.least = path, time.time(), -1

    def __call__(self) -> bool:
        try:
            stat = self.path.stat()
        except OSError:
            return False
        if stat.st_mtime < self.began - 0.01:
            return False
        self.least = stat.st_size if self.least < 0 else min(self.least, stat.st_size)
        return stat.st_size > self.least


def _wait_for_writing(process: Process, folder: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    process.wait_until(lambda: _writing(folder) or time.monotonic() > end, pause=0.0005)


def _writing(folder: Path) -> bool:
    return any(folder.glob(".*.partial"))


def steady(folder: Path, metrics: str = "metrics.jsonl", volatile: tuple[str, ...] = VOLATILE) -> list[dict[str, Any]]:
    """Metrics lines without what depends on the machine."""
    lines = [json.loads(line) for line in (folder / metrics).read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in volatile} for line in lines]


def difference(a: Any, b: Any, where: str = "", ignore: tuple[str, ...] = ()) -> str:
    """Where two trees of tensors, numbers, strings, lists and dicts first differ, '' if they are equal to the bit.

    ``ignore`` holds names of dict entries that may differ.
    """
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        return "" if same else f"{where}: tensors differ"
    if type(a) is not type(b):
        return f"{where}: {type(a).__name__} and {type(b).__name__}"
    if isinstance(a, dict):
        keys = [k for k in a if k not in ignore], [k for k in b if k not in ignore]
        if keys[0] != keys[1]:
            return f"{where}: keys {keys[0][:5]} and {keys[1][:5]}"
        return next((d for k in keys[0] if (d := difference(a[k], b[k], f"{where}/{k}", ignore))), "")
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return f"{where}: {len(a)} and {len(b)} entries"
        pairs = enumerate(zip(a, b, strict=True))
        return next((d for i, (x, y) in pairs if (d := difference(x, y, f"{where}/{i}", ignore))), "")
    return "" if a == b else f"{where}: {a!r} and {b!r}"


def assert_same_run(
    whole: Path,
    killed: Path,
    *,
    last: str,
    ignore: tuple[str, ...] = ("config", "resumed", "run"),
    metrics: str = "metrics.jsonl",
) -> None:
    """The killed run's last checkpoint and metrics are the whole run's, to the last bit.

    Args:
        whole: folder of the run that was never killed.
        killed: folder of the other.
        last: name of the last checkpoint in both.
        ignore: entries that may differ (paths and worker counts in the configuration, number of resumes).
        metrics: file of metrics lines; '' for none.
    """
    a, b = (torch.load(folder / last, weights_only=True) for folder in (whole, killed))
    found = difference(a, b, ignore=ignore)
    assert not found, found
    if metrics:
        lines = steady(whole, metrics), steady(killed, metrics)
        found = difference(lines[0], lines[1], metrics)
        assert not found, found
