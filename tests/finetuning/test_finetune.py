"""Runs of fine-tuning: files, starting weights, ranks, kills and resumes, doors, recipes, bad input."""

import dataclasses
import json
import os
import random
import re
import shlex
import shutil
import sys

import pytest
import torch
import yaml
from conftest import ROOT
from doors import COMMANDS, commands, refused
from killing import Process, assert_same_run, kill_until_done
from transfer_files import write_cifar, write_flowers, write_pets

from mocov3 import load_backbone, models
from mocov3.cli import main, parse_script
from mocov3.config import FinetuneConfig
from mocov3.config.command_lines import parse_finetune
from mocov3.config.recipes import FINETUNE_RECIPES
from mocov3.distributed import World, free_loopback_address
from mocov3.errors import UserError
from mocov3.evaluation.frozen import open_frozen
from mocov3.export import write
from mocov3.finetuning.files import find_start
from mocov3.weights import checkpoint, convert

SMALL = [
    "-a",
    "resnet10_w32",
    "--image-size",
    "32",
    "-b",
    "8",
    "--epochs",
    "2",
    "--warmup-epochs",
    "1",
    "-j",
    "0",
    "-p",
    "1",
    "--device",
    "cpu",
    "--seed",
    "3",
]


def finetune(folder, *flags, code=0):
    assert main(["finetune", *SMALL, "--output_dir", str(folder), *map(str, flags)]) == code


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return [line["loss"] for line in lines(folder) if line["loss"] is not None]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A pre-training checkpoint as the reference writes it, of a small ViT and of a ResNet."""
    files = {}
    for arch in ("vit_tiny", "resnet10_w32"):
        torch.manual_seed(2)
        model = models.build(arch, image_size=32, dim=8, mlp_dim=16)
        state = {f"module.{k}": v for k, v in model.state_dict().items()}
        files[arch] = tmp_path_factory.mktemp(arch) / "checkpoint_0001.pth.tar"
        own = {"config": {"image_size": 32, "view_preset": "gray"}, "licence": "CC0", "origin": "from a test"}
        torch.save({"epoch": 2, "arch": arch, "state_dict": state, "optimizer": {}, "mocov3": own}, files[arch])
    return files


@pytest.fixture(scope="module")
def whole(images, pretrained, tmp_path_factory):
    """A run of 2 epochs of 8 steps from pre-trained weights."""
    folder = tmp_path_factory.mktemp("whole")
    flags = ["--data-set", "folder", "--data-path", images, "--finetune", pretrained["resnet10_w32"]]
    finetune(folder, *flags, "--checkpoint-steps", "3")
    return folder


def test_files_of_a_run(whole, pretrained):
    assert {"checkpoint.pth", "best_checkpoint.pth", "config.yaml", "metrics.jsonl", "log.txt", "tensorboard"} == set(
        os.listdir(whole)
    )
    saved = torch.load(whole / "checkpoint.pth", weights_only=True)
    assert {"model", "optimizer", "epoch", "model_ema", "scaler", "arch", "mocov3"} == set(saved)
    assert (saved["epoch"], saved["arch"], saved["mocov3"]["step"]) == (2, "resnet10_w32", 16)
    assert saved["mocov3"]["licence"] == "CC0"
    assert saved["mocov3"]["origin"] == "fine-tuned from checkpoint_0001.pth.tar (from a test)"
    assert saved["model"]["fc.weight"].shape == (4, 256)
    assert yaml.safe_load((whole / "config.yaml").read_text())["view_preset"] == "gray"  # as it was pre-trained
    steps = [(line["step"], line["acc1"]) for line in lines(whole)]
    assert [s for s, acc in steps if acc is None] == list(range(16))
    assert [s for s, acc in steps if acc is not None] == [7, 15]
    deit = [json.loads(line) for line in (whole / "log.txt").read_text().splitlines()]
    assert [set(entry) for entry in deit] == [
        {"train_lr", "train_loss", "test_loss", "test_acc1", "test_acc5", "epoch"}
    ] * 2
    assert deit[0]["train_loss"] == pytest.approx(sum(losses(whole)[:8]) / 8)
    # its configuration makes the same run again
    assert main(["finetune", "--config", str(whole / "config.yaml"), "--output_dir", str(whole / "again")]) == 0
    assert losses(whole / "again") == losses(whole)
    shutil.rmtree(whole / "again")
    # every other task reads it
    features = load_backbone(whole / "checkpoint.pth")(torch.randn(2, 3, 32, 32))
    assert features.shape == (2, 256)
    best = torch.load(whole / "best_checkpoint.pth", weights_only=True)
    assert best["mocov3"]["counters"]["best"] == max(entry["test_acc1"] for entry in deit)


def test_weights_are_started_from(images, pretrained, tmp_path, capsys):
    # a reference's checkpoint, DeiT's file by --resume (model only), and timm's keys all give the same first loss
    raw = pretrained["resnet10_w32"]
    deit, bare = tmp_path / "deit.pth", tmp_path / "bare.pth"
    assert main(["convert", "--input", str(raw), "--output", str(deit)]) == 0
    torch.save(torch.load(deit)["model"], bare)
    data = ["--data-set", "folder", "--data-path", images, "--view-preset", "gray", "--max-steps", 1]
    for name, flags in {
        "raw": ["--finetune", raw],
        "resume": ["--resume", raw],
        "deit": ["--resume", deit],
        "bare": ["--finetune", bare],
        "auto": ["--resume", "auto", "--finetune", deit],
    }.items():
        finetune(tmp_path / name, *data, *flags)
        assert "new: fc.weight, fc.bias" in capsys.readouterr().out
        assert losses(tmp_path / name) == losses(tmp_path / "raw")
    finetune(tmp_path / "scratch", *data)
    assert "from scratch" in capsys.readouterr().out
    assert losses(tmp_path / "scratch") != losses(tmp_path / "raw")
    state = torch.load(tmp_path / "raw" / "checkpoint.pth")["model"]
    start = torch.load(deit)["model"]
    assert (state["conv1.weight"] - start["conv1.weight"]).norm() < 1e-3 * start["conv1.weight"].norm()


def test_eval_and_export_of_a_tuned_model(whole, images, tmp_path, capsys):
    flags = ["--data-set", "folder", "--data-path", str(images), "--device", "cpu"]
    for name in ("checkpoint.pth", "best_checkpoint.pth"):
        assert main(["finetune", "--eval", "--resume", str(whole / name), *flags]) == 0
        found = re.search(r"\* Acc@1 ([\d.]+) Acc@5 ([\d.]+)", capsys.readouterr().out)
        accuracies = [line["acc1"] for line in lines(whole) if line["acc1"] is not None]
        want = accuracies[-1] if name == "checkpoint.pth" else max(accuracies)
        assert float(found[1]) == pytest.approx(want, abs=1e-3)
        assert float(found[2]) == 100  # four classes
    moved = shutil.copytree(images, tmp_path / "moved")  # one more class, which shifts the numbers of the others
    shutil.copytree(images / "train" / "class1", moved / "train" / "a class")
    assert main(["finetune", "--eval", "--resume", str(whole / name), *flags, "--data-path", str(moved)]) == 0
    assert re.search(r"\* Acc@1 ([\d.]+) Acc@5 ([\d.]+)", capsys.readouterr().out).groups() == found.groups()
    out = tmp_path / "f.safetensors"
    assert main(["export", str(whole / "checkpoint.pth"), "--to", "safetensors", "--output", str(out)]) == 0
    card = (tmp_path / "f.safetensors.md").read_text()
    assert "fine-tuned from checkpoint_0001.pth.tar" in card
    assert "CC0" in card


def test_a_trained_position_table_moves_to_another_grid(images, pretrained, tmp_path):
    finetune(
        tmp_path,
        "--data-set",
        "folder",
        "--data-path",
        images,
        "-a",
        "vit_tiny",
        "--max-steps",
        3,
        "--finetune",
        pretrained["vit_tiny"],
        "--lr",
        0.1,
        "--warmup-lr",
        0.01,
        "--clip-grad",
        1,
        "--layer-decay",
        0.75,
    )
    file = tmp_path / "checkpoint.pth"
    table = torch.load(file)["model"]["pos_embed"]
    fixed = torch.load(pretrained["vit_tiny"])["state_dict"]["module.base_encoder.pos_embed"]
    assert (table - fixed).abs().max() > 1e-4  # trained
    larger = load_backbone(file, image_size=64)
    assert larger.pos_embed.shape == (1, 17, 192)
    corners = larger.pos_embed[0, [1, 4, 13, 16]]
    assert (corners - table[0, 1:]).norm() < 0.5 * table[0, 1:].norm()  # interpolated, not rebuilt
    rebuilt = load_backbone(pretrained["vit_tiny"], image_size=64)
    assert torch.equal(rebuilt.pos_embed, models.build_backbone("vit_tiny", image_size=64).pos_embed)


def test_killed_and_resumed_is_never_killed(images, pretrained, tmp_path):
    def command(workers):
        def argv(folder):
            return [
                sys.executable,
                "-m",
                "mocov3",
                "finetune",
                *SMALL,
                "-a",
                "vit_tiny",
                "--epochs",
                "3",
                "-j",
                workers,
                "--data-set",
                "folder",
                "--data-path",
                str(images),
                "--finetune",
                str(pretrained["vit_tiny"]),
                "--drop-path",
                "0.3",
                "--checkpoint-steps",
                "2",
                "--model-ema-decay",
                "0.9",
                "--lr",
                "0.01",
                "--output_dir",
                str(folder),
                "--resume",
                "auto",
                "--quiet",
            ]

        return argv

    report = kill_until_done([command("0"), command("1")], tmp_path / "killed", kills=2, rng=random.Random(4))
    assert report.kills >= 1
    Process(command("0")(tmp_path / "whole")).finish()
    assert_same_run(tmp_path / "whole", tmp_path / "killed", last="checkpoint.pth")
    for name in ("log.txt", "best_checkpoint.pth"):
        assert (tmp_path / "killed" / name).exists()
    assert (tmp_path / "killed" / "log.txt").read_text() == (tmp_path / "whole" / "log.txt").read_text()


def test_the_reference_command_on_two_ranks_is_one_process(tmp_path, pretrained):
    write_cifar(tmp_path, "cifar10", n=12)
    command = next(line for line in COMMANDS.read_text().splitlines() if "--data-set cifar10" in line)
    port = free_loopback_address().rsplit(":")[-1]
    for old, new in (
        ("--nproc_per_node=8", f"--nproc_per_node=2 --master_port={port}"),
        ("DATA", tmp_path),
        ("128", "8"),
        ("CKPT", pretrained["vit_tiny"]),
        ("OUT", tmp_path / "two"),
    ):
        command = command.replace(old, str(new))
    extra = ["--device", "cpu", "-p", "1", "--max-steps", "3", "--num_workers", "0", "--warmup-lr", "1e-4"]
    extra += ["--input-size", "32"]
    argv = [sys.executable, *shlex.split(command.removeprefix("python -u ")), *extra]  # as Python is with any output
    argv[argv.index("transfer/main.py")] = str(ROOT / "transfer" / "main.py")
    out = Process(argv).finish()
    assert "new: head.weight, head.bias" in out
    assert "2 process(es)" in out
    one = [*argv[argv.index("--use_env") + 2 :], "--output_dir", str(tmp_path / "one"), "--accum-iter", "2"]
    assert main(["finetune", *one]) == 0
    assert losses(tmp_path / "one")[0] == pytest.approx(losses(tmp_path / "two")[0], rel=1e-5)
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-3)
    a, b = (torch.load(tmp_path / n / "checkpoint.pth", weights_only=True) for n in ("one", "two"))
    assert (a["arch"], a["mocov3"]["total_batch"]) == ("vit_tiny", 16)
    assert b["mocov3"]["data_digest"] == a["mocov3"]["data_digest"]
    # what two ranks began, one goes on with
    assert main(["finetune", *one, "--resume", str(tmp_path / "two" / "checkpoint.pth"), "--max-steps", "4"]) == 0


def test_flowers_and_pets_report_the_mean_over_classes(tmp_path, pretrained, capsys):
    write_flowers(tmp_path / "flowers", counts=(6, 4, 5))
    write_pets(tmp_path / "pets")
    for data_set, recipe in (("flowers", "transfer_flowers"), ("pets", "transfer_pets")):
        flags = ["--recipe", recipe, "--data-path", tmp_path, "-b", 2, "--resume", pretrained["resnet10_w32"]]
        finetune(tmp_path / f"run-{data_set}", *flags, "--epochs", 1)
        out = capsys.readouterr().out
        assert "mean per class" in out
        line = lines(tmp_path / f"run-{data_set}")[-1]
        assert 0 <= line["mean_class_acc1"] <= 100
        assert ("--reprob" in out) == (data_set == "flowers")  # its command names what the reference does not apply


def test_recipes_mean_the_references_commands():
    by_set = {}
    for script, argv in commands(COMMANDS.read_text()):
        if script == "transfer/main.py":
            config = parse_script(script, argv)
            by_set[config.data_set] = config
    assert len(by_set) == 4
    fields = (
        "epochs",
        "batch_size",
        "lr",
        "weight_decay",
        "warmup_epochs",
        "repeated_aug",
        "mixup",
        "cutmix",
        "drop_path",
        "reprob",
    )
    for data_set, want in by_set.items():
        got = parse_finetune(["--recipe", f"transfer_{data_set}"], prog="x")
        assert got.arch == "vit_base"
        assert got.transfer
        assert {f: getattr(got, f) for f in fields} == {f: getattr(want, f) for f in fields}, data_set
    base = parse_finetune(["--recipe", "finetune_vit_base_150ep"], prog="x")
    assert (base.arch, base.epochs, base.lr, base.weight_decay, base.repeats) == ("vit_base", 150, 5e-4, 0.05, 3)
    assert not base.transfer
    # the reference's own page has --eval-freq too
    assert parse_script("transfer/main.py", ["--eval-freq", "10", "--data-set", "cifar10"]).eval_freq == 10
    for document in ("docs/finetune.md", "transfer/README.md", "CONFIG.md"):
        text = (ROOT / document).read_text()
        for script, argv in commands(text):
            if script == "transfer/main.py":
                parse_script(script, argv).check()
        if document == "CONFIG.md":
            for name, recipe in FINETUNE_RECIPES.items():
                assert recipe.reference_result in text.split(f"### {name}\n")[1].split("\n### ")[0]


def test_an_unreadable_image_gives_its_place_and_class_away(images, tmp_path, capsys):
    shutil.copytree(images, tmp_path / "data")
    for split in ("train", "val"):
        (tmp_path / "data" / split / "class1" / "zz.jpg").write_bytes(b"no image")
    finetune(tmp_path / "run", "--data-set", "folder", "--data-path", tmp_path / "data", "--no-repeated-aug")
    captured = capsys.readouterr()
    assert "1 unreadable images replaced (listed in corrupt.jsonl), first: class1/zz.jpg" in captured.err
    assert json.loads((tmp_path / "run" / "corrupt.jsonl").read_text())["name"] == "class1/zz.jpg"
    assert "on the 16 test images" in captured.out  # of 17
    assert lines(tmp_path / "run")[-1]["corrupt"] == 1


def test_a_resume_is_of_the_same_run(whole, images, pretrained, tmp_path, capsys):
    last = whole / "checkpoint.pth"
    data = ["--data-set", "folder", "--data-path", images]
    finetune(tmp_path, *data, "--resume", last)
    assert "nothing left to do" in capsys.readouterr().out
    for flags, message in (
        ([*data, "--lr", "0.1"], "lr (0.0005 → 0.1)"),
        ([*data, "-b", "4"], "batch_size (8 → 4)"),
        ([*data, "--accum-iter", "2"], "16; --accum-iter"),
        ([*data, "-a", "resnet18"], "arch"),
        ([*data, "--fraction", "0.5"], "fraction"),
        (["--data-set", "folder", "--data-path", images, "--mixup", "0"], "mixup (0.8 → 0.0)"),
    ):
        assert message in refused("finetune", *SMALL, "--output_dir", tmp_path, "--resume", last, *flags)
    contents = torch.load(last, weights_only=True)
    for change, message in (
        ({"optimizer": {"state": 1}}, "damaged"),
        ({"model": {}}, "misses"),
        ({"model_ema": {"a": torch.zeros(1)}}, "damaged"),
        ({"mocov3": {k: v for k, v in contents["mocov3"].items() if k != "counters"}}, "damaged"),
    ):
        torch.save({**contents, **change}, tmp_path / "changed.pth")
        assert message in refused(
            "finetune", *SMALL, *data, "--output_dir", tmp_path, "--resume", tmp_path / "changed.pth"
        )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data-set", "imagenet"], "invalid choice"),
        (["--data-path", ""], "--data-path: name the folder"),
        (["--data-path", "none"], "no such folder"),
        (["-a", "vit_smal"], "vit_small"),
        (["-a", "vit_small", "--input-size", "100"], "does not divide"),
        (["-b", "7"], "odd"),
        (["-b", "66"], "64 images"),
        (["--fraction", "0"], "above 0"),
        (["--fraction", "0.01"], "lower it"),
        (["--lr", "nan"], "--lr"),
        (["--drop-path", "1"], "below 1"),
        (["--mixup-prob", "2"], "must be 0 to 1"),
        (["--warmup-epochs", "9"], "longer than"),
        (["--layer-decay", "1.5"], "at most 1"),
        (["--finetune", "none.pth"], "no such file"),
        (["--resume", "none.pth"], "no such file"),
        (["--eval"], "--resume"),
        (["--recipe", "transfer_cifar"], "transfer_cifar10"),
        (["--view-preset", "grey"], "gray"),
        (["--small-stem", "-a", "vit_small"], "ResNets"),
        (["--finetune", "TEXT"], "text.pth"),
        (["--finetune", "CUT"], "truncated"),
        (["--finetune", "VIT"], "is of arch vit_tiny, not resnet10_w32"),
        (["--eval", "--resume", "RAW"], "has no classifier"),
        (["--eval", "--resume", "TEN"], "has 10 classes, the data set has 4"),
        (["--aa", "rand-q9"], "--aa"),
        (["--channels", "65"], "--channels must be 0 to 64"),
        (["--bit-window", "9,3"], "lower one first"),
        (["--mean-std", ".1,.2,.3"], "three means"),
        (["--mean-std", ".1,.2,.3,.4"], "three means"),
        (["--channels", "2", "--mean-std", ".1,.2,.3,.4,.5,.6"], "2 means and 2 deviations"),
    ],
)
def test_bad_input(flags, message, images, pretrained, tmp_path):
    files = {
        "TEXT": tmp_path / "text.pth",
        "CUT": tmp_path / "cut.pth",
        "VIT": pretrained["vit_tiny"],
        "RAW": pretrained["resnet10_w32"],
        "TEN": tmp_path / "ten.pth",
    }
    files["TEXT"].write_text("no weights")
    files["CUT"].write_bytes(pretrained["vit_tiny"].read_bytes()[:60_000])
    state = convert.find_backbone(checkpoint.read(pretrained["resnet10_w32"]), "f").state
    head = {"fc.weight": torch.zeros(10, 256), "fc.bias": torch.zeros(10)}
    torch.save({"model": {**state, **head}}, files["TEN"])
    flags = [files.get(f, f) for f in flags]
    data = ["--data-set", "folder", "--data-path", images]
    assert message in refused("finetune", *SMALL, *data, "--output_dir", tmp_path / "out", *flags)


def test_a_former_run_is_not_overwritten(whole, images):
    assert "--resume auto" in refused("finetune", *SMALL, "--data-path", images, "--output_dir", whole)
    assert "name the run" in refused("finetune", *SMALL, "--data-path", images, "--resume", "auto")


def test_normalisation_is_that_of_the_weights(tmp_path, pretrained):
    contents = torch.load(pretrained["resnet10_w32"], weights_only=True)
    contents["mocov3"]["config"]["mean_std"] = "0.3,0.4"
    file = tmp_path / "checkpoint_0001.pth.tar"
    torch.save(contents, file)
    world = World(0, 1, torch.device("cpu"))
    for flags, expected in (([], "0.3,0.4"), (["--view-preset", "photos"], ""), (["--mean-std", "0.5,0.2"], "0.5,0.2")):
        config = parse_finetune(["--finetune", str(file), *flags], prog="mocov3 finetune")
        assert find_start(config, world).config.mean_std == expected
    for preset in (open_frozen(str(file), flag="--model").preset, write.load(file)):
        assert (preset.mean, preset.std) == ((0.3,) * 3, (0.4,) * 3)
    config = parse_finetune(["--finetune", str(file), "--mean-std", "auto"], prog="mocov3 finetune")
    with pytest.raises(UserError, match="measured in pre-training"):
        config.check()
    contents["mocov3"]["config"]["mean_std"] = "much"
    torch.save(contents, file)
    for load in (write.load, lambda f: open_frozen(str(f), flag="--model")):
        with pytest.raises(UserError, match="damaged"):
            load(file)


DEIT_FLAGS = """
--batch-size --epochs --model --input-size --drop-path --model-ema --model-ema-decay --clip-grad --weight-decay --lr
--warmup-lr --min-lr --warmup-epochs --color-jitter --aa --smoothing --train-interpolation --repeated-aug --reprob
--mixup --cutmix --mixup-prob --mixup-switch-prob --data-path --data-set --output_dir --device --seed --resume --eval
--num_workers --pin-mem --world_size --dist_url --finetune --eval-freq
"""
OURS = """
-a --arch --image-size --patch-size --heads --small-stem --view-preset --mean-std --channels --bit-window --fraction
--output-dir -b
--accum-iter --layer-decay --transfer-transform -j --workers -p --print-freq --checkpoint-steps --max-steps
--max-hours --recipe --config --precision --nprocs-per-node --world-size --dist-url --deterministic
--allow-config-change --quiet --json --logger --group-by --labels --measures
"""


def test_the_flags_are_frozen():
    names = []
    for field in dataclasses.fields(FinetuneConfig):
        names += field.metadata["names"] or (f"--{field.name.replace('_', '-')}",)
    assert sorted(names) == sorted([*DEIT_FLAGS.split(), *OURS.split()])
