"""Linear evaluation: numerics against plain torch, many heads as one, files, resume, ranks, bad input."""

import json
import random
import re
import shutil
import sys

import numpy as np
import pytest
import rank_tasks
import torch
from doors import refused
from evaluating import ARCH, write_pretrained
from killing import Process, assert_same_run, kill_until_done
from PIL import Image
from reads import Reads
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import top_k_accuracy_score
from starting import launch_ranks

from mocov3 import models
from mocov3.cli import main
from mocov3.data.loading.labelled import CropView, open_labelled, plan_all
from mocov3.data.sources.opening import scan
from mocov3.data.views.decode import decode
from mocov3.data.views.draws import permutation
from mocov3.data.views.two_views import CentreView
from mocov3.distributed import World
from mocov3.evaluation.linear.heads import FeatureNorm, Heads, HeadSpec
from mocov3.evaluation.linear.lbfgs import fit
from mocov3.evaluation.linear.log import HeadResult, best_of, edges, table
from mocov3.metrics import correct_at

ONE = World(0, 1, torch.device("cpu"))
FLAGS = ["--epochs", "5", "-b", "16", "--seed", "3", "--device", "cpu", "-j", "0", "-p", "1"]
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    path = tmp_path_factory.mktemp("pretrained") / "checkpoint_0000.pth.tar"
    write_pretrained(path)
    return path


def lincls(images, pretrained, folder, *flags, code=0):
    argv = ["lincls", images, *FLAGS, "--pretrained", pretrained, "--output-dir", folder, *flags]
    assert main(list(map(str, argv))) == code
    return torch.load(folder / "checkpoint.pth.tar", weights_only=True) if code == 0 else None


@pytest.fixture(scope="module")
def run(images, pretrained, tmp_path_factory):
    """A run of 20 steps of six heads."""
    folder = tmp_path_factory.mktemp("run")
    lincls(images, pretrained, folder, "--lr", "0.1,1,30", "--head", "linear,bn-linear", "--wd", "1e-3")
    return folder


def normalised(pixels):
    x = torch.from_numpy(np.stack(pixels)).float() / 255
    return ((x - MEAN) / STD).permute(0, 3, 1, 2)


def test_twenty_steps_are_plain_torch(images, pretrained, tmp_path):
    saved = lincls(images, pretrained, tmp_path, "--lr", "0.5", "--wd", "1e-3", "--momentum", "0.8")
    backbone = models.build(ARCH, dim=16, mlp_dim=32).base_encoder
    contents = torch.load(pretrained, weights_only=True)["state_dict"]
    prefix = "module.base_encoder."
    backbone.load_state_dict({k.removeprefix(prefix): v for k, v in contents.items() if k.startswith(prefix)})
    backbone.eval()
    source, view = scan(images / "train"), CropView(32)
    head = torch.nn.Linear(256, 4)
    torch.nn.init.normal_(head.weight, std=0.01, generator=torch.Generator().manual_seed(3))
    torch.nn.init.zeros_(head.bias)
    sgd = torch.optim.SGD(head.parameters(), 0.0, momentum=0.8, weight_decay=1e-3)
    steps = 0
    for epoch in range(5):
        sgd.param_groups[0]["lr"] = 0.5 * 16 / 256 * (1 + np.cos(np.pi * epoch / 5)) / 2
        for indices in permutation(3, epoch, 64).reshape(4, 16):
            views = [view(source.read(i), seed=3, epoch=epoch, index=i)[0] for i in indices.tolist()]
            with torch.no_grad():
                x = backbone.features(normalised(views))
            loss = torch.nn.functional.cross_entropy(head(x), torch.from_numpy(source.labels[indices]).long())
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            steps += 1
    assert saved["mocov3"]["step"] == steps == 20
    for name in ("weight", "bias"):
        ours, plain = saved["state_dict"][f"module.fc.{name}"], getattr(head, name).detach()
        assert (ours - plain).norm() <= 1e-5 * plain.norm(), name
    momentum = saved["optimizer"]["state"][0]["momentum_buffer"]
    plain = sgd.state[head.weight]["momentum_buffer"]
    assert (momentum - plain).norm() <= 1e-4 * plain.norm()
    # the whole validation set, counted
    val = scan(images / "val")
    with torch.no_grad():
        x = normalised([CentreView(32)(val.read(i))[0] for i in range(len(val))])
        scores = head(backbone.features(x)).numpy()
    line = json.loads((tmp_path / "lincls.jsonl").read_text().splitlines()[-1])
    assert line["acc1"] == pytest.approx(100 * top_k_accuracy_score(val.labels, scores, k=1))
    assert line["acc5"] == 100


def test_every_head_is_its_own_run(images, pretrained, run, tmp_path):
    # to the last bit: the model of each, its accuracy, its momentum
    many = torch.load(run / "checkpoint.pth.tar", weights_only=True)["mocov3"]
    assert [h["head"] for h in many["heads"]] == ["linear"] * 3 + ["bn-linear"] * 3
    for i in (1, 5):
        entry = many["heads"][i]
        one = lincls(
            images, pretrained, tmp_path / str(i), "--lr", entry["lr"], "--head", entry["head"], "--wd", "1e-3"
        )["mocov3"]
        assert torch.equal(one["state"]["weights"][0], many["state"]["weights"][i])
        assert torch.equal(one["state"]["biases"][0], many["state"]["biases"][i])
        assert all(
            torch.equal(a, b) for a, b in zip(one["state"]["momenta"], many["state"]["momenta"][2 * i :], strict=False)
        )
        assert one["heads"][0] == entry


def test_batch_norm_is_torchs_and_folds():
    torch.manual_seed(1)
    norm, theirs = FeatureNorm(6, ONE.device), torch.nn.BatchNorm1d(6, affine=False, eps=1e-6).double()
    for n in (8, 8, 3):
        x = torch.randn(n, 6) * 3 + 2
        assert torch.allclose(norm.train(x, ONE), theirs(x.double()).float(), atol=1e-5)
    assert torch.allclose(norm.mean, theirs.running_mean, rtol=1e-12)
    assert torch.allclose(norm.variance, theirs.running_var, rtol=1e-12)
    before = norm.mean.clone()
    assert norm.train(torch.ones(1, 6), ONE).isfinite().all()  # one image has no variance
    assert torch.equal(norm.mean, before)
    weight, bias = torch.randn(4, 6), torch.randn(4)
    folded = norm.fold(weight, bias)
    x = torch.randn(5, 6) * 3 + 2
    assert torch.allclose(torch.nn.functional.linear(x, *folded), norm(x) @ weight.T + bias, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2])
def test_a_step_of_heads_reads_nothing(size):
    """On a GPU it would have to be waited for."""

    class Alone(World):
        def sum(self, x):
            return x

    world = Alone(0, size, ONE.device)
    specs = [HeadSpec("linear", 0.1, 0.0), HeadSpec("bn-linear", 0.1, 0.0)]
    heads = Heads(specs, width=6, classes=3, seed=0, momentum=0.9, world=world)
    with Reads() as reads:
        heads.step(torch.randn(4, 6), torch.tensor([0, 1, 2, 0]), lr_factor=1.0)
    assert not reads.found


def test_files_are_the_references(run, pretrained, images, capsys):
    saved = torch.load(run / "model_best.pth.tar", weights_only=True)
    assert list(saved)[:5] == ["epoch", "arch", "state_dict", "best_acc1", "optimizer"]
    before = torch.load(pretrained, weights_only=True)["state_dict"]
    keys = [k.removeprefix("module.base_encoder.") for k in before if ".base_encoder." in k and ".fc." not in k]
    assert list(saved["state_dict"]) == [f"module.{k}" for k in keys] + ["module.fc.weight", "module.fc.bias"]
    # the backbone did not change by one byte
    assert all(torch.equal(saved["state_dict"][f"module.{k}"], before[f"module.base_encoder.{k}"]) for k in keys)
    result = json.loads((run / "lincls.json").read_text())
    assert saved["best_acc1"] == result["best"]["best_acc1"] == max(h["best_acc1"] for h in result["heads"])
    torch.optim.SGD(torch.nn.Linear(256, 4).parameters(), 0.1, momentum=0.9).load_state_dict(saved["optimizer"])
    # what model_best says is what it does, a folded batch norm included
    capsys.readouterr()
    assert main(["lincls", str(images), "-e", "--resume", str(run / "model_best.pth.tar"), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f" * Acc@1 {saved['best_acc1']:.3f} Acc@5 100.000")


def reference_file(run, path, **changes):
    """A file as the reference writes it: no entry of ours, ``best_acc1`` a tensor."""
    saved = torch.load(run / "checkpoint.pth.tar", weights_only=True)
    own = {k: v for k, v in saved.items() if k != "mocov3"}
    torch.save({**own, "best_acc1": torch.tensor(saved["best_acc1"]), **changes}, path)
    return path


def test_a_file_of_the_reference(images, pretrained, run, tmp_path, capsys):
    lincls(images, pretrained, tmp_path / "one", "--lr", "0.5")
    file = reference_file(tmp_path / "one", tmp_path / "ref.pth.tar")
    common = [str(images), "--image-size", "32", "--device", "cpu", "-j", "0"]
    assert main(["lincls", "-e", "--resume", str(file), *common]) == 0
    ours = json.loads((tmp_path / "one" / "lincls.jsonl").read_text().splitlines()[-1])
    assert f" * Acc@1 {ours['acc1']:.3f}" in capsys.readouterr().out
    # it is resumed: 5 epochs done, two more
    flags = ["--epochs", "7", "-b", "16", "--seed", "3", "--lr", "0.5", "--output-dir", str(tmp_path / "on")]
    assert main(["lincls", "--resume", str(file), *common, *flags]) == 0
    lines = [json.loads(line) for line in (tmp_path / "on" / "lincls.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [5, 6]
    assert "one --lr" in refused("lincls", "--resume", file, *common, *flags[:-1], tmp_path / "no", "--lr", "1,2")
    bad = reference_file(tmp_path / "one", tmp_path / "bad.pth.tar", optimizer={})
    assert "optimizer" in refused("lincls", "--resume", bad, *common, *flags)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX process groups")
def test_killed_and_resumed_is_never_killed(images, pretrained, tmp_path):
    def command(workers):
        def argv(folder):
            return [
                sys.executable,
                "-m",
                "mocov3",
                "lincls",
                str(images),
                *FLAGS,
                "-j",
                workers,
                "--epochs",
                "20",
                "--pretrained",
                str(pretrained),
                "--lr",
                "0.1,3",
                "--head",
                "linear,bn-linear",
                "-b",
                "24",
                "--checkpoint-steps",
                "2",
                "--output-dir",
                str(folder),
                "--resume",
                "auto",
                "--quiet",
            ]

        return argv

    report = kill_until_done(
        [command("0"), command("1")],
        tmp_path / "killed",
        kills=3,
        rng=random.Random(5),
        metrics="lincls.jsonl",
        within=0.25,
    )
    assert report.kills >= 2
    Process(command("0")(tmp_path / "whole")).finish()
    for last in ("checkpoint.pth.tar", "model_best.pth.tar"):
        assert_same_run(tmp_path / "whole", tmp_path / "killed", last=last, metrics="lincls.jsonl")


def test_stops_and_goes_on_in_mid_epoch(images, pretrained, run, tmp_path):
    flags = ["--lr", "0.1,1,30", "--head", "linear,bn-linear", "--wd", "1e-3"]
    saved = lincls(images, pretrained, tmp_path, *flags, "--max-steps", 6)
    assert (saved["epoch"], saved["mocov3"]["iteration"], saved["mocov3"]["step"]) == (1, 2, 6)
    lincls(images, pretrained, tmp_path, *flags, "--resume", "auto")
    assert_same_run(run, tmp_path, last="checkpoint.pth.tar", metrics="lincls.jsonl")
    # other flags are refused by name
    where = ["lincls", images, *FLAGS, "--pretrained", pretrained, "--output-dir", tmp_path, "--resume", "auto"]
    error = refused(*where, *flags, "--crop-min", 0.5)
    assert "crop_min (0.08 → 0.5)" in error
    assert "lr (" in refused(*where, "--lr", "0.1,1", *flags[2:])


def test_two_ranks_are_one(images, pretrained, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(images, data)
    (data / "val" / "class0" / "00.jpg").unlink()  # 15 validation images, and batches of 24: nothing divides
    flags = ["--lr", "0.1,3", "--head", "linear,bn-linear", "-b", "24", "--epochs", "3"]
    one = lincls(data, pretrained, tmp_path / "1", *flags)
    two = lincls(data, pretrained, tmp_path / "2", *flags, "--nprocs-per-node", "2")
    a, b = ([json.loads(x) for x in (tmp_path / n / "lincls.jsonl").read_text().splitlines()] for n in "12")
    for x, y in zip(a, b, strict=True):
        assert x["acc1"] == y["acc1"]
        assert x["train_acc1"] == y["train_acc1"]
        assert x["train_loss"] == pytest.approx(y["train_loss"], rel=1e-5)
    for x, y in zip(one["mocov3"]["state"]["weights"], two["mocov3"]["state"]["weights"], strict=True):
        assert (x - y).norm() <= 1e-4 * x.norm()
    # the same in float64, part batches of a rank empty
    for n in (1, 2):
        assert launch_ranks(rank_tasks.heads, tmp_path / f"heads{n}", n) == 0
    x, y = (torch.load(tmp_path / f"heads{n}") for n in (1, 2))
    for name in ("weights", "biases", "norm", "findings"):
        assert all((p - q).norm() <= 1e-9 * p.norm() for p, q in zip(x[name], y[name], strict=True))


def test_correct_at_is_exact():
    torch.manual_seed(0)
    scores, target = torch.randn(500, 7), torch.randint(7, (500,))
    got = correct_at(scores, target, (1, 3, 5, 9)).tolist()
    assert got[:3] == [round(500 * top_k_accuracy_score(target, scores, k=k, labels=range(7))) for k in (1, 3, 5)]
    assert got[3] == 500
    ties = torch.zeros(7, 7)
    assert correct_at(ties, torch.arange(7), (1, 2, 7)).tolist() == [1, 2, 7]
    broken = torch.full((3, 7), torch.nan)
    assert correct_at(broken, torch.arange(3), (1, 5)).tolist() == [0, 0]


def test_lbfgs_is_scikit_learns(images, pretrained, tmp_path, capsys):
    rng = np.random.Generator(np.random.PCG64(0))
    x, y = rng.standard_normal((300, 8)), rng.integers(0, 3, 300)
    x[y == 1] += 1
    weight, bias = fit(torch.from_numpy(x), torch.from_numpy(y), 3, 0.01, ONE)
    theirs = LogisticRegression(C=1 / (300 * 0.01), tol=1e-10, max_iter=5000).fit(x, y)
    p = torch.softmax(torch.from_numpy(x) @ weight.T + bias, 1).numpy()
    assert np.abs(p - theirs.predict_proba(x)).max() < 1e-4
    flags = ["--cache-features", "--solver", "lbfgs", "--wd", "1e-4,1e-2", "--head", "linear,bn-linear"]
    saved = lincls(images, pretrained, tmp_path / "lbfgs", *flags)
    assert "not the published protocol" in saved["mocov3"]["protocol"]
    assert len(saved["mocov3"]["heads"]) == 4
    assert saved["best_acc1"] > 50
    saved = lincls(images, pretrained, tmp_path / "sgd", "--cache-features", "--lr", "1,10")
    assert "not the published protocol" in capsys.readouterr().out.splitlines()[-1]
    assert "not the published protocol" in json.loads((tmp_path / "sgd" / "lincls.json").read_text())["protocol"]
    assert saved["mocov3"]["step"] == 20


def test_table_and_edges():
    results = [HeadResult("linear", lr, 0.0, best_acc1=acc, best_epoch=2) for lr, acc in ((0.1, 60), (1, 70), (10, 65))]
    lines = table(results).splitlines()
    assert [line.split()[-4] for line in lines[1:]] == ["70.000", "65.000", "60.000"]
    assert lines[1].startswith("* linear")
    assert best_of(results) == 1
    assert edges(results) == []
    results[2].best_acc1 = 90
    assert "largest --lr" in edges(results)[0]
    results[0].best_acc1 = 95
    assert "smallest --lr" in edges(results)[0]


def test_the_script_door(images, pretrained, tmp_path, run_program):
    flags = [
        "-a",
        ARCH,
        "--lr",
        "3",
        "--pretrained",
        pretrained,
        "-b",
        "16",
        "--epochs",
        "2",
        "-p",
        "2",
        "-j",
        "0",
        "--seed",
        "1",
        "--image-size",
        "32",
        "--device",
        "cpu",
    ]
    done = run_program(*flags, images, cwd=tmp_path, script="main_lincls.py")
    number, average = r"\s*[\d.e+-]+", r"\(\s*[\d.e+-]+\)"
    meters = "\t".join(f"{name}{number} {average}" for name in ("Time", "Data", "Loss", "Acc@1", "Acc@5"))
    lines = [line for line in done.stdout.splitlines() if line.startswith("Epoch: [")]
    assert len(lines) == 4
    for i, line in enumerate(lines):
        assert re.fullmatch(rf"Epoch: \[{i // 2}\]\[{i % 2 * 2}/4\]\t" + meters, line), line
    assert len(re.findall(r"^ \* Acc@1 \d+\.\d{3} Acc@5 100\.000$", done.stdout, re.M)) == 2
    assert re.search(r"^Test: \[0/1\]\tTime", done.stdout, re.M)
    assert {"checkpoint.pth.tar", "model_best.pth.tar"} <= {p.name for p in tmp_path.iterdir()}


def test_other_backbones(images, tmp_path):
    for arch in ("vit_tiny", "timm/resnet10t"):
        write_pretrained(tmp_path / "c.pth.tar", arch)
        folder = tmp_path / arch.replace("/", "-")
        saved = lincls(images, tmp_path / "c.pth.tar", folder, "--epochs", "1", "--encoder", "momentum")
        assert saved["arch"] == arch
        assert main(["lincls", "-e", "--resume", str(folder / "model_best.pth.tar"), str(images)]) == 0
    # the baseline: pixels
    flags = ["-a", "pixels", "--image-size", "16", "--epochs", "1", "--output-dir", str(tmp_path / "pixels")]
    assert main(["lincls", str(images), *FLAGS, *flags]) == 0


def test_verify(images, run, capsys, monkeypatch):
    file, val = str(run / "model_best.pth.tar"), str(images / "val")
    assert main(["verify", file, val, "--device", "cpu"]) == 0
    assert "no figure" in capsys.readouterr().out
    best = torch.load(file, weights_only=True)["best_acc1"]
    monkeypatch.setattr("mocov3.evaluation.linear.scores._IMAGENET", 4)
    for figure, code, word in ((best + 0.1, 0, "agrees"), (best - 1, 1, "differs: +1.000")):
        monkeypatch.setattr("mocov3.evaluation.linear.scores.PUBLISHED", {ARCH: {1: figure}})
        assert main(["verify", file, str(images), "--device", "cpu"]) == code
        assert word in capsys.readouterr().out


def test_training_view_and_epochs(images):
    source = scan(images / "train")
    view, data = CropView(24, crop_min=0.2), source.read(5)
    first = view(data, seed=1, epoch=2, index=5)[0]
    assert first.shape == (24, 24, 3)
    assert np.array_equal(first, view(data, seed=1, epoch=2, index=5)[0])
    assert not np.array_equal(first, view(data, seed=1, epoch=3, index=5)[0])
    # a crop of the whole image is its resize by Pillow, turned or not
    whole = np.asarray(decode(data).resize((24, 24), Image.Resampling.BILINEAR))
    square = Image.fromarray(whole)
    made = [CropView(24, crop_min=1.0)(np.asarray(square), seed=0, epoch=0, index=i)[0] for i in range(20)]
    near = lambda a, b: np.abs(a.astype(int) - b).max() <= 1
    turned = [near(m, whole[:, ::-1]) for m in made]
    assert 3 <= sum(turned) <= 17
    assert all(t or near(m, whole) for t, m in zip(turned, made, strict=True))
    # every image once an epoch, whatever the ranks; the global batches are the same
    plans = {n: [list(plan_all(10, seed=4, batch_size=4, rank=r, ranks=n, epochs=2)) for r in range(n)] for n in (1, 3)}
    for i in range(6):
        parts = [plan[i].indices for plan in plans[3]]
        assert np.array_equal(np.concatenate(parts), plans[1][0][i].indices)
    assert sorted(np.concatenate([w.indices for w in plans[1][0][:3]])) == list(range(10))
    assert [w.iteration for w in plan_all(10, seed=4, batch_size=4, rank=0, ranks=1, start=(1, 2), epochs=2)] == [2]


def test_unreadable_images_are_left_out(images, pretrained, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(images, data)
    (data / "train" / "class0" / "cut.jpg").write_bytes((data / "train" / "class0" / "00.jpg").read_bytes()[:300])
    (data / "val" / "class1" / "text.png").write_text("no image")
    lincls(data, pretrained, tmp_path / "run", "--epochs", "2")
    result = json.loads((tmp_path / "run" / "lincls.json").read_text())
    assert result["unreadable"] == {"train": 1, "val": 1}
    assert "text.png" in capsys.readouterr().err
    assert (result["best"]["acc1"] * 16 / 100) % 1 == 0  # of the 16 that can be read


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-a", "resnet18"], f"give -a {ARCH}"),
        (["-a", "resnet51"], "resnet50"),
        (["--lr", "0.1,x"], "comma list"),
        (["--lr", "1,1"], "twice"),
        (["--lr", "-1"], "--lr"),
        (["--wd", "nan"], "--wd"),
        (["--head", "mlp"], "bn-linear"),
        (["--solver", "lbfgs"], "--cache-features"),
        (["--epochs", "0"], "--epochs"),
        (["-e"], "--resume"),
        (["--resume", "missing.pth.tar"], "no such file"),
        (["--pretrained", "missing.pth.tar"], "no such file"),
        (["--recipe", "lincls_vi"], "lincls_vit"),
        (["--crop-min", "2"], "must be 0 to 1"),
        (["--seed", "-1"], "--seed"),
    ],
)
def test_bad_values(flags, message, images, pretrained, tmp_path):
    assert message in refused("lincls", images, *FLAGS, "--pretrained", pretrained, "--output-dir", tmp_path, *flags)


def test_bad_files_and_data(images, pretrained, run, tmp_path):
    go = ["lincls", *FLAGS, "--output-dir", tmp_path / "out"]
    assert "not a linear file" in refused(*go, images, "--resume", pretrained)
    empty = tmp_path / "empty.pth.tar"
    torch.save({"epoch": 1, "arch": ARCH, "state_dict": {}}, empty)
    assert "no weights" in refused(*go, images, "--pretrained", empty)
    assert "no linear classifier" in refused(*go, images, "-e", "--resume", empty)
    whole = torch.load(pretrained, weights_only=True)["state_dict"]
    bare = {k.removeprefix("module.base_encoder."): v for k, v in whole.items() if "base_encoder" in k}
    torch.save({"model": bare}, empty)
    assert f"-a {ARCH} fits it" in refused(*go, images, "--pretrained", empty)
    assert f"-a {ARCH} fits it" in refused(*go, images, "--pretrained", empty, "-a", "resnet10")
    assert "no backbone" in refused(*go, images)
    few = tmp_path / "few"
    shutil.copytree(images, few)
    shutil.rmtree(few / "val" / "class3")
    shutil.move(few / "train" / "class3", few / "val" / "class3")
    assert "training lacks, first 'class3'" in refused(*go, few, "--pretrained", pretrained)
    shutil.rmtree(few / "val" / "class3")
    assert "4 classes" in refused(*go, few, "--resume", run / "checkpoint.pth.tar", "--allow-config-change")
    for path in (few / "val").rglob("*.*"):
        path.unlink()
    assert "holds no image" in refused(*go, few, "--pretrained", pretrained)
    assert "class0/val" in refused(*go, images / "train" / "class0", "--pretrained", pretrained)
    assert "former linear evaluation" in refused(
        "lincls", images, *FLAGS, "--pretrained", pretrained, "--output-dir", run
    )
    other = tmp_path / "other.pth.tar"
    write_pretrained(other, view_preset="gray")
    state = torch.load(other, weights_only=True)
    state["state_dict"]["module.base_encoder.conv1.weight"][:] += 1
    torch.save(state, other)
    assert "another backbone" in refused(
        *go, images, "--pretrained", other, "--resume", run / "checkpoint.pth.tar", "--allow-config-change"
    )
    state["state_dict"]["module.base_encoder.conv1.weight"][:] = torch.nan
    torch.save(state, other)
    assert "class0" in refused(*go, images, "--pretrained", other, "--cache-features")
    assert "not finite for class" in refused(*go, images, "--pretrained", other)


def test_heads_that_diverge_leave_the_others_alone():
    x, y = torch.randn(32, 8), torch.randint(3, (32,))
    specs = [HeadSpec("linear", 0.1, 0.0), HeadSpec("linear", 3e38, 0.0)]
    both = Heads(specs, width=8, classes=3, seed=0, momentum=0.9, world=ONE)
    alone = Heads(specs[:1], width=8, classes=3, seed=0, momentum=0.9, world=ONE)
    for _ in range(5):
        both.step(x, y, lr_factor=1.0)
        alone.step(x, y, lr_factor=1.0)
    assert not both.weights[1].isfinite().all()
    assert both.evaluate(x, y)[1, 1] == 0
    assert torch.equal(both.weights[0], alone.weights[0])


def test_labelled_sets_of_the_built_in_data():
    train, val = open_labelled("fashion-mnist")
    assert (len(train), len(val), train.classes) == (8000, 2000, val.classes)
