"""The model of MoCo v3 (arXiv 2104.02057, algorithm 1): query encoder with predictor, momentum encoder for keys.

Backbone, heads and loss are separate calls, so that they can be run at different batch sizes; ``model(x1, x2, m)``
runs them all.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mocov3 import losses
from mocov3.config.archs import is_resnet
from mocov3.distributed import gather_keys
from mocov3.distributed.batch_norm import statistics_at_rest
from mocov3.distributed.sharding import local, reshard
from mocov3.models.backbones import Encoder, build_encoder
from mocov3.models.compiled import CompiledFeatures, compile_features
from mocov3.models.lora import summed_parameters


class Statistics(NamedTuple):
    """Counts of one step on this rank, as tensors on the device (nothing is read)."""

    retrieved: Tensor
    """Queries, both directions, whose nearest key is their own."""
    queries: int
    """How many queries there were: twice the images."""
    feature_std: Tensor
    """√dim times the mean standard deviation of the normalised queries: 1 when spread evenly, 0 when collapsed."""
    embeddings: Tensor | None = None
    """The normalised queries of both directions, (queries, dim): what the effective rank is computed from."""
    drift: Tensor | None = None
    """Mean distance of the features to those of the starting network, where it was measured (``--preserve``)."""


class MoCo(nn.Module):
    """Two encoders (backbone and projector) and the predictor.

    Args:
        base_encoder: the query encoder; the momentum encoder starts as its copy.
        predictor: maps an embedding to an embedding.
        temperature: τ of the loss.
        local_weight: of the mean loss of local views.
    """

    def __init__(
        self, base_encoder: Encoder, predictor: nn.Module, temperature: float, local_weight: float = 1.0
    ) -> None:
        super().__init__()
        self.base_encoder = base_encoder
        self.momentum_encoder = deepcopy(base_encoder)
        self.momentum_encoder.requires_grad_(False)
        self.predictor = predictor
        self.temperature, self.local_weight = temperature, local_weight
        self.views_meet = uses_batch_statistics(base_encoder)
        """Whether the two views would meet in the backbone's batch statistics, so that each needs its own pass."""

    def features(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features"]:
        """Features of the query backbone."""
        return self.base_encoder.features(x)

    def queries(self, features: Float[Tensor, "batch features"]) -> Float[Tensor, "batch dim"]:
        """Features → projector → predictor."""
        out: Tensor = self.predictor(_projector(self.base_encoder)(features))
        return out

    @torch.no_grad()
    def key_features(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features"]:
        """Features of the momentum backbone, without gradient."""
        return self.momentum_encoder.features(x)

    @torch.no_grad()
    def keys(self, features: Float[Tensor, "batch features"]) -> Float[Tensor, "batch dim"]:
        """Features → momentum projector, without gradient."""
        out: Tensor = _projector(self.momentum_encoder)(features)
        return out

    @torch.no_grad()
    def update_momentum_encoder(self, m: float) -> None:
        """k ← m·k + (1 − m)·q for every parameter, frozen ones included, pairs summed. Buffers are not averaged."""
        reshard([self.base_encoder, self.momentum_encoder])
        keys, queries = local(self.momentum_encoder.parameters()), local(summed_parameters(self.base_encoder))
        # k + (1 − m)·(q − k): one pass over memory, a few kernels on a GPU, and frozen parameters stay bit-equal
        torch._foreach_lerp_(keys, queries, 1.0 - m)

    def loss(
        self, queries: Sequence[Tensor], keys: Sequence[Tensor], local: Tensor | None = None
    ) -> tuple[Float[Tensor, ""], Statistics]:
        """Symmetric contrastive loss of (q1, q2) against the keys (k1, k2) of all ranks, and its statistics.

        ``local`` are the queries of local views, (local views · batch, dim), a view after the other: ``local_weight``
        times the mean over them of the same loss against the keys of both views is added.
        """
        q1, q2 = queries
        of1, of2 = (gather_keys(k) for k in keys)
        total = torch.zeros((), device=q1.device)
        hits = torch.zeros((), dtype=torch.long, device=q1.device)
        for q, (all_keys, offset) in ((q1, of2), (q2, of1)):
            target = torch.arange(len(q), device=q.device) + offset
            scores = losses.logits(q, all_keys, self.temperature)
            total = total + losses.contrastive_loss(scores, target, self.temperature)
            hits = hits + losses.retrieved(scores.detach(), target)
        if local is not None:
            target = (torch.arange(len(q1), device=q1.device) + of1[1]).repeat(len(local) // len(q1))
            for all_keys, _ in (of1, of2):
                scores = losses.logits(local, all_keys, self.temperature)
                total = total + self.local_weight * losses.contrastive_loss(scores, target, self.temperature)
        with torch.no_grad():
            normalised = nn.functional.normalize(torch.cat([q1, q2]).float(), dim=1)
            feature_std = normalised.std(0).mean() * normalised.shape[1] ** 0.5
        return total, Statistics(hits, 2 * len(q1), feature_std, normalised)

    def contrast(
        self,
        x1: Float[Tensor, "batch channels height width"],
        x2: Float[Tensor, "batch channels height width"],
        m: float,
        local: Tensor | None = None,
    ) -> tuple[Float[Tensor, ""], Statistics]:
        """Loss and statistics of two views, and of ``local`` ones if given; moves the momentum encoder on the way.

        The order is the reference's: queries of view 1, then of view 2 (each its own pass through batch norm),
        then the momentum update, then the keys in training mode. A backbone without batch norm takes both views in
        one pass, which changes nothing but the speed. Local views, (local views · batch, channels, side, side), go
        through a pass of their own after view 2.
        """
        passes = self.passes(x1, x2)
        features = [f for x in passes for f in self.features(x).chunk(2 // len(passes))]
        return self.contrast_features(features, passes, m, local)

    def passes(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, ...]:
        """Views as the backbones take them: each its own pass, or both in one."""
        return (x1, x2) if self.views_meet else (torch.cat([x1, x2]),)

    def contrast_features(
        self, features: Sequence[Tensor], passes: tuple[Tensor, ...], m: float, local: Tensor | None = None
    ) -> tuple[Float[Tensor, ""], Statistics]:
        """``contrast``, of query features of both views that are there already."""
        queries = [self.queries(f) for f in features]
        local_queries = None if local is None else self.local_queries(local)
        self.update_momentum_encoder(m)
        keys = [self.keys(f) for x in passes for f in self.key_features(x).chunk(2 // len(passes))]
        return self.loss(queries, keys, local_queries)

    def local_queries(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim"]:
        """Queries of local views, in a pass of their own."""
        with self.local_pass():
            return self.queries(self.features(x))

    def local_pass(self) -> AbstractContextManager[None]:
        """Around local views: their batch statistics normalise them, and do not move the running ones."""
        return statistics_at_rest(self.base_encoder, self.predictor)

    @property
    def compiled(self) -> bool:
        """Whether both backbones are compiled; not where that turned out to be impossible."""
        makers = (self.base_encoder.features, self.momentum_encoder.features)
        return all(isinstance(maker, CompiledFeatures) and maker.works for maker in makers)

    def compile_backbones(self, backend: str | Callable[..., object] = "inductor", **settings: Any) -> None:
        """Compile both backbones (``mocov3.models.compiled.compile_features``, whose ``settings`` these are)."""
        compile_features([self.base_encoder, self.momentum_encoder], backend, **settings)

    def forward(
        self,
        x1: Float[Tensor, "batch channels height width"],
        x2: Float[Tensor, "batch channels height width"],
        m: float,
    ) -> Float[Tensor, ""]:
        """The loss of two views of the same images; ``m`` is the momentum of this step."""
        return self.contrast(x1, x2, m)[0]


def build(
    arch: str,
    *,
    image_size: int = 224,
    patch_size: int = 16,
    dim: int = 256,
    mlp_dim: int = 4096,
    temperature: float = 1.0,
    stop_grad_conv1: bool = False,
    small_stem: bool = False,
    local_weight: float = 1.0,
    **vit_dims: float,
) -> MoCo:
    """A freshly initialised model.

    ResNets have a projector of 2 layers (batch norm without affine at its end) and a predictor of 2 without; ViT
    and timm's backbones a projector of 3 and a predictor of 2, both ending in batch norm.

    Args:
        arch: a name of ``mocov3.config.archs`` or ``timm/NAME``.
        image_size: side of the views in pixels.
        patch_size: side of a ViT's patches in pixels.
        dim: width of the embedding.
        mlp_dim: hidden width of the heads.
        temperature: τ of the loss.
        stop_grad_conv1: freeze the patch projection of the plain ViTs.
        small_stem: 3×3 stride-1 stem without pooling (ResNets).
        local_weight: of the mean loss of local views, where there are any.
        **vit_dims: ``embed_dim``, ``depth``, ``num_heads`` in place of the named ViT's.

    Raises:
        UserError: if the name is not known.
    """
    resnet = is_resnet(arch)
    encoder = build_encoder(
        arch,
        lambda width: _mlp(2 if resnet else 3, width, mlp_dim, dim, last_norm=True),
        image_size=image_size,
        patch_size=patch_size,
        stop_grad_conv1=stop_grad_conv1,
        small_stem=small_stem,
        **vit_dims,
    )
    return MoCo(encoder, _mlp(2, dim, mlp_dim, dim, last_norm=not resnet), temperature, local_weight)


def uses_batch_statistics(encoder: Encoder) -> bool:
    """Whether features of one image depend on the others of the batch: batch norm of any kind in the backbone."""
    # every such layer keeps running statistics, whatever its class is called (timm has several)
    return any(
        "running_" in name and not name.startswith(f"{encoder.projector_name}.") for name, _ in encoder.named_buffers()
    )


def _mlp(layers: int, width: int, hidden: int, out: int, *, last_norm: bool) -> nn.Sequential:
    """Linear layers without bias in torch's default initialisation, batch norm and ReLU between them."""
    modules: list[nn.Module] = []
    for i in range(layers):
        last = i == layers - 1
        size = out if last else hidden
        modules.append(nn.Linear(width, size, bias=False))
        if not last:
            modules += [nn.BatchNorm1d(size), nn.ReLU(inplace=True)]
        elif last_norm:
            modules.append(nn.BatchNorm1d(size, affine=False))  # SimCLR's choice, kept by MoCo v3
        width = size
    return nn.Sequential(*modules)


def _projector(encoder: Encoder) -> nn.Module:
    projector: nn.Module = getattr(encoder, encoder.projector_name)
    return projector
