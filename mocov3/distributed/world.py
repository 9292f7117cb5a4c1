"""This process among the ranks, and their communication."""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from mocov3.distributed.heartbeat import Heartbeat
from mocov3.distributed.meeting import name_group, open_store
from mocov3.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among the ranks, and its device."""

    rank: int
    size: int
    device: torch.device
    local_size: int = 1
    """Ranks on this machine, which share its cores."""
    heartbeat: Heartbeat | None = field(default=None, repr=False, compare=False)

    @property
    def main(self) -> bool:
        """Whether this is the rank that writes files and output."""
        return self.rank == 0

    def wrap(self, module: nn.Module, *, static: bool = False) -> nn.Module:
        """``module`` with gradients averaged over ranks in its backward pass.

        Args:
            module: on its device.
            static: every step uses the same parameters in the same order.
        """
        if self.size == 1:
            return module
        ids = [self.device.index] if self.device.type == "cuda" else None
        ddp = nn.parallel.DistributedDataParallel
        # buffers are equal on all ranks (synchronised batch norm), so none is sent; the option changed its name
        new = "forward_sync_buffers" in inspect.signature(ddp).parameters
        options: Any = {"forward_sync_buffers" if new else "broadcast_buffers": False, "static_graph": static}
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

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its mean over ranks, many in one call; all ranks give the same shapes."""
        if self.size == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([t.flatten() for t in bucket])
            dist.all_reduce(flat.div_(self.size))  # divided first, as DistributedDataParallel does: no overflow
            parts = flat.split([t.numel() for t in bucket])
            torch._foreach_copy_(bucket, [part.view_as(t) for part, t in zip(parts, bucket, strict=True)])

    def broadcast(self, value: T) -> T:
        """Rank 0's ``value`` on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=_control_group())
        return box[0]

    def gather(self, value: T) -> list[T]:
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

    def blame(self) -> str:
        """Which rank is lost, in words, after a collective call failed; '' if none is known to be."""
        return self.heartbeat.blame() if self.heartbeat is not None else ""

    def finish(self, reason: str = "") -> None:
        """Leave the process group; ``reason`` is sent to the other ranks unless it is a regular end."""
        if self.heartbeat is not None:
            self.heartbeat.leave(reason)
        if dist.is_initialized():
            global _control
            _control = None
            dist.destroy_process_group()


def _buckets(tensors: Sequence[Tensor], most: int = 1 << 26) -> Iterator[list[Tensor]]:
    """Tensors of one dtype, in order, together up to ``most`` bytes (large enough for any network's full speed)."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for t in tensors:
        by_dtype.setdefault(t.dtype, []).append(t)
    for same in by_dtype.values():
        bucket: list[Tensor] = []
        size = 0
        for t in same:
            if bucket and size + t.nbytes > most:
                yield bucket
                bucket, size = [], 0
            bucket.append(t)
            size += t.nbytes
        yield bucket


_control: Any = None


def _control_group() -> Any:
    # messages between hosts go over gloo, whatever the devices use, so that they never wait for a device
    global _control
    if _control is None:
        _control = dist.new_group(backend="gloo")
    return _control


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
        timeout = timedelta(minutes=timeout_minutes)
        try:
            store = open_store(address, rank, timeout)
            name = name_group(store, rank, size, 60 * timeout_minutes)
            prefixed = dist.PrefixStore(name, store)
            dist.init_process_group(backend, store=prefixed, rank=rank, world_size=size, timeout=timeout)
        except (ValueError, RuntimeError) as error:
            reason = str(error).split("\n")[0][:200]
            raise UserError(f"rank {rank} of {size} could not connect to the others at {address}: {reason}") from None
        _control_group()
        # nccl's calls hang where gloo's fail, so the heartbeat alone can tell, within a minute
        hangs = backend == "nccl"
        silence = min(60 * timeout_minutes, 45) if hangs else 60 * timeout_minutes
        heartbeat = Heartbeat(rank, size, group=name, silence=silence, patience=8 if hangs else 0)
        return World(rank, size, device, local_size, heartbeat)
    return World(rank, size, device, local_size)


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
