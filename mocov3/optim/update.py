"""An update that non-finite numbers cannot reach, and its learning rate."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Group = dict[str, Any]
"""Parameters of an optimizer and how they are updated, as torch has them."""


def guarded_update(
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    ok: Bool[Tensor, ""],
    *,
    buffers: Sequence[Tensor],
    before: Float[Tensor, " numbers"],
    device: torch.device,
) -> None:
    """Update, unless the step's numbers are not finite; then batch statistics go back to what they were.

    Nothing is read from a GPU: LARS, Muon and fused AdamW leave the step out by themselves.

    Args:
        optimizer: its gradients are unscaled.
        scaler: of the loss; it moves by the infinities that unscaling met.
        ok: whether loss and gradients are finite.
        buffers: floating-point ones of the networks, which the forward pass changed.
        before: their numbers before that, one after the other.
        device: of the networks.
    """
    if device.type == "cpu":
        if bool(ok):  # reading costs nothing here
            optimizer.step()
            return
    else:
        optimizer.grad_scale, optimizer.found_inf = None, (~ok).float()  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
        if scaler.is_enabled():
            scaler.update()
    if not buffers:
        return
    # batch statistics of a step that does not count may hold NaN for ever
    parts = torch.where(ok, flattened(buffers), before).split([b.numel() for b in buffers])
    torch._foreach_copy_(list(buffers), [p.view_as(b) for p, b in zip(parts, buffers, strict=True)])


def flattened(tensors: Sequence[Tensor]) -> Float[Tensor, " numbers"]:
    """The numbers of all tensors, one after the other."""
    return torch.cat([t.flatten() for t in tensors]) if tensors else torch.empty(0)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group, times the group's own ``lr_scale`` where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
