"""Attention of timm's Vision Transformers by the kernel that is fastest in training."""

import torch.nn.functional as F
from timm.models.vision_transformer import Attention
from torch import Tensor, nn


def use_attention_products(network: nn.Module) -> None:
    """Make a network's attention the two matrix products and the softmax, not torch's fused kernel.

    On CPUs the fused kernel's backward pass takes three to seven times as long as these in bfloat16 (torch 2.14 with
    AMX, 33 to 197 tokens; ``python benchmarks/precision.py``). In float32 the fused kernel is the faster.
    """
    for module in network.modules():
        if isinstance(module, Attention):
            module.fused_attn = False  # type: ignore[misc]  # final for TorchScript's sake


def attend(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of some queries, by the kernel that the layer uses; (batch, heads, tokens, width of a head)."""
    dropout = attention.attn_drop.p if attention.training else 0.0
    if attention.fused_attn:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    weights = (q * attention.scale) @ k.transpose(-2, -1)
    return F.dropout(weights.softmax(-1), dropout) @ v
