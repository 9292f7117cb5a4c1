"""Attention heads: what tells them, asked where nothing does, the same at every door; never 6 taken for 12 unasked."""

import copy
import json

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from doors import refused

from mocov3 import load_backbone, models
from mocov3.cli import main
from mocov3.config import PretrainConfig, read_yaml
from mocov3.config.archs import CONV_VITS, HEADS, VITS, WIDTHS, check_heads
from mocov3.errors import UserError
from mocov3.evaluation import frozen, network_scores
from mocov3.models import backbones, build_backbone
from mocov3.models.positions import is_sincos_position_embedding, sincos_position_embedding
from mocov3.weights import attention_heads, checkpoint, convert, locate, start
from mocov3.weights.convert import build_from, find_backbone, load_into
from mocov3.weights.inspect import describe
from mocov3.weights.tensorfiles import read

SIZE = 32
ASKED = "that does not record its attention heads; give --heads 12 (MoCo v3's) or --heads 6 (DeiT's, DINO's, timm's)"


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
    """One block instead of twelve: heads matter in the first, and files are small."""
    for arch in ("vit_small", "vit_conv_small"):
        monkeypatch.setitem(backbones._VITS, arch, {**backbones._VITS[arch], "depth": 1})


def theirs(size=SIZE):
    """timm's ViT-S/16 of one block, its table learned."""
    torch.manual_seed(5)
    return timm.create_model("vit_small_patch16_224", num_classes=0, img_size=size, depth=1).eval()


def mocos(heads=12, size=SIZE):
    """MoCo v3's ViT-S of one block."""
    torch.manual_seed(6)
    return build_backbone("vit_small", image_size=size, num_heads=heads).eval()


def bare(network):
    return {k: v for k, v in network.state_dict().items() if not k.startswith("head.")}


def pretrained(network, *, own=None, arch="vit_small"):
    """Contents of a pre-training checkpoint around a backbone."""
    model = models.MoCo(network, torch.nn.Linear(2, 2), 0.2)
    state = {f"module.{k}": v for k, v in model.state_dict().items()}
    return {"epoch": 1, "arch": arch, "state_dict": state, **({"mocov3": own} if own else {})}


@pytest.fixture(scope="module")
def six(tmp_path_factory):
    """DeiT's file of a ViT-S with 6 heads, and MoCo v3's by the reference's conversion; at 32 px and at 224."""
    folder, files = tmp_path_factory.mktemp("six"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backbones._VITS, "vit_small", {**backbones._VITS["vit_small"], "depth": 1})
        for size in (SIZE, 224):
            files["deit", size], files["moco", size] = folder / f"deit{size}.pth", folder / f"moco{size}.pth"
            torch.save({"model": bare(theirs(size))}, files["deit", size])
            torch.save(convert.to_deit(pretrained(mocos(size=size)), "x"), files["moco", size])
    return files


# --- what tells --------------------------------------------------------------------------------------------


def mae_table(dim=384, side=2):
    """MAE's fixed table: the column's channels first."""
    q = dim // 4
    omega = 10000.0 ** -(np.arange(q) / q)
    rows, columns = np.divmod(np.arange(side * side), side)
    angles = [columns[:, None] * omega, rows[:, None] * omega]
    table = np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], 1)
    return torch.from_numpy(np.concatenate([np.zeros((1, dim)), table])[None]).float()


def own(**config):
    return {"format": 1, "config": {"image_size": SIZE, **config}}


def table_changed(change):
    state = bare(mocos())
    return {"model": {**state, "pos_embed": change(state["pos_embed"])}}


KNOWN = {
    "ours of 6": (lambda: pretrained(mocos(6), own=own(heads=6)), 6),
    "ours of 12, said": (lambda: pretrained(mocos(), own=own(heads=12)), 12),
    "ours before the field": (lambda: pretrained(mocos(), own=own()), 12),
    "ours of the default": (lambda: pretrained(mocos(), own=own(heads=None)), 12),
    "fine-tuned by us": (lambda: {"model": bare(theirs()), "arch": "vit_small", "mocov3": own(heads=6)}, 6),
    "linear file of ours": (
        lambda: {
            "state_dict": {f"module.{k}": v for k, v in bare(theirs()).items()},
            "arch": "vit_small",
            "mocov3": own(heads=3),
        },
        3,
    ),
    "the reference's": (lambda: pretrained(mocos()), 12),
    "converted": (lambda: convert.to_deit(pretrained(mocos()), "x"), 12),
    "converted, of 6": (lambda: convert.to_deit(pretrained(mocos(6), own=own(heads=6)), "x"), 6),
    "the reference's linear file": (
        lambda: {"state_dict": {f"module.{k}": v for k, v in bare(mocos()).items()}, "arch": "vit_small"},
        12,
    ),
    "half precision": (lambda: {"model": {k: v.half() for k, v in bare(mocos()).items()}}, 12),
    "bfloat16": (lambda: {"model": {k: v.bfloat16() for k, v in bare(mocos()).items()}}, 12),
    "convolutional stem": (lambda: {"model": bare(build_backbone("vit_conv_small", image_size=SIZE))}, 12),
}
UNKNOWN = {
    "DeiT's": lambda: {"model": bare(theirs())},
    "DINO's": lambda: bare(theirs()),
    "with an arch": lambda: {"arch": "vit_small", "state_dict": bare(theirs())},
    "MAE's table": lambda: table_changed(lambda table: mae_table()),
    "a table trained on": lambda: table_changed(lambda table: table + 0.01 * torch.randn_like(table)),
    "a table that is no number": lambda: table_changed(lambda table: table * float("nan")),
    "no entry of ours": lambda: {"model": bare(theirs()), "mocov3": "yes"},
}


@pytest.mark.parametrize("case", KNOWN)
def test_what_tells(case):
    contents, heads = KNOWN[case][0](), KNOWN[case][1]
    arch = "vit_conv_small" if "stem" in case else "vit_small"
    weights = find_backbone(contents, "file")
    assert weights.heads.number == heads
    assert weights.sizes(arch, "file") == {"num_heads": heads}
    assert find_backbone(contents, "file", heads=heads).heads.number == heads
    with pytest.raises(UserError, match=f"file: has {heads} attention heads .*, not 8; leave --heads out"):
        find_backbone(contents, "file", heads=8)
    if arch == "vit_small":
        encoder, settings = build_from(contents, "file", arch=arch, image_size=SIZE)
        assert (attention_heads.heads_of(encoder), settings["num_heads"]) == (heads, heads)
        with pytest.raises(UserError, match="the same shapes, other features"):
            load_into(build_backbone(arch, image_size=SIZE, num_heads=8), weights, "file")


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_does_not_tell(case):
    contents = UNKNOWN[case]()
    assert find_backbone(contents, "file").heads.number is None
    with pytest.raises(UserError) as asked:
        build_from(contents, "file", arch="vit_small", image_size=SIZE)
    assert str(asked.value) == f"file: a ViT of width 384 {ASKED}"
    with pytest.raises(UserError, match="does not record its attention heads"):
        load_into(mocos(), find_backbone(contents, "file"), "file")
    for heads in (12, 6, 3):
        encoder, _ = build_from(contents, "file", arch="vit_small", image_size=SIZE, heads=heads)
        assert attention_heads.heads_of(encoder) == heads


@pytest.mark.parametrize("heads", ["6", 6.0, True, 0, -6, 5, 768, [6]])
def test_a_damaged_number_is_refused(heads):
    with pytest.raises(UserError, match="its configuration is damaged"):
        find_backbone(pretrained(mocos(), own=own(heads=heads)), "file")


@pytest.mark.parametrize(
    ("heads", "arch", "message"),
    [
        (5, "vit_small", r"does not divide the width 384; likely: 3, 4, 6, 8, 12 \(width of vit_small\)"),
        (0, "vit_small", "must be at least 1, not 0"),
        (-1, "", "must be at least 1, not -1"),
        (385, "vit_small", "does not divide"),
        (1, "vit_small", "--heads 1 makes heads of 384 numbers; likely: 3, 4, 6, 8, 12"),
        (1, "vit_tiny", "makes heads of 192 numbers; likely: 2, 3, 4, 6"),
        (192, "vit_base", "makes heads of 4 numbers"),
        (6, "resnet50", "not resnet50: it has no attention"),
        (6, "timm/vit_small_patch16_224", "heads are those of its name"),
    ],
)
def test_numbers_that_cannot_be(heads, arch, message):
    with pytest.raises(UserError, match=message):
        check_heads(heads, arch)
    with pytest.raises(UserError):
        find_backbone({"model": bare(theirs())}, "f", heads=heads if heads != 6 else 5)


def test_the_tables_of_archs_are_those_built():
    for arch in VITS + CONV_VITS:
        built = backbones._VITS[arch]
        assert (WIDTHS[arch], HEADS[WIDTHS[arch]]) == (built["embed_dim"], built["num_heads"])
        check_heads(HEADS[WIDTHS[arch]], arch)
        if arch.endswith("micro"):  # which timm does not have
            continue
        kin = arch.replace("conv_", "") + ("_patch14_224" if arch == "vit_huge" else "_patch16_224")
        with models.shapes_only():
            other = timm.create_model(kin, depth=1).blocks[0].attn.num_heads
        assert other == attention_heads.OTHERS_HEADS.get(WIDTHS[arch], HEADS[WIDTHS[arch]]), kin


def test_other_tables_are_not_ours():
    for side in (2, 3, 14):
        ours = sincos_position_embedding(side, side, 384)
        assert is_sincos_position_embedding(ours)
        assert not is_sincos_position_embedding(mae_table(side=side))
        assert not is_sincos_position_embedding(ours[:, 1:])
    # of one patch they are the same, so it tells nothing
    one = {**bare(build_backbone("vit_small", image_size=16)), "pos_embed": mae_table(side=1)}
    assert is_sincos_position_embedding(one["pos_embed"])
    assert find_backbone(one, "x").heads.number is None


def test_networks_whose_heads_all_agree_on_are_not_asked_for(tmp_path):
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=SIZE).eval()
    file, x = tmp_path / "tiny.pth", torch.randn(2, 3, SIZE, SIZE)
    torch.save(bare(network), file)
    with torch.no_grad():
        assert torch.allclose(load_backbone(file, arch="vit_tiny", image_size=SIZE)(x), network(x), atol=1e-5)
    assert attention_heads.heads_of(load_backbone(file, arch="vit_tiny", image_size=SIZE, heads=6)) == 6
    assert "likely: 2, 3, 4, 6" in refused("embed", "--model", file, "-a", "vit_tiny", "--heads", "5", "-o", "x.npy")


def test_timms_name_has_its_own(six, tmp_path):
    name = "timm/vit_small_patch16_224"
    encoder = build_backbone(name, image_size=SIZE, depth=1)
    load_into(encoder, find_backbone(read(six["deit", SIZE]), "f"), "f")
    with pytest.raises(UserError, match=r"has 12 attention heads \(by its position table.*has 6: the same shapes"):
        load_into(encoder, find_backbone(read(six["moco", SIZE]), "f"), "f")
    # weights exported under timm's name are not taken for ours
    contents = {"model": bare(theirs()), "arch": name, "mocov3": own()}
    assert find_backbone(contents, "f").heads.number is None
    assert "leave it out" in refused("embed", "--model", name, "--untrained", "--heads", "6", "-o", "x.npy", tmp_path)


# --- every door --------------------------------------------------------------------------------------------

CPU = ("--device", "cpu", "-j", "0")
STEP = ("--image-size", SIZE, "-b", "8", "--epochs", "1", "--max-steps", "1", "-p", "1", *CPU)
TRAIN = (*STEP, "--warmup-epochs", "0")
PRETRAIN = ("--moco-dim", "8", "--moco-mlp-dim", "16", "--logger", "none", "--seed", "0")
DOORS = {
    "embed": ("embed", "IMAGES", "--model", "FILE", "-a", "vit_small", "-o", "OUT.npy", "--image-size", SIZE, *CPU),
    "knn": ("knn", "IMAGES", "--model", "FILE", "-a", "vit_small", "--image-size", SIZE, *CPU),
    "lincls": ("lincls", "IMAGES", "--pretrained", "FILE", "-a", "vit_small", "--output-dir", "OUT", *STEP),
    "finetune": (
        "finetune",
        "--data-set",
        "folder",
        "--data-path",
        "IMAGES",
        "--finetune",
        "FILE",
        "-a",
        "vit_small",
        "--output_dir",
        "OUT",
        *TRAIN,
    ),
    "finetune --resume": (
        "finetune",
        "--data-set",
        "folder",
        "--data-path",
        "IMAGES",
        "--resume",
        "FILE",
        "-a",
        "vit_small",
        "--output_dir",
        "OUT",
        *TRAIN,
    ),
    "pretrain": (
        "pretrain",
        "IMAGES",
        "--recipe",
        "defaults",
        "-a",
        "vit_small",
        "--init",
        "FILE",
        "--output-dir",
        "OUT",
        *TRAIN,
        *PRETRAIN,
    ),
    "compare": ("compare", "LARGE", "IMAGES", "-a", "vit_small", "--device", "cpu", "-j", "0"),
    "export": (
        "export",
        "FILE",
        "--to",
        "safetensors",
        "--output",
        "OUT.safetensors",
        "-a",
        "vit_small",
        "--image-size",
        SIZE,
    ),
}


@pytest.fixture
def loaded(monkeypatch):
    """Features of every network that weights were loaded into, computed as soon as they were."""
    found = []

    def spy(encoder, weights, where):
        left = load_into(encoder, weights, where)
        x = batch_of_images(encoder.patch_embed.img_size[0])
        with torch.no_grad():
            found.append((len(x[0, 0]), copy.deepcopy(encoder).eval().features(x)))
        return left

    for module in (convert, frozen, start):
        monkeypatch.setattr(module, "load_into", spy)
    # what compare would judge by at 224 px
    monkeypatch.setattr(
        network_scores,
        "features_of_views",
        lambda _, images: (torch.randn(len(images.source), 4, 8), np.arange(len(images.source))),
    )
    return found


def batch_of_images(size):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(7))


def argv(door, six, kind, images, out):
    places = {
        "IMAGES": images,
        "FILE": six[kind, SIZE],
        "LARGE": six[kind, 224],
        "OUT": out,
        "OUT.npy": out / "x.npy",
        "OUT.safetensors": out / "x.safetensors",
    }
    return [str(places.get(word, word)) for word in DOORS[door]]


@pytest.mark.parametrize("door", DOORS)
def test_every_door(door, six, images, tmp_path, loaded, capsys):
    go = argv(door, six, "deit", images, tmp_path / "out")
    assert f"a ViT of width 384 {ASKED}" in refused(*go)
    assert "does not divide the width 384" in refused(*go, "--heads", "5")
    assert "--heads must be at least 1" in refused(*go, "--heads", "0")
    assert main([*go, "--heads", "6"]) == 0
    assert loaded
    for size, features in loaded:
        with torch.no_grad():
            expected = theirs(size)(batch_of_images(size))
        assert (features - expected).abs().max() <= 1e-5 * expected.abs().max()
    # MoCo v3's own needs no word, and takes no other
    loaded.clear()
    go = argv(door, six, "moco", images, tmp_path / "moco")
    assert "has 12 attention heads (by its position table, MoCo v3's), not 6" in refused(*go, "--heads", "6")
    assert main(go) == 0
    for size, features in loaded:
        with torch.no_grad():
            expected = mocos(size=size).features(batch_of_images(size))
        assert (features - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_adapting_asks(six, images, tmp_path):
    """Before anything is measured."""
    go = (
        "pretrain",
        images,
        "--recipe",
        "adapt",
        "--init",
        six["deit", SIZE],
        "-a",
        "vit_small",
        "--output-dir",
        tmp_path,
        *STEP,
        *PRETRAIN,
        "--epochs",
        "3",
    )
    assert f"a ViT of width 384 {ASKED}" in refused(*go)


# --- what is written knows ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(six, images, tmp_path_factory):
    """A pre-training run from DeiT's weights of 6 heads: two steps, of which the first is by --max-steps."""
    folder = tmp_path_factory.mktemp("run")
    go = list(
        map(
            str,
            (
                "pretrain",
                images,
                "--recipe",
                "defaults",
                "-a",
                "vit_small",
                "--init",
                six["deit", SIZE],
                "--output-dir",
                folder,
                *TRAIN,
                *PRETRAIN,
            ),
        )
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backbones._VITS, "vit_small", {**backbones._VITS["vit_small"], "depth": 1})
        assert main([*go, "--heads", "6"]) == 0
    return folder, go


def newest(folder):
    return checkpoint.newest(folder)[0]


def test_a_run_goes_on_with_its_heads(run, capsys):
    folder, go = run
    saved = checkpoint.read(newest(folder))
    assert saved["mocov3"]["config"]["heads"] == 6 == read_yaml(folder / "config.yaml", PretrainConfig)["heads"]
    # the reference loads it: the keys and shapes of its own
    other = models.build("vit_small", image_size=SIZE, dim=8, mlp_dim=16).state_dict()
    assert {k.removeprefix("module."): v.shape for k, v in saved["state_dict"].items()} == {
        k: v.shape for k, v in other.items()
    }
    for heads in ("12", "3"):
        assert f"has 6 attention heads (as the file says), not {heads}" in refused(
            *go, "--heads", heads, "--resume", "auto", "--max-steps", "2"
        )
    assert main([*go, "--resume", "auto", "--max-steps", "2"]) == 0
    assert checkpoint.read(newest(folder))["mocov3"]["config"]["heads"] == 6
    # by the folder's own settings, and by its weights where nothing else is known
    assert main(["pretrain", "--config", str(folder / "config.yaml"), "--resume", "auto", "--max-steps", "3"]) == 0


def test_its_files_need_no_word(run, images, tmp_path, loaded):
    folder, _ = run
    file, out = newest(folder), tmp_path
    encoder = load_backbone(file)
    assert attention_heads.heads_of(encoder) == attention_heads.heads_of(load_backbone(file, momentum=True)) == 6
    x = batch_of_images(SIZE)
    with torch.no_grad():
        expected = encoder(x)
    loaded.clear()
    small = ("-b", "16", *CPU)
    flags = (*small, "--epochs", "1", "--max-steps", "1", "--lr", "0.1")
    tune = (
        "finetune",
        "--data-set",
        "folder",
        "--data-path",
        images,
        "--warmup-epochs",
        "0",
        *small,
        "--epochs",
        "1",
        "--output_dir",
        out / "tune",
    )
    for go in (
        ("embed", images / "val", "--model", file, "-o", out / "x.npy", *small),
        ("lincls", images, "--pretrained", file, "--output-dir", out / "lin", *flags),
        (
            "lincls",
            images,
            "--resume",
            "auto",
            "--output-dir",
            out / "lin",
            *flags[:-4],
            "--max-steps",
            "2",
            "--lr",
            "0.1",
        ),
        ("lincls", images, "-e", "--resume", out / "lin" / "checkpoint.pth.tar", *small),
        (*tune, "--max-steps", "1", "--finetune", file),
        ("convert", "--input", file, "--output", out / "deit.pth"),
        (
            "embed",
            images / "val",
            "--model",
            out / "deit.pth",
            "-a",
            "vit_small",
            "-o",
            out / "y.npy",
            "--image-size",
            SIZE,
            *small,
        ),
        ("export", file, "--to", "safetensors", "--output", out / "w.safetensors"),
        ("embed", images / "val", "--model", out / "w.safetensors", "-o", out / "z.npy", *small),
    ):
        assert main(list(map(str, go))) == 0, go
    assert len(loaded) >= 7
    assert all((features - expected).abs().max() <= 1e-5 * expected.abs().max() for _, features in loaded)
    assert np.allclose(np.load(out / "x.npy"), np.load(out / "y.npy"), atol=1e-5)
    assert np.allclose(np.load(out / "x.npy"), np.load(out / "z.npy"), atol=1e-5)
    # files written on the way tell, too
    assert main(list(map(str, (*tune, "--resume", out / "tune" / "checkpoint.pth")))) == 0
    best = ("--eval", "--resume", out / "tune" / "best_checkpoint.pth")
    assert main(list(map(str, (*tune, *best)))) == 0
    for name in ("lin/checkpoint.pth.tar", "tune/checkpoint.pth", "tune/best_checkpoint.pth"):
        assert find_backbone(checkpoint.read(out / name), name).heads == (6, "as the file says")
    for go in (
        ("lincls", images, "--resume", "auto", "--output-dir", out / "lin", *flags, "--heads", "12"),
        (*tune, "--resume", out / "tune" / "checkpoint.pth", "--heads", "12"),
        (*tune, *best, "--heads", "12"),
        ("export", file, "--to", "safetensors", "--output", out / "v.safetensors", "--heads", "12"),
        ("compare", file, out / "w.safetensors", images, "--heads", "12"),
    ):
        assert "has 6 attention heads (as the file says), not 12; leave --heads out" in refused(*go), go


def test_the_average_of_tuned_weights_knows(tmp_path):
    own_entry = {"config": {"heads": 6}, "task": "finetune"}
    file = tmp_path / "tuned.pth"
    torch.save({"model": bare(theirs()), "model_ema": bare(theirs()), "arch": "vit_small", "mocov3": own_entry}, file)
    assert attention_heads.heads_of(load_backbone(file, momentum=True, image_size=SIZE)) == 6
    with pytest.raises(UserError, match="not 12"):
        load_backbone(file, momentum=True, image_size=SIZE, heads=12)


def test_files_from_before_go_on(images, tmp_path):
    """A run of 12 heads whose files have no such field."""
    go = [
        "pretrain",
        str(images),
        "--recipe",
        "defaults",
        "-a",
        "vit_small",
        "--output-dir",
        str(tmp_path),
        *map(str, (*TRAIN, *PRETRAIN)),
    ]
    assert main(go) == 0
    file, settings = newest(tmp_path), tmp_path / "config.yaml"
    contents = checkpoint.read(file)
    assert contents["mocov3"]["config"].pop("heads") is None
    checkpoint.write(file, contents)
    settings.write_text(settings.read_text().replace("heads: null\n", ""))
    assert "heads" not in read_yaml(settings, PretrainConfig)
    assert "has 12 attention heads (as mocov3 builds it), not 6" in refused(*go, "--resume", "auto", "--heads", "6")
    assert main([*go, "--resume", "auto", "--max-steps", "2"]) == 0
    assert main(["pretrain", "--config", str(settings), "--resume", "auto", "--max-steps", "3", "--heads", "12"]) == 0
    # the reference's own, which holds nothing of ours
    contents = checkpoint.read(newest(tmp_path))
    del contents["mocov3"]
    torch.save(contents, tmp_path / "reference.pth.tar")
    other = [*go, "--resume", str(tmp_path / "reference.pth.tar")]
    assert "has 12 attention heads (a pre-training checkpoint of MoCo v3), not 6" in refused(*other, "--heads", "6")


def test_a_new_network_of_other_heads(images, tmp_path):
    """From scratch its table is MoCo v3's, so every file of it must say its heads."""
    assert (
        main(
            [
                "pretrain",
                str(images),
                "--recipe",
                "defaults",
                "-a",
                "vit_small",
                "--heads",
                "6",
                "--output-dir",
                str(tmp_path),
                *map(str, (*TRAIN, *PRETRAIN)),
            ]
        )
        == 0
    )
    file, converted = str(newest(tmp_path)), str(tmp_path / "deit.pth")
    assert main(["convert", "--input", file, "--output", converted]) == 0
    for path in (file, converted):
        assert find_backbone(checkpoint.read(path), path).heads == (6, "as the file says")
    model = frozen.open_frozen("vit_small", flag="--model", heads=6, image_size=SIZE)
    assert (model.heads, model.about) == (6, "vit_small, untrained (seed 0), 6 attention heads")
    assert attention_heads.heads_of(load_backbone("vit_small", heads=3, image_size=SIZE)) == 3
    with pytest.raises(UserError, match="likely"):
        load_backbone("vit_small", heads=5)


def test_weights_of_timm_bring_their_heads(monkeypatch):
    network = theirs()
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: network)
    name = "timm/vit_small_patch16_224"
    assert start.starting_weights(name).heads == (6, "timm's network")
    with pytest.raises(UserError, match=r"has 6 attention heads \(timm's network\), not 12"):
        start.starting_weights(name, 12)
    encoders = [build_backbone("vit_small", image_size=SIZE, num_heads=6) for _ in range(2)]
    start.load_start(name, encoders, "vit_small")
    with torch.no_grad():
        expected, found = network(batch_of_images(SIZE)), encoders[1].eval().features(batch_of_images(SIZE))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    with pytest.raises(UserError, match="has 6 attention heads"):
        start.load_start(name, [mocos()], "vit_small")


@pytest.fixture
def few(monkeypatch):
    """Archs that fit are looked for among these."""
    monkeypatch.setattr(locate, "BUILT_IN_ARCHS", ["resnet10_w16", "vit_tiny", "vit_small", "vit_base"])


@pytest.mark.usefixtures("few")
def test_hints_propose_no_other_network(six, images):
    go = ("embed", images, "-o", "x.npy", "--image-size", SIZE, *CPU, "--model")
    assert "-a vit_small fits it, with --heads 12 (MoCo v3's) or --heads 6" in refused(*go, six["deit", SIZE])
    assert refused(*go, six["moco", SIZE]).endswith("-a vit_small fits it\n")
    assert "fits it, with --heads 12" in refused(*go, six["deit", SIZE], "-a", "vit_tiny")
    go = ("pretrain", images, "--recipe", "defaults", "-a", "vit_tiny", *TRAIN, *PRETRAIN)
    assert "(-a vit_small fits it, with --heads 12" in refused(*go, "--init", six["deit", SIZE])


@pytest.mark.usefixtures("few")
def test_inspect_says_it(six, tmp_path, capsys):
    cases = {
        six["deit", SIZE]: "the file does not tell; give --heads 12",
        six["moco", SIZE]: "12 (by its position table",
    }
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=SIZE)
    torch.save(bare(network), tmp_path / "tiny.pth")
    safetensors.torch.save_file(bare(theirs()), tmp_path / "dino.safetensors")
    cases[tmp_path / "tiny.pth"] = "3 (as all ViTs of width 192)"
    cases[tmp_path / "dino.safetensors"] = "the file does not tell"
    for file, words in cases.items():
        assert main(["inspect", str(file), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["attention_heads"].startswith(words)
        assert any("--heads N" in use for use in found["good_for"]) == ("does not tell" in words)
    torch.save({"state_dict": bare(build_backbone("resnet10_w16"))}, tmp_path / "r.pth")
    assert "attention_heads" not in describe(str(tmp_path / "r.pth"))


def test_compare_asks_only_for_files_that_do_not_tell(six, images, loaded):
    files = [str(six[kind, 224]) for kind in ("moco", "deit")]
    assert main(["compare", *files, str(images), "-a", "vit_small", "--heads", "6", "--device", "cpu", "-j", "0"]) == 0
    expected = [mocos(size=224).features(batch_of_images(224)), theirs(224)(batch_of_images(224))]
    for (_, found), want in zip(loaded, expected, strict=True):
        assert (found - want).abs().max() <= 1e-5 * want.abs().max()
