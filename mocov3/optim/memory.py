"""Tensors by their place in memory, not by index: fused updates go through weights, gradients and state so."""

import torch
from torch import Tensor


def in_memory_order(x: Tensor, like: Tensor) -> Tensor:
    """``x`` with its entries in the memory order of ``like``, of the same shape; a copy only where the order differs.

    Fused updates go through weights, gradients and state by place in memory, not by index.
    """
    if all(a == b for a, b, n in zip(x.stride(), like.stride(), x.shape, strict=True) if n > 1):
        return x
    return torch.empty_like(like, dtype=x.dtype, device=x.device).copy_(x)


def flat(x: Tensor, like: Tensor) -> Tensor:
    """The memory of ``x`` in one dimension, in the order of ``like``'s; a copy only where it lies in another order."""
    return in_memory_order(x, like).as_strided((x.numel(),), (1,))
