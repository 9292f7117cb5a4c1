"""One optimisation step: precision, loss, gradients, and an update that non-finite numbers cannot reach.

Nothing is read from the device here; losses, norms and counts stay tensors until a print step.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mocov3.config.archs import HEAD_KEYS
from mocov3.data.device.pixels import ViewBatch
from mocov3.distributed import World
from mocov3.distributed.sharding import is_sharded, local, norms
from mocov3.models import MoCo, Statistics
from mocov3.models.precision import Precision
from mocov3.optim import flattened, guarded_update, set_learning_rate
from mocov3.pretraining.gradients import gradients_of
from mocov3.pretraining.preserve import Preservation


class Outcome(NamedTuple):
    """What one step did, on the device."""

    loss: Float[Tensor, ""]
    statistics: Statistics
    ok: Bool[Tensor, ""]
    """Whether loss and gradients were finite; where not, weights, optimizer and batch statistics stayed."""
    grad_norms: Float[Tensor, "2"]
    """Euclidean gradient norms of the backbone's first and last trainable matrix."""


class Step:
    """Forward, backward and update of one batch.

    Args:
        model: moved to the device.
        optimizer: over all parameters of the model.
        world: this rank; gradients are averaged over all.
        precision: arithmetic.
        micro_batch: most images in a pass; 0: the whole batch in one (``mocov3.pretraining.gradients``).
        spike_factor: skip steps whose gradient norm is so many times its usual one (0: none).
        preservation: of the starting network's features (``--preserve``), if wanted.
    """

    def __init__(
        self,
        model: MoCo,
        optimizer: torch.optim.Optimizer,
        *,
        world: World,
        precision: Precision,
        micro_batch: int = 0,
        spike_factor: float = 0.0,
        preservation: Preservation | None = None,
    ) -> None:
        self.model, self.optimizer, self.world, self.precision = model, optimizer, world, precision
        self.spikes = SpikeGuard(spike_factor, world.device) if spike_factor else None
        self.gradients = gradients_of(
            model, world=world, precision=precision, micro_batch=micro_batch, preservation=preservation
        )
        self.skipped = torch.zeros((), dtype=torch.long, device=world.device)
        self._buffers = [b for b in model.buffers() if b.is_floating_point()]
        weights = [p for n, p in model.base_encoder.named_parameters() if _is_backbone_weight(n, p)]
        self._watched = (weights[0], weights[-1])
        self._sharded = is_sharded(model)

    def __call__(self, x1: ViewBatch, x2: ViewBatch, local: ViewBatch | None = None, *, lr: float, m: float) -> Outcome:
        """Train on two views of the same images.

        Args:
            x1: view 1, (batch, channels, height, width), normalised; a tensor, or ``PixelViewBatch``.
            x2: view 2, likewise.
            local: local views of the same images, (local views · batch, channels, side, side), a view after the other.
            lr: learning rate of this step.
            m: momentum of the momentum encoder at this step.
        """
        set_learning_rate(self.optimizer, lr)
        before = flattened(self._buffers)
        self.optimizer.zero_grad(set_to_none=True)
        loss, statistics = self.gradients(x1, x2, m, local)
        scaler = self.precision.scaler
        scaler.unscale_(self.optimizer) if scaler.is_enabled() else None
        ok, watched = self._inspect(loss)
        device = self.world.device
        guarded_update(self.optimizer, scaler, ok, buffers=self._buffers, before=before, device=device)
        self.skipped += ~ok
        return Outcome(loss, statistics, ok, watched)

    @property
    def most_skips_in_a_row(self) -> int:
        """Skipped steps in a row that mean divergence. A loss scaler needs 16 to find its way from 65536 down to 1."""
        return 5 + (16 if self.precision.scaler.is_enabled() else 0)

    def _inspect(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        # Ranks hold the same averages, or shares of them (--fsdp), and agree
        finite = torch.isfinite(_extremes([g for g in local(grads) if g.numel()])).all() & torch.isfinite(loss)
        ok = self.world.sum((~finite).float()) == 0
        watched = norms(self.world, [w.grad for w in self._watched if w.grad is not None], self._sharded)
        if self.spikes is not None:
            ok = ok & self.spikes(torch.linalg.vector_norm(norms(self.world, grads, self._sharded)), ok)
        return ok, watched

    def diagnosis(self) -> str:
        """What is not finite after the last step, in words: gradients by name, weights by name."""
        named = list(self.model.named_parameters())
        gradients = [n for n, p in named if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
        weights = [n for n, p in named if not bool(torch.isfinite(p).all())]
        parts = [
            f"{len(names)} {kind}, first {names[0]}" if names else f"no {kind}"
            for kind, names in (("gradients", gradients), ("weights", weights))
        ]
        return f"not finite now: {'; '.join(parts)}"


class SpikeGuard:
    """Skips steps whose gradient norm is far above the usual one (an exponential mean of its logarithm), on the device.

    Args:
        factor: how many times the usual norm is too much.
        device: where it decides.
    """

    DECAY, WARM_UP = 0.99, 100

    def __init__(self, factor: float, device: torch.device) -> None:
        self.limit = math.log(factor)
        self._state = torch.zeros(2, device=device)  # decayed sum of logarithms, steps counted

    def __call__(self, norm: Float[Tensor, ""], finite: Bool[Tensor, ""]) -> Bool[Tensor, ""]:
        """Whether ``norm`` is usual; counts it if so. The first steps all are."""
        total, count = self._state
        log = norm.log()
        usual = total / (1 - self.DECAY**count).clamp_min(1e-6)
        ok = finite & ((count < self.WARM_UP) | (log - usual <= self.limit))
        counted = torch.stack([self.DECAY * total + (1 - self.DECAY) * log, count + 1])
        self._state = torch.where(ok, counted, self._state)
        return ok

    def state(self) -> list[float]:
        """What a resumed run needs."""
        return self._state.tolist()

    def restore(self, state: list[float]) -> None:
        """Continue from ``state``."""
        self._state.copy_(torch.tensor(state))


def _extremes(tensors: list[Tensor]) -> Tensor:
    """Numbers that are finite exactly if all entries are; a sum of squares could overflow."""
    if tensors[0].device.type == "cpu":  # torch's maximum norm takes fifteen times as long as both extremes there
        return torch.stack([extreme(x) for x in tensors for extreme in (torch.amax, torch.amin)])
    return torch.stack(torch._foreach_norm(tensors, torch.inf))


def _is_backbone_weight(name: str, p: Tensor) -> bool:
    head = name.startswith(HEAD_KEYS)
    return p.requires_grad and p.ndim > 1 and not head and not name.endswith(("cls_token", "pos_embed"))
