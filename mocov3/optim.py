"""Optimizers of MoCo v3: LARS (You et al. 2017, as the reference applies it) and torch's AdamW.

The optimizer is given every parameter of the model, frozen and momentum ones included: they take numbers in the
saved state, as in the reference's files, but never get state.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling for SGD with momentum.

    For tensors of two or more dimensions: g ← g + wd·w, then g ← g · η‖w‖/‖g‖ (factor 1 if either norm is 0);
    others take the plain gradient. μ ← m·μ + g; w ← w − lr·μ. The norm in the denominator is the one after
    weight decay is added (timm and others divide by ‖g‖ + wd·‖w‖).

    When ``found_inf`` is set on the instance (as ``torch.amp.GradScaler`` does) and is not 0, the step changes
    nothing, without reading the device.

    Args:
        params: parameters or groups of them.
        lr: learning rate, applied outside the momentum buffer.
        weight_decay: wd above.
        momentum: m above.
        trust_coefficient: η above.
    """

    _step_supports_amp_scaling = True  # read by torch.amp.GradScaler: it passes found_inf instead of waiting for it

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay), ("momentum", momentum)):
            if not value >= 0:
                raise ValueError(f"{name} must be 0 or more, not {value}")
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "trust_coefficient": trust_coefficient,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        scale: Tensor | None = getattr(self, "grad_scale", None)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                grad = p.grad if scale is None else p.grad / scale.to(p.grad.dtype)
                state = self.state[p]
                if "mu" not in state:
                    state["mu"] = torch.zeros_like(p)
                mu = state["mu"]
                if p.ndim > 1:
                    grad = _trusted(p, grad.add(p, alpha=group["weight_decay"]), group["trust_coefficient"])
                if found_inf is None:
                    mu.mul_(group["momentum"]).add_(grad)
                    p.add_(mu, alpha=-group["lr"])
                else:
                    ok = found_inf == 0
                    torch.where(ok, mu * group["momentum"] + grad, mu, out=mu)
                    torch.where(ok, p - group["lr"] * mu, p, out=p.data)
        return loss


def _trusted(p: Tensor, update: Tensor, coefficient: float) -> Tensor:
    weight_norm, update_norm = torch.norm(p), torch.norm(update)
    both = (weight_norm > 0) & (update_norm > 0)
    return update * torch.where(both, coefficient * weight_norm / update_norm, torch.ones_like(weight_norm))


def build_optimizer(
    params: Iterable[Any],
    name: str,
    *,
    weight_decay: float,
    momentum: float,
    fused: bool = False,
) -> torch.optim.Optimizer:
    """``lars`` or ``adamw`` over all parameters in one group, as the reference builds it.

    AdamW decays every parameter (biases, norms and cls token too). The learning rate is set each step. With
    ``fused`` AdamW can be told on the device to skip a step (``found_inf``).
    """
    if name == "lars":
        return LARS(params, weight_decay=weight_decay, momentum=momentum)
    return torch.optim.AdamW(params, lr=0.0, weight_decay=weight_decay, fused=fused or None)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group, times the group's own ``lr_scale`` where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
