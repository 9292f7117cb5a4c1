"""Synchronised batch norm on CUDA, by stand-ins for torch's kernels that ask for the types that those ask for."""

import pytest
import torch
import torch.distributed as dist

from mocov3.distributed import SynchronisedBatchNorm
from mocov3.distributed.batch_norm import statistics_at_rest


def wide(x):
    return x.transpose(0, 1).flatten(1).float()


def stats(x, eps):
    return wide(x).mean(1), torch.rsqrt(wide(x).var(1, unbiased=False) + eps)


def gather_stats(first, means, inverses, running_mean, running_var, momentum, eps, counts):
    """As torch's batch_norm_gather_stats_with_counts: what is not there cannot say the type."""
    assert counts.dtype == (first if running_mean is None else running_mean).dtype
    n, counts = counts.sum(), counts[:, None]
    mean = (means * counts).sum(0) / n
    variance = ((inverses**-2 - eps + (means - mean) ** 2) * counts).sum(0) / n
    if running_mean is not None:
        running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
        running_var.mul_(1 - momentum).add_(variance * n / (n - 1), alpha=momentum)
    return mean, torch.rsqrt(variance + eps)


def elemt(x, weight, bias, mean, inverse, eps):
    shape = (1, -1, 1, 1)
    out = (x.float() - mean.view(shape)) * (inverse * weight).view(shape) + bias.view(shape)
    return out.to(x.dtype)


def backward_reduce(grad, x, mean, inverse, weight, *wanted):
    assert wanted == (True, True, True)
    g, centred = wide(grad), wide(x) - mean[:, None]
    product = (g * centred).sum(1)
    return g.sum(1), product, product * inverse, g.sum(1)


def backward_elemt(grad, x, mean, inverse, weight, sum_grad, sum_product, counts):
    assert counts.dtype == torch.int32
    n, shape = counts.sum(), (1, -1, 1, 1)
    centred = x.float() - mean.view(shape)
    inner = grad.float() - (sum_grad / n).view(shape) - centred * (inverse**2 * sum_product / n).view(shape)
    return ((inverse * weight).view(shape) * inner).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("at_rest", [False, True])  # as local views pass through it
def test_it_is_batch_norm(monkeypatch, dtype, at_rest):
    for name, stand_in in {
        "batch_norm_stats": stats,
        "batch_norm_gather_stats_with_counts": gather_stats,
        "batch_norm_elemt": elemt,
        "batch_norm_backward_reduce": backward_reduce,
        "batch_norm_backward_elemt": backward_elemt,
    }.items():
        monkeypatch.setattr(torch, name, stand_in)
    monkeypatch.setattr(dist, "all_reduce", lambda _: None)
    torch.manual_seed(0)
    layer = SynchronisedBatchNorm(6, 1e-5, 0.1, True, True)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    plain = torch.nn.BatchNorm2d(6)
    plain.load_state_dict(layer.state_dict())
    x = (torch.randn(4, 6, 3, 5) * 2 + 1).to(dtype)
    a, b = x.clone().requires_grad_(), x.float().requires_grad_()
    if at_rest:
        with statistics_at_rest(layer, plain):
            got, expected = layer._cuda(a), plain(b)
    else:
        got, expected = layer._cuda(a), plain(b)
    bounds = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    weights = torch.randn(4, 6, 3, 5).to(dtype)
    (got * weights).sum().backward()
    (expected * weights.float()).sum().backward()
    assert got.dtype == a.grad.dtype == dtype
    torch.testing.assert_close(got.float(), expected, **bounds)
    torch.testing.assert_close(a.grad.float(), b.grad, **bounds)
    for p, q in zip(layer.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, **bounds)
    for p, q in zip(layer.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert int(layer.num_batches_tracked) == (not at_rest)
