"""Ranks: the only owner of torch.distributed. One process is a world of one, and callers never branch on it."""

from mocov3.distributed.batch_norm import SynchronisedBatchNorm, synchronise_batch_norm
from mocov3.distributed.launch import free_loopback_address, launch, launch_as
from mocov3.distributed.world import World, gather_keys, world_size

__all__ = [
    "SynchronisedBatchNorm",
    "World",
    "free_loopback_address",
    "gather_keys",
    "launch",
    "launch_as",
    "synchronise_batch_norm",
    "world_size",
]
