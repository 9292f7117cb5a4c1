"""Many machines: ranks that differ or do not come, uneven worlds, shared weights through files, plans, ready files."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import rank_tasks
import torch
import yaml
from conftest import ROOT, TINY
from killing import Process
from starting import launch_ranks, run

from mocov3.cli import main, parse_script
from mocov3.distributed import free_loopback_address
from mocov3.distributed.meeting import largest_dividing
from mocov3.distributed.sharding import ON_CPU
from mocov3.errors import UserError
from mocov3.models import build, shapes_only
from mocov3.planning.plan import Traffic, step_seconds, traffic
from mocov3.pretraining.footprint import KEPT_FREE, footprint


def test_ranks_that_differ_are_refused_by_name():
    assert launch_ranks(rank_tasks.differing, None, 2) == 0


@pytest.mark.parametrize(("rank", "missing"), [(0, "rank 1"), (1, "rank 0")])
def test_a_rank_that_never_comes_is_named(rank, missing, images, tmp_path, capsys):
    flags = ["pretrain", str(images), *TINY, "--output-dir", str(tmp_path), "--world-size", "2", "--rank", str(rank)]
    assert main([*flags, "--dist-url", free_loopback_address(), "--dist-timeout", "0.02"]) == 2
    error = capsys.readouterr().err
    assert f"{missing} did not connect within 1 s" in error
    assert error.splitlines()[-1].startswith("mocov3: error:")


def test_a_world_that_does_not_divide_uses_the_largest_that_does(images, tmp_path):
    assert [largest_dividing(n, 4096) for n in (1, 3, 24, 64)] == [1, 2, 16, 64]
    assert largest_dividing(7, 0) == 7
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "3",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "127.0.0.1:0",
        str(ROOT / "main_moco.py"),
        *TINY,
        "--max-steps",
        "2",
        "--output-dir",
        str(tmp_path / "three"),
        str(images),
    ]
    done = run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "a batch of 16 does not divide over 3 processes: 2 train, 1 idle" in done.stderr
    assert "2 process(es)" in done.stdout
    assert main(["pretrain", str(images), *TINY, "--max-steps", "1", "--output-dir", str(tmp_path / "one")]) == 0
    three, one = (
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("three", "one")
    )
    assert len(three) == 2
    assert three[0] == pytest.approx(one[0], rel=1e-5)


@pytest.mark.skipif(not ON_CPU, reason="this torch shards on GPUs only")
def test_shared_weights_leave_whole_files(images, tmp_path):
    # one process without, two with, one without, two with: the same run, through the same files
    flags = [str(images), *TINY, "-a", "vit_tiny", "--patch-size", "16", "--checkpoint-steps", "1"]

    def go(folder, steps, *more):
        command = [
            sys.executable,
            str(ROOT / "tests" / "pretrain64.py"),
            *flags,
            "--max-steps",
            str(steps),
            "--output-dir",
            str(tmp_path / folder),
            "--resume",
            "auto",
            *more,
        ]
        Process(command).finish()
        newest = max((tmp_path / folder).glob("checkpoint_*_step*.pth.tar"))
        return torch.load(newest)

    shared = ["--fsdp", "--nprocs-per-node", "2"]
    want = go("whole", 3)
    go("shared", 1, *shared, "--micro-batch", "3")
    go("shared", 2)
    got = go("shared", 3, *shared)
    assert list(got["state_dict"]) == list(want["state_dict"])
    for key, value in want["state_dict"].items():
        if not key.endswith(("encoder.norm.bias", "predictor.1.running_mean")):
            apart = float((got["state_dict"][key] - value).double().norm())
            assert apart <= 1e-9 * float(value.double().norm()), key
    assert list(got["optimizer"]["state"]) == list(want["optimizer"]["state"])
    for number, state in want["optimizer"]["state"].items():
        assert got["optimizer"]["state"][number]["mu"].shape == state["mu"].shape


def test_memory_is_counted_as_it_is_kept():
    def made():
        return build("vit_small", image_size=32, embed_dim=48, depth=3, num_heads=3, dim=16, mlp_dim=32)

    counted = footprint(made, 32, optimizer="adamw")
    model = made()
    assert counted.weights == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert counted.trained == sum(p.nbytes for p in model.parameters() if p.requires_grad)
    kept = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(t):
        if t.untyped_storage().data_ptr() not in weights:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.features(x := torch.randn(20, 3, 32, 32))
    real = sum(s.nbytes() for s in kept.values()) - x.nbytes
    assert counted.backbone == pytest.approx(real / 20, rel=0.02)
    # the most that fits is what does fit, and one part fewer does not
    one, whole = counted.peak(64, 1), counted.peak(64)
    assert counted.fitting(64, 2 * whole) == 64
    size = counted.fitting(64, (one + whole) / 2 / (1 - KEPT_FREE))
    assert 0 < size < 64
    assert counted.peak(64, size) <= (one + whole) / 2 < counted.peak(64, -(-64 // (-(-64 // size) - 1)) % 64)
    assert counted.fitting(64, one / 2) == 0
    assert counted.peak(64, 0, shards=8) < whole


def test_traffic_and_time_by_hand():
    sent = traffic(8, 4096, trained=400e6, dim=256, norm_channels=0, passes=3, fsdp=False)
    assert sent == Traffic(gradients=700e6, keys=2 * 7 / 8 * 4096 * 1024, statistics=0, weights=0)
    assert traffic(1, 4096, trained=400e6, dim=256, norm_channels=9, passes=3, fsdp=True).all == 0
    # half of a second hides .25 s of gradients; in micro-batches nothing does, and computing takes a quarter longer
    assert step_seconds(500, 500, Traffic(25e8, 0, 0, 0), 1e10, micro=False, fsdp=False) == (1.0, 0.0)
    assert step_seconds(500, 500, Traffic(75e8, 1e9, 0, 0), 1e10, micro=False, fsdp=False) == (1.0, pytest.approx(0.35))
    assert step_seconds(500, 500, Traffic(25e8, 0, 0, 0), 1e10, micro=True, fsdp=False) == (1.25, 0.25)
    preserved = {"micro": False, "fsdp": False, "preserve": True}  # 9 passes instead of 8
    assert step_seconds(500, 500, Traffic(0, 0, 0, 0), 1e10, **preserved) == (1.125, 0.0)


def test_plan(capsys):
    flags = [
        "plan",
        "-a",
        "vit_tiny",
        "--image-size",
        "32",
        "-b",
        "512",
        "--epochs",
        "2",
        "--warmup-epochs",
        "1",
        "--pictures",
        "5120",
        "--precision",
        "fp32",
        "--optimizer",
        "adamw",
    ]
    assert main([*flags, "--gpus", "4", "--gpu-memory", "24", "--images-per-second", "128", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["pictures_per_gpu"], found["micro_batch"], found["steps"]) == (128, 0, 20)
    assert found["step_seconds"] == pytest.approx(1.0, rel=0.01)
    assert main([*flags, "--gpus", "1", "--gpu-memory", "2.05"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"512 images a GPU in \d+ passes of \d+", out)
    assert "torchrun --nproc-per-node 1 main_moco.py --recipe defaults --micro-batch auto" in out
    for wrong, message in (
        (["--gpu-memory", "1.4"], "a smaller --batch-size"),
        (["--gpus", "0"], "--gpus must be"),
        (["--gpus", "3"], "does not divide"),
        (["--recipe", "auto"], "name another"),
        (["--images-per-second", "-1"], "--images-per-second"),
        (["--gpu-memory", "nan"], "--gpu-memory"),
    ):
        assert main([*flags, *wrong]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_the_sbatch_file():
    path = ROOT / "examples" / "slurm.sbatch"
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    text = path.read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)", text, re.MULTILINE))
    assert options["ntasks-per-node"] == "1"
    assert options["signal"].startswith("USR1@")
    command = text[text.index("srun ") :].split("\ncode=")[0].replace("$SLURM_NNODES", options["nodes"])
    words = shlex.split(re.sub(r"\$\{?\w+\}?", "x", command.replace("\\\n", " ")))  # as the shell puts values there
    config = parse_script("main_moco.py", words[words.index("start") + 1 :])
    config.check()
    assert (config.multiprocessing_distributed, config.world_size) == (True, int(options["nodes"]))
    gpus = int(options["nodes"]) * int(options["gpus-per-node"])
    assert config.batch_size % gpus == 0
    assert config.resume == "auto"


def test_the_pytorchjob_manifest():
    job = yaml.safe_load((ROOT / "examples" / "pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    elastic, worker = job["spec"]["elasticPolicy"], job["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert elastic["minReplicas"] <= worker["replicas"] <= elastic["maxReplicas"]
    (container,) = worker["template"]["spec"]["containers"]
    assert container["name"] == "pytorch"  # the operator looks for it
    assert container["resources"]["limits"]["nvidia.com/gpu"] == elastic["nProcPerNode"]
    volumes = {v["name"] for v in worker["template"]["spec"]["volumes"]}
    assert {m["name"] for m in container["volumeMounts"]} == volumes
    assert container["command"] == ["torchrun"]
    assert container["args"][0] == "main_moco.py"
    config = parse_script("main_moco.py", container["args"][1:])
    config.check()
    mounts = {m["mountPath"] for m in container["volumeMounts"]}
    assert config.data in mounts
    assert config.output_dir.rpartition("/")[0] in mounts


def test_large_networks_of_the_paper():
    with shapes_only():
        large, huge = (build(arch, patch_size=p).base_encoder for arch, p in (("vit_large", 16), ("vit_huge", 14)))
    # Dosovitskiy et al. 2021, table 1: 307 and 632 million parameters (with a classifier of 1,000 classes)
    for encoder, millions in ((large, 307), (huge, 632)):
        backbone = sum(p.numel() for n, p in encoder.named_parameters() if not n.startswith("head."))
        assert backbone / 1e6 == pytest.approx(millions, rel=0.015)
    with pytest.raises(UserError, match="patches of 16"):
        parse_script("main_moco.py", ["-a", "vit_huge", "--image-size", "210", "DIR"]).check()
