"""Ranks: real processes train as one does; two nodes that spawn; mistakes in starting them.

Ranks that torchrun starts are in test_many_machines.py, spawned ones that get a signal in test_runs.py.
"""

import json
import os
import sys

import pytest
import rank_tasks
import torch
from conftest import ROOT, TINY
from starting import Started, launch_ranks

from mocov3.cli import main
from mocov3.distributed import free_loopback_address
from mocov3.distributed.sharding import ON_CPU

VIT = {"image_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3}
CASES = {
    "resnet-lars": ("resnet10_w16", {}, "lars", 0.3),
    "resnet-muon": ("resnet10_w16", {}, "muon", 1e-2),
    "vit-adamw": ("vit_small", VIT, "adamw", 1e-3),
    "vit-lars": ("vit_small", {**VIT, "stop_grad_conv1": True}, "lars", 0.3),
    "conv-vit-lars": ("vit_conv_small", {**VIT, "preserve": 2.0}, "lars", 0.3),
    "vit-lora": ("vit_small", {**VIT, "lora": 2, "unfreeze_last": 1, "preserve": 2.0}, "adamw", 1e-3),
    "resnet-local": ("resnet10_w32", {"local": 16, "local_weight": 0.5}, "lars", 0.3),
    "vit-local": ("vit_small", {**VIT, "stop_grad_conv1": True, "local": 16}, "lars", 0.3),
}
MODES = ("one pass", "micro", *(("fsdp", "fsdp and micro") if ON_CPU else ()))
MODES_OF = {
    "resnet-lars": ("one pass", *MODES[2:3]),
    "resnet-muon": ("one pass",),
    "vit-adamw": MODES,
    "vit-lars": MODES,
    "conv-vit-lars": ("one pass",),
    "vit-lora": MODES[:2],
    "resnet-local": ("one pass",),
    "vit-local": MODES,
}
# zero in exact arithmetic, wholly or in part: rounding noise, which Adam scales up (habit 11)
LEFT_OUT = ("encoder.norm.bias", "predictor.1.running_mean")
LEFT_OUT_ADAMW = (*LEFT_OUT, "qkv.bias")


def apart(a, b, left_out):
    assert list(a) == list(b)
    return max(
        float((a[k].double() - b[k].double()).norm() / b[k].double().norm().clamp_min(1e-30))
        for k in b
        if not k.endswith(left_out) and float(b[k].double().norm()) > 0
    )


def runs_of(size):
    """(case, mode, precision) of a number of processes. Micro-batches are exact without batch norm in the backbone; a
    world of one shares nothing out; what torch's own classes do is not asked for in every combination."""
    for name in CASES:
        for mode in MODES_OF[name]:
            if (size == 1 and "fsdp" in mode) or (size == 4 and name not in ("vit-lars", "resnet-lars")):
                continue
            yield name, mode, torch.float64
            if name == "vit-lars" or (mode == "one pass" and size < 4):
                yield name, mode, torch.float32


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Results of all runs on 1, 2 and 4 gloo processes: starting them is what takes the time."""
    folder = tmp_path_factory.mktemp("trained")
    results = {}
    for size in (1, 2, 4):
        tasks = []
        for name, mode, dtype in runs_of(size):
            arch, dims, optimizer, lr = CASES[name]
            results[name, mode, dtype, size] = folder / f"{len(results)}"
            tasks.append((arch, dims, optimizer, dtype, lr, mode, folder / f"{len(results) - 1}"))
        assert launch_ranks(rank_tasks.each, tasks, size) == 0
    return {run: torch.load(path) for run, path in results.items()}


@pytest.mark.parametrize(
    ("size", "name", "mode", "dtype"), [(size, *run) for size in (1, 2, 4) for run in runs_of(size)]
)
def test_ranks_shards_and_micro_batches_agree(trained, size, name, mode, dtype):
    left_out = LEFT_OUT_ADAMW if CASES[name][2] == "adamw" else LEFT_OUT
    one, many = trained[name, "one pass", dtype, 1], trained[name, mode, dtype, size]
    if dtype == torch.float64:
        assert many["losses"] == pytest.approx(one["losses"], rel=1e-9)
        assert torch.tensor(many["norms"]).allclose(torch.tensor(one["norms"]), rtol=1e-8)
        assert apart(many["last"], one["last"], left_out) <= 1e-9
    else:
        assert many["losses"][0] == pytest.approx(one["losses"][0], rel=1e-5)
        assert apart(many["first"], one["first"], left_out) <= 1e-5


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def spawned(*commands, env=None, timeout=120):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    running = [Started(c, env=environment) for c in commands]
    return [(p, *p.communicate(timeout=timeout)) for p in running]


def test_spawn_on_two_nodes(images, tmp_path):
    # two "nodes" meet at a loopback address; each spawns one process
    address = free_loopback_address()
    common = [
        sys.executable,
        str(ROOT / "main_moco.py"),
        *TINY,
        "--max-steps",
        "3",
        "--multiprocessing-distributed",
        "--world-size",
        "2",
        "--dist-url",
        address,
        "--output-dir",
        str(tmp_path / "two"),
        str(images),
    ]
    for process, out, err in spawned([*common, "--rank", "0"], [*common, "--rank", "1"]):
        assert process.returncode == 0, out + err
    assert main(["pretrain", str(images), *TINY, "--max-steps", "1", "--output-dir", str(tmp_path / "one")]) == 0
    assert losses(tmp_path / "two")[0] == pytest.approx(losses(tmp_path / "one")[0], rel=1e-5)


def test_mistakes_in_starting_ranks(images, tmp_path, capsys):
    flags = [str(images), *TINY, "--output-dir", str(tmp_path)]
    for wrong, message in (
        (["--nprocs-per-node", "3"], "nearest that do: 15 or 18"),
        (["--world-size", "2", "--rank", "0"], "--dist-url"),
        (["--world-size", "2", "--rank", "2", "--dist-url", "tcp://127.0.0.1:1"], "not below"),
    ):
        assert main(["pretrain", *flags, "--resume", "auto", *wrong]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
