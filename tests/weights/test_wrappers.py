"""Weights as other programs wrap them: found by trial, said, refused by the nearest; what inspect promises runs."""

import argparse
import collections
import contextlib
import io
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from conftest import TINY
from doors import refused

import mocov3
from mocov3 import load_backbone, models
from mocov3.cli import main
from mocov3.config.command_lines import read_pretrain
from mocov3.errors import UserError
from mocov3.evaluation import network_scores
from mocov3.models import backbones, build_backbone
from mocov3.planning import speed
from mocov3.planning.choose import propose_settings
from mocov3.weights import checkpoint, convert, find, start, tensorfiles, walk
from mocov3.weights.find import find_backbone
from mocov3.weights.inspect import describe

SIZE = 32


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
    """ViTs of one block: files are small, and every kind of key is there."""
    for arch in ("vit_tiny", "vit_base", "vit_small"):
        monkeypatch.setitem(backbones._VITS, arch, {**backbones._VITS[arch], "depth": 1})


def resnet(seed=0, arch="resnet10_w16"):
    torch.manual_seed(seed)
    state = build_backbone(arch).state_dict()
    return {k: v for k, v in state.items() if not k.startswith("fc.")}


def vit(seed=0):
    torch.manual_seed(seed)
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=SIZE, depth=1).eval()


def pre(prefix, state):
    return {prefix + key: value for key, value in state.items()}


A, B = resnet(1), resnet(2)
HEAD = {"0.weight": torch.ones(8, 128), "0.bias": torch.ones(8)}
WRAPPED = {  # contents, what is said of the place, what is passed over
    "compiled": (pre("_orig_mod.", A), "no entry, prefix _orig_mod.", None),
    "compiled in ranks": ({"model": pre("module._orig_mod.", A)}, "entry model, prefix module._orig_mod.", None),
    "compiled around ranks": ({"net": pre("_orig_mod.module.", A)}, "entry net, prefix _orig_mod.module.", None),
    "Lightning": (
        {"state_dict": pre("model.net.", A) | pre("model.head.", HEAD), "hyper_parameters": {"lr": 0.1}},
        "entry state_dict, prefix model.net.",
        None,
    ),
    "solo-learn": (
        {"state_dict": pre("momentum_backbone.", B) | pre("backbone.", A) | pre("classifier.", HEAD)},
        "entry state_dict, prefix backbone.",
        "entry state_dict, prefix momentum_backbone.",
    ),
    "lightly's, a Sequential": (
        {
            "state_dict": pre(
                "backbone.",
                {
                    k.replace("bn1.", "1.", 1)
                    if k.startswith("bn1.")
                    else "0.weight"
                    if k == "conv1.weight"
                    else str(int(k[5]) + 3) + k[6:]: v
                    for k, v in A.items()
                },
            )
            | pre("projection_head.layers.", HEAD)
        },
        "entry state_dict, prefix backbone.",
        None,
    ),
    "SwAV": (
        pre("module.", A) | pre("module.projection_head.", HEAD) | {"module.prototypes.weight": HEAD["0.weight"]},
        "",
        None,
    ),
    "BYOL": (
        {"online": pre("encoder.", A), "target": pre("encoder.", B)},
        "entry online, prefix encoder.",
        "entry target, prefix encoder.",
    ),
    "MoCo v2": (
        {
            "arch": "my_resnet",
            "state_dict": pre("module.encoder_k.", B)
            | pre("module.encoder_q.", A)
            | {"module.queue": torch.ones(4, 4)},
        },
        "entry state_dict, prefix module.encoder_q.",
        "entry state_dict, prefix module.encoder_k.",
    ),
    "DINO": (
        {"student": pre("module.backbone.", B), "teacher": pre("backbone.", A) | pre("head.", HEAD), "epoch": 3},
        "entry teacher, prefix backbone.",
        "entry student, prefix module.backbone.",
    ),
    "DINO in Lightning": (
        {"state_dict": pre("student.backbone.", B) | pre("teacher.backbone.", A)},
        "entry state_dict, prefix teacher.backbone.",
        "entry state_dict, prefix student.backbone.",
    ),
    "timm's training": (
        {"state_dict": A, "state_dict_ema": B},
        "entry state_dict, no prefix",
        "entry state_dict_ema, no prefix",
    ),
    "deep": ({"a": {"b": {"c": pre("d.", A)}}}, "entry a.b.c, prefix d.", None),
}


@pytest.mark.parametrize("case", WRAPPED)
def test_wrapped_weights_are_found_and_said(case, tmp_path, capsys):
    contents, said, rather = WRAPPED[case]
    file = tmp_path / "w.pth"
    torch.save(contents, file)
    encoder = load_backbone(file, arch="resnet10_w16")
    assert all(torch.equal(value, A[key]) for key, value in encoder.state_dict().items())
    line = capsys.readouterr().err
    if said:
        where = f"weights: {said.removeprefix('no entry, ')}" + (f" (rather than {rather})" if rather else "")
        assert line == f"mocov3: {file}: {where}\n"
    else:
        assert not line
    if case == "DINO":
        assert describe(str(file))["arch"].startswith("resnet10_w16 (by")  # found without its name


@pytest.mark.parametrize("case", ["solo-learn", "BYOL", "MoCo v2", "timm's training"])
def test_the_average_can_be_asked_for(case):
    state = find_backbone(WRAPPED[case][0], case, momentum=True, arch="resnet10_w16").state
    assert all(torch.equal(value, B[key]) for key, value in state.items())
    with pytest.raises(UserError, match="no momentum encoder"):
        find_backbone({"state_dict": pre("backbone.", A)}, "f", momentum=True)


def test_a_wrapped_checkpoint_of_the_method_is_one():
    model = models.build("resnet10_w16", dim=8, mlp_dim=8)
    found = find_backbone({"state_dict": pre("_orig_mod.module.", model.state_dict())}, "f")
    assert found.kind.startswith("pre-training")
    assert found.found.startswith("weights: entry state_dict, prefix _orig_mod.module.base_encoder. (rather than")


def same(file, network, arch, **flags):
    x = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        ours, theirs = load_backbone(file, arch=arch, image_size=SIZE, **flags)(x), network(x)
    assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()


def test_mae_beside_its_decoder(tmp_path):
    network, file = vit(), tmp_path / "mae.pth"
    beside = {"mask_token": torch.ones(1, 1, 192), "decoder_pos_embed": torch.ones(1, 5, 16)}
    beside |= pre("decoder_blocks.0.norm1.", HEAD) | pre("decoder_embed.", HEAD)
    torch.save({"model": {**network.state_dict(), **beside}}, file)
    same(file, network, "vit_tiny")
    # MAE's published widths need no --heads
    for width, heads in ((768, 12), (1024, 16), (1280, 16)):
        arch = {768: "vit_base", 1024: "vit_large", 1280: "vit_huge"}[width]
        weights = find.BackboneWeights(
            "backbone", None, {"cls_token": torch.ones(1, 1, width), "blocks.0.attn.qkv.weight": HEAD["0.weight"]}
        )
        assert weights.sizes(arch, "f") == {"num_heads": heads}


def test_heads_that_a_family_has_are_assumed_and_said(tmp_path, capsys):
    torch.manual_seed(5)
    network = timm.create_model("vit_small_patch16_224", num_classes=0, img_size=SIZE, depth=1).eval()
    torch.save({"model": {**network.state_dict(), "mask_token": torch.ones(1, 1, 384)}}, tmp_path / "mae.pth")
    same(tmp_path / "mae.pth", network, "vit_small")  # of 6 heads, where our vit_small has 12
    assert "6 attention heads assumed (64 channels each, as in MAE's networks)" in capsys.readouterr().err
    theirs = torchvision.models.VisionTransformer(SIZE, 16, 1, 12, 384, 1536).eval()
    torch.save(theirs.state_dict(), tmp_path / "tv.pth")
    theirs.heads = torch.nn.Identity()
    same(tmp_path / "tv.pth", theirs, "vit_small")
    assert "12 attention heads assumed (vit_small's): --heads says another number" in capsys.readouterr().err
    torch.save(network.state_dict(), tmp_path / "plain.pth")  # of no family that tells
    with pytest.raises(UserError, match="give --heads 12"):
        load_backbone(tmp_path / "plain.pth", arch="vit_small", image_size=SIZE)


def test_patches_are_those_of_the_file(tmp_path):
    """As MAE's ViT-H/14."""
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=28, depth=1, patch_size=14).eval()
    torch.save({"model": network.state_dict()}, tmp_path / "w.pth")
    x = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        assert torch.allclose(
            load_backbone(tmp_path / "w.pth", arch="vit_tiny", image_size=28)(x), network(x), atol=1e-5
        )


@pytest.mark.parametrize(
    ("width", "heads", "arch"), [(192, 3, "vit_tiny"), (768, 12, "vit_base"), (384, 6, "vit_small")]
)
def test_torchvisions_vits(width, heads, arch, tmp_path, images):
    torch.manual_seed(4)
    network = torchvision.models.VisionTransformer(SIZE, 16, 1, heads, width, 4 * width, num_classes=3)
    for parameter in network.parameters():  # zeros, as they begin, would hide what goes where
        torch.nn.init.normal_(parameter, std=0.05)
    file = tmp_path / "tv.pth"
    torch.save(pre("module.", network.state_dict()) if heads == 3 else network.state_dict(), file)
    network.heads = torch.nn.Identity()
    flags = {"heads": heads} if width == 384 else {}
    same(file, network.eval(), arch, **flags)
    if flags:
        assert "with --heads 12 (MoCo v3's) or --heads 6" in refused("embed", "--model", file, "-o", "x.npy", images)


def test_vits_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(4)
    config = transformers.ViTConfig(
        hidden_size=192,
        num_hidden_layers=1,
        num_attention_heads=3,
        intermediate_size=768,
        image_size=SIZE,
        layer_norm_eps=1e-6,
    )
    network = transformers.ViTModel(config).eval()
    network.save_pretrained(tmp_path)
    same(tmp_path / "model.safetensors", lambda x: network(x).last_hidden_state[:, 0], "vit_tiny")


REFUSED = {
    "a block is missing": (
        lambda s: {k: v for k, v in s.items() if k != "layer3.0.bn2.weight"},
        "enc.layer3.0.bn2.weight is missing",
    ),
    "another width": (
        lambda s: {**s, "layer4.0.conv2.weight": torch.ones(5, 128, 3, 3)},
        "enc.layer4.0.conv2.weight is (5, 128, 3, 3) where this arch has (128, 128, 3, 3)",
    ),
    "more than the arch": (
        lambda s: {**s, "layer2.0.se.fc1.weight": torch.ones(3, 3)},
        "this arch has no enc.layer2.0.se.fc1.weight",
    ),
}


@pytest.mark.parametrize(("case", "door"), list(zip(REFUSED, ("embed", "export", "pretrain"), strict=True)))
def test_what_does_not_fit_is_named(case, door, tmp_path, images):
    change, reason = REFUSED[case]
    file = tmp_path / "w.pth"
    torch.save({"ema": {"net": pre("enc.", change(A))}}, file)
    line = refused(
        *{
            "embed": ["embed", "--model", file, "-a", "resnet10_w16", "-o", tmp_path / "x.npy", images],
            "export": ["export", file, "--to", "safetensors", "--output", tmp_path / "x.st", "-a", "resnet10_w16"],
            "pretrain": ["pretrain", images, *TINY, "-a", "resnet10_w16", "--output-dir", tmp_path, "--init", file],
        }[door]
    )
    count = len(A) - (case != "more than the arch")
    assert f"nearest: resnet10_w16 at entry ema.net, prefix enc., {count} of {len(A)} keys fit, but {reason}" in line


def test_files_that_name_timms_arch(tmp_path, images):
    network, file = vit(), tmp_path / "t.pth"
    torch.save({"arch": "vit_tiny_patch16_224", "state_dict": network.state_dict()}, file)
    contents = checkpoint.read(file)
    assert find.named_arch(contents) == "timm/vit_tiny_patch16_224"
    assert find.named_arch({"arch": "resnet50"}) == "resnet50"
    assert find.named_arch({"arch": "my_net"}) is None
    full = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=SIZE).eval()
    torch.save({"arch": "vit_tiny_patch16_224", "state_dict": full.state_dict()}, file)
    full.reset_classifier(0)
    encoder, settings = convert.build_from(checkpoint.read(file), "f", image_size=SIZE)
    x = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        assert torch.allclose(encoder(x), full(x), atol=1e-5)
    assert settings["arch"] == "timm/vit_tiny_patch16_224"
    assert "is of arch timm/vit_tiny_patch16_224, not vit_tiny" in refused(
        "embed", "--model", file, "-a", "vit_tiny", "-o", tmp_path / "x.npy", images
    )


def test_init_is_read_once(tmp_path, images, monkeypatch, capsys):
    file = tmp_path / "w.pth"
    torch.save({"teacher": pre("backbone.", A), "student": pre("backbone.", B)}, file)
    monkeypatch.setattr(speed, "epoch_seconds", lambda config, source, count: (1.0, 1.0, config.batch_size))
    reads, read = [], checkpoint.read
    monkeypatch.setattr(start.checkpoint, "read", lambda path: reads.append(path) or read(path))
    layers = read_pretrain(
        [str(images), "--recipe", "adapt", "--init", str(file), "--device", "cpu", "-j", "0"], prog="x", defaults=None
    )
    assert propose_settings(layers).config.arch == "resnet10_w16"
    assert reads == [str(file)]


# --- objects beside the weights ----------------------------------------------------------------------------


class Dict(dict):
    """As Lightning's AttributeDict, EasyDict and others."""


class Callback:
    """With a state of its own."""

    def __init__(self):
        self.best, self.score = Path("best.ckpt"), torch.ones(2)


OBJECTS = {
    "arguments": argparse.Namespace(lr=0.1, out=Path("x"), names={"a", "b"}),
    "a dict of a class of its own": Dict(lr=0.1, inner=Dict(a=1)),
    "a callback": Callback(),
    "keyed by class": {Callback: {"best": 1.0}},
    "a network": torch.nn.Linear(2, 2),
    "numbers of numpy": {"best": np.float64(3.5), "all": np.arange(3)},
    "counters": {"milestones": collections.Counter({3: 1}), "d": collections.defaultdict(list, {"a": [1]})},
    "in a list": [1, Callback(), {"a": Callback()}],
}


@pytest.mark.parametrize("case", OBJECTS)
@pytest.mark.parametrize("archive", [True, False])
def test_objects_beside_weights_are_passed_over(case, archive, tmp_path, monkeypatch):
    if case == "a network" and not archive:
        pytest.skip("torch's old format refers to the code of modules, which is refused")
    file = tmp_path / "w.ckpt"
    thing = OBJECTS[case]
    torch.save(
        {"args": thing, "state_dict": pre("backbone.", A), "epoch": 4}, file, _use_new_zipfile_serialization=archive
    )

    def never(*_, **__):
        raise AssertionError("an object of the file was made")

    for kind in (Callback, Dict, argparse.Namespace):
        monkeypatch.setattr(kind, "__setstate__", never, raising=False)
        monkeypatch.setattr(kind, "__setitem__", never, raising=False)
    contents = checkpoint.read(file)
    assert contents["epoch"] == 4
    assert not any(isinstance(value, tensorfiles._Object) for value in flat(contents))
    state = find_backbone(contents, "f", arch="resnet10_w16").state
    assert all(torch.equal(value, A[key]) for key, value in state.items())


def flat(value):
    if isinstance(value, dict | list):
        for inner in [*value.keys(), *value.values()] if isinstance(value, dict) else value:
            yield from flat(inner)
    yield value


class Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "function",
    [eval, print, getattr, __import__, torch._utils._rebuild_qtensor, __import__("os").system],
    ids=lambda f: f.__name__,
)
def test_what_could_run_is_refused(function, tmp_path, capsys):
    torch.save({"args": Calls(function, "1"), "state_dict": A}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"which could run code.*refused"):
        checkpoint.read(tmp_path / "w.pth")


def test_a_pickled_network_is_refused_with_the_cure(tmp_path):
    torch.save(build_backbone("resnet10_w16"), tmp_path / "w.pth")
    assert "save the network's state_dict() instead" in refused("inspect", tmp_path / "w.pth")


def test_only_what_makes_tensors_is_looked_up():
    plain = [name for name in walk._CALLS if not name.startswith("torch.")]
    assert sorted(plain) == ["_codecs.encode", "collections.OrderedDict"]
    for name in (
        "os.system",
        "builtins.eval",
        "torch.load",
        "torch.hub.load",
        "torch.nn.modules.linear.Linear",
        "pickle.loads",
    ):
        assert not walk.is_plain(name)
    unpickler = tensorfiles._Unpickler(io.BytesIO())
    assert unpickler.find_class("shutil", "rmtree") is tensorfiles._Object
    assert unpickler.find_class("torch", "float32") is torch.float32


# --- what inspect promises ---------------------------------------------------------------------------------


def written(kind, tmp_path, images):
    file = tmp_path / "file.pth"
    if kind == "ours, grey":
        flags = [*TINY, "-b", "8", "--max-steps", "1", "--output-dir", str(tmp_path), "--channels", "1"]
        assert main(["pretrain", str(images), *flags]) == 0
        return checkpoint.newest(tmp_path)[0]
    contents = {
        "wrapped": WRAPPED["DINO"][0],
        "unfit": {"arch": "resnet50", "state_dict": A},
        "unknown": pre("x.", HEAD),
        "a ViT of unknown heads": timm.create_model("vit_small_patch16_224", num_classes=0, depth=1).state_dict(),
    }[kind]
    torch.save(contents, file)
    return file


ADAPT = ["--epochs", "3", "-b", "8", "--image-size", str(SIZE), "--max-steps", "1"]
PROMISES = {"ours, grey": 4, "wrapped": 2, "a ViT of unknown heads": 2, "unfit": 0, "unknown": 0}


@pytest.mark.parametrize("kind", PROMISES)
def test_what_inspect_promises_runs(kind, tmp_path, images, monkeypatch):
    file = written(kind, tmp_path, images)
    monkeypatch.setattr(speed, "epoch_seconds", lambda config, source, count: (1.0, 1.0, config.batch_size))
    monkeypatch.setattr(
        network_scores,
        "features_of_views",
        lambda _, images: (torch.randn(len(images.source), 4, 8), np.arange(len(images.source))),
    )
    facts = describe(str(file))
    assert len(facts["good_for"]) == PROMISES[kind]
    for promise in facts["good_for"]:
        what, _, command = promise.partition(": ")
        if what == "features":
            python, _, command = command.partition("; judging: ")
            eval(python.replace("heads=N", "heads=6"), {"mocov3": mocov3})
        places = {"DIR": str(images), "OUT.pth": str(tmp_path / "out.pth"), "N": "6"}
        words = [places.get(word, word) for word in shlex.split(command)[1:]]
        if words[0] != "convert":
            words += ["--device", "cpu", "-j", "0"]
        if what == "starting":
            words += [*ADAPT, "--output-dir", str(tmp_path / "adapted")]
        with contextlib.redirect_stdout(io.StringIO()):
            assert main(words) == 0, words
    assert PROMISES[kind] or any("use by name" in text or "as a start" in text for text in facts["not_for"])


def test_inspect_promises_no_resume_of_half_a_checkpoint(tmp_path):
    model = models.build("resnet10_w16", dim=8, mlp_dim=8)
    state = {f"module.{k}": v for k, v in model.state_dict().items()}
    whole = {"epoch": 1, "arch": "resnet10_w16", "state_dict": state, "optimizer": {}}
    half = {k: v for k, v in state.items() if "momentum_encoder.layer4" not in k}
    for contents, reason in (
        ({**whole, "state_dict": half}, "its two encoders are not alike"),
        ({k: v for k, v in whole.items() if k != "optimizer"}, "misses the entry 'optimizer'"),
        ({**whole, "epoch": "one"}, "misses the entry 'epoch'"),
        ({**whole, "state_dict": pre("_orig_mod.", state)}, "its keys are not those of a run"),
    ):
        torch.save(contents, tmp_path / "c.pth.tar")
        facts = describe(str(tmp_path / "c.pth.tar"))
        assert any(reason in text for text in facts["not_for"]), facts
        assert not any("resuming" in text for text in facts["good_for"])
    safetensors.torch.save_file(A, tmp_path / "a.safetensors")
    assert describe(str(tmp_path / "a.safetensors"))["not_for"] == ["resuming: is a backbone file"]


# --- parts, and what is none ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("ending", "parts"), [("safetensors", 2), ("safetensors", 3), ("bin", 2)])
def test_parts_with_an_index(tmp_path, ending, parts):
    state = resnet()
    names = {key: f"m-{i % parts}.{ending}" for i, key in enumerate(state)}
    for name in set(names.values()):
        part = {key: value for key, value in state.items() if names[key] == name}
        (safetensors.torch.save_file if ending == "safetensors" else torch.save)(part, tmp_path / name)
    index = tmp_path / f"m.{ending}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    encoder = load_backbone(index, arch="resnet10_w16")
    assert all(torch.equal(value, encoder.state_dict()[key]) for key, value in state.items() if "fc" not in key)
    assert "is a folder; name the file in it" in refused("inspect", tmp_path)
    (tmp_path / f"m-1.{ending}").unlink()
    assert f"m-1.{ending}: there is no such file" in refused("inspect", index)


@pytest.mark.parametrize("text", ["{}", "[1]", "no", '{"weight_map": {}}', '{"weight_map": {"a": "../a"}}'])
def test_an_index_of_something_else(tmp_path, text):
    (tmp_path / "x.index.json").write_text(text)
    assert "is no index of weights beside it" in refused("inspect", tmp_path / "x.index.json")


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.bool])
def test_weights_that_are_no_floats(tmp_path, dtype):
    state = resnet()
    torch.save({**state, "conv1.weight": state["conv1.weight"].to(dtype)}, tmp_path / "w.pth")
    name = str(dtype)[6:]
    with pytest.raises(UserError, match=f"conv1.weight holds {name}, not the floats"):
        load_backbone(tmp_path / "w.pth", arch="resnet10_w16")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_floats(tmp_path, dtype):
    state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in resnet().items()}
    torch.save(state, tmp_path / "w.pth")
    loaded = load_backbone(tmp_path / "w.pth", arch="resnet10_w16").state_dict()
    assert all(torch.equal(loaded[key], state[key].to(loaded[key].dtype)) for key in loaded if "fc" not in key)


@pytest.mark.parametrize(
    ("head", "words"),
    [(b"\x1f\x8b\x08", "gzip"), (b"<html>", "web page"), (b"version https://git-lfs.github.com", "git lfs pull")],
)
def test_what_a_file_of_weights_is_instead(tmp_path, words, head):
    (tmp_path / "w.pth").write_bytes(head + b"x" * 300)
    assert words in refused("inspect", tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("arch", "side", "fits"),
    [("convnext_atto", 16, 32), ("xcit_nano_12_p16_224", 40, 48), ("maxvit_pico_rw_256", 100, 64)],
)
def test_networks_of_timm_and_sizes_they_cannot_take(arch, side, fits):
    torch.manual_seed(0)
    encoder = build_backbone(f"timm/{arch}", image_size=fits).eval()
    with torch.no_grad():
        assert encoder.features(torch.zeros(1, 3, fits, fits)).shape == (1, encoder.num_features)
    with pytest.raises(UserError, match=f"--arch timm/{arch}: cannot take images of {side} px"):
        build_backbone(f"timm/{arch}", image_size=side)
