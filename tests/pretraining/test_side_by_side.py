"""Views in threads of their own: what one pass after the other gives, in float64, and the same bits every time."""

import copy

import pytest
import torch
from torch import nn

from mocov3.distributed import World
from mocov3.models import moco
from mocov3.models.precision import precision_of
from mocov3.pretraining.gradients import MicroBatches, WholeBatch, gradients_of
from mocov3.pretraining.side_by_side import SideBySide, goes_side_by_side

CPU = torch.device("cpu")
WORLD, FP32 = World(0, 1, CPU), precision_of("fp32", CPU)


@pytest.fixture(autouse=True)
def two_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def model_of(arch, dtype=torch.float64):
    torch.manual_seed(0)
    vit = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8} if arch.startswith("vit") else {}
    model = moco.build(arch, image_size=16, dim=16, mlp_dim=32, temperature=0.2, **vit)
    return model.to(dtype=dtype, memory_format=torch.channels_last).train()


def views(dtype=torch.float64, side=16):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 3, s, s, generator=generator, dtype=dtype) for n, s in ((6, side), (6, side), (12, 8))]


def results(model, gradients, images, *, local):
    x1, x2, small = images
    loss, statistics = gradients(x1, x2, 0.9, small if local else None)
    return {
        "loss": loss,
        "feature_std": statistics.feature_std,
        **{name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
        **{f"after {name}": value.clone() for name, value in model.state_dict().items()},
    }


@pytest.mark.parametrize(("local", "cores"), [(False, 2), (True, 2), (True, 4)])  # local views: beside, by all cores
@pytest.mark.parametrize("arch", ["resnet10_w16", "vit_conv_micro"])
def test_as_one_pass_after_the_other(arch, local, cores):
    torch.set_num_threads(cores)
    model = model_of(arch)
    frozen = next(model.base_encoder.parameters())
    other, images = copy.deepcopy(model), views()
    first, second = SideBySide(model, precision=FP32), WholeBatch(other, world=WORLD, precision=FP32)
    for step in range(2):  # the second begins where batch statistics have moved
        frozen.requires_grad_(step == 0)  # frozen on the way
        if step == 1:  # weights of another tensor
            frozen.data = frozen.data.clone()
        next(other.base_encoder.parameters()).requires_grad_(step == 0)
        got, wanted = results(model, first, images, local=local), results(other, second, images, local=local)
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}")
        model.zero_grad(set_to_none=True)
        other.zero_grad(set_to_none=True)


def test_norms_that_rest_stay_at_rest():
    model = model_of("resnet10_w16")
    model.base_encoder.bn1.eval()
    before = model.base_encoder.bn1.running_mean.clone()
    results(model, SideBySide(model, precision=FP32), views(), local=True)
    assert torch.equal(model.base_encoder.bn1.running_mean, before)


@pytest.mark.parametrize("cores", [2, 4])
def test_statistics_that_rest_are_read_where_they_stand(cores):
    """A resume writes them into the network after its twin was made."""
    torch.set_num_threads(cores)
    model = model_of("resnet10_w16")
    model.base_encoder.bn1.eval()
    other = copy.deepcopy(model)
    gradients = SideBySide(model, precision=FP32)
    for network in (model, other):
        network.base_encoder.bn1.running_var.fill_(3.0)
    wanted = results(other, WholeBatch(other, world=WORLD, precision=FP32), views(), local=True)
    got = results(model, gradients, views(), local=True)
    assert all(torch.allclose(got[name], value, rtol=1e-9, atol=1e-11) for name, value in wanted.items())


@pytest.mark.parametrize("cores", [2, 4])
def test_heads_alone_are_trained_where_the_backbone_is_frozen(cores):
    torch.set_num_threads(cores)
    model = model_of("resnet10_w16")
    model.base_encoder.requires_grad_(False)
    model.base_encoder.fc.requires_grad_(True)
    other = copy.deepcopy(model)
    got = results(model, SideBySide(model, precision=FP32), views(), local=True)
    wanted = results(other, WholeBatch(other, world=WORLD, precision=FP32), views(), local=True)
    assert got.keys() == wanted.keys()
    assert all(torch.allclose(got[name], value, rtol=1e-9, atol=1e-11) for name, value in wanted.items())


def test_the_same_bits_every_time():
    once, again = (
        results(model, SideBySide(model, precision=FP32), views(torch.float32, 32), local=True)
        for model in (model_of("resnet10_w16", torch.float32) for _ in range(2))
    )
    assert all(torch.equal(again[name], value) for name, value in once.items())


@pytest.mark.parametrize(("cores", "wanted"), [(2, [1, 1, 1, 1, 1]), (4, [2, 2, 2, 2, 4])])
def test_each_view_has_its_share_of_the_cores(monkeypatch, cores, wanted):
    torch.set_num_threads(cores)
    model, seen = model_of("resnet10_w16"), []
    gradients = SideBySide(model, precision=FP32)
    features = type(model.base_encoder).features
    monkeypatch.setattr(
        type(model.base_encoder), "features", lambda *args: seen.append(torch.get_num_threads()) or features(*args)
    )
    x1, x2, local = views()
    gradients(x1, x2, 0.9, local)
    assert seen == wanted
    assert torch.get_num_threads() == cores


def test_what_fails_in_a_thread_is_raised():
    model = model_of("resnet10_w16")
    with pytest.raises(RuntimeError, match="channels"):
        SideBySide(model, precision=FP32)(views()[0], views()[1][:, :2], 0.9)


def test_where_views_go_side_by_side():
    def kind(model, **settings):
        return type(gradients_of(model, **{"world": WORLD, "precision": FP32, "micro_batch": 0, **settings}))

    model = model_of("resnet10_w16")
    assert kind(model) is SideBySide
    assert kind(model, micro_batch=2) is MicroBatches
    model.base_encoder.maxpool = nn.Dropout(0.1)
    assert not goes_side_by_side(model)
    compiled = model_of("resnet10_w16")
    compiled.compile_backbones("eager")
    assert not goes_side_by_side(compiled)
    torch.set_num_threads(1)
    assert kind(model_of("resnet10_w16")) is WholeBatch
