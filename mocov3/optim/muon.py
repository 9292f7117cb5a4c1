"""Muon (Jordan et al. 2024): momentum made orthogonal for matrices, AdamW for everything else."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from mocov3.optim.momentum import MomentumOptimizer
from mocov3.optim.update import Group

_POLYNOMIAL, _ROUNDS = (3.4445, -4.7750, 2.0315), 5
"""Of Newton and Schulz, steep at 0 (Jordan et al. 2024)."""
_LEAST = 1e-15
"""Smallest norm that is divided by: the squares of numbers below 1e-19 are zero in float32, the numbers are not."""
_SIZE = 0.2
"""Root mean square of an update for each unit of learning rate, about that of Adam (Liu et al. 2025)."""
_BETAS, _EPS = (0.9, 0.999), 1e-8
_MATRICES = (2, 4)
"""Dimensions of what is made orthogonal: tokens and tables of positions have three."""


class Muon(MomentumOptimizer):
    """Muon for matrices and kernels of convolutions (a kernel a row); AdamW for biases, norms and tokens.

    μ ← β·μ + (1 − β)·g; o = ``orthogonal``((1 − β)·g + β·μ); w ← (1 − lr·wd)·w − lr·0.2·√max(rows, columns)·o.
    With that factor (Liu et al. 2025, arXiv 2502.16982) a learning rate means what it means for AdamW.
    Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon.

    When ``found_inf`` is set on the instance and is not 0, the step changes nothing, without reading the device.

    Args:
        params: parameters or groups of them.
        lr: learning rate of both.
        weight_decay: wd above, of both.
        momentum: β above.
    """

    def __init__(self, params: ParamsT, lr: float = 0.0, weight_decay: float = 0.0, momentum: float = 0.95) -> None:
        # "fused": what torch reads when it loads a state, to keep AdamW's count of steps on the device
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "fused": True}
        super().__init__(params, defaults)

    def _update(self, params: list[Tensor], group: Group, scale: Tensor | None, found_inf: Tensor | None) -> None:
        # gradients were unscaled before: ``scale`` says nothing here
        self._muon([p for p in params if p.ndim in _MATRICES], group, found_inf)
        self._adamw([p for p in params if p.ndim not in _MATRICES], group, found_inf)

    def _muon(self, params: list[Tensor], group: Group, found_inf: Tensor | None) -> None:
        beta, lr = group["momentum"], group["lr"]
        alike: dict[object, list[tuple[Tensor, Tensor]]] = {}
        for p in params:
            assert p.grad is not None
            mu = self._momentum(p)
            self.state[p]["mu"] = _unless(found_inf, mu.lerp(p.grad, 1 - beta), mu)
            wanted = _rows(p.grad.lerp(self.state[p]["mu"], beta))
            alike.setdefault((wanted.shape, wanted.dtype, wanted.device), []).append((p, wanted))
        for same in alike.values():
            for (p, wanted), found in zip(same, orthogonal(torch.stack([w for _, w in same])), strict=True):
                moved = p.mul(1 - lr * group["weight_decay"])
                moved.add_(_shaped(found, p), alpha=-lr * _SIZE * max(wanted.shape) ** 0.5)
                p.copy_(_unless(found_inf, moved, p))

    def _adamw(self, params: list[Tensor], group: Group, found_inf: Tensor | None) -> None:
        if not params:
            return
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), device=p.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        states = [self.state[p] for p in params]
        adamw(
            params,
            [p.grad for p in params if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            found_inf=found_inf,
            amsgrad=False,
            beta1=_BETAS[0],
            beta2=_BETAS[1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=_EPS,
            maximize=False,
        )


def orthogonal(matrices: Float[Tensor, "count rows columns"]) -> Float[Tensor, "count rows columns"]:
    """Of each matrix about the orthogonal factor of its polar decomposition: singular values of 0.7 to 1.2.

    Small ones stay smaller. Five rounds of X ← (a·I + b·X·Xᵀ + c·(X·Xᵀ)²)·X. Each is a polynomial of the first X·Xᵀ,
    so that rounds are products of small squares, and the long side is touched twice.
    """
    turned = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if turned else matrices
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp_min(_LEAST)
    gram = x @ x.mT
    a, b, c = _POLYNOMIAL
    one = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    factor = one
    for number in range(_ROUNDS):
        polynomial = a * one + b * gram + c * (gram @ gram)
        factor = polynomial @ factor if number else polynomial
        if number < _ROUNDS - 1:
            gram = polynomial @ (gram @ polynomial)
    found: Tensor = factor @ x
    return found.mT if turned else found


def _rows(x: Tensor) -> Float[Tensor, "rows columns"]:
    return x.permute(0, 2, 3, 1).flatten(1) if x.ndim == 4 else x


def _shaped(rows: Tensor, like: Tensor) -> Tensor:
    if like.ndim == 2:
        return rows
    out, channels, height, width = like.shape
    return rows.view(out, height, width, channels).permute(0, 3, 1, 2)


def _unless(found_inf: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    return new if found_inf is None else torch.where(found_inf == 0, new, old)
