"""A run that was killed anywhere and resumed is the run that was never killed (docs/reliability.md)."""

import random
import sys

import pytest
from conftest import TINY
from killing import Process, assert_same_run, kill_until_done

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX process groups")
EPOCHS = 24
LAST = f"checkpoint_{EPOCHS - 1:04d}.pth.tar"


def command(pictures, *flags):
    """A run of 96 steps that checkpoints every other step and goes on from what it finds."""

    def argv(folder):
        return [
            sys.executable, "-m", "mocov3", "pretrain", str(pictures), *TINY, "--epochs", str(EPOCHS),
            "--checkpoint-every", "8", "--checkpoint-steps", "2", "--output-dir", str(folder), "--resume", "auto",
            "--quiet", *flags,
        ]  # fmt: skip

    return argv


def whole(pictures, folder, *flags):
    Process(command(pictures, *flags)(folder)).finish()
    return folder


def test_killed_and_resumed_is_never_killed(pictures, tmp_path):
    rng = random.Random(1)
    workers = [command(pictures, "-j", str(n)) for n in (0, 1, 2)]
    report = kill_until_done(workers, tmp_path / "killed", kills=6, rng=rng)
    assert report.kills >= 4
    assert_same_run(whole(pictures, tmp_path / "whole"), tmp_path / "killed", last=LAST)


def test_killed_and_resumed_with_two_ranks(pictures, tmp_path):
    rng = random.Random(2)
    two = command(pictures, "--nprocs-per-node", "2")
    report = kill_until_done(two, tmp_path / "killed", kills=3, rng=rng)
    assert report.kills >= 2
    assert_same_run(whole(pictures, tmp_path / "whole", "--nprocs-per-node", "2"), tmp_path / "killed", last=LAST)
