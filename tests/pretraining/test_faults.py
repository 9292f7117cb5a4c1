"""What goes wrong in days of training: full disks, lost ranks, bad numbers, slow leaks (docs/reliability.md)."""

import contextlib
import json
import os
import resource
import signal
import sys
import time

import numpy as np
import pytest
import rank_tasks
import torch
from conftest import TINY
from killing import Process, assert_same_run, steady
from starting import launch_ranks
from trials import record, trials

from mocov3 import models
from mocov3.cli import main
from mocov3.distributed import World, free_loopback_address
from mocov3.models.precision import Precision
from mocov3.optim import build_optimizer
from mocov3.output.log import LineFile
from mocov3.pretraining.step import SpikeGuard, Step
from mocov3.running.stop import Stop
from mocov3.running.writer import Writer
from mocov3.weights import checkpoint

posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits and signals")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux: prlimit and /proc")
CPU = World(0, 1, torch.device("cpu"))


def pretrain(images, folder, *flags, program=("-m", "mocov3", "pretrain")):
    logged = ["--logger", "tensorboard", "--output-dir", str(folder), "--quiet"]  # whose files fill and stay open too
    return [sys.executable, *program, str(images), *TINY, *logged, *map(str, flags)]


def lines(folder):
    file = folder / "metrics.jsonl"
    return file.read_text().splitlines() if file.exists() else []


# --- disks -------------------------------------------------------------------------------------------------


@linux
def test_a_full_disk_costs_no_run(images, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")  # Python would leave half of a compiled module
    # files may not grow beyond 100 KB for a while: checkpoints (2 MB) fail in the middle of being written
    flags = ["--epochs", 12, "--checkpoint-every", 10, "--checkpoint-steps", 4]
    process = Process(pretrain(images, tmp_path / "full", *flags))
    good = tmp_path / "full" / "checkpoint_0001_step000000004.pth.tar"
    process.wait_until(lambda: any((tmp_path / "full").glob("checkpoint_*")))
    hard = resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE)[1]
    resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE, (100_000, hard))
    process.wait_until(lambda: "could not be written" in process.text())
    kept = sorted(p.name for p in (tmp_path / "full").glob("checkpoint_*"))
    for path in (tmp_path / "full").glob("checkpoint_*"):
        checkpoint.read(path)  # what was there is whole
    assert kept, good
    resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE, (hard, hard))
    text = process.finish()
    assert "File too large" in text
    assert "Traceback" not in text
    Process(pretrain(images, tmp_path / "whole", *flags)).finish()
    assert_same_run(tmp_path / "whole", tmp_path / "full", last="checkpoint_0011.pth.tar")
    record("a disk that is full for a while", 1, "the run went on; last good file whole; bit-equal to the run without")


def writer(folder, **options):
    said = []
    made = Writer(folder, before=lambda: None, after=said.append, warn=said.append, **{"first_pause": 0.02, **options})
    return made, said


def test_the_snapshot_is_of_the_moment(tmp_path):
    made, said = writer(tmp_path)
    weight = torch.arange(1_000_000.0)
    for i in range(3):
        before = weight.clone()
        made.save({f"{i}.pth": {"w": weight, "n": [i, {"t": weight[:3]}]}})
        weight += 1  # in place, as an optimizer does, while the thread writes
        made.flush()
        found = checkpoint.read(tmp_path / f"{i}.pth")
        assert torch.equal(found["w"], before)
        assert torch.equal(found["n"][1]["t"], before[:3])
    assert made.close() == ""
    assert said == ["0.pth", "1.pth", "2.pth"]


def test_a_failed_write_is_tried_again(tmp_path):
    folder = tmp_path / "gone"
    made, said = writer(folder)
    made.save({"epoch_1.pth": {"epoch": 1}, "best.pth": {"epoch": 1}})
    end = time.monotonic() + 20
    while sum("could not be written" in s for s in said) < 2 and time.monotonic() < end:
        time.sleep(0.005)
    made.save({"epoch_2.pth": {"epoch": 2}})
    assert made.flush()
    folder.mkdir()  # the mount is back
    assert made.flush() == ""
    assert made.close() == ""
    # a newer numbered file takes the place of an older one; another file is still due
    assert sorted(p.name for p in folder.iterdir()) == ["best.pth", "epoch_2.pth"]
    assert said[-2:] == ["best.pth", "epoch_2.pth"]
    assert checkpoint.read(folder / "best.pth")["epoch"] == 1


def test_lines_wait_for_the_disk(tmp_path, capsys):
    file = LineFile(tmp_path / "gone" / "metrics.jsonl")
    file.write({"step": 1})
    file.write({"step": 2, "loss": float("nan")})
    assert capsys.readouterr().err.count("cannot be written") == 1
    (tmp_path / "gone").mkdir()
    file.write({"step": 3})
    file.close()
    assert (tmp_path / "gone" / "metrics.jsonl").read_text() == (
        '{"step": 1}\n{"step": 2, "loss": null}\n{"step": 3}\n'
    )


# --- ranks -------------------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize(("fault", "lost"), [("SIGSTOP", 1), ("SIGKILL", 1), ("SIGKILL", 0)])
def test_the_lost_rank_is_named(images, tmp_path, fault, lost):
    # two "nodes", so that nobody but the other rank can notice
    address = free_loopback_address()
    flags = [
        "--epochs",
        2000,
        "--checkpoint-every",
        3000,
        "--world-size",
        2,
        "--dist-url",
        address,
        "--dist-timeout",
        0.1,
    ]
    ranks = [Process(pretrain(images, tmp_path, *flags, "--rank", r)) for r in (0, 1)]
    try:
        ranks[0].wait_until(lambda: len(lines(tmp_path)) > 3)
        os.kill(ranks[lost].popen.pid, getattr(signal, fault))
        began = time.monotonic()
        code = ranks[1 - lost].popen.wait(60)
        text = ranks[1 - lost].text()
        assert code == 1, text
        assert f"mocov3: error: rank {lost} " in text
        assert "Traceback" not in text
        record(
            f"rank {lost} of 2 gets {fault}",
            1,
            f"the other ended in {time.monotonic() - began:.0f} s and named it (silence allowed: 6 s)",
        )
    finally:
        for process in ranks:
            process.kill()


@posix
def test_a_second_interrupt_stops_at_once():
    stop = Stop(max_steps=0, max_hours=0)
    try:
        for _ in range(2):  # one key press, passed on by the process above
            signal.raise_signal(signal.SIGINT)
        assert stop.agreed(CPU, 1)
        assert stop.signal == signal.SIGINT
        stop._asked -= 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        stop.close()


# --- bad numbers -------------------------------------------------------------------------------------------


def small(spike_factor=0.0):
    torch.manual_seed(0)
    model = models.build("resnet10_w32", dim=8, mlp_dim=16).train()
    optimizer = build_optimizer(model.parameters(), "lars", weight_decay=1e-4, momentum=0.9)
    return Step(model, optimizer, world=CPU, precision=Precision("fp32", CPU.device), spike_factor=spike_factor)


def state(step):
    tensors = {**step.model.state_dict(), **{f"mu{i}": s["mu"] for i, s in enumerate(step.optimizer.state.values())}}
    return {k: v.clone() for k, v in tensors.items() if not k.endswith("num_batches_tracked")}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_numbers_reach_nothing(bad):
    step = small()
    views = [torch.randn(4, 3, 32, 32) for _ in "12"]
    assert step(*views, lr=0.1, m=0.9).ok
    before = state(step)
    queries = {k: v for k, v in before.items() if k.startswith("base_encoder") and "running" not in k}
    views[0][1, 0, 3, 3] = bad
    assert not step(*views, lr=0.1, m=0.9).ok
    after = state(step)
    for key, value in before.items():
        if key.startswith("momentum_encoder") and "running" not in key:
            moved = 0.9 * value + 0.1 * queries.get(key.replace("momentum", "base"), value)
            assert torch.allclose(after[key], moved, atol=1e-6), key  # its average of good weights goes on
        else:
            assert torch.equal(after[key], value), key
    assert step.skipped == 1
    assert "not finite now" in step.diagnosis()


def test_all_ranks_skip_together(tmp_path):
    assert launch_ranks(rank_tasks.bad_on_one_rank, None, 2) == 0


def test_a_diverged_run_stops_with_a_diagnosis(images, tmp_path, capsys):
    flags = ["--optimizer", "adamw", "--lr", 1e38, "--epochs", 40, "-p", 2, "-j", 0]
    argv = ["pretrain", str(images), *TINY, "--output-dir", str(tmp_path), *map(str, flags)]
    assert main(argv) == 2
    err = capsys.readouterr().err
    errors = [line for line in err.splitlines() if "error" in line]
    assert len(errors) == 1
    assert "steps in a row" in errors[0]
    assert "try a lower --lr" in errors[0]
    skipped = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert len(skipped) >= 5
    assert all(len(entry["pictures"]) == 16 for entry in skipped)
    last = skipped[-1]
    assert [s["step"] for s in skipped[-5:]] == list(range(last["step"] - 4, last["step"] + 1))
    batch = np.load(next(tmp_path.glob("bad_batch_step*.npz")))
    assert batch["views"].shape == (16, 2, 32, 32, 3)
    assert [s["pictures"] for s in skipped if s["pictures"] == batch["indices"].tolist()]
    _, found, _ = checkpoint.newest(tmp_path)
    assert all(torch.isfinite(v).all() for v in found["state_dict"].values())
    assert found["mocov3"]["skipped"] == len(skipped)
    for line in lines(tmp_path):
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_the_spike_guard_skips_what_is_far_above_usual():
    guard = SpikeGuard(10.0, CPU.device)
    rng = np.random.Generator(np.random.PCG64(0))
    finite = torch.tensor(True)
    for x in np.exp(rng.normal(0, 0.3, 150)):
        assert guard(torch.tensor(float(x)), finite)
    kept = guard.state()
    assert not guard(torch.tensor(15.0), finite)
    assert guard.state() == kept  # what was skipped does not become usual
    assert guard(torch.tensor(5.0), finite)
    again = SpikeGuard(10.0, CPU.device)
    again.restore(guard.state())
    assert again.state() == guard.state()
    assert not again(torch.tensor(15.0), finite)


def test_the_spike_guard_resumes_to_the_bit(images, tmp_path):
    argv = ["pretrain", str(images), *TINY, "--epochs", "3", "--skip-spikes", "1.0001", "--quiet"]
    SpikeGuard.WARM_UP, warm_up = 3, SpikeGuard.WARM_UP
    try:
        assert main([*argv, "--output-dir", str(tmp_path / "whole"), "--max-steps", "9"]) == 0
        for steps in ("5", "9"):
            assert main([*argv, "--output-dir", str(tmp_path / "parts"), "--max-steps", steps, "--resume", "auto"]) == 0
    finally:
        SpikeGuard.WARM_UP = warm_up
    assert 0 < steady(tmp_path / "whole")[-1]["skipped"] < 6
    assert_same_run(tmp_path / "whole", tmp_path / "parts", last="checkpoint_0002_step000000009.pth.tar")


# --- long runs ---------------------------------------------------------------------------------------------


def memory(pid):
    """Resident bytes of a process, and its open files."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{pid}/fd"))


def newest_step(folder):
    """Step of the last line of metrics, without reading the others."""
    with (folder / "metrics.jsonl").open("rb") as file:
        file.seek(-min(2000, (folder / "metrics.jsonl").stat().st_size), os.SEEK_END)
        return json.loads(file.read().splitlines()[-1])["step"]


@linux
def test_memory_and_files_stay(images, tmp_path):
    steps = trials(320, 20000)
    flags = [
        "--image-size",
        8,
        "-b",
        4,
        "--epochs",
        steps,
        "--max-steps",
        steps,
        "-p",
        20,
        "--checkpoint-every",
        9**9,
        "--checkpoint-steps",
        steps // 20,
    ]
    process = Process(pretrain(images, tmp_path, *flags))
    seen = []
    process.wait_until(lambda: bool(lines(tmp_path)))
    while process.popen.poll() is None:
        with contextlib.suppress(OSError, ValueError, KeyError):  # it ended, or writes, while being looked at
            seen.append((newest_step(tmp_path), *memory(process.popen.pid)))
        time.sleep(0.1)
    process.finish()

    def middle(first, last, column):
        return float(np.median([s[column] for s in seen if first * steps <= s[0] <= last * steps]))

    growth = middle(0.9, 1, 1) / middle(0.3, 0.4, 1) - 1
    files = middle(0.9, 1, 2) - middle(0.3, 0.4, 2)
    outcome = f"resident memory {growth:+.2%} after warm-up, open files {files:+.0f}"
    assert growth < 0.02, outcome
    assert files <= 0, outcome
    record("steps of a tiny model with 20 checkpoints", steps, outcome)
