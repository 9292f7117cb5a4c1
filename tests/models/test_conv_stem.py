"""Convolutional stems for small patches, and the recipe of a ViT for small images."""

import json

import pytest
import torch
from torch import nn

from mocov3 import load_backbone, models
from mocov3.cli import main
from mocov3.models.backbones import build_backbone
from mocov3.weights.convert import settings_of


@pytest.mark.parametrize(("patch", "widths"), [(4, [96, 192]), (8, [48, 96, 192]), (16, [24, 48, 96, 192])])
def test_stems_halve_the_side_until_it_is_that_of_the_patch(patch, widths):
    encoder = build_backbone("vit_conv_tiny", image_size=64, patch_size=patch, depth=1)
    convolutions = [m for m in encoder.patch_embed.proj if isinstance(m, nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [*widths, 192]
    assert [c.stride for c in convolutions] == [(2, 2)] * len(widths) + [(1, 1)]
    assert encoder.patch_embed(torch.randn(2, 3, 64, 64)).shape == (2, (64 // patch) ** 2, 192)
    assert encoder.pos_embed.shape[1] == (64 // patch) ** 2 + 1
    assert settings_of(encoder.state_dict(), "vit_conv_tiny")["patch_size"] == patch
    with pytest.raises(ValueError, match="4, 8 or 16"):
        build_backbone("vit_conv_tiny", image_size=64, patch_size=32)


def test_a_view_of_another_size_goes_through_the_stem():
    torch.manual_seed(0)
    model = models.build("vit_conv_tiny", image_size=32, patch_size=4, depth=1, dim=8, mlp_dim=16).train()
    x1, x2 = torch.randn(2, 6, 3, 32, 32)
    loss, _ = model.contrast(x1, x2, 0.9, torch.randn(12, 3, 12, 12))
    assert loss.isfinite()


def test_the_recipe_trains_and_its_backbone_loads(images, tmp_path, capsys):
    flags = [str(images), "--recipe", "vit_small_images", "-b", "16", "--epochs", "2", "--warmup-epochs", "1"]
    flags += ["--max-steps", "1", "-j", "0", "-p", "1", "--device", "cpu", "--seed", "1", "--output-dir", str(tmp_path)]
    tokens_of = {"--patch-size": (64, 128), "-a": (16, 192)}
    for more in (["--patch-size", "4"], ["-a", "vit_conv_tiny"]):
        folder = tmp_path / more[1]
        assert main(["pretrain", *flags[:-1], str(folder), *more]) == 0
        line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        assert 0 < line["loss"] < 1.3 * line["loss_start"]
        backbone = load_backbone(str(next(folder.glob("checkpoint_*"))))
        tokens = backbone.patch_embed(torch.randn(1, 3, 32, 32))
        assert tokens.shape == (1, *tokens_of[more[0]])
    assert main(["pretrain", *flags, "--token-keep", "0.5:0.8"]) == 2  # whose tokens are not dropped
    assert "--token-keep is for" in capsys.readouterr().err
