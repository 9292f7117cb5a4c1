"""The method against closed forms and torch itself: loss, momentum update, batch norm over ranks, one step's guard."""

import math

import numpy as np
import pytest
import rank_tasks
import torch
from conftest import fill_model
from hypothesis import given, settings
from hypothesis import strategies as st
from starting import launch_ranks

from mocov3 import losses, models
from mocov3.data.device.pixels import normalise, rounded
from mocov3.distributed import World, synchronise_batch_norm
from mocov3.distributed.batch_norm import _SynchronisedNorm
from mocov3.evaluation.neighbours import centroid_predict, knn_accuracy, knn_predict
from mocov3.models.precision import Precision, resolve_precision
from mocov3.optim import build_optimizer
from mocov3.pretraining.step import Step

CPU = torch.device("cpu")


@given(st.integers(1, 4096), st.floats(0.05, 2))
@settings(deadline=None, max_examples=50)
def test_start_and_floor_of_the_loss(n, t):
    alike = torch.zeros(1, n, dtype=torch.float64)
    found = torch.zeros(1, n, dtype=torch.float64)
    found[0, 0] = 1 / t
    target = torch.zeros(1, dtype=torch.long)
    assert losses.loss_start(t, n) == pytest.approx(2 * losses.contrastive_loss(alike, target, t).item(), abs=1e-9)
    assert losses.loss_floor(t, n) == pytest.approx(2 * losses.contrastive_loss(found, target, t).item(), abs=1e-9)
    # the formula as issue and paper write it
    if 1 / t < 500:
        assert losses.loss_floor(t, n) == pytest.approx(4 * t * (-1 / t + math.log(math.exp(1 / t) + n - 1)), abs=1e-9)


def test_loss_is_at_least_float32_under_autocast():
    q = torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert losses.logits(q, q, 0.2).dtype == torch.float32
        assert losses.logits(q.bfloat16(), q.bfloat16(), 0.2).dtype == torch.float32
        assert losses.logits(q.double(), q.double(), 0.2).dtype == torch.float64


def tiny(**kwargs):
    return models.build("vit_small", image_size=32, embed_dim=24, depth=1, num_heads=3, dim=8, mlp_dim=16, **kwargs)


def test_first_loss_is_that_of_random_features():
    # at τ 1 the keys of unrelated embeddings look alike: 4τ·ln N within 1 %
    model = models.build("resnet18", dim=256, mlp_dim=512).train()
    x = torch.randn(32, 3, 32, 32)
    assert model(x, torch.randn_like(x), 0.99).item() == pytest.approx(losses.loss_start(1.0, 32), rel=0.01)


def test_momentum_update_covers_frozen_parameters_and_no_buffer():
    model = fill_model(tiny(stop_grad_conv1=True))
    q = {k: p.clone() for k, p in model.base_encoder.named_parameters()}
    k0 = {k: p.clone() for k, p in model.momentum_encoder.named_parameters()}
    buffers = {k: b.clone() for k, b in model.momentum_encoder.named_buffers()}
    model.update_momentum_encoder(0.9)
    for key, p in model.momentum_encoder.named_parameters():
        assert torch.allclose(p, 0.9 * k0[key] + 0.1 * q[key], rtol=2e-7, atol=1e-9), key
    assert all(torch.equal(b, buffers[k]) for k, b in model.momentum_encoder.named_buffers())


def test_keys_carry_no_gradient():
    model = tiny().train()
    model(torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32), 0.9).backward()
    assert all(p.grad is None for p in model.momentum_encoder.parameters())
    assert not any(p.requires_grad for p in model.momentum_encoder.parameters())


def test_perfect_retrieval_is_counted():
    model = tiny()
    e = torch.eye(8)
    _, statistics = model.loss((e, e), (e, e))
    assert statistics.retrieved.item() == statistics.queries == 16
    _, statistics = model.loss((e, e), (e.roll(1, 0), e.roll(1, 0)))
    assert statistics.retrieved.item() == 0


def test_synchronised_batch_norm_is_batch_norm_of_the_whole_batch():
    assert launch_ranks(rank_tasks.batch_norm, None, 2) == 0


@pytest.mark.parametrize("shape", [(6, 5), (4, 5, 7), (4, 5, 3, 6)])
@pytest.mark.parametrize("affine", [True, False])
def test_synchronised_batch_norm_asks_torch_for_nothing_it_may_refuse(monkeypatch, shape, affine):
    """torch 2.11 takes no ``eps`` of 0 in ``batch_norm``; gradients are those of torch's own in any case."""
    plain = torch.nn.functional.batch_norm

    def strict(*args, eps=1e-5, **kwargs):
        assert (args[7] if len(args) > 7 else eps) > 0
        return plain(*args, **({} if len(args) > 7 else {"eps": eps}), **kwargs)

    norm = torch.nn.BatchNorm1d(5, eps=1e-3, affine=affine).double()
    norm._check_input_dim = lambda x: None
    x = (3 + 2 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    weights = torch.randn(shape, dtype=torch.float64)
    if affine:
        torch.nn.init.normal_(norm.weight)
    wanted = [x, *norm.parameters()]
    want = torch.autograd.grad((norm(x) * weights).sum(), wanted)
    monkeypatch.setattr(torch.nn.functional, "batch_norm", strict)
    out = _SynchronisedNorm.apply(x, norm.weight, norm.bias, norm.eps)[0]
    got = torch.autograd.grad((out * weights).sum(), wanted)
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_synchronised_batch_norm_keeps_timms_activation():
    import timm

    model = timm.create_model("resnet10t", num_classes=0).eval()
    efficient = timm.create_model("mobilenetv3_small_050", num_classes=0).eval()  # its norms hold the activation
    x = torch.randn(2, 3, 64, 64)
    for net in (model, efficient):
        before, keys = net(x), list(net.state_dict())
        synchronise_batch_norm(net)
        assert list(net.state_dict()) == keys
        assert torch.equal(net(x), before)


def make_step(model, optimizer="adamw", precision="fp32"):
    made = build_optimizer(model.parameters(), optimizer, weight_decay=0.1, momentum=0.9)
    return Step(model, made, world=World(0, 1, CPU), precision=Precision(precision, CPU))


@pytest.mark.parametrize("optimizer", ["adamw", "lars", "muon"])
def test_numbers_that_are_not_finite_change_nothing(optimizer):
    model = tiny().train()
    step = make_step(model, optimizer)
    x = torch.randn(4, 3, 32, 32)
    step(x, x.flip(0), lr=1e-3, m=0.9)
    trained = {k: v.clone() for k, v in model.state_dict().items()}
    state = {k: v.clone() for s in step.optimizer.state.values() for k, v in s.items()}
    bad = x.clone()
    bad[0, 0, 0, 0] = torch.nan
    outcome = step(bad, x, lr=1e-3, m=1.0)
    assert not outcome.ok
    assert step.skipped.item() == 1
    for key, value in model.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(value, trained[key]), key
    assert all(torch.equal(v, state[k]) for k, v in list(step.optimizer.state.values())[-1].items())
    assert step(x, x.flip(0), lr=1e-3, m=0.9).ok
    assert all(v.isfinite().all() for v in model.state_dict().values())


@pytest.mark.parametrize("optimizer", ["adamw", "lars", "muon"])
def test_masked_update_of_gpus_is_the_plain_one(optimizer):
    # what runs on a GPU: an update told on the device whether to count, here on CPU tensors
    results = []
    for masked in (False, True):
        torch.manual_seed(1)
        model = tiny().double().train()
        made = build_optimizer(model.parameters(), optimizer, weight_decay=0.1, momentum=0.9)
        if optimizer == "adamw" and not masked:  # torch's own, a parameter at a time
            made = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.1, foreach=False, fused=False)
        step = Step(model, made, world=World(0, 1, CPU), precision=Precision("fp32", CPU))
        if masked:
            step.world = World(0, 1, torch.device("meta"))  # any device that is not the CPU takes that path
        for i in range(4):
            x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
            if i == 2:
                x[0, 0, 0, 0] = torch.inf
            step(x, x.flip(0), lr=1e-3, m=0.9)
        assert step.skipped.item() == 1
        results.append(model.state_dict())
    for key, value in results[0].items():
        if not key.endswith(("encoder.norm.bias", "qkv.bias", "num_batches_tracked")):
            assert torch.allclose(value, results[1][key], rtol=1e-7, atol=1e-9), key


def test_bf16_step_trains():
    model = tiny(temperature=0.2).train()
    step = make_step(model, precision="bf16")
    x = torch.randn(8, 3, 32, 32)
    first = step(x, x, lr=1e-2, m=0.9).loss.item()
    for _ in range(10):
        last = step(x, x, lr=1e-2, m=0.9).loss.item()
    assert last < 0.9 * first


def test_precision_of_each_door():
    assert resolve_precision("auto", CPU, script_door=True) == "fp32"
    assert resolve_precision("fp16", CPU, script_door=False) == "fp32"
    assert resolve_precision("bf16", CPU, script_door=True) == "bf16"
    assert resolve_precision("auto", torch.device("cuda"), script_door=True) == "fp16"


def test_normalise():
    pixels = np.arange(2 * 2 * 3 * 3, dtype=np.uint8).reshape(2, 2, 3, 3)
    x = normalise(pixels, CPU, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    want = (pixels / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]
    assert np.abs(x.permute(0, 2, 3, 1).numpy() - want).max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pixels_are_normalised_to_16_bits_by_one_rounding(dtype):
    sent = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(2, 16, 16, 3).permute(0, 3, 1, 2)
    offset, scale = (torch.tensor(v).view(1, 3, 1, 1) for v in ([120.0, 110.0, 100.0], [0.015, 0.017, 0.02]))
    x = rounded(sent.contiguous(memory_format=torch.channels_last), offset, scale, dtype)
    want = (sent.double() - offset.double()) * scale.double()
    assert x.dtype == dtype
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert ((x.double() - want).abs() <= want.abs() * torch.finfo(dtype).eps / 2 + 1e-6).all()


def test_knn_is_scikit_learns():
    from sklearn.neighbors import KNeighborsClassifier

    rng = np.random.Generator(np.random.PCG64(0))
    bank, queries = rng.standard_normal((600, 12)), rng.standard_normal((100, 12))
    labels = rng.integers(0, 5, 600)
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    theirs = KNeighborsClassifier(20, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)).fit(
        unit(bank), labels
    )
    ours = knn_predict(torch.from_numpy(bank), torch.from_numpy(labels), torch.from_numpy(queries))
    assert (ours.numpy() == theirs.predict(unit(queries))).all()
    assert knn_accuracy(
        torch.from_numpy(bank), torch.from_numpy(labels), torch.from_numpy(bank), torch.from_numpy(labels), k=1
    ) == pytest.approx(100)


def test_centroids():
    centres = 10 * torch.eye(3, 4)
    points = centres.repeat_interleave(5, 0) + 0.1 * torch.randn(15, 4)
    labels = torch.arange(3).repeat_interleave(5)
    assert (centroid_predict(points, labels, points, centre=points.mean(0)) == labels).all()
