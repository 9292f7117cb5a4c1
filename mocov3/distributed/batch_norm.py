"""Batch norm over the batch of all ranks, on any device (torch's own SyncBatchNorm is for CUDA only).

A layer communicates once in each direction, and nothing reads the device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mocov3.distributed.world import world_size


class _SynchronisedNorm(torch.autograd.Function):
    """Batch norm over the batch of all ranks (Ioffe & Szegedy 2015), forward and backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # torch's own kernels for the statistics and for x·a + b a channel: each reads memory once
        mean, variance = torch.ops.aten.batch_norm_update_stats(x, None, None, 0.0)
        count = torch.full((1,), x.numel() // x.shape[1], dtype=x.dtype, device=x.device)
        # Chan et al. 1983: means and sums of squares of parts combine exactly, without E[x²] − E[x]²
        parts = _all_gather(torch.cat([mean, variance * count, count]))
        means, sums, counts = parts[:, : len(mean)], parts[:, len(mean) : -1], parts[:, -1:]
        total = counts.sum()
        mean = (means * counts).sum(0) / total
        variance = (sums + counts * (means - mean).square()).sum(0) / total
        out = F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(variance + eps), total)
        ctx.mark_non_differentiable(mean, variance, total)
        return out, mean, variance, total

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: object) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        x, weight, mean, inverse, total = ctx.saved_tensors
        # Σ g·x̂ and Σ g over this rank's images, with the statistics of all
        _, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, None, None, mean, inverse, True, 0.0, [False, True, True]
        )
        sums = torch.stack([grad_bias, grad_weight])
        if dist.is_initialized():
            dist.all_reduce(sums)
        mean_grad, mean_product = sums / total
        # a·(g − mean(g) − x̂·mean(g·x̂)) with a = weight/σ: linear in x and g, a channel
        factor = inverse if weight is None else inverse * weight
        slope = -factor * inverse * mean_product
        a_channel = (1, -1, *[1] * (grad.ndim - 2))
        offset = -factor * mean_grad - slope * mean
        grad_x = torch.addcmul(offset.view(a_channel), x, slope.view(a_channel))
        grad_x.addcmul_(grad, factor.view(a_channel))
        return (grad_x, None, None, None) if weight is None else (grad_x, grad_weight, grad_bias, None)


class _CudaNorm(torch.autograd.Function):
    """The same by torch's CUDA kernels, which take 16-bit channels-last maps as they are.

    torch's own SyncBatchNorm reads the device in every layer, to leave out ranks without images; here all have some.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        eps: float,
        rate: float,
    ) -> Tensor:
        x = _dense(x)
        mean, inverse = torch.batch_norm_stats(x, eps)
        count = torch.full((1,), x.numel() // x.shape[1], dtype=mean.dtype, device=x.device)
        parts = _all_gather(torch.cat([mean, inverse, count]))
        n = len(mean)
        # the first argument only says in which type the rest is, if there are no running statistics to say it
        mean, inverse = torch.batch_norm_gather_stats_with_counts(
            mean, parts[:, :n], parts[:, n:-1], running_mean, running_var, rate, eps, parts[:, -1]
        )
        ctx.save_for_backward(x, weight, mean, inverse, parts[:, -1].to(torch.int32))
        return torch.batch_norm_elemt(x, weight, bias, mean, inverse, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse, counts = ctx.saved_tensors
        grad = _dense(grad)
        sum_grad, sum_product, grad_weight, grad_bias = torch.batch_norm_backward_reduce(
            grad, x, mean, inverse, weight, True, weight is not None, weight is not None
        )
        sums = torch.cat([sum_grad, sum_product])
        dist.all_reduce(sums)
        sum_grad, sum_product = sums.chunk(2)
        grad_x = torch.batch_norm_backward_elemt(grad, x, mean, inverse, weight, sum_grad, sum_product, counts)
        affine = (None, None) if weight is None else (grad_weight, grad_bias)
        return (grad_x, *affine, None, None, None, None)


def _dense(x: Tensor) -> Tensor:
    return x if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def _all_gather(x: Tensor) -> Tensor:
    if not dist.is_initialized():
        return x[None]
    if dist.get_backend() == "nccl":
        together = x.new_empty(world_size(), *x.shape)
        dist.all_gather_into_tensor(together, x)
        return together
    everyone = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(everyone, x)
    return torch.stack(everyone)


class SynchronisedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm whose training statistics are those of all ranks' batches together, on any device.

    Keys and shapes are those of torch's batch norm. In a world of one it is torch's batch norm. ``drop`` and ``act``
    follow it where it stands for one of timm's norms with activation.
    """

    def __init__(self, features: int, eps: float, momentum: float | None, affine: bool, track: bool) -> None:
        super().__init__(features, eps, momentum, affine, track)
        self.drop: nn.Module = nn.Identity()
        self.act: nn.Module = nn.Identity()

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.ndim}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise by the statistics of all ranks (training) or by the running ones (evaluation)."""
        out: Tensor = self.act(self.drop(self._normalise(input)))
        return out

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # calls among ranks end a compiled graph
    def _normalise(self, input: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(input)
        if input.device.type == "cuda":
            return self._cuda(input)
        wide = input if input.dtype in (torch.float32, torch.float64) else input.float()
        out: Tensor
        out, mean, variance, total = _SynchronisedNorm.apply(wide, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            self._track(mean, variance * (total / (total - 1)))
        return out.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        rate = self._counted_rate()
        self.running_mean.mul_(1 - rate).add_(mean.to(self.running_mean.dtype), alpha=rate)
        self.running_var.mul_(1 - rate).add_(variance.to(self.running_var.dtype), alpha=rate)

    def _counted_rate(self) -> float:
        """Count a batch; the rate at which its statistics move the running ones."""
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        return self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)

    def _cuda(self, input: Tensor) -> Tensor:
        track = self.track_running_stats
        running = (self.running_mean, self.running_var) if track else (None, None)
        rate = self._counted_rate() if track else 0.0
        out: Tensor = _CudaNorm.apply(input, self.weight, self.bias, *running, self.eps, rate)
        return out


@contextmanager
def statistics_at_rest(*modules: nn.Module) -> Iterator[None]:
    """Normalise by the batch as in training, and leave the running statistics of ``modules`` alone."""
    norms = [m for module in modules for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    tracked = [norm.track_running_stats for norm in norms]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm, before in zip(norms, tracked, strict=True):
            norm.track_running_stats = before


def moving_norms(network: nn.Module, *, but: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Batch norms of ``network``, outside ``but``, whose running statistics move in training."""
    left = set(but.modules())
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m not in left]
    return [norm for norm in norms if norm.running_mean is not None and norm.training]


def freeze_statistics(network: nn.Module, *, but: nn.Module) -> None:
    """Let the batch norms of ``network``, outside ``but``, normalise by their running statistics and keep them.

    Also in training: ``train()`` of the network does not change that any more.
    """
    left = set(but.modules())
    for norm in network.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm not in left:
            norm.eval()
            norm.train = lambda mode=True, norm=norm: norm  # type: ignore[method-assign, misc]


def synchronise_batch_norm(model: nn.Module) -> nn.Module:
    """Make every batch norm of ``model`` use the batch of all ranks. Names and values stay; works on every device."""
    for name, child in model.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and not isinstance(child, SynchronisedBatchNorm):
            setattr(model, name, _synchronised(child))
        else:
            synchronise_batch_norm(child)
    return model


def _synchronised(norm: nn.modules.batchnorm._BatchNorm) -> nn.Module:
    new = SynchronisedBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    new.weight, new.bias = norm.weight, norm.bias
    new.running_mean, new.running_var = norm.running_mean, norm.running_var
    new.num_batches_tracked = norm.num_batches_tracked
    new.train(norm.training)
    for name in ("drop", "act"):  # timm folds them into its norm
        if hasattr(norm, name):
            setattr(new, name, getattr(norm, name))
    return new
