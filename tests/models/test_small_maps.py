"""Small maps multiplied as a whole: the same numbers, weights and exports as a convolution."""

import copy

import pytest
import torch
from torch import nn

from mocov3 import models
from mocov3.models import small_maps
from mocov3.models.small_maps import SmallMapConv2d, use_whole_maps


@pytest.fixture(params=[False, True], ids=["by products", "by convolutions"])
def half_wide(request, monkeypatch):
    """Both kinds of processors."""
    monkeypatch.setattr(small_maps, "mkl_is_half_wide", lambda: request.param)


@pytest.fixture
def taken(monkeypatch):
    """Calls of the other way."""
    calls = []
    apply = small_maps._WholeMaps.apply
    monkeypatch.setattr(small_maps._WholeMaps, "apply", lambda *args: calls.append(args) or apply(*args))
    return calls


def layer(kernel, **settings):
    torch.manual_seed(0)
    padding = tuple(k // 2 for k in kernel)
    return nn.Conv2d(12, 20, kernel, padding=padding, bias=False, **settings)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("batch", [32, 37])
@pytest.mark.parametrize(
    ("kernel", "size"), [((3, 3), (2, 2)), ((3, 3), (1, 1)), ((3, 3), (1, 2)), ((7, 7), (4, 3)), ((3, 5), (2, 3))]
)
def test_maps_are_convolved_alike(half_wide, taken, kernel, size, batch, layout):
    plain = layer(kernel)
    whole = copy.deepcopy(plain)
    use_whole_maps(whole)
    assert type(whole) is SmallMapConv2d
    x = torch.randn(batch, 12, *size).to(memory_format=layout)
    found = []
    for convolve in (plain, whole):
        input = x.clone().requires_grad_()
        y = convolve(input)
        (y * torch.linspace(0.1, 1, y.numel()).view_as(y)).sum().backward()
        found.append((y.detach(), input.grad, convolve.weight.grad))
    assert len(taken) == 1
    for want, got in zip(*found, strict=True):
        assert got.shape == want.shape
        assert (got - want).norm() <= 1e-6 * want.norm()


def test_gradients_are_those_of_the_differences():
    """Against finite differences, in float64."""
    x = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    kernel = torch.randn(4, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(small_maps._WholeMaps.apply, (x, kernel))


def test_autocast_is_obeyed(taken):
    whole = layer((3, 3))
    x = torch.randn(32, 12, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        want = whole(x)
        use_whole_maps(whole)
        got = whole(x)
        got.float().sum().backward()
    assert taken
    assert got.dtype == torch.bfloat16
    assert whole.weight.grad.dtype == torch.float32
    torch.testing.assert_close(got.float(), want.float(), rtol=0.02, atol=0.02)


def test_the_way_is_taken_where_it_pays(taken):
    whole = layer((3, 3))
    use_whole_maps(whole)

    def way(*shape, dtype=torch.float32):
        taken.clear()
        with torch.no_grad():
            whole.to(dtype)(torch.randn(shape, dtype=dtype))
        return bool(taken)

    assert way(32, 12, 2, 2)
    assert not any(way(*shape) for shape in [(31, 12, 2, 2), (32, 12, 3, 2), (32, 12, 2, 3), (12, 2, 2)])
    assert not way(32, 12, 2, 2, dtype=torch.float64)
    others = [
        nn.Conv2d(12, 20, 1, bias=False),
        nn.Conv2d(12, 20, 3, bias=False),
        nn.Conv2d(12, 20, 3, padding=1),
        layer((3, 3), stride=3),
        layer((3, 3), groups=4),
        layer((3, 3), padding_mode="circular"),
        layer((2, 2)),
        nn.Conv2d(12, 20, 3, padding=2, dilation=2, bias=False),
        nn.Conv2d(12, 20, 3, padding="same", bias=False),
    ]
    for other in others:
        use_whole_maps(other)
        assert type(other) is nn.Conv2d


@pytest.mark.parametrize("batch", [5, 128])
def test_a_map_of_one_position_is_halved_by_the_middle_of_the_kernel(half_wide, taken, batch):
    """Against float64; with these sizes in bfloat16 some processors' own gradient of the weights is garbage."""
    torch.manual_seed(0)
    plain = nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False)
    exact, x = copy.deepcopy(plain).double(), torch.randn(batch, 32, 1, 1)
    exact(x.double()).square().sum().backward()
    use_whole_maps(plain)
    for autocast, bound in ((False, 1e-6), (True, 0.02)):
        plain.zero_grad()
        taken.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            plain(x).float().square().sum().backward()
        assert len(taken) == 1
        assert (plain.weight.grad - exact.weight.grad).norm() <= bound * exact.weight.grad.norm()
    taken.clear()
    plain(torch.randn(batch, 32, 2, 2))
    assert not taken


def test_a_step_is_what_it_was_and_exports_stay(monkeypatch, taken):
    """The whole model on images so small that the last stage has maps of 2×2."""
    torch.manual_seed(0)
    model = models.build("resnet10_w32", image_size=32, dim=8, mlp_dim=16, small_stem=False)
    assert sum(type(m) is SmallMapConv2d for m in model.base_encoder.modules()) == 9  # four of them halve
    x1, x2 = torch.randn(2, 32, 3, 32, 32)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    found = []
    for least in (33, 32):
        monkeypatch.setattr(small_maps, "LEAST_BATCH", least)
        model.load_state_dict(state)
        model.zero_grad()
        loss = model(x1, x2, 0.9)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((loss.detach(), gradient))
        assert len(taken) == (4 if least == 32 else 0)
    (loss, gradient), (loss2, gradient2) = found
    assert abs(loss2 - loss) <= 1e-5 * loss
    assert (gradient2 - gradient).norm() <= 1e-5 * gradient.norm()
    taken.clear()
    program = torch.export.export(model.base_encoder.eval(), (x1,))
    assert not taken
    assert sum("conv2d" in str(node.target) for node in program.graph.nodes) == 12
