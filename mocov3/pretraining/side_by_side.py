"""Loss and gradients of one batch on a CPU: the views side by side, each in a thread with its share of the cores.

Operations of small networks are too short for several cores, which wait for each other at the end of every one, and
for the one that something else disturbs. The passes of view 1 and of view 2 meet in heads and loss alone. So each view
goes through both backbones in a thread of its own, heads and loss follow with all cores, and the backward passes are
apart again. Local views are one pass with a batch norm of its own: a third thread where a view has a single core, else
all cores. What is computed is what ``WholeBatch`` computes; sums are rounded otherwise, and alike in every run.
"""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from threading import Barrier
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mocov3.data.device.pixels import ViewBatch
from mocov3.distributed.batch_norm import moving_norms
from mocov3.models import Encoder, MoCo, Statistics
from mocov3.models.compiled import CompiledFeatures
from mocov3.models.precision import Precision

_VIEWS = 2
"""Threads that share the cores."""


def goes_side_by_side(model: MoCo) -> bool:
    """Whether that is possible, and pays: on a CPU of more than one core.

    Backbones that draw random numbers are left out, since threads would take them in any order, and compiled ones.
    """
    encoder = model.base_encoder
    cores = torch.get_num_threads() if next(model.parameters()).device.type == "cpu" else 1
    compiled = isinstance(encoder.features, CompiledFeatures)
    return cores >= _VIEWS and not compiled and not any(map(_draws, encoder.modules()))


class SideBySide:
    """Loss and gradients, the views side by side.

    Args:
        model: in training mode, on the CPU; its modules stay what they are.
        precision: arithmetic.
    """

    def __init__(self, model: MoCo, *, precision: Precision) -> None:
        self.model, self.precision = model, precision
        self._queries, self._keys = _Twin(model.base_encoder), _Twin(model.momentum_encoder)
        cores = torch.get_num_threads() // _VIEWS
        self._local_beside = cores == 1
        """Whether local views have a thread too: with more cores it would take some of those that views wait for."""
        self._threads = _threads(_VIEWS + self._local_beside, cores)

    @cached_property
    def _local(self) -> "_Twin":
        """For local views, whose batch statistics move nothing."""
        return _Twin(self.model.base_encoder)

    def __call__(
        self, x1: ViewBatch, x2: ViewBatch, m: float, local: ViewBatch | None = None
    ) -> tuple[Float[Tensor, ""], Statistics]:
        """Loss and statistics; leaves the gradients in the parameters."""
        model, beside = self.model, local if self._local_beside else None
        learning = [self._queries] if beside is None else [self._queries, self._local]
        for twin in (*learning, self._keys):
            twin.follow()
        model.update_momentum_encoder(m)  # the queries' own weights stay what they are
        passes: list[Callable[[], list[Tensor]]] = [
            lambda: self._view(x1, model.base_encoder, model.momentum_encoder),
            lambda: self._view(x2, self._queries.network, self._keys.network),
        ]
        if beside is not None:
            passes.append(lambda: self._view(beside, self._local.network))
        (q1, k1), (q2, k2), *others = self._at_once(*passes)
        features = [q1, q2, *(q for (q,) in others)]
        leaves = [q.detach().requires_grad_() for q in features]
        with self.precision.autocast():
            queries = [model.queries(f) for f in leaves[:2]]
            local_queries = None if local is None else self._local_queries(local, leaves[2:])
            loss, statistics = model.loss(queries, [model.keys(k) for k in (k1, k2)], local_queries)
        self.precision.scaler.scale(loss).backward()
        if q1.requires_grad:  # not where all of the backbone is frozen
            pairs = zip(features, leaves, strict=True)
            self._at_once(*(partial(torch.autograd.backward, q, leaf.grad) for q, leaf in pairs))
            for twin in learning:
                twin.give_gradients()
        for twin in (self._queries, self._keys):
            twin.give_statistics()
        return loss.detach(), statistics

    def _view(self, x: ViewBatch, base: Encoder, momentum: Encoder | None = None) -> list[Tensor]:
        """Features of a view by the backbones."""
        images = x[:]
        with self.precision.autocast():
            query = base.features(images)
            with torch.no_grad():
                return [query, *([] if momentum is None else [momentum.features(images)])]

    def _local_queries(self, x: ViewBatch, features: list[Tensor]) -> Tensor:
        """Queries of local views, from their features where these are there already."""
        model = self.model
        if not features:
            return model.local_queries(x[:])
        with model.local_pass():
            return model.queries(features[0])

    def _at_once(self, *tasks: Callable[[], Any]) -> list[Any]:
        """Results of a task for each thread."""
        return [future.result() for future in [self._threads.submit(task) for task in tasks]]


def _draws(module: nn.Module) -> bool:
    dropout = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
    return dropout or getattr(module, "drop_prob", 0.0) > 0


class _Twin:
    """A network with the weights of another, and gradients and batch statistics of its own."""

    def __init__(self, original: Encoder) -> None:
        heads = getattr(original, original.projector_name)  # run for all views, by the original
        norms = moving_norms(original, but=heads)
        own = {id(buffer) for norm in norms for buffer in norm.buffers(recurse=False)}
        weights = {id(p): nn.Parameter(p.data, requires_grad=p.requires_grad) for p in original.parameters()}
        shared = {id(buffer): buffer for buffer in original.buffers() if id(buffer) not in own}
        self.network: Any = copy.deepcopy(original, {**weights, **shared})
        self._weights = [(p, weights[id(p)]) for p in original.parameters()]
        copied = moving_norms(self.network, but=getattr(self.network, original.projector_name))
        self._norms: list[tuple[Any, Any]] = list(zip(norms, copied, strict=True))
        for norm in copied:
            norm.momentum = 1.0  # what a pass leaves are its own statistics

    def follow(self) -> None:
        """Weights, and what of them trains, are the original's."""
        for weight, twin in self._weights:
            twin.data = weight.data
            twin.requires_grad_(weight.requires_grad)
            twin.grad = None

    def give_gradients(self) -> None:
        """Add them to those of the original."""
        pairs = [(w.grad, twin.grad) for w, twin in self._weights if w.grad is not None and twin.grad is not None]
        torch._foreach_add_([whole for whole, _ in pairs], [part for _, part in pairs])

    def give_statistics(self) -> None:
        """Move running statistics of the original by those of the twin's pass, as if it had been the next."""
        for norm, twin in self._norms:
            norm.running_mean.lerp_(twin.running_mean, norm.momentum)
            norm.running_var.lerp_(twin.running_var, norm.momentum)
            norm.num_batches_tracked += 1


def _threads(count: int, cores: int) -> ThreadPoolExecutor:
    """Threads of which each computes with so many cores; this one keeps all."""
    all_cores = torch.get_num_threads()
    ready = Barrier(count)

    def begin() -> None:
        torch.get_num_threads()  # what torch sets at a thread's first call must not come later
        torch.set_num_threads(cores)
        ready.wait()

    pool = ThreadPoolExecutor(count, "view", begin)
    for started in [pool.submit(lambda: None) for _ in range(count)]:
        started.result()
    torch.set_num_threads(all_cores)  # new threads begin with what was set last
    return pool
