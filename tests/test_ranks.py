"""Ranks: two real processes train as one does; every way of starting them; mistakes in starting them."""

import json
import os
import subprocess
import sys

import pytest
import rank_tasks
import torch
from conftest import ROOT, TINY

from mocov3.cli import main
from mocov3.distributed import free_loopback_address, launch

VIT = {"image_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3}
CASES = {
    "resnet-lars": ("resnet10_w32", {}, "lars", 0.3),
    "vit-adamw": ("vit_small", VIT, "adamw", 1e-3),
    "conv-vit-lars": ("vit_conv_small", VIT, "lars", 0.3),
}
# zero in exact arithmetic, wholly or in part: rounding noise, which Adam scales up (habit 11)
LEFT_OUT = ("encoder.norm.bias", "predictor.1.running_mean")
LEFT_OUT_ADAMW = (*LEFT_OUT, "qkv.bias")


def apart(a, b, left_out):
    return max(
        float((a[k].double() - b[k].double()).norm() / b[k].double().norm().clamp_min(1e-30))
        for k in b
        if not k.endswith(left_out) and float(b[k].double().norm()) > 0
    )


def test_two_processes_are_one(tmp_path):
    # all cases in one pair of processes: starting them is what takes the time
    for size in (1, 2):
        tasks = [
            (arch, dims, optimizer, dtype, lr, tmp_path / f"{name}-{dtype}-{size}")
            for name, (arch, dims, optimizer, lr) in CASES.items()
            for dtype in (torch.float64, torch.float32)
        ]
        assert launch(rank_tasks.each, tasks, device="cpu", processes=size) == 0
    for name, (_, _, optimizer, _) in CASES.items():
        left_out = LEFT_OUT_ADAMW if optimizer == "adamw" else LEFT_OUT
        one, two = (torch.load(tmp_path / f"{name}-torch.float64-{n}") for n in (1, 2))
        assert one["losses"] == pytest.approx(two["losses"], rel=1e-9)
        assert apart(two["last"], one["last"], left_out) <= 1e-9, name
        one, two = (torch.load(tmp_path / f"{name}-torch.float32-{n}") for n in (1, 2))
        assert one["losses"][0] == pytest.approx(two["losses"][0], rel=1e-5)
        assert apart(two["first"], one["first"], left_out) <= 1e-5, name


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one_process(pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    assert main(["pretrain", str(pictures), *TINY, "--max-steps", "3", "--output-dir", str(folder)]) == 0
    return losses(folder)


def spawned(*commands, env=None, timeout=120):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    running = [
        subprocess.Popen(c, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for c in commands
    ]
    return [(p, *p.communicate(timeout=timeout)) for p in running]


def test_spawn_on_two_nodes(pictures, tmp_path, one_process):
    # two "nodes" meet at a loopback address; each spawns one process
    address = free_loopback_address()
    common = [sys.executable, str(ROOT / "main_moco.py"), *TINY, "--max-steps", "3", "--multiprocessing-distributed",
              "--world-size", "2", "--dist-url", address, "--output-dir", str(tmp_path), str(pictures)]  # fmt: skip
    for process, out, err in spawned([*common, "--rank", "0"], [*common, "--rank", "1"]):
        assert process.returncode == 0, out + err
    assert losses(tmp_path)[0] == pytest.approx(one_process[0], rel=1e-5)


def test_torchrun(pictures, tmp_path, one_process):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0",
               "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", str(ROOT / "main_moco.py"),
               *TINY, "--max-steps", "3", "--output-dir", str(tmp_path), str(pictures)]  # fmt: skip
    ((process, out, err),) = spawned(command)
    assert process.returncode == 0, out + err
    assert losses(tmp_path)[0] == pytest.approx(one_process[0], rel=1e-5)


def test_spawn_here_and_its_mistakes(pictures, tmp_path, one_process, capsys):
    flags = [str(pictures), *TINY, "--output-dir", str(tmp_path)]
    assert main(["pretrain", *flags, "--max-steps", "3", "--nprocs-per-node", "2"]) == 0
    assert losses(tmp_path)[0] == pytest.approx(one_process[0], rel=1e-5)
    capsys.readouterr()
    for wrong, message in (
        (["--nprocs-per-node", "3"], "nearest that do: 15 or 18"),
        (["--world-size", "2", "--rank", "0"], "--dist-url"),
        (["--world-size", "2", "--rank", "2", "--dist-url", "tcp://127.0.0.1:1"], "not below"),
    ):
        assert main(["pretrain", *flags, "--resume", "auto", *wrong]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
