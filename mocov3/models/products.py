"""Matrix products of tokens at the speed that the processor has.

torch hands float32 products to MKL, which uses half-wide instructions (AVX2) on processors that are not Intel's.
oneDNN, which torch hands convolutions to, uses their full width: on an AMD EPYC with AVX-512 a 1×1 convolution of the
same numbers is about twice as fast, forward and backward (docs/cheaper.md, ``python benchmarks/step.py``). So layers
that multiply tokens are written as such convolutions there. The order of the sums differs; weights and files do not
change.
"""

import functools
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FACTS = Path("/proc/cpuinfo")

ENOUGH = 4_000_000
"""Multiplications from which the convolution's overhead is earned (measured: even at 2 to 4 million)."""


class TokenLinear(nn.Linear):
    """``nn.Linear`` that takes the faster path for float32 tokens (batch, …, width)."""

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Linear``."""
        return token_linear(input, self.weight, self.bias)


def use_fast_products(network: nn.Module) -> None:
    """Make every ``nn.Linear`` of a network a ``TokenLinear``; parameters, names and hooks stay."""
    for module in network.modules():
        if type(module) is nn.Linear:
            module.__class__ = TokenLinear


def token_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``, by way of a 1×1 convolution where that is faster."""
    if not _worth_it(x, weight):
        return F.linear(x, weight, bias)
    # (batch, tokens, width) in memory is (batch, width, tokens, 1) in channels-last: nothing is copied
    image = x.reshape(x.shape[0], -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
    product = F.conv2d(image, weight[:, :, None, None], bias).permute(0, 2, 3, 1)
    return product.reshape(*x.shape[:-1], -1)


def _worth_it(x: Tensor, weight: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False  # exported networks keep their products
    if x.device.type != "cpu" or x.dtype != torch.float32 or x.ndim not in (3, 4) or not mkl_is_half_wide():
        return False
    if x.shape[0] < 16 and torch.get_num_threads() == 1:
        return False  # torch's own rule: such convolutions do not go to oneDNN
    enough = x.shape[1] >= 8 and x.numel() * weight.shape[0] >= ENOUGH
    return enough and not torch.is_autocast_enabled("cpu")  # bfloat16 goes to oneDNN as it is


@functools.cache
def mkl_is_half_wide() -> bool:
    """Whether this processor has AVX-512 that MKL does not use, because it is not Intel's."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and "Intel" not in _maker()


@functools.cache
def multiplies_bf16() -> bool:
    """Whether this processor has instructions for products of bfloat16 matrices (AMX, AVX512-BF16)."""
    known = set(_fact("flags").split())
    return torch.backends.mkldnn.is_available() and bool(known & {"amx_bf16", "avx512_bf16"})


def _maker() -> str:
    return _fact("vendor_id") if _FACTS.exists() else platform.processor()


def _fact(name: str) -> str:
    """What Linux says of the processor; empty elsewhere."""
    lines = _FACTS.read_text().splitlines() if _FACTS.exists() else []
    return next((line for line in lines if line.startswith(name)), "")
