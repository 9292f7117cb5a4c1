"""Looking before training: check with its sheet, inspect, and normalisation measured on the images."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
import torchvision
from conftest import TINY
from doors import refused
from PIL import Image

from mocov3 import models
from mocov3.cli import main
from mocov3.config import PretrainConfig, read_yaml
from mocov3.data import open_source
from mocov3.data.sources.facts import examine
from mocov3.data.sources.survey import sample, scattered
from mocov3.weights import checkpoint
from mocov3.weights.convert import to_deit


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Sixty images of several kinds with known faults: copies, near-copies, grey, turned, unreadable."""
    root = tmp_path_factory.mktemp("mixed")
    rng = np.random.Generator(np.random.PCG64(0))
    for i in range(60):
        low = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        if i % 3 == 0:
            low[...] = low[..., :1]
        image = Image.fromarray(low).resize((160, 120), Image.Resampling.BICUBIC)
        exif = Image.Exif()
        if i < 6:
            exif[0x0112] = 6
        image.save(root / f"{i:02d}.jpg", quality=95, exif=exif)
    shutil.copy(root / "00.jpg", root / "copy.jpg")
    Image.open(root / "07.jpg").resize((80, 60)).save(root / "small.png")
    (root / "cut.jpg").write_bytes((root / "02.jpg").read_bytes()[:700])
    (root / "empty.png").write_bytes(b"")
    (root / "notes.png").write_text("no image")
    return root


def test_check_finds_what_is_there(mixed, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    flags = ["--sheet", str(sheet), "-j", "0", "--device", "cpu"]
    assert main(["check", str(mixed), *flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    survey = found["survey"]
    assert (survey["pictures"], survey["examined"], len(survey["unreadable"])) == (65, 65, 3)
    assert (survey["copies"], survey["near_copies"]) == (1, 1)
    assert survey["short_side"][1] == 120
    assert survey["gray_share"] == pytest.approx(21 / 62)
    assert survey["turned_share"] == pytest.approx(7 / 62)  # the copy too
    assert survey["formats"]["JPEG RGB"] == 61
    assert found["settings"]["view_preset"] in ("photos", "aerial")
    assert found["training_seconds"] > 0
    with Image.open(sheet) as image:
        assert image.width > 800
        assert image.height > 700
    assert main(["check", str(mixed), *flags, "--view-preset", "aerial", "-b", "16"]) == 0
    out = capsys.readouterr().out
    for text in (
        "65 images",
        "3 (4.6 %",
        "is not an image, as notes.png",
        "bound by",
        "GB",
        "meet a near-copy",
        "view-preset",
        "aerial",
        "given by you",
        "copies           1 equal",
    ):
        assert text in out


def test_check_refuses(tmp_path, images):
    assert "no data" in refused("check")
    assert "no such folder" in refused("check", tmp_path / "none")
    assert "--sample" in refused("check", images, "--sample", "0")
    assert "--no-such" in refused("check", images, "--no-such")
    sheet = tmp_path / "gone" / "sheet.png"
    assert "--sheet" in refused("check", images, "--sheet", sheet, "-j", "0")


def test_processes_find_the_same_facts(images):
    source = open_source(str(images))
    indices = list(range(64)) * 8  # enough chunks to be worth processes
    here, spawned = (list(examine(source, indices, workers=w)) for w in (0, 2))
    for a, b in zip(here, spawned, strict=True):
        assert (a.index, a.digest, a.gray, a.sums, a.width) == (b.index, b.digest, b.gray, b.sums, b.width)
        assert np.array_equal(a.thumb, b.thumb)


def test_samples_are_runs_or_scattered():
    assert sample(100, 200).tolist() == scattered(100, 200).tolist() == list(range(100))
    runs = sample(1_000_000, 1000)
    assert len(runs) == len(set(runs.tolist())) == 1000
    assert (np.diff(runs) == 1).sum() >= 1000 - 20
    single = scattered(1_000_000, 1000)
    assert len(set(single.tolist())) == 1000
    assert (np.diff(single) > 0).all()


def test_normalisation_is_measured(tmp_path):
    for i in range(20):
        pixels = np.full((10, 10, 3), (255, 128, 0), np.uint8)
        pixels[:5] = 0
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    run = tmp_path / "run"
    flags = [*TINY, "--mean-std", "auto", "--max-steps", "1", "-b", "8", "--output-dir", str(run)]
    assert main(["pretrain", str(tmp_path), *flags]) == 0
    config = PretrainConfig(**read_yaml(run / "config.yaml", PretrainConfig))
    assert config.preset.mean == pytest.approx((0.5, 0.251, 0), abs=1e-3)
    assert config.preset.std == pytest.approx((0.5, 0.251, 0.01), abs=1e-3)
    saved = torch.load(run / "checkpoint_0000_step000000001.pth.tar", weights_only=True)
    assert saved["mocov3"]["config"]["mean_std"] == config.mean_std


def inspected(capsys, path):
    assert main(["inspect", str(path), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_inspect_tells_files_apart(tmp_path, capsys):
    model = models.build("resnet10_w32", dim=16, mlp_dim=32)
    path = tmp_path / "c.pth.tar"
    position = checkpoint.Position(3, 0, 12)
    made = torch.optim.AdamW(model.parameters())
    extra = {"config": {"image_size": 32, "data": "x\ny"}, "origin": "here", "licence": "MIT"}
    contents = checkpoint.pack(
        arch="resnet10_w32", model=model, optimizer=made, scaler={}, position=position, extra=extra
    )
    checkpoint.write(path, contents)
    found = inspected(capsys, path)
    assert found["kind"] == "pre-training checkpoint of mocov3"
    assert (found["arch"], found["trained"], found["licence"]) == ("resnet10_w32", "3 epochs, 12 steps", "MIT")
    assert len(found["good_for"]) == 4
    assert main(["inspect", str(path)]) == 0
    assert "\ny" not in capsys.readouterr().out
    # the reference's: the same without our entry; its licence is known
    checkpoint.write(path, {k: v for k, v in contents.items() if k != "mocov3"})
    assert "CC-BY-NC" in inspected(capsys, path)["licence"]
    checkpoint.write(path, to_deit(contents, "x"))
    found = inspected(capsys, path)
    assert "DeiT" in found["kind"]
    assert found["arch"].startswith("resnet10_w32 (by its keys")
    torch.save(torchvision.models.resnet18().state_dict(), path)
    found = inspected(capsys, path)
    assert found["arch"].startswith("resnet18")
    assert found["licence"].startswith("not stated")
    assert any("resuming" in text for text in found["not_for"])
    checkpoint.write(
        path,
        {
            "state_dict": {"module.conv1.weight": torch.ones(1)},
            "best_acc1": torch.tensor(68.9),
            "epoch": 90,
            "arch": "resnet50",
        },
    )
    assert "68.90" in inspected(capsys, path)["kind"]
    torch.save({"weights": 3}, path)
    assert "no weights" in refused("inspect", path)
    assert "no such file" in refused("inspect", tmp_path / "none")


@pytest.mark.skipif(sys.platform == "win32", reason="names of Windows")
def test_names_cannot_forge_lines_of_check(tmp_path, capsys):
    data = tmp_path / "d"
    data.mkdir()
    for i in range(12):
        Image.new("RGB", (9, 9), (i * 20, 0, 0)).save(data / f"{i}.png")
    (data / "x\n99 images.png").write_bytes(b"")
    assert main(["check", str(data), "-j", "0", "--device", "cpu", "--sheet", str(tmp_path / "s.png")]) == 0
    assert "\n99 images" not in capsys.readouterr().out
