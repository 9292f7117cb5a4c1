"""Features as shapes: principal components, the spectrum, the attention of the cls token. Pure functions of tensors."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


def spectrum(features: Float[Tensor, "images dim"]) -> Float[Tensor, "components"]:
    """Share of the variance of each principal component, largest first, float64; they add up to 1.

    Zeros where all features are the same.
    """
    variances = torch.linalg.svdvals(_centred(features)) ** 2
    return variances / variances.sum().clamp_min(1e-300)


def flat_map(features: Float[Tensor, "images dim"]) -> Float[Tensor, "images 2"]:
    """The first two principal components of normalised features, float64.

    Signs are chosen so that the largest coordinate of each is positive; a component that is not there is 0.
    """
    unit = nn.functional.normalize(features.detach().cpu().double(), dim=1)
    left, values, _ = torch.linalg.svd(_centred(unit), full_matrices=False)
    placed = torch.zeros(len(unit), 2, dtype=torch.float64)
    count = min(2, len(values))
    placed[:, :count] = left[:, :count] * values[:count]
    sign = placed.gather(0, placed.abs().argmax(0, keepdim=True)).sign()
    return placed * torch.where(sign == 0, 1.0, sign)


def _centred(features: Tensor) -> Tensor:
    x = features.detach().cpu().double()
    return x - x.mean(0)


def attention_block(network: nn.Module) -> Any:
    """The last block's attention of a Vision Transformer with a cls token (timm's interface), or ``None``."""
    body = getattr(network, "backbone", network)
    blocks = getattr(body, "blocks", None)
    if not getattr(body, "num_prefix_tokens", 0) or not isinstance(blocks, nn.Sequential | nn.ModuleList) or not blocks:
        return None
    attention = getattr(blocks[-1], "attn", None)
    needed = ("fused_attn", "attn_drop")
    return attention if all(hasattr(attention, name) for name in needed) else None


@torch.no_grad()
def cls_attention(
    network: nn.Module, x: Float[Tensor, "batch channels height width"]
) -> Float[Tensor, "batch heads rows columns"] | None:
    """How much the cls token attends to each patch in the last block, by head; ``None`` without a cls token.

    The softmax's own values (they add up to less than 1: the cls token attends to itself as well), taken where timm
    hands them on.
    """
    attention = attention_block(network)
    body: Any = getattr(network, "backbone", network)
    grid = getattr(getattr(body, "patch_embed", None), "grid_size", None)
    if attention is None or grid is None:
        return None
    caught: list[Tensor] = []
    hook = attention.attn_drop.register_forward_pre_hook(lambda _, given: caught.append(given[0]))
    fused, attention.fused_attn = attention.fused_attn, False  # the fused kernel never forms the matrix
    try:
        body.forward_features(x)
    finally:
        attention.fused_attn = fused
        hook.remove()
    if not caught or caught[0].ndim != 4:
        return None
    rows, columns = grid
    attention = caught[0][:, :, 0, int(body.num_prefix_tokens) :].float()
    return attention.unflatten(2, (rows, columns)) if attention.shape[2] == rows * columns else None
