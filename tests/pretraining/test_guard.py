"""--guard and --new-labels: a run that forgets is stopped, what it keeps is never worse, and the end is honest."""

import json
import shutil

import pytest
import torch
from doors import refused

from mocov3.cli import main
from mocov3.errors import KEEP_YOURS
from mocov3.weights import checkpoint
from mocov3.weights.find import find_backbone

FLAGS = ["--image-size", "32", "-b", "8", "--moco-dim", "8", "--moco-mlp-dim", "16", "--logger", "none", "--device"]
FLAGS += ["cpu", "--warmup-epochs", "0", "--optimizer", "adamw", "--seed", "3", "--recipe", "defaults", "-j", "0"]
FLAGS += ["-a", "resnet10_w16", "--hold-out", "16", "--quality-every", "1"]
BEST = "best_unlabelled.pth.tar"


def weights(file):
    return find_backbone(checkpoint.read(file), "file").state


def equal(one, two):
    return all(torch.equal(v, two[k]) for k, v in one.items())


def judgements(folder):
    return [json.loads(line) for line in (folder / "guard.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def base(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    flags = [*FLAGS, "--epochs", "1", "--quiet", "--max-steps", "1", "--lr", ".01", "--output-dir", str(folder)]
    assert main(["pretrain", str(images), *flags]) == 0
    return next(folder.glob("checkpoint_*"))


@pytest.fixture(scope="module")
def run(images, base):
    def start(folder, *flags, old=images / "train"):
        guard = ["--guard", str(old)] if old else []
        given = [*FLAGS, *guard, "--init", str(base), "--output-dir", str(folder), *map(str, flags)]
        return main(["pretrain", str(images), *given])

    return start


def test_a_ruinous_rate_is_caught_and_the_start_comes_out(run, base, tmp_path, capfd):
    """By two ranks, and again where one resumes the run that was stopped."""
    flags = ["--epochs", "6", "--lr", "300", "--new-labels", "folders"]
    assert run(tmp_path, *flags, "--nprocs-per-node", "2") == KEEP_YOURS
    out = capfd.readouterr().out
    assert "can no longer be ruled out: stopping" in out
    assert "Keep your weights" in out
    lines = judgements(tmp_path)
    assert [line["holds"] for line in lines] == [True] * (len(lines) - 1) + [False]
    assert len(lines) < 6
    assert lines[-1]["old"]["drop"] > 20
    assert equal(weights(base), weights(tmp_path / BEST)), "to the last bit"
    # the verdict's images are others than those that decide
    assert lines[0]["old"]["images"] == lines[0]["verdict"]["images"] == 32
    assert run(tmp_path, *flags, "--resume", "auto") == KEEP_YOURS
    out = capfd.readouterr().out
    assert "--guard has stopped this run" in out
    assert "Keep your weights" in out
    assert judgements(tmp_path) == lines


def test_a_gentle_run_goes_on_and_says_what_it_cannot_tell(run, base, tmp_path, capsys):
    flags = ["--epochs", "2", "--lr", ".002"]
    assert run(tmp_path / "a", *flags) == 0
    out = capsys.readouterr().out
    assert "32 images decide and 32 judge; to rule out a drop of 2 points about 677 are needed" in out
    assert "Old kind: cannot tell" in out
    assert "only labels can tell" in out
    lines = judgements(tmp_path / "a")
    assert len(lines) == 2
    assert all(0 <= line["agreement"] <= 100 for line in lines)
    chosen = [line for line in lines if line["chosen"]]
    assert chosen
    assert checkpoint.read(tmp_path / "a" / BEST)["mocov3"]["step"] == chosen[-1]["step"]
    assert not equal(weights(base), weights(tmp_path / "a" / BEST))
    # judging changes nothing of training, and a resumed run judges on as it would have
    assert run(tmp_path / "b", *flags, "--max-steps", "9", "--quiet") == 0
    assert run(tmp_path / "b", *flags, "--resume", "auto", "--quiet") == 0
    assert judgements(tmp_path / "b") == lines
    assert run(tmp_path / "c", *flags, "--quiet", old=None) == 0
    states = [checkpoint.read(tmp_path / name / "checkpoint_0001.pth.tar")["state_dict"] for name in "abc"]
    assert equal(states[0], states[1])
    assert equal(states[0], states[2])


def test_labels_of_the_new_kind_decide(run, images, tmp_path, capsys):
    """Nothing is gained: not shown to be better, so the weights one has are the result."""
    names = [
        f"class{label}/{i:02d}{end}"
        for label in range(4)
        for i, end in enumerate([".jpg", ".png", ".png", ".webp"] * 4)
    ]
    table = tmp_path / "labels.csv"
    table.write_text("path,label\n" + "".join(f"{name},{name[:6]}\n" for name in names))
    flags = ["--epochs", "1", "--lr", "0", "--new-labels", table]
    assert run(tmp_path / "a", *flags, old=None) == KEEP_YOURS
    out = capsys.readouterr().out
    assert "New kind: not shown to be better" in out
    assert "0 lost and 0 gained" in out
    (line,) = judgements(tmp_path / "a")
    assert line["new"]["images"] == 16, "only those that are held out"


def test_guard_start_only_measures(run, base, tmp_path, capsys):
    assert run(tmp_path, "--epochs", "2", "--lr", "300", "--guard", "start", old=None) == 0
    lines = judgements(tmp_path)
    assert [line["holds"] for line in lines] == [True, True]
    assert "old" not in lines[0]
    assert lines[-1]["agreement"] is None or lines[-1]["agreement"] < 90
    assert "Keep your weights" not in capsys.readouterr().out


def test_blends_of_start_and_end(run, base, images, tmp_path, capsys):
    assert run(tmp_path, "--epochs", "1", "--lr", ".01", "--quiet", old=None) == 0
    capsys.readouterr()
    file = tmp_path / "checkpoint_0000.pth.tar"
    assert main(["compare", str(file), str(images), "--blend", "0,.5,1", "--json", "-j", "0"]) == 0
    rows = {row["name"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    measures = ("retrieval", "rankme", "alignment", "knn")
    for end, same in (("0", f"start: {base}"), ("1", str(file))):
        assert [rows[f"{file} blend {end}"][m] for m in measures] == [rows[same][m] for m in measures]
    middle = rows[f"{file} blend 0.5"]
    assert middle["rankme"] not in (rows[str(file)]["rankme"], rows[f"start: {base}"]["rankme"])
    assert rows[f"{file} blend 0"]["against_start"]["lost"] == rows[f"{file} blend 0"]["against_start"]["gained"] == 0
    start, pair = rows[f"start: {base}"], rows[str(file)]["against_start"]
    assert start["knn"] == pytest.approx(100 * pair["right"] / pair["images"])
    assert rows[str(file)]["knn"] == pytest.approx(start["knn"] - pair["drop"])
    assert main(["compare", str(file), str(images), "--blend", ".5", "-j", "0"]) == 0
    assert f"{file} blend 0.5 against its start: " in capsys.readouterr().out
    assert "no --init that is here" in refused("compare", base, images, "--blend", ".5", "-j", "0")
    assert "--blend" in refused("compare", file, images, "--blend", "2")
    assert "--blend" in refused("compare", file, images, "--blend", "a")


def test_refusals(images, base, tmp_path):
    command = ["pretrain", images, *FLAGS, "--output-dir", tmp_path / "r"]
    started = [*command, "--init", base]
    assert "give --init and" in refused(*command, "--guard", images)
    assert "give --init and" in refused(*started, "--guard", images, "--quality-every", "0")
    (empty := tmp_path / "empty").mkdir()
    assert "--guard" in (line := refused(*started, "--guard", empty))
    assert "no image" in line
    assert "no such folder" in refused(*started, "--guard", tmp_path / "none")
    flat = tmp_path / "flat"
    shutil.copytree(images / "train" / "class0", flat)
    assert "classes of its images must be known; give DIR,labels.csv" in refused(*started, "--guard", flat)
    assert "no such file" in refused(*started, "--guard", f"{flat},{tmp_path / 'none.csv'}")
    table = tmp_path / "old.csv"
    table.write_text("path,label\nother.jpg,a\n00.jpg,b\n")
    line = refused(*started, "--guard", f"{flat},{table}")
    assert f"--guard {table}: line 2: other.jpg is none of the images" in line
    few = tmp_path / "few"
    for label in range(2):
        (few / f"c{label}").mkdir(parents=True)
        for i in range(3):
            shutil.copy(images / "train" / f"class{label}" / f"{4 * i:02d}.jpg", few / f"c{label}")
    assert "too few for two parts" in refused(*started, "--guard", few)
    assert "must be above 0" in refused(*started, "--guard", images, "--guard-drop", "0")
    table.write_text("path,label\n" + "".join(f"class0/{i:02d}.jpg,{i // 8}\n" for i in (0, 4, 8, 12)))
    assert "kept from training, too few" in refused(*started, "--new-labels", table)
    held = refused(*started, "--guard", images, "--epochs", "0")
    assert "--epochs" in held


def test_the_start_is_read_as_its_own_training_read_images(run, images, tmp_path, capsys):
    """A run with other normalisation does not make the start look worse than it is."""
    flags = ["--epochs", "1", "--lr", "0", "--quiet"]
    run(tmp_path / "a", *flags)
    run(tmp_path / "b", *flags, "--mean-std", "0.9,0.01")
    one, two = (judgements(tmp_path / name)[0]["old"] for name in "ab")
    assert one["right"] == two["right"]
    assert (one["lost"], one["gained"]) != (two["lost"], two["gained"]), "the run's own normalisation is another"
    rows = []
    for name in "ab":
        capsys.readouterr()
        file = tmp_path / name / "checkpoint_0000.pth.tar"
        assert main(["compare", str(file), str(images), "--json", "-j", "0"]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        rows.append({line["kind"]: line for line in lines})
    assert rows[0]["start"] == rows[1]["start"]
    assert rows[0]["checkpoint"]["rankme"] != rows[1]["checkpoint"]["rankme"]
