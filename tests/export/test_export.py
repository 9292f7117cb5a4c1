"""Exports: tables account for every key, the libraries' own classes load strictly, features agree; bad input."""

import json
import sys
from unittest.mock import patch

import cards
import pytest
import timm
import torch
import torchvision.models as tv
from conftest import ROOT
from doors import no_file_above, refused

from mocov3 import load_backbone, models
from mocov3.cli import main
from mocov3.config.archs import BUILT_IN_ARCHS, is_resnet
from mocov3.errors import UserError
from mocov3.export import write
from mocov3.export.formats import WRITERS, Unfit
from mocov3.export.places import FORMATS
from mocov3.models import backbones, build_backbone, shapes_only
from mocov3.weights import checkpoint, convert, key_tables


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Untrained pre-training checkpoints by (arch, image size), made when first asked for."""
    folder, made = tmp_path_factory.mktemp("ckpt"), {}

    def get(arch, size=32):
        path = folder / f"{arch.replace('/', '-')}-{size}-{backbones._VITS.get(arch)}.pth.tar"
        if path not in made:
            torch.manual_seed(1)
            model = models.build(arch, image_size=size, dim=8, mlp_dim=16)
            for module in model.modules():  # batch statistics that matter
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.running_mean.normal_(std=0.1)
                    module.weight.data.uniform_(0.5, 1.5)
            state = {f"module.{k}": v for k, v in model.state_dict().items()}
            config = {"image_size": size, "arch": arch, "lr": 0.3, "data": "SECRET-PLACE"}
            own = {"format": 1, "config": config, "licence": "Apache-2.0", "origin": "trained from scratch by mocov3"}
            torch.save({"epoch": 7, "arch": arch, "state_dict": state, "optimizer": {}, "mocov3": own}, path)
            made[path] = model.base_encoder
        return path, made[path].eval()

    return get


@pytest.fixture
def two_blocks(monkeypatch):
    """ViTs of two blocks, where the others would only repeat what is checked."""
    for arch in ("vit_tiny", "vit_conv_small"):
        monkeypatch.setitem(backbones._VITS, arch, {**backbones._VITS[arch], "depth": 2})


@pytest.fixture
def x():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def exported(checkpoint_path, to, output, *flags):
    assert main(["export", str(checkpoint_path), "--to", to, "--output", str(output), *flags]) == 0
    return output


def close(a, b, tolerance=1e-5):
    assert (a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1)


def by_its_card(output, ours, size=32, name="features"):
    """From file bytes: what the card's code gives, against the source's network behind our evaluation view."""
    want = torch.stack([cards.by_view(data, size, 256 / 224) for data in cards.files().values()])
    with torch.no_grad():
        close(torch.as_tensor(cards.run(output, cards.files())[name]), ours(want))


def meta(arch):
    with shapes_only():
        return build_backbone(arch)


@pytest.mark.parametrize("arch", BUILT_IN_ARCHS)
def test_tables_account_for_every_key(arch, tmp_path):
    encoder = meta(arch)
    setattr(encoder, encoder.projector_name, torch.nn.Identity())
    state = encoder.state_dict()
    model = write.Exported(
        encoder, arch, 224, 16, False, (0.5,) * 3, (0.5,) * 3, 1.0, "f", "0", {}, None, "", "", False
    )
    shapes = lambda s: {k: tuple(v.shape) for k, v in s.items()}
    held = []
    for to in ("timm", "torchvision", "transformers"):
        try:
            WRITERS[to].fits(model)
        except Unfit:
            continue
        held.append(to)
        with shapes_only():
            if to == "timm":
                name, args = WRITERS[to].named(model)
                theirs, ours = timm.create_model(name, num_classes=0, **args).state_dict(), state
            elif to == "torchvision":
                theirs = WRITERS[to].build(model).state_dict()
                ours = state if is_resnet(arch) else key_tables.translate(state, key_tables.VIT_TORCHVISION)
            else:
                rows = key_tables.RESNET_TRANSFORMERS if is_resnet(arch) else key_tables.VIT_TRANSFORMERS
                ours = key_tables.translate(state, rows)
                theirs = _transformers_on_disk(WRITERS[to].config(model), tmp_path)
        assert shapes(ours) == shapes(theirs), to
    wanted = {"resnet10": 3, "vit_conv_micro": 1, "vit_conv_tiny": 1, "vit_conv_small": 1, "vit_conv_base": 1}.get(
        arch, 0 if arch.startswith("resnet10_") else 3
    )
    assert len(held) == (2 if "next" in arch or "wide" in arch else wanted)


def _transformers_on_disk(config, tmp_path):
    """The keys transformers itself writes, with unfilled weights; its classes may use other names in memory."""
    from transformers import ResNetModel, ViTModel, modeling_utils

    with torch.device("meta"):
        resnet = config.model_type == "resnet"
        made = ResNetModel(config) if resnet else ViTModel(config, add_pooling_layer=False)
    written = {}  # instead of gigabytes on the disk
    with (
        torch.device("cpu"),
        patch.object(modeling_utils, "safe_save_file", lambda tensors, *_, **__: written.update(tensors)),
    ):
        made.to_empty(device="cpu").save_pretrained(tmp_path / "theirs")
    return written


def test_a_table_with_a_gap_is_refused():
    state = {"cls_token": torch.zeros(1), "unknown.weight": torch.zeros(1)}
    with pytest.raises(KeyError, match=r"unknown\.weight: 0 rows"):
        key_tables.translate(state, key_tables.VIT_TORCHVISION)


def test_timm(checkpoints, tmp_path, x, capsys):
    path, ours = checkpoints("vit_small")
    folder = exported(path, "timm", tmp_path / "new" / "vit")
    assert "largest difference of an output" in capsys.readouterr().out
    file = folder / "model.safetensors"
    theirs = timm.create_model("vit_small_patch16_224", num_classes=0, num_heads=12, img_size=32, checkpoint_path=file)
    with torch.no_grad():
        close(theirs.eval()(x), ours.features(x))
        six = timm.create_model("vit_small_patch16_224", num_classes=0, img_size=32, checkpoint_path=file)
        assert (six.eval()(x) - ours.features(x)).abs().max() > 0.01  # timm's own has 6 heads
    by_its_card(folder, ours.features)
    local = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert local.blocks[0].attn.num_heads == 12
    with torch.no_grad():
        close(local.eval()(x), ours.features(x))
        maps = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True).eval()
        taken = maps(x)[-1]
        want = local.forward_intermediates(x, indices=1, norm=False, intermediates_only=True)[0]
    assert taken.shape == (4, 384, 2, 2)
    close(taken, want)
    assert timm.data.resolve_data_config({}, model=local)["mean"] == pytest.approx((0.485, 0.456, 0.406))
    ten = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=10)  # to fine-tune with timm
    assert torch.equal(ten.state_dict()["blocks.3.mlp.fc1.weight"], ours.state_dict()["blocks.3.mlp.fc1.weight"])
    # and back: timm's file into ours
    torch.save(local.state_dict(), tmp_path / "timm.pth")
    back = build_backbone("vit_small", image_size=32)
    convert.load_into(back, convert.find_backbone(checkpoint.read(tmp_path / "timm.pth"), "f"), "f")
    with torch.no_grad():
        close(back.eval().features(x), ours.features(x), 1e-6)


@pytest.mark.parametrize("to", ["deit", "timm", "torchvision", "transformers"])
def test_six_heads_stay_six(to, tmp_path, x, monkeypatch):
    """Every library that an export is for gives timm's own features, and is told 6."""
    depth = 12 if to == "timm" else 1  # timm's name is of 12 blocks; fewer cost less
    monkeypatch.setitem(backbones._VITS, "vit_small", {**backbones._VITS["vit_small"], "depth": depth})
    file = tmp_path / "deit.pth"
    network = timm.create_model("vit_small_patch16_224", num_classes=0, img_size=32, depth=depth).eval()
    torch.save({"model": network.state_dict()}, file)
    go = ("export", file, "--to", to, "-a", "vit_small", "--image-size", "32", "--output", tmp_path / "out")
    assert "that does not record its attention heads" in refused(*go)
    assert main([*map(str, go), "--heads", "6"]) == 0
    card = (tmp_path / "out.md" if (tmp_path / "out.md").exists() else tmp_path / "out" / "README.md").read_text()
    if to == "deit":
        assert "num_heads=6" in card
        saved = checkpoint.read(tmp_path / "out")
        assert (saved["mocov3"], set(saved)) == ({"config": {"heads": 6}}, {"model", "mocov3"})
        found = load_backbone(tmp_path / "out", arch="vit_small", image_size=32)
    elif to == "timm":
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["model_args"]["num_heads"] == 6
        found = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
        again = load_backbone(tmp_path / "out" / "model.safetensors")  # ours and timm's names are the same
        assert again.blocks[0].attn.num_heads == 6
    elif to == "torchvision":
        found = cards.run(tmp_path / "out", {"grey": cards.files()["grey"]})["model"]
    else:
        from transformers import AutoModel

        assert json.loads((tmp_path / "out" / "config.json").read_text())["num_attention_heads"] == 6
        made = AutoModel.from_pretrained(tmp_path / "out", add_pooling_layer=False).eval()
        found = lambda x: made(x).last_hidden_state[:, 0]
    with torch.no_grad():
        close(found(x), network(x))


def test_timm_resnets(checkpoints, tmp_path, x):
    for arch in ("resnet18", "resnet10", "timm/resnet10t"):
        path, ours = checkpoints(arch)
        folder = exported(path, "timm", tmp_path / arch)
        with torch.no_grad():
            close(timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(x), ours.features(x))
    maps = timm.create_model(f"local-dir:{tmp_path / 'resnet18'}", pretrained=True, features_only=True, out_indices=[4])
    with torch.no_grad():
        close(maps.eval()(x)[0].mean((2, 3)), checkpoints("resnet18")[1].features(x))


def test_patchcore_takes_an_exported_backbone(checkpoints, tmp_path):
    anomalib = pytest.importorskip("anomalib.models.image.patchcore.torch_model")
    folder = exported(checkpoints("resnet18", 64)[0], "timm", tmp_path / "r18")
    backbone = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True, out_indices=[2, 3])
    model = anomalib.PatchcoreModel(layers=["layer2", "layer3"], backbone="resnet18", pre_trained=False)
    network = model.feature_extractor.feature_extractor
    weights = {k: v for k, v in backbone.state_dict().items() if k in network.state_dict()}
    network.load_state_dict(weights)
    x = torch.randn(6, 3, 64, 64)
    model.train()
    model(x)
    model.subsample_embedding(0.5)
    model.eval()
    scores = model(torch.cat([x[:1], torch.randn(1, 3, 64, 64) * 4])).pred_score.flatten()
    assert scores[1] > scores[0]  # what it has seen, and what it has not


def test_torchvision(checkpoints, tmp_path, x, two_blocks):
    for arch in ("resnet18", "vit_tiny", "vit_conv_small"):
        path, ours = checkpoints(arch)
        file = exported(path, "torchvision", tmp_path / f"{arch}.pth")
        by_its_card(file, ours.features)
    # only the classifier is missing in the class as it comes
    whole = tv.resnet18()
    missing, unknown = whole.load_state_dict(torch.load(tmp_path / "resnet18.pth", weights_only=True), strict=False)
    assert (sorted(missing), unknown) == (["fc.bias", "fc.weight"], [])


@pytest.mark.parametrize("arch", ["vit_small", "resnet18", "resnet50"])
def test_transformers(arch, checkpoints, tmp_path, x):
    from transformers import AutoModel

    path, ours = checkpoints(arch, 32 if arch.startswith("vit") else 56)
    folder = exported(path, "transformers", tmp_path / arch)
    kwargs = {} if is_resnet(arch) else {"add_pooling_layer": False}
    theirs, info = AutoModel.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        out = theirs.eval()(x)
        close(out.pooler_output.flatten(1) if is_resnet(arch) else out.last_hidden_state[:, 0], ours.features(x))
    by_its_card(folder, ours.features, 32 if arch.startswith("vit") else 56)


def test_graphs(checkpoints, tmp_path, x, two_blocks):
    import onnx
    import onnxruntime

    path, ours = checkpoints("vit_tiny")
    file = exported(path, "onnx", tmp_path / "vit.onnx")
    session = onnxruntime.InferenceSession(file)
    program = torch.export.load(exported(path, "torch-export", tmp_path / "vit.pt2")).module()
    by_its_card(tmp_path / "vit.onnx", ours.features)
    by_its_card(tmp_path / "vit.pt2", ours.features)
    for part in (x, x[:1], x[:3]):
        with torch.no_grad():
            want = ours.features(part)
            close(torch.from_numpy(session.run(None, {"pictures": part.numpy()})[0]), want, 1e-5)
            close(program(part), want)
    about = {p.key: p.value for p in onnx.load(file).metadata_props}
    assert (about["arch"], about["licence"]) == ("vit_tiny", "Apache-2.0")


def test_deit_and_safetensors(checkpoints, tmp_path, x):
    from safetensors import safe_open

    path, ours = checkpoints("resnet10_w32")
    deit = torch.load(exported(path, "deit", tmp_path / "d.pth"), weights_only=True)
    want = {k: v for k, v in ours.state_dict().items() if not k.startswith("fc.")}
    assert list(deit) == ["model"]
    assert list(deit["model"]) == list(want)
    assert all(torch.equal(v, want[k]) for k, v in deit["model"].items())
    by_its_card(tmp_path / "d.pth", ours.features)
    # a file without arch is exported again once it is named
    assert "-a resnet10_w32 fits it" in refused(
        "export", tmp_path / "d.pth", "--to", "safetensors", "--output", tmp_path / "d.st"
    )
    exported(tmp_path / "d.pth", "safetensors", tmp_path / "s.safetensors", "-a", "resnet10_w32", "--image-size", "32")
    with safe_open(tmp_path / "s.safetensors", "pt") as file:
        assert sorted(file.keys()) == sorted(want)
        assert "CC-BY-NC" in file.metadata()["licence"]  # nothing is known of it, so the strictest is named
    # and back: it says all that is needed to build it
    with torch.no_grad():
        assert torch.equal(load_backbone(tmp_path / "s.safetensors")(x), ours.features(x))
    by_its_card(tmp_path / "s.safetensors", ours.features)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "s.safetensors").read_bytes()[:9000])
    assert "damaged" in refused("export", tmp_path / "cut.safetensors", "--to", "deit", "--output", tmp_path / "o")


def test_the_momentum_encoder_can_be_taken(checkpoints, tmp_path):
    path, ours = checkpoints("resnet10_w32")
    contents = torch.load(path, weights_only=True)
    contents["state_dict"]["module.momentum_encoder.conv1.weight"] = ours.conv1.weight.detach() + 1
    torch.save(contents, tmp_path / "other.pth.tar")
    exported(tmp_path / "other.pth.tar", "deit", tmp_path / "m.pth", "--momentum")
    assert torch.equal(torch.load(tmp_path / "m.pth")["model"]["conv1.weight"], ours.conv1.weight.detach() + 1)
    assert "momentum encoder" in (tmp_path / "m.pth.md").read_text()


def test_the_card_says_what_it_is(checkpoints, tmp_path):
    import hashlib

    path, _ = checkpoints("vit_tiny")
    card = (exported(path, "timm", tmp_path / "out") / "README.md").read_text()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for text in (
        "vit_tiny",
        "32 × 32",
        "0.485, 0.456, 0.406",
        digest,
        "Apache-2.0",
        "license: apache-2.0",
        "trained from scratch by mocov3",
        "after 7 epochs",
        "lr: 0.3",
        "largest difference",
    ):
        assert text in card, text
    assert "SECRET-PLACE" not in card
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_args"] == {"img_size": 32}


@pytest.fixture
def tuned(tmp_path):
    """Fine-tuned checkpoints of three classes: arch → (file, network)."""

    def make(arch):
        torch.manual_seed(9)
        network = models.build_encoder(arch, lambda width: torch.nn.Linear(width, 3), image_size=32).eval()
        average = {k: v + 0.01 if v.is_floating_point() else v for k, v in network.state_dict().items()}
        own = {"task": "finetune", "config": {"image_size": 32, "data_set": "pets"}, "classes": ["a", "b", "c\x1b[2J"]}
        path = tmp_path / f"{arch.replace('/', '-')}-tuned.pth"
        torch.save({"model": network.state_dict(), "model_ema": average, "arch": arch, "mocov3": own}, path)
        return path, network

    return make


def test_a_classifier_goes_along(tuned, tmp_path, x):
    for arch in ("vit_tiny", "resnet18", "timm/resnet10t"):
        path, network = tuned(arch)
        folder = exported(path, "timm", tmp_path / "timm" / arch.replace("/", "-"), "--classifier")
        with torch.no_grad():
            want = network(x)
            close(timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(x), want)
        assert json.loads((folder / "config.json").read_text())["pretrained_cfg"]["label_names"][:2] == ["a", "b"]
        card = (folder / "README.md").read_text()
        assert "scores of 3 classes: a, b, c\\x1b[2J" in card  # no name can draw on the terminal
        assert "fine-tuned on pets" in card
        if not arch.startswith("timm/"):
            file = exported(path, "torchvision", tmp_path / f"{arch}.pth", "--classifier")
            made = (
                tv.resnet18(num_classes=3)
                if arch == "resnet18"
                else tv.VisionTransformer(
                    32, 16, 12, 3, 192, 768, num_classes=3, norm_layer=lambda d: torch.nn.LayerNorm(d, eps=1e-6)
                )
            )
            made.load_state_dict(torch.load(file, weights_only=True))  # the class as it comes, strictly
            with torch.no_grad():
                close(made.eval()(x), want)
    assert "fine-tuned" in card.splitlines()[8]
    assert json.loads((folder / "config.json").read_text())["pretrained_cfg"]["interpolation"] == "bilinear"  # pets
    path, network = tuned("resnet10_w32")
    import onnxruntime

    session = onnxruntime.InferenceSession(exported(path, "onnx", tmp_path / "c.onnx", "--classifier"))
    with torch.no_grad():
        close(torch.from_numpy(session.run(["scores"], {"pictures": x.numpy()})[0]), network(x))
    for to, suffix in (("deit", "pth"), ("safetensors", "safetensors")):
        by_its_card(exported(path, to, tmp_path / f"scores.{suffix}", "--classifier"), network, name="scores")
    average = exported(path, "safetensors", tmp_path / "a.safetensors", "--classifier", "--momentum")
    assert torch.equal(checkpoint.read(average)["model"]["fc.bias"], network.fc.bias.detach() + 0.01)
    out = tmp_path / "no"
    assert "without classifier" in refused("export", path, "--to", "transformers", "--output", out, "--classifier")
    odd = {**network.state_dict(), "fc.weight": torch.zeros(3, 5)}
    torch.save({"model": odd, "arch": "resnet10_w32"}, tmp_path / "odd.pth")
    assert "is not of 256 features" in refused(
        "export", tmp_path / "odd.pth", "--to", "onnx", "--output", out, "--classifier", "--image-size", "32"
    )


def test_what_differs_is_not_left_behind(checkpoints, tmp_path, monkeypatch):
    path, _ = checkpoints("resnet10_w32")
    write = WRITERS["safetensors"].write

    def spoilt(model, place):
        with torch.no_grad():
            model.encoder.bn1.bias.add_(0.1)
            write(model, place)
            model.encoder.bn1.bias.sub_(0.1)

    monkeypatch.setattr(WRITERS["safetensors"], "write", spoilt)
    with pytest.raises(RuntimeError, match="outputs differ"):
        main(["export", str(path), "--to", "safetensors", "--output", str(tmp_path / "out" / "s.st")])
    assert list((tmp_path / "out").iterdir()) == []


def test_bad_input(checkpoints, tmp_path):
    path, _ = checkpoints("resnet10_w32")
    small, _ = checkpoints("vit_conv_small")
    out = tmp_path / "out"
    cut = tmp_path / "cut.pth.tar"
    cut.write_bytes(path.read_bytes()[:50_000])
    text = tmp_path / "text.pth"
    text.write_text("no weights")
    torch.save({"epoch": 1}, tmp_path / "empty.pth")
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious.txt").write_text("")
    (tmp_path / "file").write_text("")
    for flags, message in (
        ([path, "--to", "timm", "--output", out], "3×3 stem"),
        ([small, "--to", "timm", "--output", out], "torchvision has"),
        ([small, "--to", "transformers", "--output", out], "cannot hold vit_conv_small"),
        ([path, "--to", "deit", "--output", out, "--classifier"], "has no classifier"),
        ([path, "--to", "tensorflow", "--output", out], "invalid choice"),
        ([path, "--to", "timm", "--output", full], "not empty"),
        ([path, "--to", "timm", "--output", tmp_path / "file"], "needs a folder"),
        ([path, "--to", "deit", "--output", full], "name of a file"),
        ([path, "--to", "deit", "--output", path], "the checkpoint itself"),
        ([path, "--to", "deit", "--output", tmp_path / "file" / "x.pth"], "cannot be written"),
        ([path, "--to", "deit", "--output", out, "-a", "resnet50"], "is of arch resnet10_w32, not resnet50"),
        ([path, "--to", "deit", "--output", out, "-a", "resnet5"], "did you mean"),
        ([path, "--to", "deit", "--output", out, "--image-size", "0"], "at least 1"),
        ([small, "--to", "deit", "--output", out, "--image-size", "50"], "do not divide"),
        ([tmp_path / "none", "--to", "deit", "--output", out], "no such file"),
        ([cut, "--to", "deit", "--output", out], "truncated"),
        ([text, "--to", "deit", "--output", out], "text.pth"),
        ([tmp_path / "empty.pth", "--to", "deit", "--output", out], "holds no weights"),
    ):
        assert message in refused("export", *flags), flags
    assert not out.exists()
    assert [p.name for p in full.iterdir()] == ["precious.txt"]


def test_every_format_is_listed():
    assert list(WRITERS) == list(FORMATS)
    text = (ROOT / "docs" / "export.md").read_text()
    assert all(f"`{name}`" in text for name in FORMATS)


def test_convert_to_deit_refuses_in_one_line(checkpoints, tmp_path, run_program):
    path, _ = checkpoints("resnet10_w32")
    cut = tmp_path / "cut.pth.tar"
    cut.write_bytes(path.read_bytes()[:50_000])
    (tmp_path / "folder").mkdir()
    done = run_program("--input", path, "--output", "bare.pth", cwd=tmp_path, script="convert_to_deit.py")
    assert "keys of the encoder" in done.stdout
    assert (tmp_path / "bare.pth").exists()
    for flags, message in (
        (["--input", cut, "--output", tmp_path / "o.pth"], "truncated"),
        (["--input", tmp_path / "bare.pth", "--output", tmp_path / "o.pth"], "not a pre-training checkpoint"),
        (["--input", path, "--output", tmp_path / "folder"], "folder"),
        (["--input", path, "--output", path], "the checkpoint itself"),
        (["--input", path, "--output", tmp_path / "bare.pth" / "o.pth"], "cannot be written"),
        (["--input", tmp_path / "none", "--output", tmp_path / "o.pth"], "no such file"),
    ):
        assert message in refused("convert", *flags), flags
    assert not (tmp_path / "o.pth").exists()
    assert path.stat().st_size > 100_000


@pytest.mark.parametrize("to", ["onnx", "safetensors", "deit"])
def test_grey_networks(to, tmp_path):
    model = models.build("resnet10_w32", image_size=32, dim=8, mlp_dim=8, in_chans=1)
    file = tmp_path / "grey.pth.tar"
    state = {f"module.{k}": v for k, v in model.state_dict().items()}
    config = {"channels": 1, "image_size": 32}
    checkpoint.write(file, {"arch": "resnet10_w32", "epoch": 1, "state_dict": state, "mocov3": {"config": config}})
    if to == "deit":
        with pytest.raises(UserError, match="takes 1 channel"):
            write.export(file, to, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    out = tmp_path / "out.safetensors"
    write.export(file, to, out)
    if to == "safetensors":
        x = torch.rand(2, 1, 32, 32)
        torch.testing.assert_close(load_backbone(out)(x), model.eval().base_encoder.features(x))


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
@pytest.mark.parametrize("to", ["safetensors", "deit", "transformers", "torch-export"])
def test_a_full_disk_is_one_line(checkpoints, tmp_path, to):
    path, _ = checkpoints("resnet18")
    with no_file_above(8000):
        said = refused("export", path, "--to", to, "--output", tmp_path / "x")
    assert "--output" in said
    assert "cannot be written" in said
    assert not list(tmp_path.iterdir())
