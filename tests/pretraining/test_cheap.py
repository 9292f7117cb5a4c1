"""Cheaper pre-training: token dropout, schedules of image and patch size, and their way back to full."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import TINY

from mocov3 import models
from mocov3.cli import main
from mocov3.config import PretrainConfig
from mocov3.config.cheap import Stage, stages
from mocov3.data import Work
from mocov3.data.device.token_strips import cheaper, strips
from mocov3.data.views.draws import kept_tokens
from mocov3.models.patches import resized_kernel, sincos_of_places
from mocov3.models.positions import sincos_position_embedding
from mocov3.weights.checkpoint import read

VIT = {"image_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "dim": 8, "mlp_dim": 16}


@pytest.fixture
def vit():
    torch.manual_seed(0)
    model = models.build("vit_small", **VIT).double().base_encoder.train()
    model.pos_embed.data = sincos_position_embedding(4, 4, 24).double()
    for name, p in model.named_parameters():  # biases and gains that do something
        if p.ndim == 1:
            torch.nn.init.normal_(p, mean=float("norm" in name), std=0.3)
    return model


def by_timm(vit, x, kept=None):
    """All blocks over all tokens, by timm's own calls; tokens dropped from the table's sum."""
    tokens = vit._pos_embed(vit.patch_embed(x))
    if kept is not None:
        tokens = torch.cat([tokens[:, :1], torch.stack([t[1 + k] for t, k in zip(tokens, kept, strict=True)])], 1)
    return vit.norm(vit.blocks(tokens))[:, 0]


def same(got, want, parameters, tolerance=1e-10):
    weights = torch.randn_like(want)
    ours, theirs = (torch.autograd.grad((f * weights).sum(), parameters, allow_unused=True) for f in (got, want))
    assert torch.allclose(got, want, rtol=0, atol=tolerance * float(want.detach().norm()))
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        assert a is None or float((a - b).norm()) <= tolerance * float(b.norm() + 1)


def test_only_the_first_token_of_the_last_block_is_computed(vit):
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    rows = []
    vit.blocks[-1].mlp.register_forward_hook(lambda module, given, out: rows.append(out.shape[1]))
    got = vit.features(x)
    assert rows == [1]
    same(got, by_timm(vit, x), [p for p in vit.parameters() if p.requires_grad])


def test_dropped_tokens_are_not_seen(vit):
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    kept = torch.tensor([[0, 3, 7], [1, 2, 15], [4, 9, 14]])
    got = vit.features(strips(x, kept, 8, 4))
    # places are computed here and looked up there, in float32
    same(got, by_timm(vit, x, kept), [p for p in vit.parameters() if p.requires_grad], tolerance=1e-6)
    changed = x.clone()
    changed[0, :, 8:16, 0:8] += 1  # patch 4, which the first image does not keep
    assert torch.equal(vit.features(strips(changed, kept, 8, 4))[0], got[0])


def test_places_are_those_of_full_views():
    x = torch.arange(2 * 3 * 16 * 16, dtype=torch.float64).view(2, 3, 16, 16)
    everything = torch.arange(4).expand(2, -1)
    packed = strips(x, everything, 8, 4)  # 16 px of patches of 8 in a grid of 4: each covers two a side
    assert packed.shape == (2, 5, 8, 32)
    assert torch.equal(packed[:, :3, :, 8:16], x[:, :, :8, 8:])
    places = packed[0, 3:, 0, ::8]
    assert places.tolist() == [[0.5, 0.5, 2.5, 2.5], [0.5, 2.5, 0.5, 2.5]]
    table = sincos_position_embedding(3, 5, 16)[:, 1:]
    at = torch.cartesian_prod(torch.arange(3.0), torch.arange(5.0)).T[None]
    assert torch.allclose(sincos_of_places(at, 16), table, atol=1e-6)


@pytest.mark.parametrize("side", [6, 8, 16])
def test_larger_patches_give_the_tokens_of_enlarged_ones(side):
    weight, patch = torch.randn(5, 3, 4, 4, dtype=torch.float64), torch.randn(1, 3, 4, 4, dtype=torch.float64)
    larger = torch.nn.functional.interpolate(patch, (side, side), mode="bilinear", antialias=True)
    token = (resized_kernel(weight, side) * larger).sum((1, 2, 3))
    assert torch.allclose(token, (weight * patch).sum((1, 2, 3)), atol=1e-9)


@pytest.mark.parametrize("side", [8, 16])
def test_sixteen_bits_are_the_same_in_every_stage(vit, side):
    """Autocast leaves whole views a residual stream of 32 bits; so it does strips, of any size of patch."""
    vit.float()
    streams = []
    for block in vit.blocks:
        block.register_forward_hook(lambda module, given, out: streams.append((given[0].dtype, out.dtype)))
    x = torch.randn(2, 3, 32, 32)
    packed = strips(x, torch.arange((32 // side) ** 2).expand(2, -1), side, 4)
    with torch.autocast("cpu", torch.bfloat16):
        whole, cheap = vit.features(x), vit.features(packed)
    assert set(streams) == {(torch.float32, torch.float32)}
    if side == 8:  # the same patches at the same places
        assert torch.allclose(cheap, whole, rtol=0, atol=1e-6)


def test_larger_patches_are_not_rounded_twice():
    weight = torch.randn(5, 3, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        got = resized_kernel(weight, 8)
    assert got.dtype == torch.float32
    assert torch.equal(got, resized_kernel(weight, 8))


def test_draws_are_functions_of_the_image():
    settings = {"seed": 5, "epoch": 2, "view": 0}
    whole = kept_tokens(49, 12, indices=np.arange(400), **settings)
    assert whole.shape == (400, 12)
    assert all(len(set(row)) == 12 for row in whole.tolist())
    assert np.array_equal(whole[100:110], kept_tokens(49, 12, indices=np.arange(100, 110), **settings))
    for other in ({"seed": 6}, {"epoch": 3}, {"view": 1}):
        drawn = kept_tokens(49, 12, indices=np.arange(400), **{**settings, **other})
        assert abs(np.mean([len(set(a) & set(b)) for a, b in zip(drawn, whole, strict=True)]) - 12 * 12 / 49) < 0.3
    often = np.bincount(whole.ravel(), minlength=49) / 400
    assert abs(often - 12 / 49).max() < 5 * np.sqrt(12 / 49 * 37 / 49 / 400)


def test_a_full_stage_leaves_views_alone():
    config = PretrainConfig(arch="vit_small", epochs=10, token_keep="0.5:0.5")
    first, last = stages(config)
    x1, x2 = torch.randn(2, 2, 3, 224, 224)
    work = Work(0, 0, np.array([3, 8]))
    cpu = torch.device("cpu")
    assert cheaper(x1, x2, last, work, seed=1, device=cpu) == (x1, x2)
    whole = cheaper(x1, x2, first, work, seed=1, device=cpu)
    a, b = whole[0][:], whole[1][:]
    assert a.shape == b.shape == (2, 5, 16, 16 * 98)
    assert torch.equal(torch.cat([whole[0][:1], whole[0][1:]]), a)  # as micro-batches ask for them
    assert not torch.equal(a[:, 3:], b[:, 3:])


def test_stages():
    def made(arch="vit_small", epochs=10, **flags):
        return stages(PretrainConfig(arch=arch, epochs=epochs, **flags))

    assert made() == [Stage(0, 10, 224, 16, 1.0, 0)]
    assert made(token_keep="0.25") == [Stage(0, 8, 224, 16, 0.25, 14, 0.8), Stage(8, 10, 224, 16, 1.0, 0)]
    assert made("resnet50", image_size_schedule="128:0.3,160:0.4") == [
        Stage(0, 3, 128, 16, 1.0, 0, 0.3),
        Stage(3, 7, 160, 16, 1.0, 0, 0.7),
        Stage(7, 10, 224, 16, 1.0, 0),
    ]
    assert made(token_keep="0.5:0.6", patch_size_schedule="32:0.3") == [
        Stage(0, 3, 224, 32, 0.5, 14, 0.3),
        Stage(3, 6, 224, 16, 0.5, 14, 0.6),
        Stage(6, 10, 224, 16, 1.0, 0),
    ]
    assert made(epochs=2, token_keep="0.5:0.99")[0].end == 1
    for epochs in (1, 2, 3, 5, 100):  # of the time, to which the expected epochs are nothing
        clock = made(
            epochs=epochs, schedule="wsd", budget="1h", token_keep="0.5:0.1,0.6:0.2", patch_size_schedule="32:.3"
        )
        assert [(stage.share, stage.keep, stage.patch_size) for stage in clock] == [
            (0.1, 0.5, 32),
            (0.3, 0.6, 32),
            (1.0, 1.0, 16),
        ]
    assert (made(token_keep="0.25")[0].tokens, made(token_keep="0.25")[0].kept) == (196, 49)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"token_keep": "half"}, "VALUE:SHARE"),
        ({"token_keep": "1.5"}, "at most 1"),
        ({"token_keep": "nan"}, "at most 1"),
        ({"token_keep": "0.5:1"}, "above 0 and below 1"),
        ({"token_keep": "0.5:nan"}, "above 0 and below 1"),
        ({"token_keep": "0.5:0.6,0.7:0.5"}, "at full size"),
        ({"token_keep": "0.5", "epochs": 1, "warmup_epochs": 0}, "too few"),
        ({"token_keep": "0.5", "arch": "resnet50"}, "not resnet50"),
        ({"token_keep": "0.5", "arch": "vit_conv_small"}, "not vit_conv_small"),
        ({"image_size_schedule": "160", "arch": "timm/convnext_atto"}, "and ResNets"),
        ({"image_size_schedule": "100"}, "from 0% to 80% of the run views of 100 px do not divide"),
        ({"image_size_schedule": "448"}, "would not be cheaper"),
        ({"image_size_schedule": "160.5"}, "whole numbers"),
        ({"image_size_schedule": "inf"}, "whole numbers"),
        ({"image_size_schedule": "-16"}, "whole numbers"),
        ({"patch_size_schedule": "8"}, "would not be cheaper"),
        ({"patch_size_schedule": "48"}, "do not divide"),
    ],
)
def test_schedules_that_mean_nothing(flags, message, capsys):
    from mocov3.errors import UserError

    with pytest.raises(UserError, match=message) as error:
        PretrainConfig(**{"arch": "vit_small", "epochs": 10, **flags}).check()
    assert "\n" not in str(error.value)


def test_resumes_across_stages_are_bit_exact(images, tmp_path):
    flags = [
        str(images),
        *TINY,
        "-a",
        "vit_tiny",
        "--patch-size",
        "8",
        "--optimizer",
        "adamw",
        "--lr",
        "1e-2",
        "--epochs",
        "3",
        "--token-keep",
        "0.5:0.6",
        "--image-size-schedule",
        "16:0.3",
        "--knn-every",
        "2",
        "--moco-m-cos",
    ]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert main(["pretrain", *flags, "--output-dir", str(straight)]) == 0
    # 4 steps an epoch; stages change after 4 and 8: stopped within, at and after a change
    for steps in (["--max-steps", "3"], ["--max-steps", "4"], ["--max-steps", "9"], []):
        assert main(["pretrain", *flags, *steps, "--resume", "auto", "--output-dir", str(stopped)]) == 0
    a, b = (read(folder / "checkpoint_0002.pth.tar") for folder in (straight, stopped))
    assert all(torch.equal(a["state_dict"][k], b["state_dict"][k]) for k in a["state_dict"])
    for i, state in a["optimizer"]["state"].items():
        assert all(torch.equal(v, b["optimizer"]["state"][i][k]) for k, v in state.items())
    assert main(["pretrain", *flags, "--resume", "auto", "--token-keep", "0.4:0.6", "--output-dir", str(stopped)]) == 2


def test_resnets_train_on_growing_images_and_end(images, tmp_path):
    """A program of its own: a loader process that is left behind keeps it from ending."""
    flags = [str(images), *TINY, "--image-size-schedule", "16:0.5", "--output-dir", str(tmp_path), "-j", "1"]
    subprocess.run([sys.executable, "-m", "mocov3", "pretrain", *flags], check=True, timeout=120)
    assert (tmp_path / "checkpoint_0001.pth.tar").exists()
