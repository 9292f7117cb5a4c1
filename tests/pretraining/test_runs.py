"""Whole runs of the program: files, metrics, theory, resume to the last bit, signals, unreadable images."""

import json
import os
import shutil
import signal
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, TINY
from PIL import Image
from starting import Started

from mocov3 import load_backbone, losses
from mocov3.cli import main
from mocov3.distributed import World
from mocov3.metrics import MetricsLine
from mocov3.running.stop import Stop

VOLATILE = ("images_per_second", "data_wait", "resumed")


def pretrain(images, folder, *flags, code=0):
    assert main(["pretrain", str(images), *TINY, "--output-dir", str(folder), *map(str, flags)]) == code


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steady(folder):
    return [{k: v for k, v in line.items() if k not in VOLATILE} for line in metrics(folder)]


def contents(path):
    return torch.load(path, weights_only=True)


def same(a, b):
    """Whether two checkpoints hold the same run: weights, optimizer, position."""
    assert list(a["state_dict"]) == list(b["state_dict"])
    assert all(torch.equal(v, b["state_dict"][k]) for k, v in a["state_dict"].items())
    states = a["optimizer"]["state"], b["optimizer"]["state"]
    assert list(states[0]) == list(states[1])
    for i, state in states[0].items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(states[1][i][k])) for k, v in state.items())
    assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
    for key in ("epoch", "scaler"):
        assert a[key] == b[key]
    for key in ("step", "iteration", "seed", "data_digest"):
        assert a["mocov3"][key] == b["mocov3"][key]


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """An uninterrupted run of 2 epochs of 4 steps, with k-NN."""
    folder = tmp_path_factory.mktemp("whole")
    pretrain(images, folder, "--knn-every", 2, "--checkpoint-steps", 3, "--logger", "tensorboard")
    return folder


def test_files_of_a_run(whole, images):
    assert sorted(p.name for p in whole.iterdir()) == [
        "checkpoint_0000.pth.tar",
        "checkpoint_0001.pth.tar",
        "config.yaml",
        "machine.jsonl",
        "metrics.jsonl",
        "pictures.txt.gz",
        "tensorboard",
    ]
    saved = contents(whole / "checkpoint_0001.pth.tar")
    assert (saved["epoch"], saved["mocov3"]["step"], saved["mocov3"]["iteration"]) == (2, 8, 0)
    assert saved["mocov3"]["config"]["arch"] == saved["arch"] == "resnet10_w16"
    config = yaml.safe_load((whole / "config.yaml").read_text())
    assert config["seed"] == 3
    assert config["data"] == str(images)
    backbone = load_backbone(whole / "checkpoint_0001.pth.tar")
    assert backbone(torch.randn(2, 3, 32, 32)).shape == (2, 128)


def test_metrics_of_a_run(whole):
    lines = metrics(whole)
    names = set(MetricsLine.__dataclass_fields__)
    assert all(set(line) == names for line in lines)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5, 6, 7, 7]
    assert lines[0]["lr"] == 0
    knn = [line["knn"] for line in lines]
    assert knn[:-1] == [None] * 8
    assert 25 < knn[-1] <= 100  # four classes of four colours
    assert all(np.isfinite(line["loss"]) and line["grad_norm_first"] > 0 for line in lines)
    assert lines[0]["loss_start"] == pytest.approx(losses.loss_start(1.0, 16))


def test_tensorboard_has_every_step(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole / "tensorboard"))
    events.Reload()
    scalars = events.Scalars("loss")
    assert [e.step for e in scalars] == list(range(8))
    assert [e.value for e in scalars] == pytest.approx([line["loss"] for line in metrics(whole)[:8]])


def test_first_loss_is_theory(tmp_path):
    # τ 1, unrelated images and an untrained network: 4τ·ln N within 1 %
    rng = np.random.Generator(np.random.PCG64(0))
    for i in range(64):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    pretrain(tmp_path, tmp_path / "run", "--max-steps", 1, "-b", 64, "--moco-dim", 256, "--moco-mlp-dim", 512)
    line = metrics(tmp_path / "run")[0]
    assert line["loss"] == pytest.approx(4 * np.log(64), rel=0.01)


def test_the_floor_is_reached(tmp_path):
    # sixty-four images seen often enough: within 10 % of the floor, every image found among the others
    flags = [
        "-a",
        "resnet10_w32",
        "--epochs",
        45,
        "--warmup-epochs",
        5,
        "-b",
        64,
        "--optimizer",
        "adamw",
        "--lr",
        2e-2,
        "--wd",
        1e-3,
        "--moco-dim",
        64,
        "--moco-mlp-dim",
        128,
        "--crop-min",
        0.9,
        "--moco-t",
        1.0,
        "--checkpoint-every",
        60,
        "--moco-m",
        0.9,
        "--image-size",
        16,
        "--view-preset",
        "gray",
    ]
    rng = np.random.Generator(np.random.PCG64(2))
    for i in range(64):  # images that differ plainly
        small = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
        small.resize((24, 24), Image.Resampling.BICUBIC).save(tmp_path / f"{i:02d}.png")
    pretrain(tmp_path, tmp_path / "run", *flags)
    line = metrics(tmp_path / "run")[-1]
    assert line["loss_floor"] < line["loss"] < 1.1 * line["loss_floor"]
    assert line["retrieval_accuracy"] > 0.75


def test_six_steps_are_three_and_three(images, tmp_path):
    for name, first, second in (("adamw", 0, 2), ("lars", 1, 0)):
        flags = ["--optimizer", name, "--lr", 0.01, "--deterministic"]
        pretrain(images, tmp_path / f"{name}-whole", *flags, "--max-steps", 6, "-j", 1)
        parts = tmp_path / f"{name}-parts"
        pretrain(images, parts, *flags, "--max-steps", 3, "-j", first)
        assert (parts / "checkpoint_0000_step000000003.pth.tar").exists()
        pretrain(images, parts, *flags, "--max-steps", 6, "-j", second, "--resume", "auto")
        last = "checkpoint_0001_step000000006.pth.tar"
        same(contents(tmp_path / f"{name}-whole" / last), contents(parts / last))
        assert steady(tmp_path / f"{name}-whole") == steady(parts)
        assert metrics(parts)[-1]["resumed"] == 1
    torch.use_deterministic_algorithms(False)


def start(images, folder, *flags):
    command = [sys.executable, "-m", "mocov3", "pretrain", str(images), *TINY, "--output-dir", str(folder), *flags]
    return Started(command, env={**os.environ, "PYTHONPATH": str(ROOT)})


def wait_for(condition, process, seconds=60):
    for _ in range(int(seconds / 0.02)):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    pytest.fail("waited too long")


LONG = ["--epochs", "8", "--checkpoint-every", "10"]


@pytest.fixture(scope="module")
def long_whole(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    pretrain(images, folder, *LONG)
    return folder


def lines_written(folder):
    file = folder / "metrics.jsonl"
    return file.exists() and len(file.read_text().splitlines()) > 6


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_while_ranks_agree_is_not_lost(number):
    """Ranks spend most of a short step waiting for each other: there a signal is likely to come."""
    stop = Stop(max_steps=0, max_hours=0)

    came = []

    class Waiting(World):
        def any(self, reason):
            if not came:
                came.append(True)
                signal.raise_signal(number)  # its handler runs before the call returns
            return reason

    world = Waiting(0, 2, torch.device("cpu"))
    try:
        assert not stop.agreed(world, 1)  # the others were not told
        assert stop.agreed(world, 2)
        assert stop._reason == number
    finally:
        stop.close()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_checkpoints_and_resumes(images, tmp_path, long_whole, ranks):
    # two ranks: spawned by the process that gets the signal, which passes it on; they train as one does
    flags = ["--nprocs-per-node", "2"] if ranks == 2 else ["-j", "1"]
    process = start(images, tmp_path, *LONG, *flags)
    wait_for(lambda: lines_written(tmp_path), process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, out + err
    assert "--resume auto" in out
    assert "Traceback" not in err
    assert list(tmp_path.glob("checkpoint_*"))
    assert metrics(tmp_path)[0]["loss"] == pytest.approx(metrics(long_whole)[0]["loss"], rel=1e-5)
    if ranks == 1:
        pretrain(images, tmp_path, *LONG, "--resume", "auto")
        same(contents(long_whole / "checkpoint_0007.pth.tar"), contents(tmp_path / "checkpoint_0007.pth.tar"))
        assert steady(long_whole) == steady(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_sigint_stops_at_the_next_step(images, tmp_path):
    process = start(images, tmp_path, *LONG)
    wait_for(lambda: lines_written(tmp_path), process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert list(tmp_path.glob("checkpoint_*"))


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_sigkill_and_resume_is_the_run_never_killed(images, tmp_path, long_whole):
    process = start(images, tmp_path, *LONG, "--checkpoint-steps", "3", "-j", "1")
    wait_for(lambda: len(list(tmp_path.glob("checkpoint_*step*"))) > 0 and lines_written(tmp_path), process)
    process.kill()
    process.wait()
    assert not (tmp_path / "checkpoint_0007.pth.tar").exists()
    pretrain(images, tmp_path, *LONG, "--resume", "auto")
    same(contents(long_whole / "checkpoint_0007.pth.tar"), contents(tmp_path / "checkpoint_0007.pth.tar"))
    assert steady(long_whole) == steady(tmp_path)


def test_resume_refuses_another_run(images, whole, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    pretrain(images, folder, "--resume", "auto", "--crop-min", 0.5, "--moco-t", 0.7, code=2)
    error = capsys.readouterr().err
    assert "crop_min (0.08 → 0.5)" in error
    assert "moco_t (1.0 → 0.7)" in error
    pretrain(images / "train" / "class0", folder, "--resume", "auto", code=2)
    error = capsys.readouterr().err
    assert "trained on 64 images" in error
    assert "missing: class0/00.jpg" in error
    assert "16 new: 00.jpg" in error
    pretrain(images, folder, "--resume", "auto", "--epochs", 3, "--allow-config-change", "--max-steps", 9)
    assert (folder / "checkpoint_0002_step000000009.pth.tar").exists()
    pretrain(images, folder, "--resume", "auto", "--epochs", 3, "--allow-config-change", "--max-steps", 9)
    assert "nothing left to do" in capsys.readouterr().out


def test_config_yaml_reproduces_the_run(whole, tmp_path):
    again = tmp_path / "again"
    assert main(["pretrain", "--config", str(whole / "config.yaml"), "--output-dir", str(again)]) == 0
    assert steady(again) == steady(whole)


def test_unreadable_images_are_listed_and_limited(images, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(images / "train", data)
    (data / "class0" / "cut.jpg").write_bytes((data / "class0" / "00.jpg").read_bytes()[:300])
    (data / "class1" / "text.png").write_text("no image")
    pretrain(data, tmp_path / "run", "--epochs", 2, "-b", 33)
    listed = [json.loads(line) for line in (tmp_path / "run" / "corrupt.jsonl").read_text().splitlines()]
    assert sorted(os.path.basename(entry["name"]) for entry in listed) == ["cut.jpg", "text.png"]
    assert metrics(tmp_path / "run")[-1]["corrupt"] == 2
    assert "unreadable" in capsys.readouterr().err
    for i in range(12):
        (data / "class2" / f"bad{i}.png").write_bytes(b"")
    pretrain(data, tmp_path / "many", "--epochs", 9, "-b", 26, code=2)
    error = capsys.readouterr().err
    assert "--max-corrupt 0.01" in error
    assert list((tmp_path / "many").glob("checkpoint_*"))


def test_the_script_door(images, tmp_path, run_program):
    done = run_program(*TINY, "--max-steps", 5, images, cwd=tmp_path, script="main_moco.py")
    lines = [line for line in done.stdout.splitlines() if line.startswith("Epoch: [")]
    assert len(lines) == 5
    number, average = r"[\d.e+-]+", r"\(\s*[\d.e+-]+\)"
    import re

    for i, line in enumerate(lines):
        pattern = rf"Epoch: \[{i // 4}\]\[{i % 4}/4\]\tTime\s+{number} {average}\tData\s+{number} {average}\t"
        assert re.fullmatch(pattern + rf"LR {number} {average}\tLoss {number} {average}", line), line
    # as the reference: files in the current folder, without asking about a former run
    assert (tmp_path / "checkpoint_0001_step000000005.pth.tar").exists()
    assert (tmp_path / "checkpoint_0000.pth.tar").exists()


def test_output_styles(images, tmp_path, capsys):
    pretrain(images, tmp_path / "quiet", "--max-steps", 2, "--quiet")
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1  # the result
    assert str(tmp_path / "quiet" / "checkpoint_0000_step000000002.pth.tar") in captured.out
    assert captured.err == ""
    pretrain(images, tmp_path / "json", "--max-steps", 2, "--json")
    out = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["step"] for line in out] == [0, 1]
    pretrain(images, tmp_path / "lines", "--max-steps", 2)
    out = capsys.readouterr().out
    assert "starts near 11.09" in out
    assert all(len(line) <= 80 for line in out.splitlines() if line.startswith("epoch"))


@pytest.mark.parametrize(
    "flags",
    [
        ["-a", "vit_tiny", "--image-size", "32", "--grad-checkpoint", "--optimizer", "adamw", "--stop-grad-conv1"],
        ["-a", "timm/resnet10t", "--image-size", "32"],
        ["-a", "resnet18", "--small-stem", "--views", "pillow"],
        ["--init", "INIT", "--precision", "bf16"],
    ],
)
def test_other_models_and_options(flags, images, whole, tmp_path):
    flags = [str(whole / "checkpoint_0001.pth.tar") if f == "INIT" else f for f in flags]
    pretrain(images, tmp_path, "--max-steps", 2, *flags)
    saved = contents(tmp_path / "checkpoint_0000_step000000002.pth.tar")
    keys = [k.removeprefix("module.base_encoder.") for k in saved["state_dict"] if "base_encoder" in k]
    if "timm/resnet10t" in flags:
        assert {k.split(".")[0] for k in keys} == {"backbone", "projector"}
    if "--init" in flags:
        start = contents(whole / "checkpoint_0001.pth.tar")["state_dict"]
        assert saved["mocov3"]["origin"].startswith("initialised from")
        key = "module.base_encoder.conv1.weight"
        assert (saved["state_dict"][key] - start[key]).norm() < 0.1 * start[key].norm()
