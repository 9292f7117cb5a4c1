"""Low-rank pairs beside the matrices of a ViT's blocks, trained in their place (Hu et al. 2021, arXiv 2106.09685).

A matrix W is used as W + up·down, with ``up`` zero at first. W keeps its name and stands still, and so do all weights
of the backbone but norms. The momentum encoder has no pairs: it averages the sums, since the average of two pairs is
the pair of another network. The last blocks can be trained whole instead (Khanna et al. 2024, arXiv 2406.10973).
"""

import re

import torch
from torch import Tensor, nn

from mocov3.errors import UserError
from mocov3.models.backbones import Encoder
from mocov3.models.products import TokenLinear

DOWN, UP = "lora_down", "lora_up"
_MATRIX = re.compile(r"((?:^|.*\.)blocks\.\d+)\.(?:attn|mlp)\.")


class PairedLinear(TokenLinear):
    """A linear layer whose weight is the stored one plus the product of its pair."""

    lora_down: nn.Parameter
    """(rank, in), drawn as a linear layer's weight."""
    lora_up: nn.Parameter
    """(out, rank), 0 at first."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # read as every linear layer's, stored under the same name
        """The sum, in the weights' own precision."""
        stored = self._parameters["weight"]
        assert stored is not None
        with torch.autocast(stored.device.type, enabled=False):
            return stored + self.lora_up @ self.lora_down


def add_pairs(encoder: Encoder, rank: int, unfreeze_last: int = 0) -> None:
    """Give every matrix of attention and MLP a pair, and freeze what else is in the backbone but norms.

    Args:
        encoder: a ViT.
        rank: of every pair.
        unfreeze_last: blocks at the end that are trained whole, without pairs.

    Raises:
        UserError: if there are no such matrices, no block is left for pairs, or the rank is not below their widths.
    """
    named = [
        (match[1], layer)
        for name, layer in encoder.named_modules()
        if isinstance(layer, nn.Linear) and (match := _MATRIX.match(name))
    ]
    blocks = list(dict.fromkeys(block for block, _ in named))
    if not blocks:
        raise UserError("--lora is for ViTs: this arch has no blocks of attention and MLP")
    if unfreeze_last >= len(blocks):
        raise UserError(
            f"--unfreeze-last {unfreeze_last}: leaves none of the {len(blocks)} blocks for pairs; give less, or train "
            "all without --lora"
        )
    whole = blocks[len(blocks) - unfreeze_last :]
    layers = [layer for block, layer in named if block not in whole]
    narrowest = min(min(layer.weight.shape) for layer in layers)
    if rank >= narrowest:
        raise UserError(f"--lora {rank}: the rank must be below the width of the network's matrices, {narrowest}")
    trained = set(getattr(encoder, encoder.projector_name).parameters())
    trained |= {p for block in whole for p in encoder.get_submodule(block).parameters()}
    for module in encoder.modules():
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_("Norm" in type(module).__name__ or parameter in trained)
    for layer in layers:
        down = layer.weight.new_empty(rank, layer.in_features)
        nn.init.kaiming_uniform_(down, a=5**0.5)
        layer.lora_down, layer.lora_up = nn.Parameter(down), nn.Parameter(down.new_zeros(layer.out_features, rank))
        layer.__class__ = PairedLinear


def summed_parameters(encoder: Encoder) -> list[Tensor]:
    """The parameters of an encoder in order, pairs added to their matrices: those of the same network without pairs."""
    if not any(isinstance(module, PairedLinear) for module in encoder.modules()):
        return list(encoder.parameters())
    return [
        module.weight if name == "weight" and isinstance(module, PairedLinear) else parameter
        for module in encoder.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if name not in (DOWN, UP)
    ]
