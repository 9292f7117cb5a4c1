"""Adapting what others published: timm's networks, built without their weights, smaller but else as they are.

Each is loaded strictly, trained with pairs and preservation, merged and exported; a DINOv2 with registers, a DINOv3, an
MAE and SigLIP's image tower.
"""

import json

import numpy as np
import pytest
import timm
import torch

from mocov3 import models
from mocov3.cli import main
from mocov3.models.lora import DOWN, UP, add_pairs
from mocov3.planning.adapting import choices_of, row_of
from mocov3.planning.auto import Images, Machine, choose_settings
from mocov3.weights import checkpoint
from mocov3.weights.convert import fitted, settings_of
from mocov3.weights.find import BackboneWeights, find_backbone

NAMES = {
    "vit_small_patch14_reg4_dinov2.lvd142m": 56,
    "vit_small_patch16_dinov3.lvd1689m": 64,
    "vit_base_patch16_224.mae": 64,
    "vit_base_patch16_siglip_224.webli": 64,
}
SIZES = {"depth": 2, "embed_dim": 48, "num_heads": 3}
BUILD = timm.create_model


@pytest.fixture(params=NAMES)
def published(request, monkeypatch):
    """A network's name, the network, and timm as if it could fetch its weights."""
    torch.manual_seed(7)
    network = BUILD(request.param, num_classes=0, **SIZES).eval()
    with torch.no_grad():
        for p in network.parameters():  # layer scales begin near 0, tokens at 0: what is lost there would not be seen
            p.add_(0.05 * torch.randn_like(p))

    def offline(name, pretrained=False, **kwargs):
        if not pretrained:
            return BUILD(name, **{**kwargs, **SIZES})
        assert name == request.param
        return network

    monkeypatch.setattr(timm, "create_model", offline)
    return request.param, network


def embedded(images, tmp_path, *model):
    file = tmp_path / f"{len(list(tmp_path.iterdir()))}.npy"
    flags = ["--device", "cpu", "-j", "0", "-o", str(file)]
    assert main(["embed", *map(str, model), *flags, str(images / "val")]) == 0
    return torch.from_numpy(np.load(file))


def test_a_published_network_is_adapted_and_exported(published, images, tmp_path, capsys):
    name, network = published
    size = NAMES[name]
    flags = ["--init", f"timm/{name}", "-a", f"timm/{name}", "--image-size", str(size), "-b", "8", "--optimizer"]
    flags += ["adamw", "--lr", ".05", "--warmup-epochs", "0", "--moco-dim", "8", "--moco-mlp-dim", "16", "--seed", "0"]
    flags += ["--recipe", "defaults", "--logger", "none", "-j", "0", "--device", "cpu", "-p", "1", "--lora", "2"]
    flags += ["--unfreeze-last", "1", "--preserve", "1"]
    folder = tmp_path / "run"
    assert main(["pretrain", str(images), *flags, "--max-steps", "2", "--output-dir", str(folder)]) == 0
    drifts = [json.loads(line)["drift"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert abs(drifts[0]) < 1e-5, "every weight of the start is in place"
    file = checkpoint.newest(folder)[0]
    state = checkpoint.read(file)["state_dict"]
    merged = find_backbone(checkpoint.read(file), "file").state
    kept = {
        k.removeprefix("module.base_encoder.backbone."): v for k, v in state.items() if "base_encoder.backbone" in k
    }
    start = network.state_dict()
    assert set(start) == {k for k in kept if not k.endswith((DOWN, UP))}
    for key, value in kept.items():
        if key.startswith("blocks.0.") and key.endswith("weight") and value.ndim == 2 and "norm" not in key:
            assert torch.equal(value, start[key]), "stands still"
    assert not torch.equal(merged["backbone.blocks.0.mlp.fc1.weight"], start["blocks.0.mlp.fc1.weight"])
    # the network of the run, its adapter beside the published weights, and the export are one
    trained = embedded(images, tmp_path, "--model", file)
    torch.save(network.state_dict(), tmp_path / "published.pth")
    adapter = tmp_path / "adapter.safetensors"
    assert main(["export", str(file), "--adapter", "--output", str(adapter)]) == 0
    base = ["--model", tmp_path / "published.pth", "-a", f"timm/{name}", "--adapter", adapter]
    assert torch.equal(embedded(images, tmp_path, *base, "--image-size", size), trained)
    assert main(["export", str(file), "--to", "safetensors", "--output", str(tmp_path / "out")]) == 0
    assert "compared from file bytes" in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_at_full_size_by_shapes_alone(name):
    """Every key in place, and pairs of rank 8 with norms below 5 % of the weights."""
    with models.shapes_only():
        network = BUILD(name, num_classes=0)
        size = int(timm.get_pretrained_cfg(name).input_size[-1])
        encoder = models.build_backbone(f"timm/{name}", image_size=size)
        state = fitted(encoder, BackboneWeights("timm model", f"timm/{name}", network.state_dict()), name)
        assert len(state) == len(network.state_dict())
        whole = sum(p.numel() for p in encoder.parameters())
        add_pairs(encoder, 8)
    assert sum(p.numel() for p in encoder.parameters() if p.requires_grad) < 0.05 * whole
    assert whole > 20_000_000


def test_the_plan_takes_images_that_divide_into_patches():
    """--recipe adapt from patches of 14 px: no view of 64."""
    with models.shapes_only():
        state = BUILD("vit_small_patch14_reg4_dinov2.lvd142m", num_classes=0).state_dict()
    arch = "timm/vit_small_patch14_reg4_dinov2.lvd142m"
    given = {**settings_of(state, arch), "arch": arch}
    machine = Machine("cpu", 8 << 30, 2)
    seen = Images(5000, 300, "photos", "", "", gray=False)
    table = choices_of(row_of(arch, 5000))
    chosen = choose_settings(seen, machine, None, given, lambda _: (1.0, {}), lambda *_: 1.0, table)
    assert {c.name: c.value for c in chosen}["image_size"] == 70
