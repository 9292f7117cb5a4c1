"""--lora: pairs beside a ViT's matrices, in training, momentum, resume and files (arXiv 2106.09685)."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from doors import refused

from mocov3 import models
from mocov3.cli import main
from mocov3.distributed import World
from mocov3.errors import UserError
from mocov3.models.lora import DOWN, UP, PairedLinear, add_pairs
from mocov3.models.precision import Precision
from mocov3.optim import build_optimizer
from mocov3.pretraining.step import Step
from mocov3.weights import checkpoint
from mocov3.weights.find import find_backbone, summed

CPU = torch.device("cpu")
PREFIX = "module.base_encoder."
FLAGS = ["-a", "vit_tiny", "--image-size", "32", "-b", "16", "--moco-dim", "8", "--moco-mlp-dim", "16", "--epochs", "2"]
FLAGS += ["--warmup-epochs", "0", "--optimizer", "adamw", "--lr", ".05", "--seed", "3", "--recipe", "defaults"]
FLAGS += ["--logger", "none", "--quiet", "-j", "0"]
LORA = ["--lora", "4", "--unfreeze-last", "1"]


def tiny(rank=2, unfreeze_last=0):
    torch.manual_seed(0)
    model = models.build("vit_small", image_size=32, embed_dim=24, depth=2, num_heads=3, dim=8, mlp_dim=16)
    if rank:
        add_pairs(model.base_encoder, rank, unfreeze_last)
        for module in model.base_encoder.modules():
            if isinstance(module, PairedLinear):
                torch.nn.init.normal_(module.lora_up, std=0.1)
    return model.train()


def test_a_pair_is_added_to_its_matrix():
    model = tiny()
    layer = model.base_encoder.blocks[1].mlp.fc2
    stored = dict(layer.named_parameters())["weight"]
    x = torch.randn(2, 5, layer.in_features)
    want = F.linear(x, stored, layer.bias) + F.linear(F.linear(x, layer.lora_down), layer.lora_up)
    assert torch.allclose(layer(x), want, atol=1e-5)
    plain = tiny(rank=0)
    assert plain.state_dict().keys() < model.state_dict().keys(), "every key stays in place"
    paired = [n for n, m in model.base_encoder.named_modules() if isinstance(m, PairedLinear)]
    assert paired == [f"blocks.{i}.{n}" for i in (0, 1) for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    assert not any(isinstance(m, PairedLinear) for m in model.momentum_encoder.modules())
    plain.base_encoder.load_state_dict(summed(model.base_encoder.state_dict()))
    x = torch.randn(4, 3, 32, 32)
    assert torch.allclose(plain.eval().features(x), model.eval().features(x), atol=1e-5)


def test_the_momentum_encoder_averages_sums_and_not_pairs():
    model = tiny()
    layer = model.base_encoder.blocks[0].attn.qkv
    key = model.momentum_encoder.blocks[0].attn.qkv.weight
    want, ups, downs = key.clone(), layer.lora_up.detach().clone(), layer.lora_down.detach().clone()
    stored = dict(layer.named_parameters())["weight"].detach()
    for _ in range(3):
        with torch.no_grad():
            layer.lora_up.add_(torch.randn_like(layer.lora_up))
            layer.lora_down.add_(torch.randn_like(layer.lora_down))
            want = 0.9 * want + 0.1 * (stored + layer.lora_up @ layer.lora_down)
            ups, downs = 0.9 * ups + 0.1 * layer.lora_up, 0.9 * downs + 0.1 * layer.lora_down
        model.update_momentum_encoder(0.9)
    assert torch.allclose(key, want, atol=1e-6)
    assert not torch.allclose(stored + ups @ downs, want, atol=0.1), "averaged pairs are another network"


def test_a_step_moves_pairs_norms_and_heads_alone_and_micro_batches_agree():
    results = []
    for micro_batch in (0, 3):
        model = tiny()
        before = {k: v.clone() for k, v in model.base_encoder.state_dict().items()}
        optimizer = build_optimizer(model.parameters(), "adamw", weight_decay=0.1, momentum=0.9)
        step = Step(model, optimizer, world=World(0, 1, CPU), precision=Precision("fp32", CPU), micro_batch=micro_batch)
        x1, x2 = torch.randn(2, 8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        assert step(x1, x2, lr=0.01, m=0.9).ok
        results.append([p.grad for p in model.parameters() if p.grad is not None])
        moved = {k for k, v in model.base_encoder.state_dict().items() if not torch.equal(v, before[k])}
        norms = ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", DOWN, UP)
        backbone = {k for k in moved if not k.startswith("head.")}
        assert backbone == {k for k in before if k.endswith(norms) or k.startswith("norm.")}
        trained = sum(p.numel() for n, p in model.base_encoder.named_parameters() if n in backbone)
        assert trained == sum(before[k].numel() for k in backbone)
    assert len(results[0]) == len(results[1])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*results, strict=True))


def test_a_stem_keeps_the_statistics_it_starts_with(images, tmp_path):
    """Those of other images would be another network; in parts and at once the step is the same then."""
    model = models.build("vit_conv_tiny", image_size=32, patch_size=8, dim=8, mlp_dim=16)
    for encoder in (model.base_encoder, model.momentum_encoder):
        for module in encoder.patch_embed.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    base = tmp_path / "base.pth.tar"
    state = {f"module.{k}": v for k, v in model.state_dict().items()}
    checkpoint.write(base, {"arch": "vit_conv_tiny", "epoch": 1, "state_dict": state})
    weights = []
    for micro_batch in ("0", "4"):
        folder = tmp_path / micro_batch
        flags = [
            *FLAGS,
            *["-a", "vit_conv_tiny", "--patch-size", "8", "--lora", "4", "--max-steps", "2", "--lr", "1e-3"],
            "--init",
            str(base),
        ]
        flags += ["--hold-out", "8", "--quality-every", "1", "--output-dir", str(folder)]
        assert main(["pretrain", str(images), *flags, "--micro-batch", micro_batch]) == 0
        trained = checkpoint.read(newest(folder))["state_dict"]
        held = [k for k in state if "patch_embed" in k and "running" in k]
        assert len(held) == 12
        assert all(torch.equal(trained[k], state[k.replace("momentum", "base")]) for k in held)
        assert not torch.equal(trained["module.predictor.1.running_mean"], state["module.predictor.1.running_mean"])
        weights.append([v for k, v in trained.items() if k.endswith((DOWN, UP))])
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*weights, strict=True))


def test_the_last_blocks_are_trained_whole_where_asked():
    model = tiny(unfreeze_last=1)
    assert not any(isinstance(m, PairedLinear) for m in model.base_encoder.blocks[1].modules())
    before = {k: v.clone() for k, v in model.base_encoder.state_dict().items()}
    keys = {k: v.clone() for k, v in model.momentum_encoder.named_parameters()}
    optimizer = build_optimizer(model.parameters(), "adamw", weight_decay=0.1, momentum=0.9)
    step = Step(model, optimizer, world=World(0, 1, CPU), precision=Precision("fp32", CPU))
    x1, x2 = torch.randn(2, 8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert step(x1, x2, lr=0.01, m=0.9).ok
    model.update_momentum_encoder(0.5)
    moved = {k for k, v in model.base_encoder.state_dict().items() if not torch.equal(v, before[k])}
    whole = {k for k in before if k.startswith("blocks.1.")}
    assert whole <= moved
    norms = ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", DOWN, UP)
    rest = {k for k in before if k.endswith(norms) or k.startswith("norm.")}
    assert {k for k in moved if not k.startswith("head.")} == whole | rest
    of_keys = dict(model.momentum_encoder.named_parameters())
    assert {k for k in keys if not torch.equal(keys[k], of_keys[k])} >= whole


def test_a_vit_s_trains_little_of_its_backbone():
    with models.shapes_only():
        network = models.build_backbone("vit_small")
        whole = sum(p.numel() for p in network.parameters())
        add_pairs(network, 8)
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) < 0.05 * whole


@pytest.mark.parametrize("arch", ["vit_tiny", "vit_small", "vit_base"])
def test_the_trained_state_stays_small(arch):
    """At most 5 % of the backbone, from 5 million parameters."""
    with models.shapes_only():
        network = models.build_backbone(arch)
        whole = sum(p.numel() for p in network.parameters())
        add_pairs(network, 4)
    assert whole > 5_000_000
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) <= 0.05 * whole


@pytest.fixture(scope="module")
def base(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    assert main(["pretrain", str(images), *FLAGS, "--max-steps", "1", "--output-dir", str(folder)]) == 0
    return next(folder.glob("checkpoint_*"))


@pytest.fixture(scope="module")
def adapted(images, base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapted")
    flags = [*FLAGS, *LORA, "--init", str(base), "--max-steps", "4", "--hold-out", "8", "--quality-every", "1"]
    assert main(["pretrain", str(images), *flags, "--checkpoint-steps", "2", "--output-dir", str(folder)]) == 0
    return folder


def newest(folder):
    return checkpoint.newest(folder)[0]


def features(images, tmp_path, *model):
    file = tmp_path / f"{len(list(tmp_path.iterdir()))}.npy"
    assert main(["embed", *map(str, model), "-o", str(file), str(images / "val")]) == 0
    return np.load(file)


def test_a_resume_is_bit_equal(images, base, adapted, tmp_path):
    flags = [*FLAGS, *LORA, "--init", str(base), "--hold-out", "8", "--quality-every", "1"]
    flags += ["--output-dir", str(tmp_path), "--checkpoint-steps", "2"]
    assert main(["pretrain", str(images), *flags, "--max-steps", "2"]) == 0
    assert main(["pretrain", str(images), *flags, "--max-steps", "4", "--resume", "auto"]) == 0
    one, two = (checkpoint.read(newest(folder)) for folder in (adapted, tmp_path))
    assert all(torch.equal(v, two["state_dict"][k]) for k, v in one["state_dict"].items())
    states = [c["optimizer"]["state"] for c in (one, two)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][n][name], states[1][n][name]) for n in states[0] for name in states[0][n])


def test_files_hold_the_trained_features(images, base, adapted, tmp_path, capsys):
    trained = features(images, tmp_path, "--model", newest(adapted))
    assert np.abs(trained - features(images, tmp_path, "--model", base)).max() > 1e-3
    file = tmp_path / "adapter.safetensors"
    assert main(["export", str(newest(adapted)), "--adapter", "--output", str(file)]) == 0
    assert "adapter of rank 4 for vit_tiny" in capsys.readouterr().out
    assert np.array_equal(features(images, tmp_path, "--model", base, "--adapter", file), trained)
    # as plain weights of the backbone, as others have them, without our entry
    weights = find_backbone(checkpoint.read(base), "base").state
    torch.save(weights, tmp_path / "plain.pth")
    flags = ["--model", tmp_path / "plain.pth", "--adapter", file]
    assert np.array_equal(features(images, tmp_path, *flags), trained)
    best = checkpoint.read(adapted / "best_unlabelled.pth.tar")["state_dict"]
    assert not any(key.endswith((DOWN, UP)) for key in best), "pairs are summed"
    # what is trained on from the adapter starts as it ended
    folder = tmp_path / "on"
    flags = [*FLAGS, "--init", base, "--adapter", file, "--max-steps", "1", "--lr", "0", "--output-dir", folder]
    assert main(["pretrain", str(images), *map(str, flags)]) == 0
    state = checkpoint.read(newest(folder))["state_dict"]
    want = find_backbone(checkpoint.read(newest(adapted)), "adapted").state
    assert all(torch.equal(state[f"{PREFIX}{k}"], v) for k, v in want.items())


def test_refusals(images, base, adapted, tmp_path):
    run = ["pretrain", images, *FLAGS, "--output-dir", tmp_path / "r"]
    assert "give --init" in refused(*run, "--lora", "4")
    assert "below the width of the network's matrices, 192" in refused(*run, "--lora", "192", "--init", base)
    assert "no such file" in refused(*run, "--init", base, "--adapter", tmp_path / "none")
    assert "--fsdp" in refused(*run, "--lora", "4", "--init", base, "--fsdp")
    file = tmp_path / "a.safetensors"
    assert main(["export", str(newest(adapted)), "--adapter", "--output", str(file)]) == 0
    other = copy.deepcopy(checkpoint.read(base))
    other["state_dict"][f"{PREFIX}blocks.0.attn.qkv.weight"] += 1
    torch.save(other, tmp_path / "other.pth.tar")
    line = refused("embed", "--model", tmp_path / "other.pth.tar", "--adapter", file, "-o", tmp_path / "x.npy", images)
    assert "was trained on other weights (vit_tiny)" in line
    (tmp_path / "text").write_text("no adapter")
    flags = ["embed", "--model", base, "-o", tmp_path / "x.npy", images]
    assert "cannot be read as safetensors" in refused(*flags, "--adapter", tmp_path / "text")
    assert "was not trained with --lora" in refused("export", base, "--adapter", "--output", tmp_path / "b.safetensors")
    line = refused(*run, "--lora", "2", "--init", base, "--resume", newest(adapted))
    assert "lora (4 → 2), unfreeze_last (1 → 0)" in line
    assert "leaves none of the 12 blocks" in refused(*run, "--lora", "2", "--unfreeze-last", "12", "--init", base)
    assert "goes beside --lora" in refused(*run, "--unfreeze-last", "1", "--init", base)


def test_arches_without_blocks():
    with pytest.raises(UserError, match="no blocks of attention"):
        add_pairs(models.build("resnet18", dim=8, mlp_dim=16).base_encoder, 2)
