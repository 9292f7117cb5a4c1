"""What a CPU cannot measure, on one GPU, in parts: ``make gpu``, or ``python benchmarks/gpu.py --parts steps resume``.

Every part is written into docs/gpu.md when it ends, with card, versions and date; the others stay as they are. Without
``--parts``, those that nobody has measured come first, then the oldest, until ``--minutes`` are over. Without a GPU
nothing is measured and nothing is lost. ``--rehearse`` runs the parts at toy size on the CPU and writes nothing: it
shows that the program works, and its numbers mean nothing.
"""

import argparse
import datetime
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import step as steps
from mocov3 import models
from mocov3.config import PretrainConfig
from mocov3.models import MoCo
from mocov3.models.precision import frozen_precision
from mocov3.optim import build_optimizer
from mocov3.pretraining.assemble import count_memory

GOLDENS = {"resnet18_t1.0_w1": "resnet18", "resnet50_t1.0_w1": "resnet50", "vit_small_t0.2_w1": "vit_small"}
NOTHING = "Not measured yet."
TARGETS = {"vit_small": (3800, 4400, 0.85), "vit_base": (1150, 1350, 0.85), "resnet50": (2300, 2700, 0.72)}
"""Images a second on an H200, floor and goal, and the factor for an H100."""


@dataclass
class Machine:
    """Where it is measured, and how large."""

    device: torch.device
    rehearsal: bool
    folder: Path
    """For images and runs."""

    def pick(self, full: Any, toy: Any) -> Any:
        """The size to measure at."""
        return toy if self.rehearsal else full

    @property
    def workers(self) -> int:
        """Loader processes."""
        return self.pick(min(os.cpu_count() or 1, 16), 0)

    def images(self, kind: str = "small") -> Path:
        """A folder of JPEGs of 500×375 pixels: ``small`` of about 55 kB, ``imagenet`` of 117 kB as ImageNet's mean."""
        from benchmarks import images

        folder = self.folder / f"images-{kind}"
        count = self.pick(32768, 32)
        return folder if folder.is_dir() else images.folder(folder, count, quality={"small": 85, "imagenet": 97}[kind])

    def run(self, *command: Any) -> str:
        """Run the program; what it prints."""
        argv = [sys.executable, "-m", "mocov3", *map(str, command)]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError((done.stderr or done.stdout).strip().splitlines()[-1])
        return done.stdout

    def pretrain(self, *flags: Any, name: str, steps: int, data: Path | None = None) -> list[dict[str, Any]]:
        """Lines of metrics of a run by the program itself."""
        out = self.folder / name
        usual = ["--recipe", "defaults", "-p", self.pick(5, 1), "--max-steps", steps, "--seed", 0, "--quiet"]
        where = ["--device", self.device.type, "--output-dir", out]
        self.run("pretrain", data or self.images(), *usual, *where, *flags)
        return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]

    @functools.cached_property
    def product(self) -> float:
        """FLOP/s of a product of 8192² matrices of bf16 random numbers."""
        n = self.pick(8192, 256)
        a, b = torch.randn(2, n, n, device=self.device, dtype=torch.bfloat16).unbind()
        return 2 * n**3 / fastest(lambda: a @ b, self.device, 10)

    @functools.cached_property
    def bandwidth(self) -> float:
        """Bytes/s of a copy on the device, read and written."""
        n = self.pick(2**31, 2**20)
        a, b = torch.empty(2, n, device=self.device, dtype=torch.int8).unbind()
        return 2 * n / fastest(lambda: b.copy_(a), self.device, 10)


def sync(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def fastest(run: Callable[[], Any], device: torch.device, times: int, rounds: int = 3) -> float:
    """Seconds of one call: the best of ``rounds`` of so many ``times``, after as many to warm up."""
    best = float("inf")
    for round in range(rounds + 1):
        sync(device)
        began = time.perf_counter()
        for _ in range(times):
            run()
        sync(device)
        best = min(best, (time.perf_counter() - began) / times) if round else best
    return best


# --- right -----------------------------------------------------------------------------------------------------------


def _fill() -> Any:
    spec = importlib.util.spec_from_file_location("golden_fill", ROOT / "tests/golden/fill.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def _gradients(model: Any, loss: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
    (loss * scale).backward()
    named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: g.double() / scale for n, g in named.items()}


def _golden_loss(case: dict[str, Any], machine: Machine, dtype: torch.dtype) -> float:
    fill, device = _fill(), machine.device
    size, batch = machine.pick(case["image_size"], 32), case["global_batch"]
    model = models.build(
        case["arch"],
        image_size=size,
        dim=case["dim"],
        mlp_dim=case["mlp_dim"],
        temperature=case["T"],
        stop_grad_conv1=case["stop_grad_conv1"],
    )
    for key, value in model.state_dict().items():
        new = fill.fill_value(key, tuple(value.shape))
        if new is not fill.KEEP:
            value.copy_(torch.from_numpy(np.asarray(new)))
    model.to(device, dtype).train()
    views = [torch.from_numpy(fill.images("c_step", 0, v, batch, size)).to(device, dtype) for v in (1, 2)]
    return float(model(*views, case["m"]).detach())


def right(machine: Machine) -> list[str]:
    """Recorded losses in float64 and float32; gradients in 16 bits of a fresh network against float64."""
    cases = json.loads((ROOT / "tests/golden/c_step.json").read_text())["cases"]
    lines = ["| golden step | float64 − recorded | float32 − recorded |", "|---|---:|---:|"]
    names = [n for n in GOLDENS if n in cases] or [n for n, c in cases.items() if c["world"] == 1]
    for name in names[: machine.pick(len(names), 1)]:
        recorded = cases[name]["float64"][0]["loss"]
        apart = [_golden_loss(cases[name], machine, dtype) - recorded for dtype in (torch.float64, torch.float32)]
        lines.append(f"| {name} | " + " | ".join(f"{a:+.0e}" for a in apart) + " |")
    lines += [
        "",
        "Gradients of a freshly initialised network on 64 random images against float64, ‖g − g₆₄‖ / ‖g₆₄‖ over all "
        "parameters; *eager fp16* is the step in the reference's manner, and what 16 bits are judged by: at most 1.5 "
        "times its error.",
        "",
        "| network | eager fp16 | fp16 | fp16, compiled | bf16 | bf16, compiled |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for arch in machine.pick(["vit_small", "resnet50"], ["vit_tiny"]):
        lines.append(f"| {arch} | " + " | ".join(f"{e:.3f}" for e in _errors(arch, machine)) + " |")
    return lines


def _errors(arch: str, machine: Machine) -> list[float]:
    device, size = machine.device, machine.pick(224, 32)
    case = steps.CASES["resnet50" if arch == "resnet50" else "vit_small"]
    torch.manual_seed(1)
    views = torch.randn(2, machine.pick(64, 8), 3, size, size, device=device)

    def once(dtype: torch.dtype | None, *, plain: bool = False, compiled: bool = False) -> dict[str, Tensor]:
        wide = torch.float32 if dtype else torch.float64
        model = steps.build(arch, case, size, device).to(wide)
        scale = 1024.0 if dtype == torch.float16 else 1.0
        if plain:
            eager = steps.Eager(model, case, device)
            with _autocast(device, dtype):
                loss = eager.loss(views[0], views[1], 0.99)
            return _gradients(model, loss, scale)
        model.to(memory_format=torch.channels_last)
        if compiled:
            torch._dynamo.reset()
            model.compile_backbones(machine.pick("inductor", "eager"))
        with _autocast(device, dtype):
            loss = model(*(v.to(wide, memory_format=torch.channels_last) for v in views), 0.99)
        return _gradients(model, loss, scale)

    exact = once(None)
    norm = sum(float(g.norm()) ** 2 for g in exact.values())
    half = machine.pick(torch.float16, torch.bfloat16)
    gradients = [once(half, plain=True)]
    gradients += [once(dtype, compiled=c) for dtype in (half, torch.bfloat16) for c in (False, True)]
    return [(sum(float((g[n] - exact[n]).norm()) ** 2 for n in exact) / norm) ** 0.5 for g in gradients]


# --- steps -----------------------------------------------------------------------------------------------------------


def flops_of(arch: str, size: int, **settings: Any) -> float:
    """Floating-point operations of a training step an image: both views, gradients, keys; attention counted."""
    model = models.build(arch, image_size=size, **settings).train()
    x = torch.randn(2, 2, 3, size, size)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x[0], x[1], 0.99).backward()
    return counter.get_total_flops() / 2


def _views(machine: Machine, batch: int, size: int) -> list[Tensor]:
    both = torch.randn(2, batch, 3, size, size, device=machine.device)
    return [v.to(memory_format=torch.channels_last) for v in both.unbind()]


def _release(machine: Machine) -> None:
    torch._dynamo.reset()
    if machine.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def time_step(machine: Machine, arch: str, batch: int, size: int, *, manner: str, **settings: Any) -> dict[str, float]:
    """Seconds of a step, of the first one, and peak bytes; ``manner``: reference, or a precision of ours."""
    device, case = machine.device, steps.CASES["resnet50" if arch.startswith("resnet") else "vit_small"]
    _release(machine)
    model = steps.build(arch, case, size, device) if size > 64 else _small(arch, size, device)
    x1, x2 = _views(machine, batch, size)
    if manner == "reference":
        x1, x2 = x1.contiguous(), x2.contiguous()
    halves = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(manner)  # as runs give pixels to networks
    x1, x2 = (x1, x2) if halves is None else (x1.to(halves), x2.to(halves))
    side: Any = (
        steps.Eager(model, case, device)
        if manner == "reference"
        else steps.Ours(model, case, device, precision=manner, **settings)
    )
    began = time.perf_counter()
    side(x1, x2, 0.99)
    sync(device)
    first = time.perf_counter() - began
    took = fastest(lambda: side(x1, x2, 0.99), device, machine.pick(12, 1))
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return {"seconds": took, "first": first, "peak": peak}


def _small(arch: str, size: int, device: torch.device) -> MoCo:
    torch.manual_seed(0)
    return models.build(arch, image_size=size, small_stem=arch.startswith("resnet"), temperature=0.2).to(device).train()


def step_of(machine: Machine, arch: str, batch: int) -> list[str]:
    """A step in the reference's manner and ours, eager and compiled, in one process."""
    size, batch = machine.pick((224, batch), (32, 2))
    compiled = not machine.rehearsal
    sixteen = machine.pick("bf16", "fp32")
    ways: dict[str, dict[str, Any]] = {
        "in the reference's manner, fp16": {"manner": "reference"},
        "eager, bf16": {"manner": sixteen},
        "compiled, bf16": {"manner": sixteen, "compile": compiled},
    }
    if arch == "resnet50":  # cuDNN's batch norm takes fp16 alone
        ways["compiled, fp16"] = {"manner": machine.pick("fp16", "fp32"), "compile": compiled}
    flops = flops_of(arch, size)
    lines = [
        "| step | images/s | ms | of the product | peak memory | against the first | first step |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    base = 0.0
    for name, way in ways.items():
        times = time_step(machine, arch, batch, size, **way)
        base = base or times["seconds"]
        rate = batch / times["seconds"]
        lines.append(
            f"| {name} | {rate:.0f} | {1e3 * times['seconds']:.1f} | {100 * rate * flops / machine.product:.0f} % | "
            f"{times['peak'] / 1e9:.1f} GB | {base / times['seconds']:.2f}× | {times['first']:.0f} s |"
        )
    optimizer = steps.CASES["resnet50" if arch == "resnet50" else "vit_small"]["optimizer"]
    config = PretrainConfig(arch=arch, image_size=size, optimizer=optimizer)
    planned = count_memory(config, sixteen_bits=True).peak(batch)
    floor, goal, h100 = TARGETS[arch]
    return [
        *lines,
        "",
        f"Batch {batch}, {size} px, random images on the device; {flops / 1e9:.1f} GFLOP an image (attention counted), "
        f"against the card's measured product of {machine.product / 1e12:.0f} TFLOP/s; it copies "
        f"{machine.bandwidth / 1e12:.2f} TB/s. `mocov3 plan` counts {planned / 1e9:.1f} GB. "
        f"Target on an H200: {floor} images/s, goal {goal} (H100: × {h100}).",
    ]


def micro_batches(machine: Machine) -> list[str]:
    """512 images in one pass and in passes of 128, compiled as a run is."""
    size, batch, part = machine.pick((224, 512, 128), (32, 4, 2))
    manner, compiled = machine.pick(("bf16", True), ("fp32", False))
    lines = ["| ViT-S, 512 images | images/s | ms | peak memory | time of one pass |", "|---|---:|---:|---:|---:|"]
    whole = 0.0
    for name, micro in (("one pass", 0), ("passes of 128", part)):
        settings = {"compile": compiled, "micro_batch": micro}
        times = time_step(machine, "vit_small", batch, size, manner=manner, **settings)
        took = times["seconds"]
        whole = whole or took
        lines.append(
            f"| {name} | {batch / took:.0f} | {1e3 * took:.0f} | {times['peak'] / 1e9:.1f} GB | {took / whole:.2f}× |"
        )
    return [*lines, "", "Target: 1.5× the time of one pass, goal 1.35×."]


def small_images(machine: Machine) -> list[str]:
    """ResNet-18 with the stem for small images at 32 px, where launching kernels takes the time."""
    batch = machine.pick(512, 4)
    manner, compiled = machine.pick(("bf16", True), ("fp32", False))
    ways = {"eager (a run's default)": {}, "compiled": {"compile": compiled}}
    lines = ["| ResNet-18, 32 px, batch 512 | images/s | ms | first step |", "|---|---:|---:|---:|"]
    for name, way in ways.items():
        times = time_step(machine, "resnet18", batch, 32, manner=manner, **way)
        took = times["seconds"]
        lines.append(f"| {name} | {batch / took:.0f} | {1e3 * took:.1f} | {times['first']:.0f} s |")
    return [*lines, "", "Target: 8,000 images/s, goal 14,000 (H200)."]


# --- whole runs ------------------------------------------------------------------------------------------------------


def _rate(lines: list[dict[str, Any]]) -> tuple[float, float]:
    tail = lines[len(lines) // 2 :]
    return median(line["images_per_second"] for line in tail), mean(line["data_wait"] for line in tail)


def _runs(machine: Machine, count: int, runs: list[tuple[str, int, str, list[str]]]) -> list[str]:
    """A table of ViT-S runs by the program: (title, loader processes, images, flags)."""
    size, batch = machine.pick((224, 512), (32, 4))
    arch = machine.pick("vit_small", "vit_tiny")
    usual = ["-a", arch, "-b", batch, "--optimizer", "adamw", "--image-size", size, "--stop-grad-conv1"]
    lines = ["| run from JPEG files | loader processes | images/s | waiting for data |", "|---|---:|---:|---:|"]
    for title, workers, kind, flags in runs:
        name = f"run-{kind}-{workers}-{len(flags) and flags[-1]}"
        metrics = machine.pretrain(*usual, *flags, "-j", workers, name=name, steps=count, data=machine.images(kind))
        rate, wait = _rate(metrics)
        lines.append(f"| {title} | {workers} | {rate:.0f} | {100 * wait:.0f} % |")
    return [
        *lines,
        "",
        f"{arch}, batch {batch}, bf16, compiled, {os.cpu_count()} cores; median of the second half of {count} steps.",
    ]


def whole_runs(machine: Machine) -> list[str]:
    """Runs of the program from JPEG files of two sizes."""
    runs = [(f"files of {kb} kB", machine.workers, kind, []) for kb, kind in ((55, "small"), (117, "imagenet"))]
    return [*_runs(machine, machine.pick(60, 3), runs), "", "Target: 94 % of the step alone, goal 98 %."]


def device_views(machine: Machine) -> list[str]:
    """Runs with few loader processes, views on the CPU and on the device."""
    runs = [
        (f"views on the {where}", machine.pick(4, 0), "small", ["--views-on", place])
        for where, place in (("CPU", "cpu"), ("device", "device"))
    ]
    target = "Target: views on the device 1.2 times those on the CPU, goal 1.5."
    return [*_runs(machine, machine.pick(24, 3), runs), "", target]


def large_batch(machine: Machine) -> list[str]:
    """ViT-B at batch 4096 where only 12 GB may be used."""
    code = (
        "import sys, torch\nfrom mocov3.cli import main\n"
        "if torch.cuda.is_available():\n"
        "    total = torch.cuda.get_device_properties(0).total_memory\n"
        "    torch.cuda.set_per_process_memory_fraction(12e9 / total)\n"
        "code = main(sys.argv[1:])\n"
        "print('peak', torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0)\n"
        "sys.exit(code)\n"
    )
    out = machine.folder / "large"
    flags = ["-a", machine.pick("vit_base", "vit_tiny"), "-b", machine.pick(4096, 16), "--optimizer", "adamw"]
    flags += ["--micro-batch", machine.pick("auto", 4), "--stop-grad-conv1", "-j", machine.workers, "--recipe"]
    flags += ["defaults", "-p", 1, "--max-steps", 2, "--device", machine.device.type, "--output-dir", out, "--quiet"]
    flags += ["--image-size", machine.pick(224, 32)]
    command = [sys.executable, "-c", code, "pretrain", machine.images(), *flags]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([*map(str, command)], env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr or done.stdout).strip().splitlines()[-1])
    peak = int(done.stdout.split()[-1])
    rate = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["images_per_second"]
    return [
        f"ViT-B, 224 px, batch 4096, `--micro-batch auto`, bf16: {peak / 1e9:.1f} GB reserved at most, "
        f"{rate:.0f} images/s in the second step."
    ]


# --- evaluation, fine-tuning -----------------------------------------------------------------------------------------


def evaluation(machine: Machine) -> list[str]:
    """``embed`` from JPEG files against its two halves: the forward pass and the loader."""
    size, batch = machine.pick((224, 256), (32, 4))
    arch = machine.pick("vit_small", "vit_tiny")
    flags = ["--device", machine.device.type, "-j", machine.workers, "-b", batch, "--overwrite"]
    out = machine.folder / "features.npy"
    flags += ["--image-size", size]
    printed = machine.run("embed", "--model", arch, machine.images(), "--output", out, *flags)  # untrained: as fast
    embedded = float((re.search(r"; (\d+) images/s", printed) or [0, 0])[1])
    model = models.build(arch, image_size=size).base_encoder.to(machine.device).eval()
    x = torch.randn(batch, 3, size, size, device=machine.device)
    with torch.no_grad(), frozen_precision("auto", machine.device).autocast():
        forward = batch / fastest(lambda: model.features(x), machine.device, machine.pick(10, 1))
    loader = _loader_rate(machine, size, batch)
    return [
        "| ViT-S, 224 px | images/s |",
        "|---|---:|",
        f"| forward pass alone, {frozen_precision('auto', machine.device).name} | {forward:.0f} |",
        f"| loader alone, {machine.workers} processes | {loader:.0f} |",
        f"| `mocov3 embed` of {machine.pick(32768, 32)} JPEGs, start not counted | {embedded:.0f} |",
        "",
        "Target: 5,000 images/s and 0.9 of the slower half, goal 7,500 (H200).",
    ]


def fine_tuning(machine: Machine) -> list[str]:
    """Fine-tuning of ViT-S with DeiT's augmentation, from JPEG files of ten classes."""
    from benchmarks import images

    root, out = machine.folder / "classes", machine.folder / "tuned"
    for split, each in (("train", machine.pick(820, 8)), ("val", machine.pick(64, 4))):
        for number in range(machine.pick(10, 2)):
            images.folder(root / split / f"class{number}", each)
    batch = machine.pick(256, 4)
    flags = ["--model", machine.pick("vit_small", "vit_tiny"), "--data-set", "IMNET", "--data-path", root]
    flags += ["--epochs", 2, "--warmup-epochs", 0, "--batch-size", batch, "--input-size", machine.pick(224, 32)]
    flags += ["--print-freq", machine.pick(8, 1), "--output_dir", out, "-j", machine.workers]
    machine.run("finetune", *flags, "--device", machine.device.type, "--quiet")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rate, wait = _rate([line for line in lines if line.get("images_per_second")])
    return [
        f"ViT-S, 224 px, batch {batch}, from files of 55 kB, {machine.workers} loader processes: {rate:.0f} images/s, "
        f"{100 * wait:.0f} % of the time waiting for data."
    ]


def _loader_rate(machine: Machine, size: int, batch: int) -> float:
    # a program of its own: loader processes import what the main one is, and this one imports torch
    argv: list[Any] = [sys.executable, ROOT / "benchmarks/loading.py", machine.images()]
    argv += ["--image-size", size, "--batch-size", batch, "--workers", machine.workers]
    return float(subprocess.run([*map(str, argv)], capture_output=True, text=True, check=True).stdout.split()[0])


# --- launches, resume ------------------------------------------------------------------------------------------------


def launches(machine: Machine) -> list[str]:
    """Kernels that the update starts: momentum encoder and optimizer."""
    lines = ["| update of | optimizer | kernel launches |", "|---|---|---:|"]
    for arch, optimizer in machine.pick(
        [("resnet50", "lars"), ("vit_small", "adamw"), ("vit_base", "adamw")], [("resnet10_w32", "lars")]
    ):
        model = models.build(arch).to(machine.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        built: Any = build_optimizer(model.parameters(), optimizer, weight_decay=0.1, momentum=0.9)
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        lines.append(f"| {arch} | {optimizer} | {_launches_of_update(model, built, machine.device)} |")
    return lines


def _launches_of_update(model: MoCo, optimizer: Any, device: torch.device) -> int:
    optimizer.found_inf, optimizer.grad_scale = torch.zeros((), device=device), None
    cuda = device.type == "cuda"
    kind = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    for last in (False, True):  # the first makes the state
        with torch.profiler.profile(activities=[kind]) as profile:
            model.update_momentum_encoder(0.99)
            optimizer.step()
            sync(device)
        if last:
            on_device = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
            return sum(
                event.device_type == on_device and not event.name.startswith(("Memcpy", "Memset"))
                for event in profile.events() or []
            )
    raise AssertionError


def resume(machine: Machine) -> list[str]:
    """A stopped and resumed run ends in the same bits, with --deterministic."""
    lines = []
    for arch, optimizer in machine.pick([("resnet50", "lars"), ("vit_small", "adamw")], [("vit_tiny", "adamw")]):
        flags = ["-a", arch, "-b", machine.pick(128, 8), "--optimizer", optimizer, "--deterministic", "-j"]
        flags += [machine.pick(8, 0), "--image-size", machine.pick(224, 32), "--checkpoint-steps", 2]
        machine.pretrain(*flags, name=f"straight-{arch}", steps=4)
        machine.pretrain(*flags, name=f"stopped-{arch}", steps=2)
        machine.pretrain(*flags, "--resume", "auto", name=f"stopped-{arch}", steps=4)
        a, b = (
            torch.load(
                max((machine.folder / f"{kind}-{arch}").glob("checkpoint_*"), key=lambda p: p.name),
                weights_only=True,
                map_location="cpu",
            )
            for kind in ("straight", "stopped")
        )
        differ = [k for k, v in a["state_dict"].items() if not torch.equal(v, b["state_dict"][k])]
        if differ:
            raise RuntimeError(f"{arch}: {len(differ)} of {len(a['state_dict'])} tensors differ, first {differ[0]}")
        lines.append(f"- {arch}, {optimizer}: {len(a['state_dict'])} tensors bit-equal after 2 + 2 and after 4 steps")
    return lines


# --- parts, and the page they are written to -------------------------------------------------------------------------

PARTS: dict[str, tuple[str, Callable[[Machine], list[str]]]] = {
    "right": ("Right", right),
    "vit_small": ("A step of ViT-S", functools.partial(step_of, arch="vit_small", batch=512)),
    "vit_base": ("A step of ViT-B", functools.partial(step_of, arch="vit_base", batch=256)),
    "resnet50": ("A step of ResNet-50", functools.partial(step_of, arch="resnet50", batch=256)),
    "micro": ("Micro-batches", micro_batches),
    "small": ("Small images", small_images),
    "runs": ("Whole runs", whole_runs),
    "views": ("Views on the device", device_views),
    "evaluation": ("Evaluation", evaluation),
    "finetune": ("Fine-tuning", fine_tuning),
    "large": ("Batch 4096 in 12 GB", large_batch),
    "launches": ("Kernel launches of the update", launches),
    "resume": ("Bit-equal resume", resume),
}

HEAD = """# On a GPU

What only a GPU can show, measured part by part by `make gpu` (`benchmarks/gpu.py`). Under each title stand the card,
the versions and the day. A part that says it is not measured has been rehearsed at toy size on a CPU, and no more.
"""


def sections(page: str) -> dict[str, str]:
    """Title → text of a page's parts."""
    return {title: body.strip() for title, _, body in (s.partition("\n") for s in page.split("\n## ")[1:])}


def write(file: Path, page: dict[str, str]) -> None:
    """All parts in their order; those without a text say so."""
    parts = [f"## {title}\n\n{page.get(title, NOTHING)}\n" for title, _ in PARTS.values()]
    file.write_text("\n".join([HEAD, *parts]), encoding="utf-8")


def due(page: dict[str, str]) -> list[str]:
    """Names of parts: not measured ones first, then by age."""

    def day(name: str) -> str:
        text = page.get(PARTS[name][0], NOTHING)
        return (re.search(r"\d{4}-\d\d-\d\d", text) or [""])[0]

    return sorted(PARTS, key=day)


def measure(machine: Machine, name: str) -> tuple[str, bool]:
    """A part's text under a line that says where and when, and whether it was measured."""
    try:
        lines = PARTS[name][1](machine)
    except Exception as error:  # the other parts are worth having
        return f"**Failed**: {type(error).__name__}: {str(error)[:500]}", False
    where = torch.cuda.get_device_name() if machine.device.type == "cuda" else "CPU, rehearsal"
    from importlib.metadata import version

    versions = f"torch {torch.__version__}, timm {version('timm')}"
    return "\n".join([f"{where}, {versions}, {datetime.date.today()}.", "", *lines]), True


def main() -> int:
    """Measure, write; 1 if a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "gpu.md")
    parser.add_argument("--rehearse", action="store_true", help="every part at toy size on the CPU; writes nothing")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--minutes", type=float, default=11, help="begin no part after this time")
    args = parser.parse_args()
    cuda = torch.cuda.is_available() and not args.rehearse
    page = sections(args.output.read_text(encoding="utf-8")) if args.output.exists() else {}
    if not (cuda or args.rehearse):
        write(args.output, page)
        print("torch finds no CUDA device here: nothing measured; --rehearse shows that the program works")
        return 0
    began, failed = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        machine = Machine(torch.device("cuda" if cuda else "cpu"), args.rehearse, Path(folder))
        torch.backends.cudnn.benchmark = True
        for name in args.parts or due(page):
            if time.monotonic() - began > 60 * args.minutes:
                print(f"{name}: not begun, the {args.minutes:g} minutes are over", file=sys.stderr)
                continue
            text, measured = measure(machine, name)
            failed += not measured
            title = PARTS[name][0]
            print(f"\n## {title} ({time.monotonic() - began:.0f} s)\n\n{text}", flush=True)
            if measured and cuda:
                page = sections(args.output.read_text(encoding="utf-8")) if args.output.exists() else {}
                write(args.output, {**page, title: text})
            _release(machine)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
