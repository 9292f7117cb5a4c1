"""Fast steps: one pass for two views, few launches, no reading of the device, compiled and recomputed networks."""

import copy
import dataclasses
import functools
import json
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from reads import Reads
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch.utils._python_dispatch import TorchDispatchMode

from mocov3 import models
from mocov3.cli import main
from mocov3.config import PretrainConfig
from mocov3.data import Batch, Work
from mocov3.data.device.pixels import normalise
from mocov3.data.device.token_strips import strips
from mocov3.distributed import World
from mocov3.errors import UserError
from mocov3.metrics import MetricsLine
from mocov3.models import MoCo, vit
from mocov3.models.compiled import compile_features
from mocov3.models.gelu import gelu
from mocov3.models.patches import project_patches
from mocov3.models.precision import Precision
from mocov3.optim import LARS, build_optimizer
from mocov3.output.log import Session
from mocov3.pretraining.assemble import build_model, resolve_compile
from mocov3.pretraining.log import PretrainingLog
from mocov3.pretraining.recorder import Recorder
from mocov3.pretraining.step import Step
from mocov3.running.counters import Counters

CPU = torch.device("cpu")
VIT = {"image_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3, "dim": 8, "mlp_dim": 16}


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def gradients(model, x1, x2, m=0.9):
    model.zero_grad()
    loss = model(x1, x2, m)
    loss.backward()
    return loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def apart(a, b):
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).norm() / b[k].norm().clamp_min(1e-30)) for k in b if not k.endswith("norm.bias"))


def test_views_share_a_pass_where_they_cannot_meet(float64):
    torch.manual_seed(0)
    together = models.build("vit_small", **VIT).train()
    apart_model = models.build("vit_small", **VIT).train()
    apart_model.load_state_dict(together.state_dict())
    assert not together.views_meet
    apart_model.views_meet = True  # what batch norm in the backbone asks for
    passes = []
    together.base_encoder.patch_embed.register_forward_hook(lambda *_: passes.append(1))
    x1, x2 = torch.randn(2, 4, 3, 32, 32)
    (loss, got), (expected, want) = gradients(together, x1, x2), gradients(apart_model, x1, x2)
    assert len(passes) == 1
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert apart(got, want) <= 1e-10


@pytest.mark.parametrize(
    ("arch", "meet"),
    [
        ("resnet10_w32", True),
        ("vit_conv_small", True),
        ("vit_tiny", False),
        ("timm/resnet10t", True),
        ("timm/convnext_atto", False),
        ("timm/resnet26t.ra2_in1k", True),
    ],
)
def test_batch_statistics_are_found(arch, meet):
    dims = {"embed_dim": 24, "depth": 1, "num_heads": 3} if "vit" in arch else {}
    assert models.build(arch, image_size=32, dim=8, mlp_dim=8, **dims).views_meet == meet


def test_recomputed_blocks_give_the_same_gradients(float64):
    config = PretrainConfig(arch="vit_tiny", image_size=32, moco_dim=8, moco_mlp_dim=16, stop_grad_conv1=True)
    torch.manual_seed(0)
    plain = build_model(config, World(0, 1, CPU))
    recomputed = build_model(PretrainConfig(**{**vars(config), "grad_checkpoint": True}), World(0, 1, CPU))
    recomputed.load_state_dict(plain.state_dict())
    calls = []
    for model in (plain, recomputed):
        model.base_encoder.blocks[0].register_forward_pre_hook(lambda module, *_: calls.append(id(module)))
    x1, x2 = torch.randn(2, 2, 3, 32, 32)
    (loss, want), (again, got) = gradients(plain, x1, x2), gradients(recomputed, x1, x2)
    assert len(calls) == 3  # once, and twice where it is recomputed
    assert torch.equal(loss, again)
    assert all(torch.equal(got[k], want[k]) for k in want)


def test_blocks_with_batch_norm_are_not_recomputed():
    config = PretrainConfig(arch="timm/resnet10t", grad_checkpoint=True, moco_dim=8, moco_mlp_dim=8)
    with pytest.raises(UserError, match="batch statistics"):
        build_model(config, World(0, 1, CPU))


def test_compiled_backbones_train_alike(monkeypatch):
    # the backend only changes what graphs become; that they are captured whole is what is tested
    backbones = functools.partialmethod(MoCo.compile_backbones, backend="eager")
    monkeypatch.setattr(MoCo, "compile_backbones", backbones)
    # what tests check at every call, some versions of dynamo cannot trace
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = models.build("vit_small", **VIT).train()
        optimizer = build_optimizer(model.parameters(), "adamw", weight_decay=0.1, momentum=0.9)
        if compiled:
            model.compile_backbones()
        step = Step(model, optimizer, world=World(0, 1, CPU), precision=Precision("fp32", CPU))
        losses, graphs = [], []
        for i in range(3):
            losses.append(float(step(*torch.randn(2, 4, 3, 32, 32), lr=1e-3, m=0.9 + i / 100).loss))
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        found.append(losses)
        assert (graphs[0] > 0) == compiled
        assert graphs[0] == graphs[2], "compiled anew at later steps"
    assert found[0] == found[1]
    model.eval()
    with torch.no_grad():
        model.features(torch.randn(3, 3, 32, 32))  # evaluation stays eager
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs[2]


def test_where_nothing_compiles_the_backbone_runs_eagerly_and_says_so_once(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as above

    def broken(*_):
        raise RuntimeError("no C compiler\nat all")

    torch._dynamo.reset()
    said = []
    model = models.build("resnet10_w16", dim=8, mlp_dim=8).train()
    x = torch.randn(2, 3, 32, 32)
    expected = copy.deepcopy(model).features(x)
    compile_features([model.base_encoder], broken, say=said.append)
    assert torch.equal(model.features(x), expected)
    model.features(x)
    assert len(said) == 1
    assert "no C compiler" in said[0]
    assert "at all" not in said[0]


@pytest.mark.parametrize(
    ("flags", "device", "before", "compiled"),
    [
        ({}, "cpu", None, False),
        ({}, "cuda", None, True),
        ({"compile": False}, "cuda", None, False),
        ({"compile": True}, "cpu", None, True),
        ({"deterministic": True}, "cuda", None, False),
        ({"grad_checkpoint": True}, "cuda", None, False),
        ({"fsdp": True}, "cuda", None, False),
        ({}, "cuda", {"compile": False}, False),
        ({}, "cuda", {}, False),  # a run of a version that did not say
        ({}, "cpu", {"compile": True}, True),
        ({"image_size": 32}, "cuda", None, False),  # launching the kernels takes longer than running them
        ({"image_size": 32, "compile": True}, "cuda", None, True),
        ({"micro_batch": 16}, "cuda", None, False),
        ({"compile": False}, "cuda", {"compile": True}, False),
        ({"grad_checkpoint": True}, "cuda", {"compile": True}, True),
        ({"deterministic": True}, "cuda", {"compile": True}, False),  # which --compile refuses
        ({"fsdp": True}, "cuda", {"compile": True}, False),
    ],
)
def test_what_is_compiled(flags, device, before, compiled, capsys):
    found = None if before is None else (Path("checkpoint"), {"mocov3": {"config": before}})
    config = PretrainConfig(**{"batch_size": 512, **flags})
    micro_batch = config.micro_batch if isinstance(config.micro_batch, int) else 0
    assert resolve_compile(config, World(0, 1, torch.device(device)), micro_batch, found) == compiled
    changed = before == {"compile": True} and not compiled and config.compile is None
    assert ("goes on eagerly" in capsys.readouterr().err) == changed


@pytest.mark.parametrize("works", [True, False])
def test_a_run_stores_its_mode_and_leaves_the_choice_to_config_yaml(images, tmp_path, monkeypatch, capsys, works):
    def broken(*_):
        raise RuntimeError("no C compiler")

    torch._dynamo.reset()
    backbones = functools.partialmethod(MoCo.compile_backbones, backend="eager" if works else broken)
    monkeypatch.setattr(MoCo, "compile_backbones", backbones)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    monkeypatch.setattr("mocov3.pretraining.assemble.resolve_compile", lambda *_: True)  # as on CUDA
    flags = "--recipe defaults -a resnet10_w16 -b 4 --image-size 32 --device cpu -j 0 --max-steps 1 --quiet"
    flags += " --moco-dim 8 --moco-mlp-dim 8"
    assert main(["pretrain", str(images), *flags.split(), "--output-dir", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("checkpoint_*")
    assert torch.load(path, weights_only=True)["mocov3"]["config"]["compile"] is works
    assert capsys.readouterr().err.count("no C compiler") == (not works)  # once, though there are two backbones
    assert "compile: null" in (tmp_path / "config.yaml").read_text()


def test_compiled_kernels_are_no_deterministic_ones():
    with pytest.raises(UserError, match="--deterministic"):
        PretrainConfig(compile=True, deterministic=True).check()


def test_micro_batches_do_not_compile_a_network_with_batch_norm_again(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    compiled = []
    for micro_batch in (4, 2):  # 2 and 4 parts
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        torch.manual_seed(0)
        model = models.build("resnet10_w16", dim=8, mlp_dim=8).train()
        optimizer = build_optimizer(model.parameters(), "adamw", weight_decay=0.1, momentum=0.9)
        model.compile_backbones(backend="eager")
        step = Step(model, optimizer, world=World(0, 1, CPU), precision=Precision("fp32", CPU), micro_batch=micro_batch)
        for _ in range(2):
            step(*torch.randn(2, 8, 3, 32, 32), lr=1e-3, m=0.9)
            compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(set(compiled)) == 1


def test_the_gelu_of_16_bits_is_the_exact_one_but_for_rounding():
    x = torch.linspace(-12, 12, 100_001, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    torch.nn.functional.gelu(exact).sum().backward()
    torch._dynamo.reset()
    for function in (gelu, torch.compile(gelu, backend="aot_eager")):
        x.grad = None
        y = function(x)
        y.sum().backward()
        assert (y.double() - torch.nn.functional.gelu(exact)).abs().max() < 3e-5
        assert (x.grad.double() - exact.grad).abs().max() < 2.5e-4  # where the polynomial ends, at ±4
    for dtype in (torch.bfloat16, torch.float16):
        assert gelu(x.to(dtype)).dtype == dtype


def test_a_compiled_gelu_keeps_its_argument_and_result_only():
    kept = []

    def keep(graph, _):
        made = [node.meta["val"] for node in graph.graph.output_node().args[0] if "val" in getattr(node, "meta", {})]
        kept.extend(t.dtype for t in made if getattr(t, "ndim", 0) == 3)
        return make_boxed_func(graph.forward)

    layers = torch.nn.ModuleList([torch.nn.Linear(8, 8, dtype=torch.bfloat16) for _ in range(6)])

    def network(x):
        for layer in layers:
            x = x + gelu(layer(x))
        return x

    torch._dynamo.reset()
    backend = aot_autograd(
        fw_compiler=keep,
        bw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    out = torch.compile(network, backend=backend)(torch.randn(2, 5, 8, dtype=torch.bfloat16))
    out.float().sum().backward()
    assert all(layer.weight.grad.abs().max() > 0 for layer in layers)
    assert kept
    assert torch.float32 not in kept


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_product_of_patches_is_the_convolution(layout):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 48, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    layer = torch.nn.Conv2d(3, 24, 8, stride=8, dtype=torch.float64)
    expected = layer(x)
    got = project_patches(x, layer.weight, layer.bias).permute(0, 3, 1, 2)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(got.square().sum(), [x, layer.weight, layer.bias]),
        torch.autograd.grad(expected.square().sum(), [x, layer.weight, layer.bias]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("patch", [8, 16])
def test_strips_are_projected_by_products_where_those_are_faster(monkeypatch, patch):
    """As on a GPU, also of larger patches."""
    torch.manual_seed(0)
    model = models.build("vit_micro", image_size=32, patch_size=8, dim=8, mlp_dim=8).double()
    tokens = torch.tensor([[3, 0], [1, 2]])
    x = strips(torch.randn(2, 3, 32, 32, dtype=torch.float64), tokens, patch, 4)
    expected = model.base_encoder.features(x)
    monkeypatch.setattr(vit, "patch_maps", lambda *given: project_patches(*given).permute(0, 3, 1, 2))
    torch.testing.assert_close(model.base_encoder.features(x), expected, rtol=1e-10, atol=1e-10)


def test_places_of_local_views_are_not_rounded_to_16_bits(monkeypatch):
    """Views come in 16 bits on a GPU."""
    model, asked = models.build("vit_micro", image_size=32, patch_size=8, dim=8, mlp_dim=8), []
    table = vit.sincos_of_places
    monkeypatch.setattr(vit, "sincos_of_places", lambda places, dim: asked.append(places) or table(places, dim))
    with torch.autocast("cpu", torch.bfloat16):
        model.base_encoder.features(torch.randn(2, 3, 24, 24).bfloat16())
    (places,) = asked
    assert places.dtype == torch.float32
    row = (torch.arange(3) + 0.5) * 4 / 3 - 0.5
    torch.testing.assert_close(places[0, 0].view(3, 3), row[:, None].expand(3, 3))


# --- the update ---------------------------------------------------------------------------------------------


def by_the_formula(p, grad, mu, lr, wd):
    """docs/method.md, in float64."""
    p, grad, mu = p.double(), grad.double(), mu.double()
    if p.ndim > 1:
        grad = grad + wd * p
        size, length = p.norm(), grad.norm()
        grad = grad * (0.001 * size / length if size > 0 and length > 0 else 1.0)
    mu = 0.9 * mu + grad
    return p - lr * mu, mu


@pytest.mark.parametrize("told", [False, True])
def test_lars_in_any_layout(told):
    """Channels-last weights, 1×1 kernels whose gradient has other strides, sizes across a row, zeros, no gradient."""
    shapes = [(8, 3, 3, 3), (16, 8, 1, 1), (40, 37), (5,), (1, 1, 4), (33, 31, 2, 2), (4, 4)]
    params = [torch.nn.Parameter(torch.randn(s)) for s in shapes]
    for i in (0, 1, 5):
        params[i].data = params[i].data.to(memory_format=torch.channels_last)
    params[6].data.zero_()
    unused = torch.nn.Parameter(torch.ones(3))
    optimizer = LARS([*params, unused], lr=0.5, weight_decay=0.01)
    if told:  # the way of GPUs
        optimizer.found_inf, optimizer.grad_scale = torch.zeros(()), None
    state = [(p.detach().clone(), torch.zeros_like(p)) for p in params]
    for _ in range(3):
        for p in params:
            p.grad = torch.randn(p.shape)  # contiguous, whatever the weight is
        state = [by_the_formula(p, w.grad, mu, 0.5, 0.01) for w, (p, mu) in zip(params, state, strict=True)]
        optimizer.step()
    for p, (want, mu) in zip(params, state, strict=True):
        assert torch.allclose(p.double(), want, rtol=1e-5, atol=1e-6)
        assert torch.allclose(optimizer.state[p]["mu"].double(), mu, rtol=1e-5, atol=1e-6)
        assert optimizer.state[p]["mu"].stride() == p.stride()
    assert unused not in optimizer.state


PER_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
"""Tensors a launch by the number of lists (ATen/native/cuda/MultiTensorApply.cuh); at most 320 blocks of 65,536."""
NO_KERNEL = (
    "view",
    "as_strided",
    "slice",
    "empty",
    "detach",
    "unsqueeze",
    "select",
    "alias",
    "unbind",
    "zeros_like",
    "split",
)


class Launches(TorchDispatchMode):
    """Counts the kernels that operations would start on a GPU."""

    def __init__(self):
        super().__init__()
        self.count, self.by_name = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        lists = [a for a in args if isinstance(a, (list, tuple)) and a and isinstance(a[0], torch.Tensor)]
        if name.startswith(("_foreach", "_fused")):
            depth = sum(len(a) == len(lists[0]) for a in lists)
            inplace = name.endswith("_")
            blocks = sum(-(-t.numel() // 65536) for t in lists[0])
            n = max(-(-len(lists[0]) // PER_LAUNCH[min(depth + (not inplace), 5)]), -(-blocks // 320)) + (
                "norm" in name
            )
        else:
            n = 0 if name.startswith(NO_KERNEL) else 1
        self.count += n
        self.by_name[name] = self.by_name.get(name, 0) + n
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("arch", "optimizer"), [("resnet50", "lars"), ("vit_small", "adamw")])
def test_update_is_few_launches(arch, optimizer):
    model = models.build(arch).to(memory_format=torch.channels_last)
    made = build_optimizer(model.parameters(), optimizer, weight_decay=0.1, momentum=0.9)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    made.found_inf, made.grad_scale = torch.zeros(()), None  # the way of GPUs
    made.step()  # makes its state
    with Launches() as launches:
        model.update_momentum_encoder(0.99)
        made.step()
    assert 5 <= launches.count <= 30, launches.by_name


@pytest.mark.parametrize(("arch", "optimizer", "late"), [("resnet10_w32", "lars", False), ("vit_small", "adamw", True)])
def test_nothing_is_read_between_print_steps(arch, optimizer, late, tmp_path):
    dims = VIT if arch == "vit_small" else {"dim": 8, "mlp_dim": 16}
    world = World(0, 1, CPU)
    model = models.build(arch, **dims).to(memory_format=torch.channels_last).train()
    made = build_optimizer(model.parameters(), optimizer, weight_decay=0.1, momentum=0.9)
    step = Step(model, made, world=world, precision=Precision("bf16", CPU), spike_factor=10.0)
    step.world = dataclasses.replace(world, device=torch.device("cuda"))  # it does from here on as on a GPU
    log = PretrainingLog(PretrainConfig(output_dir=str(tmp_path), quiet=True, epochs=1), Session(8))
    recorder = Recorder(world, log, Counters(), batch_size=4, print_freq=4, images=lambda *_: [], late=late)
    read, weights = [], [p.clone() for p in model.parameters()]
    for i in range(5):
        batch = Batch(Work(0, i, np.arange(4)), np.zeros((2, 4, 32, 32, 3), np.uint8), [])
        log.batch_came()
        with Reads() as reads:
            x1, x2 = (normalise(p, CPU, (0.5,) * 3, (0.2,) * 3) + torch.randn(4, 3, 32, 32) for p in batch.pixels)
            outcome = step(x1, x2, lr=0.1, m=0.99)
            recorder.step_done(batch, outcome, step=i, lr=0.1, m=0.99, skipped=step.skipped)
        read.append(len(reads.found))
    recorder.flush()
    log.close()
    expected = [False, True, False, False, False] if late else [True, False, False, False, True]
    assert [n > 0 for n in read] == expected, reads.found
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 4]
    assert any(not torch.equal(p, before) for p, before in zip(model.parameters(), weights, strict=True))


@pytest.mark.parametrize(("share", "told"), [(0.04, "wait 4%"), (0.29, "waits for data 29%")])
def test_the_bar_says_when_the_loader_binds(tmp_path, share, told):
    log = PretrainingLog(PretrainConfig(output_dir=str(tmp_path), quiet=True), Session(8, writes=False))
    needed = [f.name for f in dataclasses.fields(MetricsLine) if f.default is dataclasses.MISSING]
    assert told in log._parts(MetricsLine(**{**dict.fromkeys(needed, 0), "data_wait": share}))


def test_a_told_step_changes_nothing():
    """The way of GPUs again: a NaN in the images, and neither weights nor optimizer nor batch statistics move."""
    world = World(0, 1, CPU)
    model = models.build("resnet10_w32", dim=8, mlp_dim=16).train()
    made = build_optimizer(model.parameters(), "lars", weight_decay=0.1, momentum=0.9)
    step = Step(model, made, world=world, precision=Precision("fp32", CPU))
    step.world = dataclasses.replace(world, device=torch.device("cuda"))
    x1, x2 = torch.randn(2, 4, 3, 32, 32)
    assert step(x1, x2, lr=0.1, m=0.99).ok
    kept = [*model.base_encoder.state_dict().values(), *(made.state[p]["mu"] for p in made.state)]
    before = [v.clone() for v in kept if v.is_floating_point()]
    assert not step(x1 * torch.nan, x2, lr=0.1, m=0.99).ok
    assert all(torch.equal(a, b) for a, b in zip(before, (v for v in kept if v.is_floating_point()), strict=True))
