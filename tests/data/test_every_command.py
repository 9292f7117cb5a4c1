"""Every command on 16-bit grey images and on images of five channels: by what tifffile and OpenCV read of them."""

import json
import tarfile

import cv2
import numpy as np
import onnx
import pytest
import tifffile
import torch
import yaml
from cards import run as run_card
from conftest import TINY
from doors import refused
from PIL import Image

from mocov3 import load_backbone
from mocov3.cli import main
from mocov3.config.presets import PRESETS, Reading
from mocov3.data.loading.supervised import DeitAugment
from mocov3.evaluation.frozen import open_frozen
from mocov3.output.log import warn_once

CHANNELS = {"grey": 1, "five": 5}
WINDOW = (200, 3800)
MEASURED = "0.2,0.3"


def command(*flags):
    assert main([str(flag) for flag in flags]) == 0


class Kind:
    """A folder of 12-bit images, dark and bright ones, and a network trained on them."""

    def __init__(self, name, folder):
        self.name, self.channels, self.data, self.run = name, CHANNELS[name], folder / "data", folder / "run"
        random = np.random.default_rng(7)
        for part, count in (("train", 24), ("val", 16)):
            for number in range(count):
                place = self.data / part / ("dark", "bright")[number % 2]
                place.mkdir(parents=True, exist_ok=True)
                values = random.integers(0, 2000, (12, 13, 5)).repeat(3, 0).repeat(3, 1) + number % 2 * 2000
                self.write(place / str(number), values.astype(np.uint16))
        self.reading = ["--channels", self.channels, "--bit-window", "200,3800"]
        views = ["--mean-std", MEASURED, "--views-on", "device"]
        judged = ["--knn-every", 2, "--quality-every", 2, "--local-views", 2]
        more = [*self.reading, *views, *judged, "--output-dir", self.run]
        command("pretrain", self.data, *TINY, "-b", 8, *more)
        self.file = self.run / "checkpoint_0001.pth.tar"

    def write(self, path, values):
        if self.name == "grey":
            cv2.imwrite(f"{path}.png", values[..., 0])
        else:
            tifffile.imwrite(f"{path}.tif", values, photometric="minisblack", planarconfig="contig")

    def files(self, part):
        return sorted(file for file in (self.data / part).rglob("*") if file.is_file())

    def inputs(self, part, side, kind):
        """What a network of ``side`` px takes of the images of a part, by libraries alone."""
        rows = []
        for file in self.files(part):
            values = cv2.imread(str(file), cv2.IMREAD_UNCHANGED) if file.suffix == ".png" else tifffile.imread(file)
            values = values.reshape(*values.shape[:2], -1).astype(float)
            levels = np.clip(np.rint((values - WINDOW[0]) * 255 / (WINDOW[1] - WINDOW[0])), 0, 255).astype(np.uint8)
            tall = round(side * 256 / 224)
            wide = int(tall * values.shape[1] / values.shape[0])
            box = [round((n - side) / 2) for n in (wide, tall)]
            planes = [Image.fromarray(p).resize((wide, tall), kind) for p in np.moveaxis(levels, 2, 0)]
            planes = [np.asarray(p.crop((*box, box[0] + side, box[1] + side))) for p in planes]
            rows.append((np.stack(planes) / 255 - 0.2) / 0.3)
        return torch.from_numpy(np.stack(rows)).float()


@pytest.fixture(scope="module", params=list(CHANNELS))
def kind(request, tmp_path_factory):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return Kind(request.param, tmp_path_factory.mktemp(request.param))


def test_pretraining(kind, tmp_path):
    """On the device's views, from weights, near them, and guarded."""
    assert load_backbone(kind.file)(torch.zeros(2, kind.channels, 32, 32)).shape == (2, 128)
    knn = [json.loads(line)["knn"] for line in (kind.run / "metrics.jsonl").read_text().splitlines()][-1]
    assert knn == 100  # brightness tells the classes apart
    near = ["--init", kind.file, "--preserve", 1, "--guard", "start", "--quality-every", 1, "--epochs", 1]
    flags = [*kind.reading, "--warmup-epochs", 0, "--lr", "1e-9", "--output-dir", tmp_path]
    command("pretrain", kind.data, *TINY, "-b", 8, *near, *flags)
    before, after = (torch.load(f, weights_only=True)["state_dict"] for f in (kind.file, *tmp_path.glob("*0000.pth*")))
    name = "module.base_encoder.conv1.weight"
    assert torch.allclose(before[name], after[name], atol=1e-4)


def test_embed_and_knn(kind, tmp_path, capsys):
    command("embed", kind.data, "--model", kind.file, "-j", 0, "-o", tmp_path / "e.npy")
    with torch.no_grad():
        want = load_backbone(kind.file)(kind.inputs("train", 32, Image.Resampling.BILINEAR))
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "e.npy")), want, rtol=1e-3, atol=1e-3)
    for flags in ([], ["--view-preset", "gray"]):
        command("knn", kind.data, "--model", kind.file, "-j", 0, *flags)
    preset = open_frozen(str(kind.file), flag="--model", view_preset="gray").preset
    assert (preset.reading, preset.evaluation_zoom) == (Reading(kind.channels, WINDOW), 1.0)
    assert len(preset.mean) == len(preset.std) == kind.channels
    capsys.readouterr()
    if kind.channels == 5:
        assert "holds 5 channels, not 3" in refused("knn", kind.data, "--model", "pixels", "-j", "0")
    else:
        command("knn", kind.data, "--model", "pixels", "-j", 0, "--image-size", 32)
        assert "24 images were read with remarks" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["pixels", "resnet10_w16"])
def test_networks_that_say_nothing_read_images_as_flags_say(kind, model, tmp_path, capsys):
    flags = ["--image-size", 32, "-j", 0, *kind.reading]
    command("embed", kind.data, "--model", model, "-o", tmp_path / "e.npy", *flags)
    frozen = open_frozen(model, flag="--model", image_size=32, channels=kind.channels)
    mean, std = (sum(numbers) / 3 for numbers in (PRESETS["photos"].mean, PRESETS["photos"].std))
    images = (kind.inputs("train", 32, Image.Resampling.BILINEAR) * 0.3 + 0.2 - mean) / std
    with torch.no_grad():
        want = frozen.features(images)
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "e.npy")), want, rtol=1e-3, atol=1e-3)
    command("knn", kind.data, "--model", model, *flags, "--json")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])
    more = ["--epochs", 1, "-b", 8, "--cache-features", "--output-dir", tmp_path / "linear"]
    command("lincls", kind.data, "-a", model, *flags, *more)
    capsys.readouterr()
    said = refused("knn", kind.data, "--model", kind.file, "-j", "0", "--channels", "2")
    assert f"is of images of {kind.channels} channels, not --channels 2" in said
    assert "--bit-window" in refused("knn", kind.data, "--model", model, "--bit-window", "9,1")


def test_looking_at_images_and_runs(kind, tmp_path, capsys):
    known = kind.reading if kind.name == "five" else []
    command("check", kind.data, *TINY, *known, "--sheet", tmp_path / "sheet.png")
    said = capsys.readouterr().out
    assert "over 8 bits      24 images" in said
    assert ("; --bit-window 200,3800" if known else "give --bit-window 0,4095") in said
    assert Image.open(tmp_path / "sheet.png").height > 96
    command("compare", kind.file, kind.data)
    command("report", kind.run)
    assert (kind.run / "report.html").stat().st_size > 10_000
    capsys.readouterr()
    command("inspect", kind.file)
    assert f"--channels {kind.channels}" in capsys.readouterr().out
    command("convert", "--input", kind.file, "--output", tmp_path / "deit.pth")
    preset = open_frozen(str(tmp_path / "deit.pth"), flag="--model", arch="resnet10_w16", image_size=32).preset
    assert preset.reading == Reading(kind.channels, WINDOW)
    command("plan", "-a", "resnet10_w16", "--image-size", 32, *kind.reading, "-b", 64)


def test_packing_loses_nothing(kind, tmp_path, capsys):
    """An archive holds the files' bytes, of images that a JPEG cannot stand for too."""
    warn_once.cache_clear()
    command("pack", kind.data, "--out", tmp_path, "--resize", 20)
    assert "are not resized" in capsys.readouterr().err
    with tarfile.open(next((tmp_path / "val").glob("*.tar"))) as tar:
        held = [tar.extractfile(m).read() for m in tar.getmembers() if not m.name.endswith("cls")]
    assert sorted(held) == sorted(file.read_bytes() for file in kind.files("val"))


def test_linear_evaluation_then_fine_tuning(kind, tmp_path):
    linear = tmp_path / "linear"
    command("lincls", kind.data, "--pretrained", kind.file, "--epochs", 1, "-b", 8, "-j", 0, "--output-dir", linear)
    flags = ["--data-path", kind.data, "--epochs", 1, "--warmup-epochs", 0, "-b", 8, "-j", 0, "--transfer-transform"]
    command("finetune", *flags, "--finetune", linear / "checkpoint.pth.tar", "--output_dir", tmp_path / "tuned")
    config = yaml.safe_load((tmp_path / "tuned" / "config.yaml").read_text())
    assert (config["channels"], config["bit_window"], config["image_size"]) == (kind.channels, "200,3800", 32)
    assert config["mean_std"] == ",".join(["0.2"] * kind.channels + ["0.3"] * kind.channels)


@pytest.fixture(scope="module")
def tuned(kind, tmp_path_factory):
    """Fine-tuned by DeiT's whole recipe."""
    out = tmp_path_factory.mktemp("tuned")
    flags = ["--epochs", 2, "--warmup-epochs", 0, "-b", 8, "-j", 0, "--device", "cpu"]
    command("finetune", "--data-path", kind.data, "--finetune", kind.file, *flags, "--output_dir", out)
    return out / "checkpoint.pth"


def test_fine_tuning(kind, tuned, tmp_path, capsys):
    """Evaluation is what the network says of images read by libraries alone, resized as DeiT does."""
    contents = torch.load(tuned, weights_only=True)
    saved = contents["mocov3"]["config"]
    told = {"channels": kind.channels, "bit_window": "200,3800", "mean_std": MEASURED}
    assert {name: saved[name] for name in told} == told
    state = contents["model"]
    with torch.no_grad():
        features = load_backbone(tuned)(kind.inputs("val", 32, Image.Resampling.BICUBIC))
        scores = features @ state["fc.weight"].T + state["fc.bias"]
    target = torch.tensor([int(file.parent.name == "dark") for file in kind.files("val")])
    loss = float(torch.nn.functional.cross_entropy(scores, target))
    capsys.readouterr()
    data = ["--data-path", kind.data, "-j", "0", "-b", "8"]
    command("finetune", *data, "--resume", tuned, "--eval")
    said = capsys.readouterr().out
    assert abs(float(said.split("loss ")[1].split()[0]) - loss) < 2e-3
    assert f"each of {kind.channels} channels as a grey image" in said
    command("finetune", *data, "--resume", tuned, "--epochs", 2, "--warmup-epochs", 0, "--output_dir", tmp_path)
    assert "--bit-window" in refused("finetune", *data, "--resume", tuned, "--bit-window", "9,3")
    assert "bit_window ('200,3800' → '0,99')" in refused(
        *("finetune", *data, "--resume", tuned, "--bit-window", "0,99", "--output_dir", tmp_path / "other"),
        *("--epochs", "2", "--warmup-epochs", "0"),
    )


def test_exports_read_images_as_their_source(kind, tuned, tmp_path):
    """The card's code on the files gives what the network gives; and our commands follow what was written."""
    images = {file.name: file.read_bytes() for file in kind.files("val")[:3]}
    with torch.no_grad():
        want = load_backbone(tuned)(kind.inputs("val", 32, Image.Resampling.BICUBIC)[:3])
    for to in ("safetensors", "deit") if kind.name == "grey" else ("safetensors", "deit", "onnx"):
        out = tmp_path / f"out.{to}"
        command("export", tuned, "--to", to, "--output", out)
        torch.testing.assert_close(torch.as_tensor(run_card(out, images)["features"]), want, rtol=1e-3, atol=1e-3)
        assert "values 200 to 3800" in out.with_name(out.name + ".md").read_text()
        if to == "onnx":
            about = {p.key: p.value for p in onnx.load(out).metadata_props}
            assert json.loads(about["view"])["window"] == list(WINDOW)
            assert json.loads(about["view"])["channels"] == kind.channels
            continue
        preset = open_frozen(str(out), flag="--model", arch="resnet10_w16", image_size=32).preset
        assert preset.reading == Reading(kind.channels, WINDOW)
        assert (preset.mean, preset.std) == ((0.2,) * kind.channels, (0.3,) * kind.channels)


def test_weights_of_colour_start_others(kind, tmp_path, capsys):
    """By flags alone, and from weights of RGB, whose first layer is summed or repeated."""
    flags = ["--data-path", kind.data, "-a", "resnet10_w16", "--image-size", 32, "--epochs", 1, "--warmup-epochs", 0]
    flags += ["-b", 8, "-j", 0, "--max-steps", 1, "--lr", 0, "--warmup-lr", 0, "--min-lr", 0, "--aa", "none"]
    colour = load_backbone("resnet10_w16", image_size=32).state_dict()
    torch.save({"model": colour}, tmp_path / "rgb.pth")
    command("finetune", *flags, *kind.reading, "--finetune", tmp_path / "rgb.pth", "--output_dir", tmp_path)
    first, rgb = (
        torch.load(tmp_path / "checkpoint.pth", weights_only=True)["model"]["conv1.weight"],
        colour["conv1.weight"],
    )
    want = rgb.sum(1, keepdim=True) if kind.channels == 1 else rgb[:, [0, 1, 2, 0, 1]] * 3 / 5
    torch.testing.assert_close(first, want)
    assert "was trained on 3 channels" in capsys.readouterr().err


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "augmix-m5-w4-d2", "3a", ""])
def test_the_training_view_of_a_channel_is_timms_of_a_grey_image(policy):
    """Of the grey image in colour timm leaves equal channels, by the same draws: those of every one of five too."""
    grey = np.random.default_rng(3).integers(0, 256, (9, 11), dtype=np.uint8).repeat(5, 0).repeat(5, 1)

    def view(pixels, channels, index):
        augment = DeitAugment(32, policy, mean=(0.3,) * channels, reading=Reading(channels))
        return augment(pixels, seed=1, epoch=0, index=index)[0]

    for index in range(12):
        want = view(grey[..., None].repeat(3, 2), 3, index)
        assert np.array_equal(view(grey, 1, index), want[..., :1])
        assert np.array_equal(view(grey[..., None].repeat(5, 2), 5, index), want[..., :1].repeat(5, 2))
