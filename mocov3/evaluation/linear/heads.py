"""Many linear classifiers on the same frozen features, trained side by side by SGD.

Every head has its own weights, learning rate and weight decay and sees the same batches, so one pass of the backbone
serves all (DINOv2 evaluates so; the author of MoCo v3 calls the learning rate "quite sensitive"). Each head's
arithmetic is that of its own separate run, matrix product by matrix product: on the CPU to the last bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mocov3.distributed import World
from mocov3.losses import answers_loss
from mocov3.metrics import correct_at


@dataclass(frozen=True)
class HeadSpec:
    """What makes a head: its kind (``linear`` or ``bn-linear``), learning rate for 256 images, weight decay."""

    kind: str
    lr: float
    weight_decay: float

    def __str__(self) -> str:
        return f"{self.kind}, lr {self.lr:g}, wd {self.weight_decay:g}"


class FeatureNorm:
    """Batch norm without parameters over the features of all ranks, as MAE's linear evaluation has it (eps 1e-6).

    Features are frozen, so there is no gradient; sums are taken in float64, so that neither the number of ranks nor
    the order of the batch shows.
    """

    eps, rate = 1e-6, 0.1

    def __init__(self, width: int, device: torch.device) -> None:
        wide = torch.float64 if device.type != "mps" else torch.float32
        self.mean = torch.zeros(width, dtype=wide, device=device)
        self.variance = torch.ones(width, dtype=wide, device=device)

    def train(self, x: Float[Tensor, "batch width"], world: World) -> Float[Tensor, "batch width"]:
        """Normalise by the statistics of the batch over all ranks, and move the running ones."""
        wide = x.to(self.mean.dtype)
        mean, variance, n = self._statistics(wide, world)
        several = n >= 2  # one image has no variance; how many there are is not read off the device
        unbiased = variance * (n / (n - 1).clamp_min(1))
        self.mean.copy_(torch.where(several, (1 - self.rate) * self.mean + self.rate * mean, self.mean))
        self.variance.copy_(torch.where(several, (1 - self.rate) * self.variance + self.rate * unbiased, self.variance))
        mean, variance = torch.where(several, mean, self.mean), torch.where(several, variance, self.variance)
        return ((wide - mean) * torch.rsqrt(variance + self.eps)).to(x.dtype)

    def measure(self, x: Float[Tensor, "batch width"], world: World) -> None:
        """Take the statistics of ``x`` over all ranks as the running ones."""
        mean, variance, _ = self._statistics(x.to(self.mean.dtype), world)
        self.mean.copy_(mean)
        self.variance.copy_(variance)

    def _statistics(self, wide: Tensor, world: World) -> tuple[Tensor, Tensor, Tensor]:
        count = torch.full((1,), len(wide), dtype=wide.dtype, device=wide.device)
        sums = world.sum(torch.cat([wide.sum(0), wide.square().sum(0), count]))
        width, n = len(self.mean), sums[-1]
        mean = sums[:width] / n.clamp_min(1)
        return mean, (sums[width:-1] / n.clamp_min(1) - mean.square()).clamp_min(0), n

    def __call__(self, x: Float[Tensor, "batch width"]) -> Float[Tensor, "batch width"]:
        """Normalise by the running statistics."""
        scale = torch.rsqrt(self.variance + self.eps)
        return ((x.to(self.mean.dtype) - self.mean) * scale).to(x.dtype)

    def fold(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias of the one linear layer that does what this norm and the given layer do."""
        scaled = weight.to(self.mean.dtype) * torch.rsqrt(self.variance + self.eps)
        return scaled.to(weight.dtype), (bias.to(self.mean.dtype) - scaled @ self.mean).to(bias.dtype)


class Heads:
    """Linear heads and their optimizer on this rank.

    Args:
        specs: one a head.
        width: of the features.
        classes: how many.
        seed: all heads start from the same draw N(0, 0.01) of it, bias 0.
        momentum: of SGD.
        world: this rank; gradients are of the whole batch over all ranks.
        dtype: of weights and arithmetic.
    """

    def __init__(
        self,
        specs: Sequence[HeadSpec],
        *,
        width: int,
        classes: int,
        seed: int,
        momentum: float,
        world: World,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.specs, self.world, self.classes = list(specs), world, classes
        generator = torch.Generator().manual_seed(seed)
        first = torch.empty(classes, width).normal_(0.0, 0.01, generator=generator)
        self.weights = [first.to(world.device, dtype, copy=True).requires_grad_() for _ in specs]
        self.biases = [torch.zeros(classes, device=world.device, dtype=dtype).requires_grad_() for _ in specs]
        self.optimizer = self._sgd(momentum)
        self.norm = FeatureNorm(width, world.device)
        self._normed = any(s.kind == "bn-linear" for s in specs)

    def _sgd(self, momentum: float) -> torch.optim.Optimizer:
        groups = [
            {"params": [w, b], "lr": 0.0, "weight_decay": s.weight_decay}
            for w, b, s in zip(self.weights, self.biases, self.specs, strict=True)
        ]
        return torch.optim.SGD(groups, lr=0.0, momentum=momentum)

    def scores(self, x: Float[Tensor, "batch width"]) -> list[Float[Tensor, "batch classes"]]:
        """Scores of every head, in evaluation."""
        return self._apply(x, self.norm(x) if self._normed else x)

    def _apply(self, x: Tensor, normed: Tensor) -> list[Tensor]:
        parts = zip(self.specs, self.weights, self.biases, strict=True)
        # a product a head: one large product could round otherwise than the head's own run
        return [F.linear(normed if s.kind == "bn-linear" else x, w, b) for s, w, b in parts]

    def step(
        self, x: Float[Tensor, "batch width"], target: Int[Tensor, "batch ..."], *, lr_factor: float
    ) -> Float[Tensor, "heads 3"]:
        """Train every head on this rank's part of a batch by its mean loss (``answers_loss``) over all ranks.

        Args:
            x: features, finite.
            target: classes, or findings (batch, findings).
            lr_factor: every head's learning rate is its own ``lr`` times this.

        Returns:
            For every head the sum of losses, and how many are right among the first 1 and 5 (of findings: not
            counted), on this rank.
        """
        x = x.to(self.weights[0].dtype)
        normed = self.norm.train(x, self.world) if self._normed else x
        scores = self._apply(x, normed)
        losses = [answers_loss(s, target) for s in scores]
        parameters = [*self.weights, *self.biases]
        share = 1.0 if self.world.size > 1 else 1.0 / max(len(x), 1)  # of several ranks the sum is divided instead
        grads = torch.autograd.grad(losses, parameters, grad_outputs=[torch.full_like(one, share) for one in losses])
        self._set_grads(parameters, list(grads), len(x))
        for group, spec in zip(self.optimizer.param_groups, self.specs, strict=True):
            group["lr"] = spec.lr * lr_factor
        self.optimizer.step()
        return counted([s.detach() for s in scores], torch.stack(losses).detach(), target)

    def _set_grads(self, parameters: list[Tensor], grads: list[Tensor], count: int) -> None:
        if self.world.size > 1:
            n = torch.full((1,), float(count), dtype=grads[0].dtype, device=grads[0].device)
            flat = self.world.sum(torch.cat([*(g.flatten() for g in grads), n]))
            parts = flat[:-1].split([g.numel() for g in grads])
            grads = [p.view_as(g) for p, g in zip(parts, grads, strict=True)]
            torch._foreach_div_(grads, flat[-1].clamp_min(1.0))
        for p, g in zip(parameters, grads, strict=True):
            p.grad = g

    def evaluate(self, x: Float[Tensor, "batch width"], target: Int[Tensor, "batch ..."]) -> Float[Tensor, "heads 3"]:
        """Sum of losses and counts of right ones among the first 1 and 5, for every head, on this rank."""
        with torch.no_grad():
            scores = self.scores(x.to(self.weights[0].dtype))
            losses = torch.stack([answers_loss(s, target) for s in scores])
            return counted(scores, losses, target)

    def folded(self, head: int) -> tuple[Float[Tensor, "classes width"], Float[Tensor, "classes"]]:
        """Weight and bias of a head as one linear layer on the features, on the CPU."""
        weight, bias = self.weights[head].detach(), self.biases[head].detach()
        if self.specs[head].kind == "bn-linear":
            weight, bias = self.norm.fold(weight, bias)
        return weight.cpu().clone(), bias.cpu().clone()

    @torch.no_grad()
    def set(self, head: int, weight: Tensor, bias: Tensor) -> None:
        """Give a head its weight and bias."""
        self.weights[head].copy_(weight)
        self.biases[head].copy_(bias)

    def state(self) -> dict[str, list[Tensor]]:
        """Everything that training changes, as tensors on the CPU."""
        momenta = [
            self.optimizer.state[p].get("momentum_buffer")
            for w in zip(self.weights, self.biases, strict=True)
            for p in w
        ]
        return {
            "weights": [w.detach().cpu().clone() for w in self.weights],
            "biases": [b.detach().cpu().clone() for b in self.biases],
            "momenta": [torch.empty(0) if m is None else m.cpu().clone() for m in momenta],
            "norm": [self.norm.mean.cpu().clone(), self.norm.variance.cpu().clone()],
        }

    @torch.no_grad()
    def load(self, state: dict[str, list[Tensor]]) -> None:
        """Take over a ``state`` of the same heads."""
        for ours, saved in ((self.weights, state["weights"]), (self.biases, state["biases"])):
            for p, value in zip(ours, saved, strict=True):
                p.copy_(value)
        parameters = [p for pair in zip(self.weights, self.biases, strict=True) for p in pair]
        for p, momentum in zip(parameters, state["momenta"], strict=True):
            if momentum.numel():
                self.optimizer.state[p]["momentum_buffer"] = momentum.to(p.device, p.dtype, copy=True)
        self.norm.mean.copy_(state["norm"][0])
        self.norm.variance.copy_(state["norm"][1])


def counted(
    scores: Sequence[Float[Tensor, "batch classes"]], losses: Float[Tensor, "heads"], target: Int[Tensor, "batch ..."]
) -> Float[Tensor, "heads 3"]:
    """Sum of losses, right among the first 1, among the first 5, a row a head."""
    if target.ndim == 1:
        hits = torch.stack([correct_at(s, target, (1, 5)) for s in scores])
    else:  # findings are judged by AUROC, which is no count
        hits = losses.new_zeros(len(scores), 2)
    return torch.cat([losses.double()[:, None] if losses.device.type != "mps" else losses[:, None], hits], dim=1)
