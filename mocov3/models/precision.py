"""Arithmetic of the networks: float32, or 16 bits by autocast, with a loss scaler for fp16."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn


class Precision:
    """Arithmetic of the networks: fp32, bf16 (autocast) or fp16 (autocast and a loss scaler, CUDA only).

    Networks that are not trained have tf32 besides: float32 whose products round their factors to 10 bits, as fp16
    does, and keep the range of float32.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self.device = name, device
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def suit(self, network: nn.Module) -> None:
        """Give a network that is to be trained the kernels that are fastest in this arithmetic."""
        if self.name == "bf16" and self.device.type == "cpu":
            from mocov3.models.attention import use_attention_products  # timm, which ResNets do not need

            use_attention_products(network)

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which networks are run."""
        if self.name == "tf32":
            return _rounded_products()
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.name, torch.float32)
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.name != "fp32")


@contextmanager
def _rounded_products() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # convolutions have it by torch's default
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def precision_of(name: str, device: torch.device, *, script_door: bool = False) -> Precision:
    """The arithmetic that ``--precision`` asks for in training on a device."""
    return Precision(resolve_precision(name, device, script_door=script_door), device)


def frozen_precision(name: str, device: torch.device) -> Precision:
    """The arithmetic that ``--precision`` asks for of a network that is not trained."""
    cuda = device.type == "cuda"
    if name == "auto":
        name = "tf32" if cuda else "fp32"
    return Precision(name if cuda or name not in ("fp16", "tf32") else "fp32", device)


def resolve_precision(name: str, device: torch.device, *, script_door: bool) -> str:
    """``auto``: fp16 on CUDA as the reference (its scripts), bf16 where the GPU has it, else fp32."""
    if name != "auto":
        return name if name != "fp16" or device.type == "cuda" else "fp32"
    if device.type != "cuda":
        return "fp32"
    return "fp16" if script_door or not torch.cuda.is_bf16_supported() else "bf16"
