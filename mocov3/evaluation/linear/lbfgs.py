"""Logistic regression by L-BFGS: heads on cached features, fitted to convergence instead of by SGD.

Of classes it is multinomial; of findings each is fitted by itself.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mocov3.distributed import World
from mocov3.evaluation.linear.heads import Heads
from mocov3.losses import answers_loss

_CHUNK = 65536  # rows whose scores are held at a time
_ITERATIONS = 500


def fit(
    x: Float[Tensor, "batch width"], target: Int[Tensor, "batch ..."], classes: int, weight_decay: float, world: World
) -> tuple[Float[Tensor, "classes width"], Float[Tensor, "classes"]]:
    """Weight and bias that minimise the mean loss (``answers_loss``) + ½·wd·‖weight‖² over the rows of all ranks.

    scikit-learn's ``LogisticRegression(C=1/(n·wd))`` has the same minimum. Every rank gets the same result.
    """
    both = torch.zeros(classes, x.shape[1] + 1, dtype=x.dtype, device=x.device, requires_grad=True)
    n = float(world.sum(torch.tensor([float(len(x))], device=x.device)))
    optimizer = torch.optim.LBFGS(
        [both],
        max_iter=_ITERATIONS,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        weight, bias = both.detach()[:, :-1], both.detach()[:, -1]
        total = torch.zeros(1, dtype=x.dtype, device=x.device)
        grad = torch.zeros_like(both)
        for rows, wanted in zip(x.split(_CHUNK), target.split(_CHUNK), strict=True):
            loss, error = _loss(F.linear(rows, weight, bias), wanted)
            total += loss
            grad[:, :-1] += error.T @ rows
            grad[:, -1] += error.sum(0)
        summed = world.sum(torch.cat([total, grad.flatten()])) / n
        both.grad = summed[1:].view_as(both)
        both.grad[:, :-1] += weight_decay * weight
        return summed[0] + 0.5 * weight_decay * weight.square().sum()

    optimizer.step(closure)  # the gradient is set by hand, in chunks
    solved = both.detach()
    return solved[:, :-1].contiguous(), solved[:, -1].contiguous()


def _loss(scores: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of losses as ``answers_loss``, and its gradient by the scores."""
    loss = answers_loss(scores, wanted)
    if wanted.ndim == 2:
        return loss, (scores.sigmoid() - wanted.clamp(min=0)) * (wanted >= 0) / scores.shape[1]
    error = F.softmax(scores, dim=1)
    error[torch.arange(len(scores), device=scores.device), wanted] -= 1
    return loss, error


def solve(heads: Heads, features: Float[Tensor, "batch width"], target: Int[Tensor, "batch ..."], world: World) -> None:
    """Fit every head to this rank's rows of cached features; ``bn-linear`` heads see standardised ones."""
    x, target = features.to(world.device), target.to(world.device)
    normed = None
    for i, spec in enumerate(heads.specs):
        if spec.kind == "bn-linear" and normed is None:
            heads.norm.measure(x, world)
            normed = heads.norm(x)
        rows = normed if spec.kind == "bn-linear" and normed is not None else x
        heads.set(i, *fit(rows, target, heads.classes, spec.weight_decay, world))
