"""Golden G: conversion to DeiT's format, and what linear evaluation loads and trains."""

import numpy as np
import pytest
import torch
from conftest import GOLDEN, fill, fill_model, golden

from mocov3 import models
from mocov3.cli import main
from mocov3.config import LinclsConfig
from mocov3.weights import checkpoint, convert

G = golden("g_convert.json")
TABLE = np.load(GOLDEN / "b_pos_embed.npz")["vit_small_224"]
ARCHS = [name for name in G if isinstance(G[name], dict) and "n_keys" in G[name] and "keys" in G[name]]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A pre-training checkpoint in the reference's layout for each recorded arch, filled by the rule."""
    files = {}
    for arch in [*ARCHS, "resnet50"]:
        model = fill_model(models.build(arch, mlp_dim=512 if arch == "resnet50" else 4096))
        state = {f"module.{k}": v for k, v in model.state_dict().items()}
        for key in state:
            if key.endswith("pos_embed"):  # not filled by the rule: the reference's own table, to the last bit
                state[key] = torch.from_numpy(TABLE)[None]
        files[arch] = tmp_path_factory.mktemp(arch) / "checkpoint.pth.tar"
        torch.save({"epoch": 1, "arch": arch, "state_dict": state, "optimizer": {}, "scaler": {}}, files[arch])
    return files


@pytest.mark.parametrize("arch", ARCHS)
def test_to_deit(arch, checkpoints, tmp_path):
    output = tmp_path / "new" / "folder" / "out.pth"
    assert main(["convert", "--input", str(checkpoints[arch]), "--output", str(output)]) == 0
    converted = torch.load(output, weights_only=True)
    assert list(converted) == G[arch]["top_level_keys"]
    model = converted["model"]
    kept = [row for row in G[arch]["keys"] if not row[0].startswith("fc.")]  # the reference left the projector in
    assert sorted([k, list(v.shape), str(v.dtype).removeprefix("torch.")] for k, v in model.items()) == sorted(kept)
    if arch != "resnet18":
        assert (
            fill.sha256_arrays({k: v.numpy() for k, v in model.items() if v.is_floating_point()})
            == G[arch]["sha256_all_float_keys_sorted"]
        )
    for key, want in G[arch]["fingerprint"].items():
        if key in model:
            got = fill.fingerprint(key, model[key].numpy())
            assert fill.compare_fingerprint(got, want, 1e-9), key
    # in the checkpoint's own order, nothing changed
    source = torch.load(checkpoints[arch], weights_only=True)["state_dict"]
    order = [k.removeprefix("module.base_encoder.") for k in source]
    assert list(model) == [k for k in order if k in model]
    assert all(torch.equal(v, source[f"module.base_encoder.{k}"]) for k, v in model.items())


def test_bare_output_name(checkpoints, tmp_path, monkeypatch):
    # the reference fails here: os.makedirs('')
    assert G["edge_output_without_directory"]["returncode"] == 1
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "--input", str(checkpoints["resnet18"]), "--output", "out.pth"]) == 0
    assert (tmp_path / "out.pth").exists()


def test_keys_without_module(checkpoints, tmp_path):
    # the reference writes an empty model
    assert G["edge_checkpoint_without_module_prefix"]["n_keys"] == 0
    contents = torch.load(checkpoints["vit_small"], weights_only=True)
    contents["state_dict"] = {k.removeprefix("module."): v for k, v in contents["state_dict"].items()}
    assert len(convert.to_deit(contents, "file")["model"]) == G["vit_small"]["n_keys"]


@pytest.mark.parametrize("arch", list(G["main_lincls"]))
def test_linear_evaluation_loads_the_same(arch, checkpoints):
    want = G["main_lincls"][arch]
    model = models.linear_classifier(arch, 1000)
    found = convert.find_backbone(checkpoint.read(checkpoints[arch]), "file")
    missing = convert.load_into(model, found, "file")
    assert sorted(missing) == want["missing"]
    assert sorted(found.state) == sorted(want["loaded"])
    assert all(torch.equal(model.state_dict()[k], v) for k, v in found.state.items())
    assert all(reason in ("head", "not of this encoder") for reason in found.dropped.values())
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert sorted(trainable) == sorted(want["trainable"])
    head = getattr(model, model.projector_name)
    assert list(head.weight.shape) == want["head_weight_shape"]
    recorded = want["head_weight_std_3_seeds"]
    bound = 5 * 0.01 / (2 * head.weight.numel()) ** 0.5
    assert abs(head.weight.std().item() - np.mean(recorded)) <= bound
    assert bool((head.bias == 0).all()) == want["head_bias_all_zero"]
    config = LinclsConfig()
    assert (config.initial_lr, config.momentum, config.weight_decay) == (
        want["lr"],
        want["momentum"],
        want["weight_decay"],
    )


def test_load_backbone_gives_the_features(checkpoints):
    backbone = convert.load_backbone(checkpoints["resnet18"])
    model = fill_model(models.build("resnet18")).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(backbone(x), model.features(x))
        momentum = convert.load_backbone(checkpoints["resnet18"], momentum=True)
        assert torch.equal(momentum(x), model.key_features(x))
