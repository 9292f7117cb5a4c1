"""LARS (You et al. 2017), as the reference applies it."""

import itertools
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from mocov3.optim.memory import flat
from mocov3.optim.momentum import MomentumOptimizer
from mocov3.optim.update import Group


class LARS(MomentumOptimizer):
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

    _scratch = torch.empty(0)
    _step_supports_amp_scaling = True  # read by torch.amp.GradScaler: it passes found_inf instead of waiting for it

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "trust_coefficient": trust_coefficient,
        }
        super().__init__(params, defaults)

    def _update(self, params: list[Tensor], group: Group, scale: Tensor | None, found_inf: Tensor | None) -> None:
        for p in params:
            self._momentum(p)
        if found_inf is None and scale is None and all(p.device.type == "cpu" for p in params):
            self._on_cpu(params, group)
        else:
            self._on_device(params, group, scale, found_inf)

    def _on_cpu(self, params: list[Tensor], group: Group) -> None:
        # memory traffic is what an update costs: one scratch buffer for all, nothing allocated, the factor folded in
        for p in params:
            mu, grad, factor = self.state[p]["mu"], p.grad, 1.0
            assert grad is not None
            if p.ndim > 1:
                grad = torch.add(grad, p, alpha=group["weight_decay"], out=self._scratch_like(p))
                size, change = float(torch.linalg.vector_norm(p)), float(torch.linalg.vector_norm(grad))
                factor = group["trust_coefficient"] * size / change if size > 0 and change > 0 else 1.0
            mu.mul_(group["momentum"]).add_(grad, alpha=factor)
            p.add_(mu, alpha=-group["lr"])

    def _scratch_like(self, p: Tensor) -> Tensor:
        if self._scratch.numel() < p.numel() or self._scratch.dtype != p.dtype:
            self._scratch = p.new_empty(p.numel())
        # parameters are dense, so that their strides fit a buffer of their size (channels-last ones too)
        return self._scratch.as_strided(p.shape, p.stride())

    def _on_device(self, params: list[Tensor], group: Group, scale: Tensor | None, found_inf: Tensor | None) -> None:
        """A few kernels for all parameters: about 25 for ResNet-50, momentum encoder not counted (docs/gpu.md)."""
        mus = [flat(self.state[p]["mu"], p) for p in params]
        weights = [flat(p, p) for p in params]
        grads = [flat(p.grad, p) for p in params if p.grad is not None]
        if scale is not None:
            torch._foreach_mul_(grads, scale.reciprocal().to(grads[0].dtype))
        matrices = [i for i, p in enumerate(params) if p.ndim > 1]
        if matrices:
            rows = _Rows([weights[i] for i in matrices])
            torch._foreach_copy_(rows.parts, [grads[i] for i in matrices])
            torch._foreach_add_(rows.parts, [weights[i] for i in matrices], alpha=group["weight_decay"])
            n = len(matrices)
            norms = torch.stack(
                [*torch._foreach_norm([weights[i] for i in matrices]), *torch._foreach_norm(rows.parts)]
            )
            factors = group["trust_coefficient"] * norms[:n] / norms[n:]
            rows.scale(factors.masked_fill_(norms.view(2, n).amin(0) == 0, 1.0))
            for i, part in zip(matrices, rows.parts, strict=True):
                grads[i] = part
        torch._fused_sgd_(
            weights,
            grads,
            mus,
            weight_decay=0.0,
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
            found_inf=found_inf,
        )


class _Rows:
    """One buffer for the updates of several tensors, each beginning at a row, so that one kernel scales them all.

    Args:
        tensors: one-dimensional, of one dtype and device.
    """

    WIDTH = 1024
    _owners: ClassVar[dict[Any, Tensor]] = {}

    def __init__(self, tensors: list[Tensor]) -> None:
        sizes = tuple(t.numel() for t in tensors)
        counts = [-(-n // self.WIDTH) for n in sizes]
        self._buffer = tensors[0].new_empty(sum(counts), self.WIDTH)
        starts = [0, *itertools.accumulate(counts)]
        whole = self._buffer.view(-1)
        self.parts = [whole[s * self.WIDTH :][:n] for s, n in zip(starts, sizes, strict=False)]
        key = (sizes, tensors[0].device)
        if key not in self._owners:  # sent once: sending waits for the device
            numbers = torch.arange(len(sizes)).repeat_interleave(torch.tensor(counts))
            self._owners[key] = numbers.to(tensors[0].device)
        self._owner = self._owners[key]

    def scale(self, factors: Tensor) -> None:
        """Multiply tensor i by ``factors[i]``."""
        self._buffer.mul_(factors[self._owner].unsqueeze(1))
