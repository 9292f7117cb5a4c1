"""Stochastic depth (Huang et al. 2016) whose draws are made before the pass: the same for a batch and for its parts.

Apart from ``mocov3.pretraining.gradients`` because it needs timm, which ResNets do without.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from timm.layers import DropPath
from torch import Tensor, nn


class MaskedDropPath(DropPath):
    """timm's stochastic depth, with draws that are made before the pass where ``mask`` is set."""

    mask: Tensor | None = None

    def draw(self, images: int, device: torch.device) -> Float[Tensor, "images"]:
        """1 for images that keep the path, 0 for others."""
        return torch.empty(images, device=device).bernoulli_(1 - self.drop_prob)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` with some images' paths dropped, the others scaled up."""
        if self.mask is None or not self.training:
            dropped: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
            return dropped
        keep = 1 - self.drop_prob
        mask = self.mask.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        return x * (mask / keep if keep > 0 and self.scale_by_keep else mask)


class Masks:
    """Masks of all paths of an encoder for one view; ``take`` hands a micro-batch's part to the paths."""

    def __init__(self, paths: Sequence[MaskedDropPath], masks: Sequence[Tensor]) -> None:
        self._paths, self._masks = paths, masks

    def take(self, part: slice | None) -> None:
        """Hand on the masks of these images; ``None``: draw as timm does."""
        for path, mask in zip(self._paths, self._masks, strict=True):
            path.mask = mask[part] if part is not None else None


def mask_paths(encoder: nn.Module) -> list[MaskedDropPath]:
    """Replace the active stochastic depths of ``encoder``; in order of registration, which is timm's of calls."""
    for module in list(encoder.modules()):
        for name, child in module.named_children():
            if isinstance(child, DropPath) and child.drop_prob > 0 and not isinstance(child, MaskedDropPath):
                setattr(module, name, MaskedDropPath(child.drop_prob, child.scale_by_keep).train(child.training))
    return [module for module in encoder.modules() if isinstance(module, MaskedDropPath)]
