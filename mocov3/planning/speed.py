"""What this machine can do: its memory, and the time of a training step and of loading, measured on a few of each."""

import copy
import time
from collections.abc import Callable

import numpy as np
import torch

from mocov3.config import PretrainConfig
from mocov3.data import Source
from mocov3.data.loading.loader import loader_workers, usable_cores
from mocov3.distributed import World
from mocov3.distributed.launch import count_ranks, pick_device
from mocov3.errors import UserError
from mocov3.models.precision import precision_of
from mocov3.models.products import multiplies_bf16
from mocov3.optim import build_optimizer
from mocov3.planning.auto import Machine
from mocov3.planning.reading import image_seconds
from mocov3.pretraining.assemble import plain_model, resolve_compile
from mocov3.pretraining.footprint import free_memory
from mocov3.pretraining.preserve import Preservation
from mocov3.pretraining.step import Step

_STEPS, _SECONDS = 3, 1.0  # at least
_HALF = 0.5
_COMPILED = 0.72
"""Time of a compiled step against the eager one that is measured: 0.74 of a ViT-S, 0.65 of a ResNet-50 in bfloat16 on
an H200 (docs/gpu.md). Compiling it first would take up to a minute."""


def machine(device: str, gpu: int | None) -> Machine:
    """The device that training would take, and what it has.

    Raises:
        UserError: if there is no such device.
    """
    torch_device = pick_device(device, gpu)
    if torch_device.type == "cuda":
        return Machine("cuda", free_memory(torch_device), usable_cores(), torch.cuda.get_device_name(torch_device))
    memory, name = int(_HALF * free_memory(torch_device)), torch_device.type
    return Machine(name, memory, usable_cores(), name, bf16=name == "cpu" and multiplies_bf16())


def epoch_seconds(
    config: PretrainConfig, source: Source, images: int, *, best: bool = False
) -> tuple[float, float, int]:
    """(seconds an epoch of training, seconds of loading, batch size that fits), by a few steps of each.

    With several processes one is measured, on its part of the batch. A batch that does not fit the device's memory is
    halved until it does. ``best``: by the fastest step, which tells what the machine can do, instead of the median,
    which tells what it does while others are at work on it.

    Raises:
        UserError: if not even two images fit.
    """
    device, ranks = pick_device(config.device, config.gpu), count_ranks(config)
    batch = max(config.batch_size // ranks.size, 1)
    while True:
        try:
            times = _step_times(config, device, batch)
            break
        except torch.OutOfMemoryError:
            if batch < 4:
                raise UserError(
                    f"--arch {config.arch} at --image-size {config.image_size}: does not fit the memory of "
                    f"{device}; take a smaller one"
                ) from None
            batch //= 2
        finally:
            if device.type == "cuda":
                torch.cuda.empty_cache()  # a rank of another process may train there
    workers = max(loader_workers(config.workers, ranks.here), 1)
    if device.type == "cpu":  # the last one loads only while steps wait
        workers = max(min(workers, usable_cores() // ranks.here - 1), 1)
    workers *= ranks.size
    loading = image_seconds(config, source) * images / workers
    step = min(times) if best else float(np.median(times))
    part = _micro_batch(config) or batch
    if device.type == "cuda" and resolve_compile(config, World(0, ranks.size, device), part, None):
        step *= _COMPILED
    batch *= ranks.size
    return step * max(images // batch, 1), loading, batch


def images_per_second(config: PretrainConfig, batch: int) -> float:
    """Images a second that training steps of ``batch`` take on the device of ``config``."""
    return batch / float(np.median(_step_times(config, pick_device(config.device, config.gpu), batch)))


def total_seconds(training: float, loading: float, device: str, *, workers: int) -> float:
    """Time of an epoch: on a CPU both share the cores, elsewhere the slower one decides.

    ``workers`` processes load beside the steps; without any, images are loaded between them.
    """
    if device != "cpu":
        return max(training, loading)
    return training + (loading / 2 if workers else loading)


def _step_times(config: PretrainConfig, device: torch.device, batch: int) -> list[float]:
    # another generator's draws: measuring must not change the run
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        model = plain_model(config)
        model.to(device=device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        optimizer = build_optimizer(model.parameters(), config.optimizer, weight_decay=0.0, momentum=0.9)
        precision = precision_of(config.precision, device)
        precision.suit(model)
        preservation = Preservation(copy.deepcopy(model.momentum_encoder), config.preserve) if config.preserve else None
        step = Step(
            model,
            optimizer,
            world=World(0, 1, device),
            precision=precision,
            micro_batch=_micro_batch(config),
            preservation=preservation,
        )
        x1, x2 = (
            torch.randn(batch, config.channels, config.image_size, config.image_size, device=device) for _ in range(2)
        )

        local = None
        if (small := config.local) is not None:
            local = torch.randn(small.count * batch, config.channels, small.pixels, small.pixels, device=device)

        def run() -> None:
            step(x1, x2, local, lr=0.0, m=1.0)

        return _times(run, device)


def _micro_batch(config: PretrainConfig) -> int:
    return config.micro_batch if isinstance(config.micro_batch, int) else 0


def _times(run: Callable[[], None], device: torch.device) -> list[float]:
    run()
    times: list[float] = []
    while len(times) < _STEPS or sum(times) < _SECONDS:
        _wait(device)
        began = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - began)
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
