"""Muon against its formula, torch's own AdamW for the rest, and torch's own Muon."""

import pytest
import torch
from torch import nn

from mocov3.config import PretrainConfig
from mocov3.errors import UserError
from mocov3.optim import Muon, name_by_state, name_of
from mocov3.optim.muon import orthogonal


def by_rounds(x):
    """The orthogonal factor as the rounds are written, one after the other, of one matrix."""
    if len(x) > x.shape[1]:
        return by_rounds(x.T).T
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


@pytest.mark.parametrize("shape", [(4, 4), (5, 40), (40, 5), (64, 27), (1, 6), (6, 1)])
def test_rounds_by_their_small_squares(shape):
    x = torch.randn(3, *shape, dtype=torch.float64)
    wanted = torch.stack([by_rounds(matrix) for matrix in x])
    assert torch.allclose(orthogonal(x), wanted, rtol=1e-9, atol=1e-10)
    assert torch.allclose(orthogonal(x.float()).double(), wanted, atol=1e-3)


def test_directions_stay_and_sizes_become_alike():
    u, v = (torch.linalg.qr(torch.randn(n, 8, dtype=torch.float64)).Q for n in (12, 30))
    sizes = torch.logspace(0, -2, 8, dtype=torch.float64)
    found = u.T @ orthogonal((u * sizes @ v.T)[None])[0] @ v
    assert torch.allclose(found, torch.diag(found.diag()), atol=1e-10)
    assert found.diag().min() > 0.65
    assert found.diag().max() < 1.25


def test_a_gradient_of_zeros_moves_nothing():
    assert torch.equal(orthogonal(torch.zeros(1, 3, 5)), torch.zeros(1, 3, 5))
    faded = orthogonal(torch.full((1, 3, 5), 1e-25))  # momentum after many such, whose squares are zero
    assert bool(torch.isfinite(faded).all())
    assert faded.abs().max() < 1e-3


def test_steps_by_the_formula():
    """Kernels in either memory order, 1×1 ones, equal shapes, wide and tall matrices; tokens and biases by AdamW."""
    shapes = [(8, 3, 3, 3), (8, 3, 3, 3), (16, 8, 1, 1), (40, 7), (7, 40), (5,), (1, 2, 4)]
    params = [nn.Parameter(torch.randn(s, dtype=torch.float64)) for s in shapes]
    params[0].data = params[0].data.to(memory_format=torch.channels_last)
    unused = nn.Parameter(torch.ones(3, 3))
    optimizer = Muon([*params, unused], lr=0.1, weight_decay=0.05)
    matrices, others = [p for p in params if p.ndim in (2, 4)], [p for p in params if p.ndim in (1, 3)]
    weights = [p.detach().clone() for p in matrices]
    momenta = [torch.zeros_like(w) for w in weights]
    copies = [nn.Parameter(p.detach().clone()) for p in others]
    theirs = torch.optim.AdamW(copies, lr=0.1, weight_decay=0.05, eps=1e-8)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn(p.shape, dtype=torch.float64)
        for copy, p in zip(copies, others, strict=True):
            copy.grad = p.grad.clone()
        for i, p in enumerate(matrices):
            momenta[i] = 0.95 * momenta[i] + 0.05 * p.grad
            rows = (0.05 * p.grad + 0.95 * momenta[i]).flatten(1)
            update = 0.2 * max(rows.shape) ** 0.5 * by_rounds(rows).view_as(p)
            weights[i] = (1 - 0.1 * 0.05) * weights[i] - 0.1 * update
        optimizer.step()
        theirs.step()
    for p, wanted in zip([*matrices, *others], [*weights, *copies], strict=True):
        assert torch.allclose(p, wanted, rtol=1e-9, atol=1e-10)
    assert optimizer.state[params[0]]["mu"].stride() == params[0].stride()
    assert unused not in optimizer.state


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has had its own since 2.9")
def test_torchs_own_goes_the_same_way():
    ours = nn.Parameter(torch.randn(24, 60))
    theirs = nn.Parameter(ours.detach().clone())
    one = Muon([ours], lr=0.02, weight_decay=0.1)
    other = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    before = ours.detach().clone()
    for _ in range(3):
        ours.grad = torch.randn(24, 60)
        theirs.grad = ours.grad.clone()
        one.step()
        other.step()
    moved, wanted = ours - before, theirs - before
    assert (moved - wanted).norm() < 0.05 * wanted.norm()  # torch's rounds are in bfloat16


def test_an_update_is_about_as_large_as_the_learning_rate_says():
    p = nn.Parameter(torch.zeros(64, 32, 3, 3))
    optimizer = Muon([p], lr=0.01)
    p.grad = torch.randn_like(p)
    optimizer.step()
    assert 0.7 * 0.002 < p.detach().square().mean().sqrt() < 1.2 * 0.002


def test_a_run_that_goes_on_from_its_state_has_the_same_bits():
    torch.manual_seed(0)
    gradients = torch.randn(4, 12)

    def begun(weights):
        net = nn.Linear(3, 3)
        net.load_state_dict(weights)
        return net, Muon(net.parameters(), lr=0.1, weight_decay=0.1)

    def go(net, optimizer, part):
        for g in part:
            net.weight.grad, net.bias.grad = g[:9].view(3, 3).clone(), g[9:].clone()
            optimizer.step()
        return {name: value.clone() for name, value in net.state_dict().items()}

    start = nn.Linear(3, 3).state_dict()
    whole = go(*begun(start), gradients)
    net, optimizer = begun(start)
    half, state = go(net, optimizer, gradients[:2]), optimizer.state_dict()
    again, fresh = begun(half)
    fresh.load_state_dict(state)
    ended = go(again, fresh, gradients[2:])
    assert all(torch.equal(whole[name], ended[name]) for name in whole)
    assert name_of(fresh) == "muon"
    assert name_by_state({entry for values in state["state"].values() for entry in values}) == "muon"


def test_parts_of_matrices_are_refused():
    with pytest.raises(UserError, match="--optimizer muon needs whole matrices"):
        PretrainConfig(optimizer="muon", fsdp=True).check()
    for bad in ({"lr": -1.0}, {"weight_decay": -1.0}, {"momentum": -1.0}):
        with pytest.raises(ValueError, match="must be 0 or more"):
            Muon([nn.Parameter(torch.ones(2, 2))], **bad)
