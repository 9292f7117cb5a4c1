"""Ranks: the only owner of torch.distributed.

One process is a world of one, and callers never branch on it. Batch norm is synchronised on every device (torch's
own SyncBatchNorm is for CUDA only).
"""

import inspect
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from mocov3.errors import UserError

Task = Callable[["World", Any], int]
"""What ``launch`` runs on every rank: (world, payload) → exit code."""


@dataclass(frozen=True)
class World:
    """This process among the ranks, and its device."""

    rank: int
    size: int
    device: torch.device
    local_size: int = 1
    """Ranks on this machine, which share its cores."""

    @property
    def main(self) -> bool:
        """Whether this is the rank that writes files and output."""
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """``module`` with gradients averaged over ranks in its backward pass."""
        if self.size == 1:
            return module
        ids = [self.device.index] if self.device.type == "cuda" else None
        ddp = nn.parallel.DistributedDataParallel
        # buffers are equal on all ranks (synchronised batch norm), so none is sent; the option changed its name
        new = "forward_sync_buffers" in inspect.signature(ddp).parameters
        options = {"forward_sync_buffers" if new else "broadcast_buffers": False}
        return ddp(module, device_ids=ids, gradient_as_bucket_view=True, **options)

    def any(self, flag: int) -> int:
        """The largest ``flag`` of all ranks, over the host (no device is read)."""
        if self.size == 1:
            return flag
        value = torch.tensor([flag])
        dist.all_reduce(value, dist.ReduceOp.MAX, group=_control_group())
        return int(value)

    def sum(self, values: Tensor) -> Tensor:
        """Sum of ``values`` over ranks."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def share(self, value: Any) -> Any:
        """Rank 0's ``value`` on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=_control_group())
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's ``value``, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        box: list[Any] = [None] * self.size
        dist.all_gather_object(box, value, group=_control_group())
        return box

    def barrier(self) -> None:
        """Wait for all ranks, over the host."""
        if self.size > 1:
            dist.barrier(group=_control_group())

    def finish(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            global _control
            _control = None
            dist.destroy_process_group()


_control: Any = None


def _control_group() -> Any:
    # messages between hosts go over gloo, whatever the devices use, so that they never wait for a device
    global _control
    if _control is None:
        _control = dist.new_group(backend="gloo")
    return _control


def pick_device(name: str, index: int | None) -> torch.device:
    """The best device of ``auto``, or the named one.

    Raises:
        UserError: if the named device is not here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise UserError("--device cuda: torch finds no CUDA device here; use --device cpu")
        if index is not None and index >= torch.cuda.device_count():
            raise UserError(f"GPU {index} does not exist; this machine has {torch.cuda.device_count()}, from 0")
        device = torch.device("cuda", index or 0)
        torch.cuda.set_device(device)
        return device
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: torch finds no such device here; use --device cpu")
    return torch.device(name)


def start(
    rank: int,
    size: int,
    device: torch.device,
    *,
    backend: str,
    address: str,
    local_size: int = 1,
    timeout_minutes: float = 30,
) -> World:
    """Join ``size`` ranks that meet at ``address`` (``tcp://HOST:PORT`` or ``env://``).

    nccl is replaced by gloo where the device is not CUDA.

    Raises:
        UserError: if the ranks do not meet.
    """
    if size > 1:
        backend = backend if device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(
                backend,
                init_method=address,
                rank=rank,
                world_size=size,
                timeout=timedelta(minutes=timeout_minutes),
            )
        except (ValueError, RuntimeError) as error:
            reason = str(error).split("\n")[0][:200]
            raise UserError(f"rank {rank} of {size} could not meet the others at {address}: {reason}") from None
        _control_group()
    return World(rank, size, device, local_size)


def free_loopback_address() -> str:
    """``tcp://127.0.0.1:PORT`` of a port that is free now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{s.getsockname()[1]}"


def from_torchrun() -> tuple[int, int, int] | None:
    """(rank, world size, local rank) as torchrun set them, or ``None`` where it did not start this process."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if not all(name in os.environ for name in names):
        return None
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])


def launch(
    task: Task,
    payload: Any,
    *,
    device: str = "auto",
    gpu: int | None = None,
    spawn: bool = False,
    processes: int = 0,
    nodes: int = -1,
    node_rank: int = -1,
    address: str = "",
    backend: str = "nccl",
) -> int:
    """Run ``task(world, payload)`` on every rank that belongs to this node, and return its exit code.

    Ranks come from torchrun's environment; or from ``spawn``/``processes`` (one a GPU, or so many, on each of
    ``nodes``); or from ``nodes`` and ``node_rank`` alone (every process started by hand); else there is one.

    Raises:
        UserError: if the device does not exist or ranks do not meet.
    """
    if not (spawn or processes > 1) and (given := from_torchrun()) is not None:
        rank, size, local = given
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return _run(
            task, payload, rank, size, here, pick_device(device, local if gpu is None else gpu), backend, "env://"
        )
    if address == "env://":
        nodes = int(os.environ.get("WORLD_SIZE", nodes)) if nodes < 1 else nodes
        node_rank = int(os.environ.get("RANK", node_rank)) if node_rank < 0 else node_rank
    nodes, node_rank = max(nodes, 1), max(node_rank, 0)
    if node_rank >= nodes:
        raise UserError(f"--rank {node_rank} is not below --world-size {nodes}")
    if not (spawn or processes > 1):
        if nodes > 1 and not address:
            raise UserError(f"--world-size {nodes} needs --dist-url tcp://HOST:PORT, the same on all")
        return _run(task, payload, node_rank, nodes, 1, pick_device(device, gpu), backend, address)
    gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    processes = processes or max(gpus, 1)
    if gpus and processes > gpus:
        raise UserError(f"--nprocs-per-node {processes}: this node has {gpus} GPUs; or give --device cpu")
    if not address:
        if nodes > 1:
            raise UserError(f"--world-size {nodes} needs --dist-url tcp://HOST:PORT, the same on all nodes")
        address = free_loopback_address()
    ranks = [(node_rank * processes + local, nodes * processes, local) for local in range(processes)]
    return _spawn(task, payload, ranks, device, backend, address)


def _run(
    task: Task, payload: Any, rank: int, size: int, here: int, device: torch.device, backend: str, address: str
) -> int:
    if here > 1 and device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max((os.cpu_count() or 1) // here, 1))  # ranks would fight over the cores
    world = start(rank, size, device, backend=backend, address=address, local_size=here)
    try:
        return task(world, payload)
    finally:
        world.finish()


def _spawn(task: Task, payload: Any, ranks: list[tuple[int, int, int]], device: str, backend: str, address: str) -> int:
    context = multiprocessing.get_context("spawn")
    messages = context.SimpleQueue()
    children = [
        context.Process(target=_child, args=(messages, task, payload, *rank, len(ranks), device, backend, address))
        for rank in ranks
    ]
    handlers = {}
    try:
        for name in ("SIGTERM", "SIGINT", "SIGUSR1"):  # the ranks decide; they get what this process gets
            if hasattr(signal, name):
                number = getattr(signal, name)
                handlers[number] = signal.signal(number, lambda n, _: _pass_on(children, n))
        for child in children:
            child.start()
        _wait(children)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for child in children:
            if child.is_alive():
                child.kill()
    if not messages.empty():
        raise UserError(messages.get())
    codes = [child.exitcode or 0 for child in children]
    failed = [(rank[0], code) for rank, code in zip(ranks, codes, strict=True) if code]
    for rank, code in failed:
        if code < 0:
            print(f"mocov3: rank {rank} was killed by signal {-code}", file=sys.stderr)
    return max((code if code > 0 else 1 for _, code in failed), default=0)


def _wait(children: list[Any], grace: float = 20.0) -> None:
    """Wait for all; once one failed, the others get ``grace`` seconds (they may hang in a collective call)."""
    deadline = None
    while any(child.is_alive() for child in children):
        multiprocessing.connection.wait([c.sentinel for c in children if c.is_alive()], timeout=1.0)
        if deadline is None and any(c.exitcode for c in children):
            deadline = time.monotonic() + grace
        if deadline is not None and time.monotonic() > deadline:
            return


def _pass_on(children: list[Any], number: int) -> None:
    for child in children:
        if child.pid and child.is_alive():
            os.kill(child.pid, number)


def _child(
    messages: Any,
    task: Task,
    payload: Any,
    rank: int,
    size: int,
    local: int,
    here: int,
    device: str,
    backend: str,
    address: str,
) -> None:
    try:
        code = _run(task, payload, rank, size, here, pick_device(device, local), backend, address)
    except UserError as error:
        messages.put(str(error))
        code = 2
    sys.exit(code)


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


@torch.no_grad()
def gather_keys(k: Float[Tensor, "batch dim"]) -> tuple[Float[Tensor, "keys dim"], int]:
    """The keys of all ranks in rank order, and where this rank's begin. Carries no gradient."""
    if world_size() == 1:
        return k, 0
    everyone = [torch.empty_like(k) for _ in range(world_size())]
    dist.all_gather(everyone, k.contiguous())
    return torch.cat(everyone), dist.get_rank() * len(k)


class _SynchronisedNorm(torch.autograd.Function):
    """Batch norm over the batch of all ranks (Ioffe & Szegedy 2015), forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
        axes = [0, *range(2, x.ndim)]
        count = torch.full((1,), x.numel() // x.shape[1], dtype=x.dtype, device=x.device)
        mean = x.mean(axes)
        squares = (x - _channels(mean, x)).square().sum(axes)
        # Chan et al. 1983: means and sums of squares of parts combine exactly, without E[x²] − E[x]²
        parts = _all_gather(torch.cat([mean, squares, count]))
        means, sums, counts = parts[:, : len(mean)], parts[:, len(mean) : -1], parts[:, -1:]
        total = counts.sum()
        mean = (means * counts).sum(0) / total
        variance = (sums + counts * (means - mean).square()).sum(0) / total
        scale = torch.rsqrt(variance + eps)
        normalised = (x - _channels(mean, x)) * _channels(scale, x)
        ctx.save_for_backward(normalised, weight, scale, total)
        ctx.axes = axes
        out = normalised
        if weight is not None:
            out = out * _channels(weight, x) + _channels(bias, x)
        ctx.mark_non_differentiable(mean, variance, total)
        return out, mean, variance, total

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        normalised, weight, scale, total = ctx.saved_tensors
        grad_bias = grad.sum(ctx.axes)
        grad_weight = (grad * normalised).sum(ctx.axes)
        sums = torch.stack([grad_bias, grad_weight])
        if dist.is_initialized():
            dist.all_reduce(sums)
        mean_grad, mean_product = (_channels(part / total, grad) for part in sums)
        grad_x = (grad - mean_grad - normalised * mean_product) * _channels(scale, grad)
        if weight is None:
            return grad_x, None, None, None
        return grad_x * _channels(weight, grad), grad_weight, grad_bias, None


def _channels(x: Tensor | None, like: Tensor) -> Tensor:
    assert x is not None
    return x.view(1, -1, *[1] * (like.ndim - 2))


def _all_gather(x: Tensor) -> Tensor:
    if not dist.is_initialized():
        return x[None]
    everyone = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(everyone, x)
    return torch.stack(everyone)


class SynchronisedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm whose training statistics are those of all ranks' batches together, on any device.

    Keys and shapes are those of torch's batch norm. In a world of one it is torch's batch norm. ``drop`` and ``act``
    follow it where it stands for one of timm's norms with activation.
    """

    drop: nn.Module = nn.Identity()
    act: nn.Module = nn.Identity()

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.ndim}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise by the statistics of all ranks (training) or by the running ones (evaluation)."""
        return self.act(self.drop(self._normalise(input)))

    def _normalise(self, input: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(input)
        if input.device.type == "cuda" and dist.get_backend() == "nccl":
            return self._cuda(input)
        wide = input if input.dtype in (torch.float32, torch.float64) else input.float()
        out, mean, variance, total = _SynchronisedNorm.apply(wide, self.weight, self.bias, self.eps)
        with torch.no_grad():
            assert self.num_batches_tracked is not None
            assert self.running_mean is not None
            assert self.running_var is not None
            self.num_batches_tracked.add_(1)
            rate = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
            unbiased = variance * (total / (total - 1))
            self.running_mean.mul_(1 - rate).add_(mean.to(self.running_mean.dtype), alpha=rate)
            self.running_var.mul_(1 - rate).add_(unbiased.to(self.running_var.dtype), alpha=rate)
        return out.to(input.dtype)

    def _cuda(self, input: Tensor) -> Tensor:
        # torch's fused kernels, where they exist
        from torch.nn.modules._functions import SyncBatchNorm

        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        rate = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        return SyncBatchNorm.apply(
            input, self.weight, self.bias, self.running_mean, self.running_var, self.eps, rate,
            dist.group.WORLD, world_size(),
        )  # fmt: skip


def synchronise_batch_norm(model: nn.Module) -> nn.Module:
    """Make every batch norm of ``model`` use the batch of all ranks. Names and values stay; works on every device."""
    for name, child in model.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and not isinstance(child, SynchronisedBatchNorm):
            setattr(model, name, _synchronised(child))
        else:
            synchronise_batch_norm(child)
    return model


def _synchronised(norm: nn.modules.batchnorm._BatchNorm) -> nn.Module:
    new = SynchronisedBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    new.weight, new.bias = norm.weight, norm.bias
    new.running_mean, new.running_var = norm.running_mean, norm.running_var
    new.num_batches_tracked = norm.num_batches_tracked
    new.train(norm.training)
    for name in ("drop", "act"):  # timm folds them into its norm
        if hasattr(norm, name):
            setattr(new, name, getattr(norm, name))
    return new
