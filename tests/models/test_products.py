"""Products of tokens by way of a convolution: the same numbers, weights and exports as ``nn.Linear``."""

import pytest
import torch
from torch import nn

from mocov3 import models
from mocov3.models import products
from mocov3.models.attention import use_attention_products
from mocov3.models.precision import Precision
from mocov3.models.products import TokenLinear, multiplies_bf16, use_fast_products


@pytest.fixture
def half_wide(monkeypatch):
    """A processor on which the other way is taken."""
    monkeypatch.setattr(products, "mkl_is_half_wide", lambda: True)
    monkeypatch.setattr(products, "ENOUGH", 0)


def both(shape, *, bias=True):
    """Output and gradients by input, weight and bias: plain, and as tokens."""
    torch.manual_seed(0)
    plain = nn.Linear(shape[-1], 24, bias=bias)
    fast = nn.Linear(shape[-1], 24, bias=bias)
    fast.load_state_dict(plain.state_dict())
    use_fast_products(fast)
    assert type(fast) is TokenLinear
    x = torch.randn(shape)
    found = []
    for layer in (plain, fast):
        input = x.clone().requires_grad_()
        y = layer(input)
        (y * torch.linspace(0.1, 1, y.numel()).view_as(y)).sum().backward()
        found.append([y.detach(), input.grad, *(p.grad for p in layer.parameters())])
    return zip(*found, strict=True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(16, 9, 32), (16, 8, 3, 32), (3, 50, 32), (16, 4, 32), (64, 32)])
def test_tokens_are_multiplied_alike(half_wide, shape, bias):
    for want, got in both(shape, bias=bias):
        assert got.shape == want.shape
        assert got.is_contiguous()
        assert (got - want).norm() <= 1e-6 * want.norm()


def test_a_cut_of_the_tokens_is_multiplied_alike(half_wide):
    layer = use = nn.Linear(32, 24)
    x = torch.randn(16, 20, 64)[:, 3:15, ::2]  # neither contiguous nor whole
    want = nn.functional.linear(x, layer.weight, layer.bias)
    use_fast_products(use)
    torch.testing.assert_close(use(x), want, rtol=1e-5, atol=1e-6)


def test_the_way_is_taken_where_it_pays(monkeypatch):
    calls = []
    convolve = nn.functional.conv2d
    monkeypatch.setattr(nn.functional, "conv2d", lambda *args: calls.append(1) or convolve(*args))
    layer = nn.Linear(8, 8)
    use_fast_products(layer)
    tokens = torch.randn(16, 9, 8)

    def taken(x):
        calls.clear()
        with torch.no_grad():
            layer.to(x.dtype)(x)
        return bool(calls)

    monkeypatch.setattr(products, "mkl_is_half_wide", lambda: False)
    assert not taken(tokens)
    monkeypatch.setattr(products, "mkl_is_half_wide", lambda: True)
    assert not taken(tokens)
    monkeypatch.setattr(products, "ENOUGH", tokens.numel() * 8)
    assert taken(tokens)
    assert not any(map(taken, (tokens[:, :1], tokens[:, 0], tokens.double())))
    with torch.autocast("cpu", torch.bfloat16):
        assert not taken(tokens)
    program = torch.export.export(layer.float(), (tokens,))
    assert not any("conv" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize(
    ("maker", "capability", "expected"),
    [
        ("vendor_id : AuthenticAMD", "AVX512", True),
        ("vendor_id : GenuineIntel", "AVX512", False),
        ("Intel64 Family 6", "AVX512", False),
        ("vendor_id : AuthenticAMD", "AVX2", False),
    ],
)
def test_processors(monkeypatch, maker, capability, expected):
    monkeypatch.setattr(products, "_maker", lambda: maker)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert products.mkl_is_half_wide.__wrapped__() is expected


@pytest.mark.parametrize("arch", ["vit_small", "timm/vit_tiny_patch16_224"])
def test_networks_compute_what_they_did(monkeypatch, arch):
    """A step of the whole model, with the way taken and without."""
    torch.manual_seed(0)
    dims = {"embed_dim": 24, "depth": 2, "num_heads": 3}
    model = models.build(arch, image_size=64, dim=8, mlp_dim=16, **dims)
    x1, x2 = torch.randn(2, 16, 3, 64, 64)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert sum(type(m) is TokenLinear for m in model.base_encoder.modules()) == 8
    found = []
    monkeypatch.setattr(products, "ENOUGH", 0)
    for taken in (False, True):
        monkeypatch.setattr(products, "mkl_is_half_wide", lambda taken=taken: taken)
        model.load_state_dict(state)
        model.zero_grad()
        loss = model(x1, x2, 0.9)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((loss.detach(), gradient))
    (loss, gradient), (loss2, gradient2) = found
    assert abs(loss2 - loss) <= 1e-5 * loss
    assert (gradient2 - gradient).norm() <= 1e-5 * gradient.norm()
    assert not torch.equal(gradient, gradient2)  # it was another way


@pytest.mark.parametrize("arch", ["vit_micro", "timm/vit_tiny_patch16_224"])
def test_attention_by_products_is_the_same(arch):
    """Outputs and gradients of both ways agree, of whole blocks and of the last, which asks for one token."""
    torch.manual_seed(0)
    found = []
    network = models.build_backbone(arch, image_size=32, **({"patch_size": 8} if arch == "vit_micro" else {}))
    x = torch.randn(3, 3, 32, 32)
    for products_wanted in (False, True):
        if products_wanted:
            use_attention_products(network)
        network.zero_grad()
        y = network.features(x)
        (y * torch.linspace(0.1, 1, y.numel()).view_as(y)).sum().backward()
        found.append([y.detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 20
    for want, got in zip(*found, strict=True):
        assert (got - want).norm() <= 1e-4 * want.norm() + 1e-6


@pytest.mark.parametrize(("precision", "expected"), [("bf16", False), ("fp32", True)])
def test_only_training_in_bf16_on_cpus_takes_products(precision, expected):
    network = models.build_backbone("vit_micro", image_size=32, patch_size=8)
    Precision(precision, torch.device("cpu")).suit(network)
    assert {block.attn.fused_attn for block in network.blocks} == {expected}
    Precision(precision, torch.device("cuda")).suit(network)
    assert {block.attn.fused_attn for block in network.blocks} == {expected}


@pytest.mark.parametrize(("flags", "expected"), [("fpu avx512_bf16 sse", True), ("amx_bf16", True), ("avx2", False)])
def test_bf16_instructions_are_read_from_the_processors_flags(flags, expected, tmp_path, monkeypatch):
    facts = tmp_path / "cpuinfo"
    facts.write_text(f"vendor_id\t: Someone\nflags\t\t: {flags}\n")
    monkeypatch.setattr(products, "_FACTS", facts)
    multiplies_bf16.cache_clear()
    try:
        assert multiplies_bf16() == expected
        assert products._maker() == "vendor_id\t: Someone"
    finally:
        multiplies_bf16.cache_clear()
