"""One step of fine-tuning: forward and backward of every accumulated batch, clipping, update, average."""

import contextlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from mocov3.distributed import World
from mocov3.losses import at_least_float32
from mocov3.models.precision import Precision
from mocov3.optim import flattened, guarded_update

Micro = tuple[Tensor, Tensor, Any]
"""Images (batch, channels, height, width), targets (classes or soft), and what to call before their forward pass."""


class Outcome(NamedTuple):
    """What one step did, on the device."""

    loss: Float[Tensor, ""]
    """Mean over the images of all ranks."""
    grad_norm: Float[Tensor, ""]
    """Euclidean norm of the gradient before clipping."""
    ok: Bool[Tensor, ""]
    """Whether loss and gradient were finite; where not, nothing changed."""


class TuneStep:
    """Trains a classifier.

    Args:
        model: on the device, in training mode.
        optimizer: over its parameters.
        criterion: (scores, targets) → loss.
        world: this rank; gradients are averaged over all.
        precision: arithmetic.
        accumulate: batches of a step.
        clip: largest gradient norm; 0 for none.
        ema: average of the weights, updated after every step.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: nn.Module,
        *,
        world: World,
        precision: Precision,
        accumulate: int = 1,
        clip: float = 0.0,
        ema: ModelEmaV3 | None = None,
    ) -> None:
        self.model, self.optimizer, self.criterion = model, optimizer, criterion
        self.world, self.precision, self.accumulate, self.clip, self.ema = world, precision, accumulate, clip, ema
        self.network: Any = world.wrap(model)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._buffers = [b for b in model.buffers() if b.is_floating_point()]

    def __call__(self, batches: Iterable[Micro]) -> Outcome:
        """One update from ``accumulate`` batches, taken one after the other."""
        before = flattened(self._buffers)
        scaler = self.precision.scaler
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for i, (x, target, prepare) in enumerate(batches):
            prepare()
            last = i + 1 == self.accumulate
            # gradients are averaged over ranks once, with the last batch
            hold = contextlib.nullcontext() if last or self.world.size == 1 else self.network.no_sync()
            with hold:
                loss = self._loss(x, target) / self.accumulate
                scaler.scale(loss).backward()
            losses.append(loss.detach())
        if scaler.is_enabled():
            scaler.unscale_(self.optimizer)
        total = torch.stack(losses).sum()
        norm = nn.utils.clip_grad_norm_(self._parameters, self.clip or float("inf"))
        # ranks share gradients but not losses; they must decide alike
        bad = ~(torch.isfinite(norm) & torch.isfinite(total))
        loss, bads = (self.world.sum(torch.stack([total, bad.to(total.dtype)])) / self.world.size).unbind()
        ok, device = bads == 0, self.world.device
        guarded_update(self.optimizer, scaler, ok, buffers=self._buffers, before=before, device=device)
        if self.ema is not None:
            self._average(self.ema, ok)
        return Outcome(loss, norm, ok)

    def _loss(self, x: Tensor, target: Tensor) -> Float[Tensor, ""]:
        with self.precision.autocast():
            scores = self.network(x)
        # autocast is left: the loss is computed in at least float32
        return self.criterion(at_least_float32(scores), target)

    @torch.no_grad()
    def _average(self, ema: ModelEmaV3, ok: Tensor) -> None:
        """Move the average, unless the step did not count."""
        if self.world.device.type == "cpu":
            if bool(ok):
                ema.update(self.model)
            return
        # as timm does, with a weight that is decided on the device
        pairs = list(zip(ema.module.state_dict().values(), self.model.state_dict().values(), strict=True))
        averages, values = ([pair[i] for pair in pairs if pair[0].is_floating_point()] for i in (0, 1))
        change = torch._foreach_sub(values, averages)
        torch._foreach_mul_(change, (1 - ema.get_decay()) * ok.float())
        torch._foreach_add_(averages, change)
        for average, value in pairs:
            if not average.is_floating_point():
                average.copy_(torch.where(ok, value, average))
