"""Faults that every training survives alike: a second run, full disks, signals, lost ranks, bad numbers."""

import contextlib
import os
import resource
import signal
import socket
import sys

import pytest
from evaluating import write_pretrained
from killing import Process, environment
from starting import run

from mocov3.errors import UserError
from mocov3.running.folder import LINCLS_LOCK, LOCK
from mocov3.weights import checkpoint, our_entry

TASKS = {
    "pretrain": "-a resnet10_w16 --moco-dim 8 --moco-mlp-dim 8 --recipe defaults -b 16 --image-size 32",
    "lincls": "-b 16 --lr 0.1 -p 1",
    "finetune": "-a resnet10_w16 --small-stem --data-set folder -b 16 --input-size 32 --aa none -p 1",
}
LINES = {"pretrain": "metrics.jsonl", "lincls": "lincls.jsonl", "finetune": "metrics.jsonl"}
"""File that grows while a task trains."""
LAST = {"pretrain": "checkpoint_*.pth.tar", "lincls": "checkpoint.pth.tar", "finetune": "checkpoint.pth"}
"""Files that a resume starts from."""

LOCKS = {"pretrain": LOCK, "lincls": LINCLS_LOCK, "finetune": LOCK}
every_task = pytest.mark.parametrize("task", TASKS)
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux: prlimit")
posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX process groups")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A pre-trained checkpoint for linear evaluation."""
    path = tmp_path_factory.mktemp("pretrained") / "checkpoint_0000.pth.tar"
    write_pretrained(path)
    return path


def command(task, images, pretrained, folder, *flags):
    """The command line of a task that trains into ``folder``; 9,999 epochs unless told otherwise."""
    data = ["--data-path", str(images)] if task == "finetune" else [str(images)]
    weights = ["--pretrained", str(pretrained)] if task == "lincls" else []
    usual = ["--epochs", "9999", "--seed", "0", "--device", "cpu", "-j", "0", "--quiet", "--output-dir", str(folder)]
    return [sys.executable, "-m", "mocov3", task, *data, *weights, *TASKS[task].split(), *usual, *map(str, flags)]


def started(task, argv, folder):
    """The process of a command that trains by now."""
    process, lines = Process(argv), folder / LINES[task]
    assert process.wait_until(lambda: lines.exists() and lines.stat().st_size > 0)
    return process


def errors(text):
    return [line for line in text.splitlines() if line.startswith("mocov3: error")]


@posix
@every_task
def test_a_second_run_is_refused_and_a_resume_starts_at_once_after_a_kill(task, images, pretrained, tmp_path):
    argv = command(task, images, pretrained, tmp_path)
    first = started(task, argv, tmp_path)
    try:
        second = run([*argv, "--resume", "auto"], env=environment())
        assert second.returncode == 2, second.stderr
        (line,) = second.stderr.splitlines()
        assert f"process {first.popen.pid} on {socket.gethostname()}" in line
        assert str(tmp_path) in line
        assert first.popen.poll() is None
    finally:
        first.kill()
    assert (tmp_path / LOCKS[task]).exists()
    Process([*argv, "--resume", "auto", "--max-steps", "1"]).finish()
    assert not (tmp_path / LOCKS[task]).exists()


@linux
@every_task
def test_a_disk_that_is_full_for_a_while_costs_no_run_and_a_full_one_is_said(
    task, images, pretrained, tmp_path, monkeypatch
):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")  # Python would leave half of a compiled module
    argv = command(task, images, pretrained, tmp_path, "--checkpoint-steps", 3)
    process = started(task, argv, tmp_path)
    process.wait_until(lambda: any(tmp_path.glob(LAST[task])))
    hard = resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE)[1]
    resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE, (20_000, hard))
    process.wait_until(lambda: "could not be written" in process.text())
    files = sorted(tmp_path.glob(LAST[task]))
    steps = max(our_entry(checkpoint.read(path))["step"] for path in files)  # what was there is whole
    resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE, (hard, hard))

    def newest():
        found = []
        for path in tmp_path.glob(LAST[task]):
            with contextlib.suppress(UserError):  # removed in between, as a newer one is there
                found.append(our_entry(checkpoint.read(path))["step"])
        return max(found, default=0)

    assert process.wait_until(lambda: newest() > steps, pause=0.1)
    resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE, (20_000, hard))
    os.kill(process.popen.pid, signal.SIGTERM)
    assert process.popen.wait(120) == 2
    (line,) = errors(process.text())
    assert "last checkpoint is not in" in line
    assert "make room" in line
    assert "Traceback" not in process.text()
    assert not list(tmp_path.glob(".*partial"))


@posix
@every_task
def test_a_signal_ends_a_run_after_its_step_with_a_checkpoint(task, images, pretrained, tmp_path):
    number = {"lincls": signal.SIGINT, "finetune": signal.SIGHUP}.get(task, signal.SIGTERM)
    if signal.getsignal(number) == signal.SIG_IGN:  # of a suite under nohup, as runs under nohup inherit it
        number = signal.SIGTERM
    argv = command(task, images, pretrained, tmp_path)
    process = started(task, argv, tmp_path)
    os.kill(process.popen.pid, number)
    assert process.popen.wait(120) == 128 + number
    assert "Traceback" not in process.text()
    (newest, *_) = sorted(tmp_path.glob(LAST[task]), key=lambda p: p.stat().st_mtime, reverse=True)
    step = our_entry(checkpoint.read(newest))["step"]
    assert step > 0
    Process([*argv, "--resume", "auto", "--max-steps", str(step)]).finish()  # nothing left to do
    assert not (tmp_path / LOCKS[task]).exists()


@posix
@every_task
def test_a_lost_rank_is_named_and_the_others_end(task, images, pretrained, tmp_path):
    argv = command(task, images, pretrained, tmp_path, "--nprocs-per-node", 2)
    process = started(task, argv, tmp_path)
    if len(process.ranks) < 2:
        process.kill()
        pytest.skip("ranks are not started one by one here")
    os.kill(process.ranks[1].pid, signal.SIGKILL)
    assert process.popen.wait(120) == 1
    text = process.text()
    assert "Traceback" not in text
    assert "rank 1" in text
    process.kill()
    Process([*command(task, images, pretrained, tmp_path), "--resume", "auto", "--max-steps", "1"]).finish()


@every_task
def test_numbers_that_are_not_finite_end_a_run_in_one_line_or_are_null(task, images, pretrained, tmp_path, run_program):
    argv = command(task, images, pretrained, tmp_path, "--lr", "1e38", "--epochs", "40", "--warmup-epochs", "0")
    argv = argv if task != "lincls" else command(task, images, pretrained, tmp_path, "--lr", "1e38", "--epochs", "2")
    done = run_program(*argv[3:], cwd=tmp_path, check=False)
    assert "Traceback" not in done.stderr
    if task == "lincls":
        assert done.returncode == 0
        assert "NaN" not in (tmp_path / "lincls.jsonl").read_text()
    else:
        assert done.returncode == 2
        (line,) = errors(done.stderr)
        assert "not finite" in line
    assert not (tmp_path / LOCKS[task]).exists()
