"""Loss and gradients of one batch: in one pass, or exactly the same in the memory of a micro-batch.

The loss compares every image with all others of the batch, so that a batch cannot be split as for a classifier:
accumulated gradients of small batches are those of small batches. Gradient caching (Gao et al. 2021, arXiv 2101.06983)
splits the network instead, where images do not meet: features of all micro-batches are computed without a graph;
heads, with their batch norm, and loss run on the whole batch and give the gradient of the loss by every feature; the
backbone then runs again, a micro-batch at a time, and carries these gradients down to its weights. It costs one more
forward pass of the query backbone, about a quarter of a step.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mocov3.data.device.pixels import ViewBatch
from mocov3.distributed import World
from mocov3.distributed.batch_norm import moving_norms
from mocov3.distributed.sharding import is_sharded, reduce_now
from mocov3.models import MoCo, Statistics
from mocov3.models.precision import Precision
from mocov3.pretraining.preserve import Preservation
from mocov3.pretraining.side_by_side import SideBySide, goes_side_by_side

if TYPE_CHECKING:
    from mocov3.models.depth import MaskedDropPath, Masks
else:
    Masks = MaskedDropPath = object  # with timm, which runs of ResNets need not import

_Norm = nn.modules.batchnorm._BatchNorm


class WholeBatch:
    """Loss and gradients in one pass; gradients are averaged over ranks on the way.

    Args:
        model: in training mode, on its device.
        world: this rank.
        precision: arithmetic.
        preservation: of the starting network's features, if wanted.
    """

    def __init__(
        self, model: MoCo, *, world: World, precision: Precision, preservation: Preservation | None = None
    ) -> None:
        self.precision, self.weight = precision, preservation.weight if preservation else 0.0
        contrast = _Contrast(model, preservation)
        self._contrast: Any = (
            contrast if is_sharded(model) else world.wrap(contrast, static=True)
        )  # shared weights reduce by themselves

    def __call__(
        self, x1: ViewBatch, x2: ViewBatch, m: float, local: ViewBatch | None = None
    ) -> tuple[Float[Tensor, ""], Statistics]:
        """Loss and statistics; leaves the gradients, times the scale of the loss scaler, in the parameters."""
        with self.precision.autocast():
            loss, statistics, drift = self._contrast(x1[:], x2[:], m, None if local is None else local[:])
        total = loss if drift is None else loss + self.weight * drift
        self.precision.scaler.scale(total).backward()
        return loss.detach(), statistics._replace(drift=drift if drift is None else drift.detach())


class _Contrast(nn.Module):
    """What is wrapped for gradient averaging: one call a step, as DistributedDataParallel asks."""

    def __init__(self, model: MoCo, preservation: Preservation | None) -> None:
        super().__init__()
        self.model, self.preservation = model, preservation

    def forward(
        self, x1: Tensor, x2: Tensor, m: float, local: Tensor | None
    ) -> tuple[Tensor, Statistics, Tensor | None]:
        if self.preservation is None:
            return *self.model.contrast(x1, x2, m, local), None
        features, patches = self.model.base_encoder.features_and_mean(x1)
        both = [features, self.model.features(x2)]
        loss, statistics = self.model.contrast_features(both, self.model.passes(x1, x2), m, local)
        return loss, statistics, self.preservation.distances(x1, features, patches).mean()


class MicroBatches:
    """Loss and gradients of the whole batch in the memory of ``size`` images (gradient caching).

    Equal to ``WholeBatch`` but for the order of summation where the backbone has no batch norm (ViTs). Where it has,
    its statistics are those of each micro-batch (of all ranks), and running statistics move once a view, by the mean
    of the micro-batches'; loss, gradients and heads are exact for that network.

    Stochastic depth draws what it would draw for the whole batch. Other draws inside the backbone (dropout, tokens
    that are kept) are made a micro-batch at a time, and are the same in both passes.

    Args:
        model: in training mode, on its device.
        world: this rank; gradients are averaged over ranks once, at the end.
        precision: arithmetic.
        size: most images of this rank in a pass.
        preservation: of the starting network's features, if wanted.
    """

    def __init__(
        self, model: MoCo, *, world: World, precision: Precision, size: int, preservation: Preservation | None = None
    ) -> None:
        if size < 1:
            raise ValueError(f"a micro-batch holds 1 image or more, not {size}")
        self.model, self.world, self.precision, self.size = model, world, precision, size
        encoders = (model.base_encoder, model.momentum_encoder)
        # those of the projector see the whole batch
        self._norms = [moving_norms(encoder, but=getattr(encoder, encoder.projector_name)) for encoder in encoders]
        from mocov3.models import depth

        self._masks = depth.Masks
        self._paths = [depth.mask_paths(encoder) for encoder in (model.base_encoder, model.momentum_encoder)]
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._sharded = is_sharded(model)
        self._preservation = preservation

    def __call__(
        self, x1: ViewBatch, x2: ViewBatch, m: float, local: ViewBatch | None = None
    ) -> tuple[Float[Tensor, ""], Statistics]:
        """Loss and statistics; leaves the gradients, times the scale of the loss scaler, in the parameters."""
        model, views = self.model, [x1, x2]
        masks = self._draw_paths(self._paths[0], len(x1))
        passes = [self._without_graph(self.model.features, x, 0, mask) for x, mask in zip(views, masks, strict=True)]
        if local is not None:
            views.append(local)
            masks.append(self._masks(self._paths[0], [p.draw(len(local), self.world.device) for p in self._paths[0]]))
            passes.append(self._without_graph(self.model.features, local, 0, masks[2], tracked=False))
        features = [f.requires_grad_() for f, _ in passes]
        with self.precision.autocast():
            queries = [model.queries(f) for f in features[:2]]
            local_queries = self._local_queries(*features[2:])
        model.update_momentum_encoder(m)
        masks_of_keys = self._draw_paths(self._paths[1], len(x1))
        of_keys = [
            self._without_graph(self.model.key_features, x, 1, mask)[0]
            for x, mask in zip(views[:2], masks_of_keys, strict=True)
        ]
        with self.precision.autocast():
            loss, statistics = model.loss(queries, [model.keys(f) for f in of_keys], local_queries)
        del of_keys, queries, local_queries
        self.precision.scaler.scale(loss).backward()
        drift = None
        for x, f, mask, (_, draws) in zip(views, features, masks, passes, strict=True):
            assert f.grad is not None
            kept = self._preservation if x is views[0] else None
            moved = self._backward(x, f.grad, mask, draws, kept, last=x is views[-1])
            drift = moved if drift is None else drift
            f.grad = None
        if not self._sharded:
            self.world.average([p.grad for p in self._trained if p.grad is not None])
        return loss.detach(), statistics._replace(drift=drift)

    def _local_queries(self, features: Tensor | None = None) -> Tensor | None:
        if features is None:
            return None
        with self.model.local_pass():
            return self.model.queries(features)

    def _parts(self, images: int) -> list[slice]:
        """Parts of nearly equal size: none is so small that its batch statistics say nothing."""
        count = -(-images // self.size)
        edges = [i * images // count for i in range(count + 1)]
        return [slice(a, b) for a, b in itertools.pairwise(edges)]

    @torch.no_grad()
    def _without_graph(
        self, features: Callable[[Tensor], Tensor], x: ViewBatch, encoder: int, mask: Masks, *, tracked: bool = True
    ) -> tuple[Float[Tensor, "batch features"], list[Tensor]]:
        """Features of all micro-batches, and the state of the generator before each."""
        whole: Tensor | None = None
        parts, draws, norms = self._parts(len(x)), [], self._norms[encoder]
        statistics = _averaged(norms, len(parts)) if tracked else _resting(norms)
        with statistics as add_statistics, self.precision.autocast():
            for part in parts:
                draws.append(_generator_state(self.world.device))
                mask.take(part)
                f = features(x[part])
                if whole is None:  # one tensor from the start: parts and their concatenation would need twice the room
                    whole = f.new_empty(len(x), *f.shape[1:])
                whole[part] = f
                add_statistics()
            mask.take(None)
        assert whole is not None
        return whole, draws

    def _backward(
        self,
        x: ViewBatch,
        gradient: Tensor,
        mask: Masks,
        draws: list[Tensor],
        preservation: Preservation | None,
        *,
        last: bool,
    ) -> Tensor | None:
        """The backbone again, with graph and the same draws, from the gradients of the features; the mean distance to
        the start where that is preserved, a loss of single images, which needs no cache.
        """
        distances: list[Tensor] = []
        after = _generator_state(self.world.device)
        parts = self._parts(len(x))
        with _held(self._norms[0]):
            for part, state in zip(parts, draws, strict=True):
                if self._sharded:  # one reduction a step: with the last part of the last view
                    reduce_now([self.model.base_encoder], last and part == parts[-1])
                _set_generator_state(self.world.device, state)
                mask.take(part)
                with self.precision.autocast():
                    if preservation is None:
                        roots, gradients = [self.model.features(x[part])], [gradient[part]]
                    else:
                        f, patches = self.model.base_encoder.features_and_mean(x[part])
                        distances.append(preservation.distances(x[part], f, patches).sum() / len(x))
                        total = self.precision.scaler.scale(preservation.weight * distances[-1])
                        roots, gradients = [f, total], [gradient[part], torch.ones_like(total)]
                torch.autograd.backward(roots, gradients)
        mask.take(None)
        _set_generator_state(self.world.device, after)
        return torch.stack(distances).sum().detach() if distances else None

    def _draw_paths(self, paths: Sequence[MaskedDropPath], images: int) -> list[Masks]:
        """What stochastic depth drops in both views, drawn as one pass over the whole batch would."""
        device = self.world.device
        if self.model.views_meet:
            return [self._masks(paths, [path.draw(images, device) for path in paths]) for _ in "12"]
        both = [path.draw(2 * images, device).chunk(2) for path in paths]
        return [self._masks(paths, [drawn[view] for drawn in both]) for view in (0, 1)]


def gradients_of(
    model: MoCo, *, world: World, precision: Precision, micro_batch: int, preservation: Preservation | None = None
) -> WholeBatch | MicroBatches | SideBySide:
    """How ``model`` is trained: by micro-batches of so many images; of 0, whole, side by side where that pays."""
    if micro_batch:
        return MicroBatches(model, world=world, precision=precision, size=micro_batch, preservation=preservation)
    if world.size == 1 and preservation is None and not is_sharded(model) and goes_side_by_side(model):
        return SideBySide(model, precision=precision)
    return WholeBatch(model, world=world, precision=precision, preservation=preservation)


@contextmanager
def _averaged(norms: list[_Norm], parts: int) -> Iterator[Callable[[], None]]:
    """Make ``parts`` passes count as one for running statistics: r ← (1−a)·r + a·(mean of the parts' statistics).

    Yields what must be called after each part.
    """
    averaged = [norm for norm in norms if norm.momentum is not None]
    statistics = [buffer for norm in averaged for buffer in (norm.running_mean, norm.running_var) if buffer is not None]
    rates = [norm.momentum or 0.0 for norm in averaged for _ in range(2)]
    total = [torch.zeros_like(s) for s in statistics]

    def add() -> None:
        if statistics:
            torch._foreach_add_(total, statistics)

    with _held(norms):  # what a pass leaves are its own statistics
        yield add
    for buffer, sums, rate in zip(statistics, total, rates, strict=True):
        buffer.lerp_(sums / parts, rate)
    for norm in norms:
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked += 1


@contextmanager
def _resting(norms: list[_Norm]) -> Iterator[Callable[[], None]]:
    """Passes that move no running statistics, as those of local views; used as ``_averaged``."""
    with _held(norms):
        yield lambda: None


@contextmanager
def _held(norms: list[_Norm]) -> Iterator[None]:
    """Normalise by the batch as in training, and leave the running statistics alone.

    All passes over parts run at one rate, 1: for another a compiled network would be compiled again.
    """
    saved_buffers = [[b.clone() for b in norm.buffers(recurse=False)] for norm in norms]
    rates = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None if norm.momentum is None else 1.0
    try:
        yield
    finally:
        for norm, buffers, usual in zip(norms, saved_buffers, rates, strict=True):
            norm.momentum = usual
            for buffer, before in zip(norm.buffers(recurse=False), buffers, strict=True):
                buffer.copy_(before)


def _generator_state(device: torch.device) -> Tensor:
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state()


def _set_generator_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state)
