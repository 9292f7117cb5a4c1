"""What optimizers of our own share: their settings' bounds, a momentum for each weight, what a step is told."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from mocov3.optim.memory import in_memory_order
from mocov3.optim.update import Group


class MomentumOptimizer(torch.optim.Optimizer):
    """An optimizer that is told by ``found_inf``, set on the instance, whether a step counts.

    Args:
        params: parameters or groups of them.
        defaults: settings of a group; ``lr``, ``weight_decay`` and ``momentum`` are 0 or more.
    """

    def __init__(self, params: ParamsT, defaults: Group) -> None:
        for name in ("lr", "weight_decay", "momentum"):
            if not defaults[name] >= 0:
                raise ValueError(f"{name} must be 0 or more, not {defaults[name]}")
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
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(params, group, scale, found_inf)
        return loss

    def _update(self, params: list[Tensor], group: Group, scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Move the parameters of a group, all of which have gradients."""
        raise NotImplementedError

    def _momentum(self, p: Tensor) -> Tensor:
        """``mu`` of a parameter, in its memory order whatever file it came from: updates go through memory."""
        mu: Tensor | None = self.state[p].get("mu")
        self.state[p]["mu"] = mu = torch.zeros_like(p) if mu is None else in_memory_order(mu, p)
        return mu
