"""One training step against an eager step in the reference's manner: ``python benchmarks/step.py [--quick]``.

The eager step follows the paper's algorithm 1 as one writes it down: images in NCHW, each view its own pass,
attention as two products and a softmax, the momentum encoder and LARS a parameter at a time with new tensors, AdamW a
parameter at a time. Both sides train the same network on the same images, in one process, by turns; the fastest of
the rounds counts. Printed: the ratio of the step and of the update alone (momentum encoder and optimizer), and where
the time goes. On a GPU both sides run as their programs do there: bf16 autocast here, fp16 with a scaler there.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if "torch" not in sys.modules:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mocov3 import models
from mocov3.distributed import World
from mocov3.models import MoCo
from mocov3.models.patches import PatchProjection
from mocov3.models.precision import Precision
from mocov3.models.products import TokenLinear
from mocov3.models.small_maps import SmallMapConv2d
from mocov3.optim import build_optimizer
from mocov3.pretraining.step import Step

CASES: dict[str, dict[str, Any]] = {
    "resnet50": {"optimizer": "lars", "temperature": 1.0, "lr": 0.1, "weight_decay": 1e-6},
    "vit_small": {"optimizer": "adamw", "temperature": 0.2, "lr": 1e-4, "weight_decay": 0.1, "stop_grad_conv1": True},
    "resnet10_w16": {
        "optimizer": "adamw",
        "temperature": 0.2,
        "lr": 4e-3,
        "weight_decay": 0.05,
        "dim": 128,
        "mlp_dim": 512,
    },
}
USUAL = ["resnet50", "vit_small"]
KINDS = {
    "convolution": ("convolution", "conv"),
    "matrix products": ("mm", "linear", "matmul"),
    "attention": ("attention", "softmax"),
    "normalisation": ("norm",),
    "optimizer": ("adam", "lerp", "sgd", "_foreach"),
}


class EagerLars:
    """LARS a parameter at a time, each intermediate a new tensor."""

    def __init__(self, params: Any, weight_decay: float) -> None:
        self.params, self.weight_decay, self.lr = [p for p in params if p.requires_grad], weight_decay, 0.0
        self.mu = [torch.zeros_like(p) for p in self.params]

    @torch.no_grad()
    def step(self) -> None:
        """One update."""
        for p, mu in zip(self.params, self.mu, strict=True):
            change = p.grad
            assert change is not None
            if p.ndim > 1:
                change = change + self.weight_decay * p
                size, length, one = torch.norm(p), torch.norm(change), torch.ones((), device=p.device)
                change = change * torch.where((size > 0) & (length > 0), 0.001 * size / length, one)
            mu.mul_(0.9).add_(change)
            p.add_(mu, alpha=-self.lr)


class Eager:
    """A step in the reference's manner; see the head of this file."""

    def __init__(self, model: MoCo, case: dict[str, Any], device: torch.device) -> None:
        self.model, self.lr = model, case["lr"]
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False  # timm's own switch
            for ours, plain in ((TokenLinear, nn.Linear), (SmallMapConv2d, nn.Conv2d), (PatchProjection, nn.Conv2d)):
                if isinstance(module, ours):
                    module.__class__ = plain
        self.optimizer: Any
        if case["optimizer"] == "lars":
            self.optimizer = EagerLars(model.parameters(), case["weight_decay"])
        else:
            self.optimizer = torch.optim.AdamW(
                model.parameters(), lr=self.lr, weight_decay=case["weight_decay"], foreach=False, fused=False
            )
        self.scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")
        self.device = device

    def __call__(self, x1: Tensor, x2: Tensor, m: float) -> Tensor:
        """Forward, backward, update."""
        with torch.autocast(self.device.type, torch.float16, enabled=self.device.type == "cuda"):
            loss = self.loss(x1, x2, m)
        self.model.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer) if isinstance(self.optimizer, torch.optim.Optimizer) else None
        self.update()
        self.scaler.update() if isinstance(self.optimizer, torch.optim.Optimizer) else None
        return loss

    def loss(self, x1: Tensor, x2: Tensor, m: float) -> Tensor:
        """Queries, the momentum update, keys, and the loss in both directions."""
        model = self.model
        q1, q2 = (model.predictor(model.base_encoder(x)) for x in (x1, x2))
        with torch.no_grad():
            self.average(m)
            k1, k2 = (model.momentum_encoder(x) for x in (x1, x2))
        return self.half(q1, k2) + self.half(q2, k1)

    @torch.no_grad()
    def average(self, m: float) -> None:
        """The momentum encoder, a parameter at a time."""
        pairs = zip(self.model.momentum_encoder.parameters(), self.model.base_encoder.parameters(), strict=True)
        for k, q in pairs:
            k.data = k.data * m + q.data * (1 - m)

    def update(self) -> None:
        """The optimizer."""
        if isinstance(self.optimizer, EagerLars):
            self.optimizer.lr = self.lr
        self.optimizer.step()

    def half(self, q: Tensor, k: Tensor) -> Tensor:
        """One direction of the loss."""
        t = self.model.temperature
        scores = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T / t
        return 2 * t * F.cross_entropy(scores, torch.arange(len(q), device=q.device))


class Ours:
    """The step that ``mocov3 pretrain`` runs."""

    def __init__(
        self,
        model: MoCo,
        case: dict[str, Any],
        device: torch.device,
        *,
        precision: str = "",
        compile: bool = False,
        micro_batch: int = 0,
    ) -> None:
        self.model, self.lr = model.to(memory_format=torch.channels_last), case["lr"]  # type: ignore[call-overload]
        if compile:
            model.compile_backbones()
        self.optimizer = build_optimizer(
            model.parameters(), case["optimizer"], weight_decay=case["weight_decay"], momentum=0.9
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.step = Step(
            self.model,
            self.optimizer,
            world=World(0, 1, device),
            precision=Precision(precision or ("bf16" if device.type == "cuda" else "fp32"), device),
            micro_batch=micro_batch,
        )

    def __call__(self, x1: Tensor, x2: Tensor, m: float) -> Tensor:
        """Forward, backward, guarded update."""
        return self.step(x1, x2, lr=self.lr, m=m).loss

    def average(self, m: float) -> None:
        """The momentum encoder."""
        self.model.update_momentum_encoder(m)

    def update(self) -> None:
        """The optimizer."""
        self.optimizer.step()


def build(arch: str, case: dict[str, Any], size: int, device: torch.device) -> MoCo:
    """A network, the same at every call."""
    torch.manual_seed(0)
    settings = {k: v for k, v in case.items() if k in ("temperature", "stop_grad_conv1", "dim", "mlp_dim")}
    return models.build(arch, image_size=size, **settings).to(device).train()


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """By the clock on a device, which is waited for; on the CPU of processor time, as others may be at work there."""
    if device.type != "cuda":
        began = time.process_time()
        run()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(arch: str, size: int, batch: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """Fastest seconds of step and update on both sides, and the shares of their time."""
    case = CASES[arch]
    sides: dict[str, Any] = {
        "eager": Eager(build(arch, case, size, device), case, device),
        "ours": Ours(build(arch, case, size, device), case, device),
    }
    views: dict[str, Any] = {"eager": torch.randn(2, batch, 3, size, size, device=device).unbind()}
    views["ours"] = [v.to(memory_format=torch.channels_last) for v in views["eager"]]
    times: dict[str, Any] = {name: {"step": [], "update": []} for name in sides}
    for round in range(rounds + 1):
        for name, side in sides.items():
            x1, x2 = views[name]
            took = seconds(lambda side=side, x1=x1, x2=x2: side(x1, x2, 0.99), device)  # type: ignore[misc]
            update = min(seconds(lambda side=side: (side.average(0.99), side.update()), device) for _ in range(3))  # type: ignore[misc]
            if round:  # the first warms up
                times[name]["step"].append(took)
                times[name]["update"].append(update)
    for name, side in sides.items():
        x1, x2 = views[name]
        times[name] = {k: min(v) for k, v in times[name].items()}
        times[name]["shares"] = shares(lambda side=side, x1=x1, x2=x2: side(x1, x2, 0.99), device)  # type: ignore[misc]
    return times


def shares(run: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Shares of the time of one step by kind of operation, by torch's profiler."""
    cuda = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU]
    spent = dict.fromkeys([*KINDS, "rest"], float("inf"))
    for _ in range(2):  # of each kind the faster: the profiler goes by the clock, and others may be at work
        with torch.profiler.profile(activities=activities) as profile:
            run()
            torch.cuda.synchronize() if cuda else None
        once = dict.fromkeys(spent, 0.0)
        for event in profile.key_averages():
            took = event.self_device_time_total if cuda else event.self_cpu_time_total
            name = event.key.lower()
            once[next((kind for kind, parts in KINDS.items() if any(p in name for p in parts)), "rest")] += took
        spent = {kind: min(took, once[kind]) for kind, took in spent.items()}
    total = sum(spent.values()) or 1.0
    return {kind: took / total for kind, took in spent.items()}


def table(by_arch: dict[str, dict[str, Any]]) -> str:
    """Both sides, the ratios, and where the time goes, in Markdown."""
    lines = ["| step of | eager, ms | ours, ms | ratio | update: eager, ms | ours, ms | ratio |", "|---|" + "---:|" * 6]
    for arch, f in by_arch.items():
        e, o = f["eager"], f["ours"]
        lines.append(
            f"| {arch} | {1e3 * e['step']:.0f} | {1e3 * o['step']:.0f} | {e['step'] / o['step']:.2f}× | "
            f"{1e3 * e['update']:.1f} | {1e3 * o['update']:.1f} | {e['update'] / o['update']:.1f}× |"
        )
    lines += ["", "| share of the time | " + " | ".join([*KINDS, "rest"]) + " |", "|---|" + "---:|" * (len(KINDS) + 1)]
    for arch, f in by_arch.items():
        for name in ("eager", "ours"):
            parts = " | ".join(f"{100 * share:.0f} %" for share in f[name]["shares"].values())
            lines.append(f"| {arch}, {name} | {parts} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", default=USUAL, choices=list(CASES))
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="small images, few rounds: does it run?")
    args = parser.parse_args()
    size, rounds = (32, 1) if args.quick else (args.image_size, args.rounds)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads = int(os.environ["OMP_NUM_THREADS"])
    torch.set_num_threads(threads)
    by_arch = {}
    for arch in args.archs:
        by_arch[arch] = measure(arch, size, args.batch_size, rounds, device)
        print(f"{arch} done", file=sys.stderr, flush=True)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"processor time, {threads} thread(s)"
    print(table(by_arch))
    print(f"\nBatch {args.batch_size}, {size} px, {where}, fastest of {rounds} rounds, torch {torch.__version__}.")


if __name__ == "__main__":
    main()
