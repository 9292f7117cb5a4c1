"""What a CPU cannot measure, on one GPU in under 45 minutes: ``make gpu``, or ``python benchmarks/gpu.py``.

Writes docs/gpu.md: goldens in every precision against float64, speed and share of the GPU's peak, views on the device,
a batch of 4096 in 12 GB, kernel launches of the update, bit-equal resume. What this machine or this version cannot
measure is skipped, with the reason. ``--rehearse`` runs every part at toy size on the CPU and writes nothing: it shows
that the program works, and its numbers mean nothing.
"""

import argparse
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import mean, median
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import step as steps
from mocov3 import models
from mocov3.config import PretrainConfig
from mocov3.models import MoCo
from mocov3.optim import build_optimizer

MINUTES = 45
GOLDENS = {"resnet18_t1.0_w1": "resnet18", "resnet50_t1.0_w1": "resnet50", "vit_small_t0.2_w1": "vit_small"}
PEAKS = {
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "A10": 125,
    "4090": 165,
    "3090": 71,
    "T4": 65,
}
"""Dense bf16 (T4: fp16) TFLOP/s with float32 sums, from NVIDIA's data sheets; first name that fits."""


class Skip(Exception):
    """Why a part is not measured here."""


@dataclass
class Machine:
    """Where it is measured, and how large."""

    device: torch.device
    rehearsal: bool
    folder: Path
    """For images and runs."""

    def need_gpu(self) -> None:
        """Skip where there is none."""
        if self.device.type != "cuda" and not self.rehearsal:
            raise Skip("torch finds no CUDA device here")

    def pick(self, full: Any, toy: Any) -> Any:
        """The size to measure at."""
        return toy if self.rehearsal else full

    @functools.cached_property
    def images(self) -> Path:
        """A folder of JPEGs."""
        try:
            from benchmarks import images
        except ImportError as error:
            raise Skip(f"images to load need the bench extra ({error})") from None
        return images.folder(self.folder / "pictures", self.pick(8192, 32))

    def pretrain(self, *flags: Any, name: str, steps: int) -> list[dict[str, Any]]:
        """Lines of metrics of a run by the program itself."""
        out = self.folder / name
        common = [
            "--recipe",
            "defaults",
            "-p",
            "1" if self.rehearsal else "5",
            "--max-steps",
            steps,
            "--seed",
            "0",
            "--device",
            self.device.type,
            "--output-dir",
            out,
            "--quiet",
        ]
        command = [sys.executable, "-m", "mocov3", "pretrain", self.images, *common, *flags]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([*map(str, command)], env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError((done.stderr or done.stdout).strip().splitlines()[-1])
        return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def sync(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


# --- goldens in every precision --------------------------------------------------------------------------------------


def _fill() -> Any:
    spec = importlib.util.spec_from_file_location("golden_fill", ROOT / "tests/golden/fill.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _golden_step(
    case: dict[str, Any],
    machine: Machine,
    dtype: torch.dtype,
    autocast: torch.dtype | None = None,
    *,
    tf32: bool = False,
    channels_last: bool = False,
    compiled: bool = False,
) -> dict[str, Any]:
    """Loss, and gradients in float64 on the CPU, of one recorded step."""
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
    if channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        views = [v.to(memory_format=torch.channels_last) for v in views]
    if compiled:
        model.compile_backbones(*(["eager"] if machine.rehearsal else []))
    context: AbstractContextManager[Any] = nullcontext()
    if autocast is not None:
        context = torch.autocast(device.type, autocast)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    try:
        with context:
            loss = model(*views, case["m"])
        (loss * (1024 if autocast == torch.float16 else 1)).backward()
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    scale = 1 / 1024 if autocast == torch.float16 else 1
    left_out = ("encoder.norm.bias", "qkv.bias")  # zero in exact arithmetic, wholly or in part
    grads = {
        n: p.grad.double().cpu() * scale
        for n, p in model.named_parameters()
        if p.grad is not None and not n.endswith(left_out)
    }
    return {"loss": float(loss.detach()), "grads": grads}


def goldens(machine: Machine) -> list[str]:
    """One recorded step in every precision, against float64 on the same device."""
    machine.need_gpu()
    cases = json.loads((ROOT / "tests/golden/c_step.json").read_text())["cases"]
    ways: dict[str, dict[str, Any]] = {
        "fp32": {},
        "fp32, channels-last": {"channels_last": True},
        "fp32, compiled": {"compiled": True},
        "TF32": {"tf32": True},
        "bf16": {"autocast": torch.bfloat16},
        "bf16, channels-last": {"autocast": torch.bfloat16, "channels_last": True},
        "bf16, compiled": {"autocast": torch.bfloat16, "channels_last": True, "compiled": True},
        "fp16": {"autocast": torch.float16},
    }
    lines = [
        "| golden step | arithmetic | loss − float64 | gradients, median relative error | worst |",
        "|---|---|---:|---:|---:|",
    ]
    names = [n for n in GOLDENS if n in cases] or [n for n, c in cases.items() if c["world"] == 1]
    for name in names[: machine.pick(len(names), 1)]:
        case = cases[name]
        exact = _golden_step(case, machine, torch.float64)
        recorded = case["float64"][0]["loss"]
        lines.append(f"| {name} | float64 | recorded: {exact['loss'] - recorded:+.1e} | | |")
        for way, settings in ways.items():
            got = _golden_step(case, machine, torch.float32, **settings)
            errors = [float((g - exact["grads"][n]).norm() / exact["grads"][n].norm()) for n, g in got["grads"].items()]
            lines.append(
                f"| {name} | {way} | {got['loss'] - exact['loss']:+.1e} | {median(errors):.1e} | {max(errors):.1e} |"
            )
    return lines


# --- speed -----------------------------------------------------------------------------------------------------------


def flops_of(arch: str, size: int) -> float:
    """Floating-point operations of a training step an image: both views, gradients, keys; counted by torch."""
    model = models.build(arch, image_size=size).train()
    x = torch.randn(2, 2, 3, size, size)
    with FlopCounterMode(display=False) as counter:
        model(x[0], x[1], 0.99).backward()
    return counter.get_total_flops() / 2


def peak_of(machine: Machine) -> tuple[float, str]:
    """FLOP/s of the GPU in bf16, and where that is from."""
    if machine.rehearsal:
        return 1e12, "rehearsal"
    name = torch.cuda.get_device_name()
    for part, tera in PEAKS.items():
        if part in name:
            return tera * 1e12, f"data sheet of {part}"
    a = torch.randn(8192, 8192, device=machine.device, dtype=torch.bfloat16)
    best = min(_seconds(lambda: a @ a, machine.device) for _ in range(10))
    return 2 * 8192**3 / best, "its fastest product of 8192² matrices"


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    sync(device)
    began = time.perf_counter()
    run()
    sync(device)
    return time.perf_counter() - began


def _batch(machine: Machine, on_80_gb: int) -> int:
    if machine.device.type != "cuda":
        return 4
    share = torch.cuda.get_device_properties(machine.device).total_memory / 80e9
    return int(max(16, 2 ** int(np.log2(max(on_80_gb * share, 16)))))


def speed(machine: Machine) -> list[str]:
    """Images a second and share of the peak: steps alone, compiled, and whole runs from JPEG files."""
    machine.need_gpu()
    peak, source = peak_of(machine)
    lines = ["| arch | what | batch | images/s | of bf16 peak | waiting for data |", "|---|---|---:|---:|---:|---:|"]
    size, rounds = machine.pick((224, 20), (32, 1))
    for arch, base in machine.pick({"resnet50": 512, "vit_small": 512, "vit_base": 512}, {"vit_tiny": 4}).items():
        flops, batch = flops_of(arch, size), _batch(machine, base)
        case = steps.CASES["resnet50" if arch == "resnet50" else "vit_small"]

        def add(what: str, rate: float, wait: str = "", arch: str = arch, batch: int = batch, f: float = flops) -> None:
            lines.append(f"| {arch} | {what} | {batch} | {rate:.0f} | {100 * rate * f / peak:.0f} % | {wait} |")

        for compiled in (False, True):
            if compiled and machine.rehearsal:
                continue  # minutes
            ours = steps.Ours(steps.build(arch, case, size, machine.device), case, machine.device, compile=compiled)
            x1, x2 = (
                x.to(memory_format=torch.channels_last)
                for x in torch.randn(2, batch, 3, size, size, device=machine.device).unbind()
            )
            for _ in range(machine.pick(5, 1)):
                ours(x1, x2, 0.99)
            took = _seconds(lambda o=ours, a=x1, b=x2: [o(a, b, 0.99) for _ in range(rounds)], machine.device)  # type: ignore[misc]
            add("step, compiled" if compiled else "step", rounds * batch / took)
            del ours, x1, x2
        runs = machine.pretrain(
            "-a",
            arch,
            "-b",
            batch,
            "--image-size",
            size,
            "--optimizer",
            case["optimizer"],
            "--precision",
            machine.pick("bf16", "fp32"),
            "-j",
            machine.pick(16, 0),
            name=f"speed-{arch}",
            steps=machine.pick(60, 3),
        )
        tail = runs[len(runs) // 2 :]
        add(
            f"run, {os.cpu_count()} cores",
            median(f["images_per_second"] for f in tail),
            f"{100 * mean(f['data_wait'] for f in tail):.0f} %",
        )
    lines += [
        "",
        f"Peak: {peak / 1e12:.0f} TFLOP/s ({source}). Operations are counted by torch for one step: queries "
        "with gradients and keys of both views.",
    ]
    return lines


def against_eager(machine: Machine) -> list[str]:
    """benchmarks/step.py on this device."""
    machine.need_gpu()
    size, batch, rounds = machine.pick((224, 64, 5), (32, 2, 1))
    rows = {}
    for arch in machine.pick(list(steps.CASES), ["vit_small"]):
        rows[arch] = steps.measure(arch, size, batch, rounds, machine.device)
    return [*steps.table(rows).splitlines(), "", f"Batch {batch}; eager: fp16 with a scaler, ours: bf16."]


def views_on_device(machine: Machine) -> list[str]:
    """Colours and blur on the CPU or on the device."""
    machine.need_gpu()
    lines = ["| views on | images/s | waiting for data |", "|---|---:|---:|"]
    for where in ("cpu", "device"):
        runs = machine.pretrain(
            "-a",
            machine.pick("vit_small", "vit_tiny"),
            "-b",
            _batch(machine, 512),
            "--optimizer",
            "adamw",
            "--image-size",
            machine.pick(224, 32),
            "--views-on",
            where,
            "-j",
            machine.pick(16, 0),
            "--precision",
            machine.pick("bf16", "fp32"),
            name=f"views-{where}",
            steps=machine.pick(60, 3),
        )
        tail = runs[len(runs) // 2 :]
        rate, wait = median(f["images_per_second"] for f in tail), mean(f["data_wait"] for f in tail)
        lines.append(f"| {where} | {rate:.0f} | {100 * wait:.0f} % |")
    return lines


# --- memory, launches, resume ----------------------------------------------------------------------------------------


def large_batch(machine: Machine) -> list[str]:
    """ViT-B at batch 4096 where only 12 GB may be used."""
    machine.need_gpu()
    if "micro_batch" not in {f.name for f in fields(PretrainConfig)}:
        raise Skip("this version has no --micro-batch")
    if not machine.rehearsal and torch.cuda.get_device_properties(machine.device).total_memory < 12e9:
        raise Skip("the GPU has less than 12 GB")
    flags = [
        "-a",
        machine.pick("vit_base", "vit_tiny"),
        "-b",
        machine.pick(4096, 16),
        "--optimizer",
        "adamw",
        "--micro-batch",
        machine.pick("auto", 4),
        "--stop-grad-conv1",
        "-j",
        machine.pick(16, 0),
        "--precision",
        machine.pick("bf16", "fp32"),
        "--image-size",
        machine.pick(224, 32),
    ]
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
    command = [
        sys.executable,
        "-c",
        code,
        "pretrain",
        machine.images,
        "--recipe",
        "defaults",
        "-p",
        1,
        "--max-steps",
        2,
        "--device",
        machine.device.type,
        "--output-dir",
        out,
        "--quiet",
        *flags,
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*map(str, command)], env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr or done.stdout).strip().splitlines()[-1])
    peak = int(done.stdout.split()[-1])
    rate = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["images_per_second"]
    return [
        f"ViT-B, 224 px, batch 4096, `--micro-batch auto`, bf16: {peak / 1e9:.1f} GB reserved at most, "
        f"{rate:.0f} images/s."
    ]


def launches(machine: Machine) -> list[str]:
    """Kernels that the update starts: momentum encoder and optimizer."""
    machine.need_gpu()
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
    machine.need_gpu()
    lines = []
    for arch, optimizer in machine.pick([("resnet50", "lars"), ("vit_small", "adamw")], [("vit_tiny", "adamw")]):
        flags = [
            "-a",
            arch,
            "-b",
            machine.pick(128, 8),
            "--optimizer",
            optimizer,
            "--deterministic",
            "-j",
            machine.pick(8, 0),
            "--image-size",
            machine.pick(224, 32),
            "--precision",
            machine.pick("bf16", "fp32"),
            "--checkpoint-steps",
            2,
        ]
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


PARTS: dict[str, Callable[[Machine], list[str]]] = {
    "Goldens in every precision": goldens,
    "Speed": speed,
    "A step against an eager one": against_eager,
    "Views on the device": views_on_device,
    "Batch 4096 in 12 GB": large_batch,
    "Kernel launches of the update": launches,
    "Bit-equal resume": resume,
}


def measure(machine: Machine, chosen: list[str]) -> tuple[list[str], int]:
    """All parts as Markdown, and how many failed."""
    began, text, failed = time.monotonic(), [], 0
    for title in chosen:
        text += [f"## {title}", ""]
        try:
            if time.monotonic() - began > 60 * (MINUTES - 5):
                raise Skip(f"the {MINUTES} minutes are over")
            text += PARTS[title](machine)
        except Skip as reason:
            text.append(f"Skipped: {reason}.")
        except Exception as error:  # the other parts are worth having
            failed += 1
            text.append(f"**Failed**: {type(error).__name__}: {str(error)[:500]}")
        text.append("")
        print(f"{title}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        if machine.device.type == "cuda":
            torch.cuda.empty_cache()
    return text, failed


def main() -> int:
    """Measure, write; 1 if a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "gpu.md")
    parser.add_argument("--rehearse", action="store_true", help="every part at toy size on the CPU; writes nothing")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), metavar="PART")
    args = parser.parse_args()
    cuda = torch.cuda.is_available() and not args.rehearse
    where = torch.cuda.get_device_name() if cuda else "a machine without a GPU"
    with tempfile.TemporaryDirectory() as folder:
        machine = Machine(torch.device("cuda" if cuda else "cpu"), args.rehearse, Path(folder))
        body, failed = measure(machine, args.parts)
    head = [
        "# On a GPU",
        "",
        "What only a GPU can show, measured by one command: `make gpu` (`benchmarks/gpu.py`), in "
        f"under {MINUTES} minutes.",
        f"This table was made on {where}, torch {torch.__version__}, {os.cpu_count()} cores.",
        "",
    ]
    text = "\n".join([*head, *body]).rstrip() + "\n"
    if args.rehearse:
        print(text)
    else:
        args.output.write_text(text, encoding="utf-8")
        print(f"wrote {args.output}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
