"""Micro-batches: gradients of the whole batch in the memory of a part (gradient caching), compared with one pass."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from conftest import TINY

from mocov3 import models
from mocov3.cli import main
from mocov3.config import PretrainConfig
from mocov3.data.device.pixels import PixelViewBatch, normalise
from mocov3.distributed import World
from mocov3.errors import UserError
from mocov3.models.precision import Precision
from mocov3.optim import build_optimizer
from mocov3.pretraining.assemble import check_micro_batch
from mocov3.pretraining.footprint import free_memory
from mocov3.pretraining.gradients import MicroBatches, WholeBatch
from mocov3.pretraining.step import Step

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
VIT = {"image_size": 32, "embed_dim": 48, "depth": 3, "num_heads": 3, "stop_grad_conv1": True}
KINDS = {
    "frozen projection": ("vit_small", VIT),
    "stochastic depth": ("vit_small", {**VIT, "drop_path_rate": 0.4}),
    "timm": ("timm/vit_tiny_patch16_224", {"image_size": 32, "depth": 2}),
}


@pytest.mark.parametrize(
    ("batch", "size", "message"),
    [(8, 1, "give 2 or more"), (3, 2, "give 0 (none)"), (7, 3, None), (5, 3, None), (11, 2, "give 3 or more")],
)
def test_batch_norm_never_meets_one_image(batch, size, message):
    model = build("resnet10_w16", {})
    config = PretrainConfig(arch="resnet10_w16", batch_size=batch, micro_batch=size)
    if message is None:
        check_micro_batch(size, config, ALONE, model)
        return
    with pytest.raises(UserError, match=re.escape(message)):
        check_micro_batch(size, config, ALONE, model)
    check_micro_batch(0, config, ALONE, model)
    check_micro_batch(size, config, ALONE, build("vit_tiny", {"image_size": 32}))  # which has none in its backbone
    many = dataclasses.replace(config, batch_size=2 * batch)  # two ranks' images meet in one batch norm
    check_micro_batch(size, many, World(0, 2, CPU), model)


def build(arch, dims, dtype=torch.float64):
    torch.manual_seed(3)
    return models.build(arch, dim=16, mlp_dim=32, temperature=0.2, **dims).to(dtype).train()


def views(images=10, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(images, 3, 32, 32, generator=generator, dtype=torch.float64).to(dtype) for _ in "12"]


def run(model, made, x1, x2, m=0.9):
    torch.manual_seed(7)
    model.zero_grad()
    loss, statistics = made(x1, x2, m)
    after = torch.rand(1)  # the generator must stand where it would
    state = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss, statistics, state, dict(model.named_buffers()), after


def apart(got, want):
    assert list(got) == list(want)
    return max(
        float((got[k].double() - want[k].double()).norm() / want[k].double().norm().clamp_min(1e-300))
        for k in want
        if not k.endswith(("encoder.norm.bias", "backbone.norm.bias", "predictor.1.running_mean"))
        and float(want[k].double().norm()) > 0
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [3, 4, 10, 64])  # 10 images: parts of 2 and 3, of 3 and 4, the whole
def test_gradients_are_those_of_the_whole_batch(kind, size):
    for dtype, bound in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        results = []
        for micro in (0, size):
            model = build(*KINDS[kind], dtype)
            settings = {"world": ALONE, "precision": Precision("fp32", CPU)}
            made = MicroBatches(model, size=size, **settings) if micro else WholeBatch(model, **settings)
            results.append(run(model, made, *views(dtype=dtype)))
        (loss, statistics, grads, buffers, after), (got, counted, ours, our_buffers, our_after) = results
        assert abs(float(got - loss)) <= bound * float(loss)
        assert apart(ours, grads) <= bound
        assert apart(our_buffers, buffers) <= bound
        assert (counted.retrieved, counted.queries) == (statistics.retrieved, statistics.queries)
        assert torch.equal(our_after, after)
        assert dtype == torch.float32 or not any("patch_embed" in name and kind != "timm" for name in ours)


def in_one_graph(model, x1, x2, m, parts):
    """The network whose backbone takes the parts one after the other, by automatic differentiation."""

    def of(features, x):
        return torch.cat([features(x[part]) for part in parts])

    queries = [model.queries(of(model.features, x)) for x in (x1, x2)]
    model.update_momentum_encoder(m)
    loss, statistics = model.loss(queries, [model.keys(of(model.key_features, x)) for x in (x1, x2)])
    loss.backward()
    return loss.detach(), statistics


@pytest.mark.parametrize(
    ("arch", "dims"),
    [
        ("resnet10_w32", {}),
        ("vit_conv_small", {"image_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3}),
        ("vit_small", {**VIT, "proj_drop_rate": 0.3, "attn_drop_rate": 0.2, "patch_drop_rate": 0.5}),
    ],
)
def test_where_images_meet_it_is_exact_for_the_network_it_says(arch, dims):
    # batch norm in the backbone: statistics of each micro-batch; dropout: drawn a micro-batch at a time
    parts = [slice(0, 5), slice(5, 10)]
    model, reference = build(arch, dims), build(arch, dims)
    made = MicroBatches(model, world=ALONE, precision=Precision("fp32", CPU), size=5)
    before = {k: b.clone() for k, b in reference.named_buffers()}
    want = run(reference, lambda *views: in_one_graph(reference, *views, parts), *views())
    got = run(model, made, *views())
    assert float(got[0]) == pytest.approx(float(want[0]), rel=1e-12)
    assert apart(got[2], want[2]) <= 1e-9
    for name, buffer in got[3].items():
        if "encoder" not in name or any(head in name for head in (".fc.", ".head.")):
            assert torch.allclose(buffer, want[3][name], rtol=1e-9, atol=1e-12), name
        elif name.endswith("num_batches_tracked"):
            assert int(buffer) == 2
        elif name.endswith("bn1.running_mean"):
            check_first_norm(name, buffer, before[name], build(arch, dims))


def check_first_norm(name, got, start, fresh):
    """The first batch norm sees the same input in every order of passes: r ← .9 r + .1 mean, once a view."""
    if name != "base_encoder.bn1.running_mean":
        return
    want = start
    for x in views():
        inputs = fresh.base_encoder.conv1(x)
        want = 0.9 * want + 0.1 * inputs.mean((0, 2, 3))
    assert torch.allclose(got, want, rtol=1e-9, atol=1e-12)


def test_recomputed_blocks_draw_the_same():
    results = []
    for recompute in (False, True):
        model = build(*KINDS["stochastic depth"])
        model.base_encoder.set_grad_checkpointing(recompute)
        results.append(run(model, MicroBatches(model, world=ALONE, precision=Precision("fp32", CPU), size=4), *views()))
    assert apart(results[1][2], results[0][2]) <= 1e-9


def test_sixteen_bits_err_as_little_as_in_one_pass():
    exact = build(*KINDS["frozen projection"], torch.float32)
    precise = run(exact, WholeBatch(exact, world=ALONE, precision=Precision("fp32", CPU)), *views(dtype=torch.float32))
    errors = []
    for kind in (WholeBatch, MicroBatches):
        model = build(*KINDS["frozen projection"], torch.float32)
        size = {"size": 4} if kind is MicroBatches else {}
        made = kind(model, world=ALONE, precision=Precision("bf16", CPU), **size)
        grads = run(model, made, *views(dtype=torch.float32))[2]
        assert all(g.dtype == torch.float32 for g in grads.values())
        whole, mine = (torch.cat([g[k].flatten() for k in grads]) for g in (precise[2], grads))
        errors.append(float((whole - mine).norm() / whole.norm()))
    assert 1e-4 < errors[0] < 0.3  # 16 bits show
    assert errors[1] < 1.25 * errors[0]


def test_non_finite_numbers_change_nothing():
    model = build("resnet10_w32", {}, torch.float32)
    optimizer = build_optimizer(model.parameters(), "lars", weight_decay=0.1, momentum=0.9)
    step = Step(model, optimizer, world=ALONE, precision=Precision("fp32", CPU), micro_batch=4)
    x1, x2 = views(8, torch.float32)
    assert step(x1, x2, lr=0.1, m=0.9).ok
    state = {k: v.clone() for k, v in model.state_dict().items() if "momentum" not in k and "tracked" not in k}
    x1[1, 0, 0, 0] = torch.nan
    assert not step(x1, x2, lr=0.1, m=0.9).ok
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())


def test_a_run_in_micro_batches_is_the_run(images, tmp_path, capsys):
    flags = [
        "pretrain",
        str(images),
        *TINY,
        "-a",
        "vit_small",
        "--patch-size",
        "16",
        "--optimizer",
        "adamw",
        "--lr",
        "0.0015",
        "--max-steps",
        "3",
    ]
    lines = {}
    for micro in ("0", "5", "auto"):
        folder = tmp_path / micro
        assert main([*flags, "--micro-batch", micro, "--output-dir", str(folder)]) == 0
        lines[micro] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        out = capsys.readouterr().out
        assert ("micro-batches of 5: loss and gradients are those of all 16 images, as in one" in out) == (micro == "5")
        assert ("fit in one pass" in out) == (micro == "auto")
    for micro in ("5", "auto"):
        for got, want in zip(lines[micro], lines["0"], strict=True):
            assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)
            assert got["grad_norm_last"] == pytest.approx(want["grad_norm_last"], rel=1e-4)


def test_it_says_what_batch_norm_makes_inexact(images, tmp_path, capsys):
    flags = ["pretrain", str(images), *TINY, "--max-steps", "1", "--micro-batch", "4", "--output-dir", str(tmp_path)]
    assert main(flags) == 0
    assert "resnet10_w16 has batch norm, which normalises by 4 images at a time" in capsys.readouterr().out
    for wrong, message in (("-1", "--micro-batch must be"), ("many", "--micro-batch")):
        try:
            code = main([*flags[:-4], "--micro-batch", wrong, "--output-dir", str(tmp_path / "x")])
        except SystemExit as stop:
            code = stop.code
        assert code == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


@pytest.mark.parametrize("parameters", [False, True])
def test_views_are_normalised_in_parts(parameters):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    left = np.zeros((6, 12), np.float32) if parameters else None
    if left is not None:
        left[[0, 3], 9:12] = (1, 0, 1)  # grey, solarised
        left[2, 10] = 1.5  # blurred
    settings = (CPU, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    lazy = PixelViewBatch(pixels, *settings, left)
    assert len(lazy) == 6
    assert torch.equal(torch.cat([lazy[0:2], lazy[2:6]]), normalise(pixels, *settings, left))


@pytest.mark.parametrize(
    ("free", "fraction", "expected"),
    [
        (60, 1.0, 60 + 10 - 4),  # what the cache holds is free
        (60, 0.25, 20 - 4),  # the process may take a quarter
        (5, 1.0, 5 + 10 - 4),  # others use the device
    ],
)
def test_free_memory_of_a_gpu_counts_the_cache_and_the_limit_of_the_process(free, fraction, expected, monkeypatch):
    for name, value in (
        ("mem_get_info", (free, 80)),
        ("memory_allocated", 4),
        ("memory_reserved", 10),
        ("get_per_process_memory_fraction", fraction),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value, raising=False)
    assert free_memory(torch.device("cuda")) == expected
