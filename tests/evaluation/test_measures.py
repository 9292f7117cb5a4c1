"""Measures beside accuracy: scikit-learn's on random cases with ties and missing labels; several findings an image."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from doors import refused
from evaluating import write_pretrained
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn import metrics
from sklearn.linear_model import LogisticRegression

from mocov3.cli import main
from mocov3.data.sources.findings import with_findings
from mocov3.data.sources.opening import open_source
from mocov3.distributed import World
from mocov3.errors import UserError
from mocov3.evaluation import measures
from mocov3.evaluation.answers import Answers, answered
from mocov3.evaluation.linear.lbfgs import fit
from mocov3.evaluation.neighbours import nearest, shares, vote
from mocov3.evaluation.paired import findings_against_start
from mocov3.losses import answers_loss


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(8, 60))
def test_measures_of_classes_are_scikit_learns(seed, classes, images):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, images)
    scores = rng.integers(0, 4, (images, classes)) / 4  # ties
    found = measures.of_classes(scores, labels)
    answers = scores.argmax(1)
    present = np.unique(labels)
    recalls = [metrics.recall_score(labels == c, answers == c) for c in present]
    assert found["balanced_accuracy"] == pytest.approx(100 * np.mean(recalls))
    assert found["macro_f1"] == pytest.approx(100 * metrics.f1_score(labels, answers, average="macro"))
    assert found["confusion"] == metrics.confusion_matrix(labels, answers, labels=range(classes)).tolist()
    judged = [1] if classes == 2 else [c for c in present if 0 < (labels == c).sum() < images]
    for name, theirs in (("auroc", metrics.roc_auc_score), ("average_precision", metrics.average_precision_score)):
        values = [theirs(labels == c, scores[:, c]) for c in judged if 0 < (labels == c).sum() < images]
        assert found[name] == (pytest.approx(100 * np.mean(values)) if values else None)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(4, 60))
def test_measures_of_findings_leave_out_what_is_missing(seed, findings, images):
    rng = np.random.default_rng(seed)
    truth = rng.integers(-1, 2, (images, findings))
    scores = rng.integers(0, 5, (images, findings)) / 5
    names = [f"f{i}" for i in range(findings)]
    found = measures.of_findings(scores, truth, names)
    own = []
    for i, name in enumerate(names):
        known = truth[:, i] >= 0
        line, positive = found["findings"][name], truth[known, i]
        assert (line["known"], line["positive"]) == (known.sum(), positive.sum())
        if len(np.unique(positive)) == 2:
            own.append(metrics.roc_auc_score(positive, scores[known, i]))
            assert line["auroc"] == pytest.approx(100 * own[-1])
        else:
            assert line["auroc"] is line["average_precision"] is None
    assert found["auroc"] == (pytest.approx(100 * np.mean(own)) if own else None)


def test_intervals_come_from_whole_groups(monkeypatch):
    monkeypatch.setattr(measures, "_DRAWS", 60)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 80)
    scores = rng.random((80, 2)) + 0.4 * np.eye(2)[labels]
    alone = measures.of_classes(scores, labels, np.arange(80))
    copies = measures.of_classes(scores.repeat(4, 0), labels.repeat(4), np.arange(80).repeat(4))
    single = measures.of_classes(scores.repeat(4, 0), labels.repeat(4), np.arange(320))
    for name in ("auroc", "balanced_accuracy", "macro_f1"):
        low, high = alone[f"{name}_interval"]
        assert low < alone[name] < high
        assert copies[f"{name}_interval"] == pytest.approx([low, high])
        assert high - low > 1.5 * np.diff(single[f"{name}_interval"])[0]


def test_shares_of_the_vote():
    rng = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(50, 8, generator=rng), torch.randn(20, 8, generator=rng)
    labels = torch.randint(0, 3, (50,), generator=rng)
    found = nearest(bank, queries, 9)
    one_hot = torch.nn.functional.one_hot(labels, 3)
    got = shares(found, one_hot, 7, 0.1)
    assert torch.equal(got.argmax(1), vote(found, labels, [7], [0.1], classes=3)[7, 0.1])
    torch.testing.assert_close(got.sum(1), torch.ones(20, dtype=torch.float64))
    # unknown findings do not vote; where none is known, the share in the bank stands
    truth = torch.where(torch.rand(50, 3, generator=rng) < 0.4, -1, one_hot)
    got = shares(found, truth, 7, 0.1)
    for q in range(20):
        rows, weight = found.index[q, :7], (found.similarity[q, :7] / 0.1).exp()
        for c in range(3):
            known = truth[rows, c] >= 0
            of_bank = truth[:, c][truth[:, c] >= 0].double().mean()
            wanted = (weight * (truth[rows, c] == 1))[known].sum() / weight[known].sum() if known.any() else of_bank
            assert float(got[q, c]) == pytest.approx(float(wanted))


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Images whose brightness shows one finding, whose colour shows another; a third is rare; some are not known."""
    root, rng = tmp_path_factory.mktemp("scans"), np.random.default_rng(0)
    rows = ["patient,image,bright,red,rare,age"]
    for number in range(72):
        bright, red = rng.integers(0, 2, 2).tolist()
        pixels = rng.integers(0, 60, (16, 16, 3)) + 90 * bright
        pixels[..., 0] += 80 * red
        part = "train" if number < 48 else "val"
        path = root / "data" / part / "scans" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
        cells = [str(bright), str(red), str(int(number % 9 == 0))]
        cells = [("", "-1", "nan")[i] if rng.random() < 0.15 else cell for i, cell in enumerate(cells)]
        rows.append(",".join([f"p{number // 3}", path.stem, *cells, "61"]))
    (root / "findings.csv").write_text("\n".join([*rows, "p99,999,1,1,0,70"]))
    return root


def read(root):
    """Findings by the test's own reading: name → values."""
    table = {}
    for line in (root / "findings.csv").read_text().splitlines()[1:]:
        _, name, *cells, _ = line.split(",")
        table[name] = [int(c) if c in ("0", "1") else -1 for c in cells]
    return table


def test_a_table_of_findings(scans, tmp_path):
    data, table = str(scans / "data"), read(scans)
    parts = [open_source(data, part) for part in ("train", "val")]
    found = with_findings(str(scans / "findings.csv"), parts)
    for part, whole in zip(found, parts, strict=True):
        assert part.classes == ["bright", "red", "rare"], "age is no finding, nor is the patient"
        known = [i for i in range(len(whole)) if max(table[whole.name(i)[-7:-4]]) >= 0]
        assert [part.name(i) for i in range(len(part))] == [whole.name(i) for i in known]
        assert part.labels.tolist() == [table[part.name(i)[-7:-4]] for i in range(len(part))]
    two = with_findings(f"{scans / 'findings.csv'}:red,bright", parts[:1])[0]
    assert two.classes == ["red", "bright"]
    assert two.digest != found[0].digest
    text = (scans / "findings.csv").read_text()
    for wrong, said in (
        (text.replace("p1,003,", "p1,003,2,").replace(",61", "", 1), "line 5, column bright: holds 2"),
        (text + "\np0,000,0,0,1,61\np0,000,1,0,1,61", "differ on one image"),
    ):
        (tmp_path / "wrong.csv").write_text(wrong)
        with pytest.raises(UserError, match=re.escape(said)):
            with_findings(f"{tmp_path / 'wrong.csv'}:bright,red,rare", parts)


def knn(capfd, *argv):
    capfd.readouterr()
    flags = ["--model", "pixels", "--image-size", "16", "-k", "5", "--device", "cpu", "-j", "0"]
    assert main(["knn", *map(str, argv), *flags]) == 0
    return capfd.readouterr().out


def test_knn_of_findings(scans, capfd, monkeypatch):
    monkeypatch.setattr(measures, "_DRAWS", 20)
    labels = ["--labels", scans / "findings.csv"]
    result = json.loads(knn(capfd, scans / "data", *labels, "--json"))
    assert (result["leave_one_out"], result["findings"], result["queries"]) == (False, 3, 24)
    found = result["measures"]["findings"]
    assert found["bright"]["auroc"] > 95 < found["red"]["auroc"]
    assert result["auroc"][0]["auroc"] == pytest.approx(np.mean([one["auroc"] for one in found.values()]))
    # groups; a bank that asks itself; text
    alone = json.loads(knn(capfd, scans / "data" / "train", *labels, "--group-by", f"{labels[1]}:patient", "--json"))
    assert (alone["leave_one_out"], alone["groups"]) == (True, 16)
    low, high = alone["auroc"][0]["interval"]
    assert low < alone["auroc"][0]["auroc"] < high
    text = knn(capfd, scans / "data", *labels)
    assert "mean AUROC in %" in text
    assert re.search(r"bright +\d+\.\d+ +\d+\.\d+ +\d+ +\d+", text)


def test_measures_of_knn(images, capfd, monkeypatch):
    result = json.loads(knn(capfd, images, "--measures", "--json"))
    table = np.array(result["measures"]["confusion"])
    assert table.sum() == 16
    assert 100 * table.trace() / 16 == pytest.approx(result["accuracy"][0]["accuracy"])
    recalls = table.diagonal() / table.sum(1)
    assert result["measures"]["balanced_accuracy"] == pytest.approx(100 * recalls.mean())
    text = knn(capfd, images, "--measures")
    assert "macro-F1" in text
    assert "measures" not in json.loads(knn(capfd, images, "--json"))
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    assert "--measures needs scikit-learn: pip install" in refused(
        "knn", images, "--model", "pixels", "--measures", "--device", "cpu"
    )


def test_the_loss_of_findings_leaves_out_what_is_missing():
    scores, truth = torch.randn(30, 4, dtype=torch.float64), torch.randint(-1, 2, (30, 4))
    known = truth >= 0
    wanted = torch.nn.functional.binary_cross_entropy(scores.sigmoid()[known], truth[known].double(), reduction="sum")
    assert float(answers_loss(scores, truth)) == pytest.approx(float(wanted) / 4)
    changed = torch.where(known, scores, torch.randn_like(scores))
    assert float(answers_loss(changed, truth)) == pytest.approx(float(wanted) / 4)


def test_regression_of_findings_is_scikit_learns():
    rng = np.random.default_rng(0)
    x, truth = rng.standard_normal((60, 5)), rng.integers(-1, 2, (60, 2))
    decay, one = 0.01, World(0, 1, torch.device("cpu"))
    weight, bias = fit(torch.from_numpy(x), torch.from_numpy(truth), 2, decay, one)
    for i in range(2):
        known = truth[:, i] >= 0
        # the mean is over 60 images and 2 findings, the decay of each finding's row
        theirs = LogisticRegression(C=1 / (60 * 2 * decay), tol=1e-10).fit(x[known], truth[known, i])
        assert np.abs(weight[i].numpy() - theirs.coef_[0]).max() < 1e-4
        assert abs(float(bias[i]) - theirs.intercept_[0]) < 1e-4


def test_linear_evaluation_of_findings(scans, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measures, "_DRAWS", 20)
    labels = ["--labels", str(scans / "findings.csv"), "--group-by", f"{scans / 'findings.csv'}:patient"]
    shared = ["--image-size", "16", "--device", "cpu", "-j", "0", "--output-dir", str(tmp_path)]
    fast = ["--cache-features", "--epochs", "2", "-b", "16", "--lr", "0.1,1", "--seed", "0"]
    assert main(["lincls", str(scans / "data"), "-a", "resnet10_w32", *shared, *fast, *labels]) == 0
    out = capsys.readouterr().out
    assert "best AUROC" in out
    assert re.search(r"rare +\d+\.\d+", out)
    lines = [json.loads(line) for line in (tmp_path / "lincls.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    assert "acc1" not in lines[0]
    result = json.loads((tmp_path / "lincls.json").read_text())
    assert result["best"]["auroc"] == pytest.approx(result["measures"]["auroc"])
    assert result["measures"]["auroc_interval"][0] < result["measures"]["auroc"]
    # what was written is evaluated to the same; without the findings it is refused
    again = ["lincls", str(scans / "data"), "-e", "--resume", str(tmp_path / "checkpoint.pth.tar"), *shared]
    assert main([*again, *labels, "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["measures"]["findings"] == result["measures"]["findings"]
    assert "was trained on findings: give --labels CSV" in refused(*again)
    assert "says nothing of" in refused(
        "lincls", scans / "data", "-a", "pixels", "--output-dir", tmp_path / "x", *only_train(scans, tmp_path)
    )


def only_train(scans, tmp_path):
    """A file that says nothing of the validation images."""
    text = (scans / "findings.csv").read_text().splitlines()
    (tmp_path / "some.csv").write_text("\n".join(text[:49]))
    return ["--labels", tmp_path / "some.csv"]


def test_fine_tuning_on_findings(scans, tmp_path, capsys):
    labels = ["--labels", str(scans / "findings.csv:bright,red")]
    data = ["--data-set", "folder", "--data-path", str(scans / "data"), "--device", "cpu", "-j", "0"]
    small = ["-a", "resnet10_w32", "--small-stem", "--input-size", "16", "-b", "12", "--aa", "none", "--reprob", "0"]
    short = ["--epochs", "4", "--warmup-epochs", "0", "--lr", "0.1", "--color-jitter", "0", "--fraction", "0.9"]
    assert main(["finetune", *data, *labels, *small, *short, "--output-dir", str(tmp_path), "--logger", "none"]) == 0
    out = capsys.readouterr().out
    assert "--mixup, --cutmix and --smoothing are not applied" in out
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    areas = [line["auroc"] for line in lines if line["auroc"] is not None]
    assert len(areas) == 4
    assert max(areas) > 70, "brightness and colour are easily told"
    last = ["--eval", "--resume", str(tmp_path / "checkpoint.pth"), "--measures", "--json"]
    assert main(["finetune", *data, *labels, *last]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])["measures"]
    assert told["auroc"] == pytest.approx(areas[-1], abs=1e-3)
    assert set(told["findings"]) == {"bright", "red"}


def test_measures_of_classifiers(images, tmp_path, capsys):
    flags = ["--device", "cpu", "-j", "0", "--output-dir", str(tmp_path)]
    fast = ["--cache-features", "--epochs", "1", "--lr", "1", "--image-size", "16", "--seed", "0"]
    assert main(["lincls", str(images), "-a", "pixels", *flags, *fast, "--measures"]) == 0
    result = json.loads((tmp_path / "lincls.json").read_text())
    table = np.array(result["measures"]["confusion"])
    assert 100 * table.trace() / table.sum() == pytest.approx(result["best"]["acc1"])
    assert "balanced accuracy" in capsys.readouterr().out


def compare(capsys, *argv):
    capsys.readouterr()
    assert main(["compare", *map(str, argv), "--device", "cpu", "-j", "0"]) == 0
    return capsys.readouterr().out


def test_compare_by_findings(scans, tmp_path, capsys, monkeypatch):
    from mocov3.evaluation import answers

    monkeypatch.setattr(measures, "_DRAWS", 20)
    monkeypatch.setattr(answers, "_DRAWS", 50)
    write_pretrained(tmp_path / "start.pth.tar")
    write_pretrained(tmp_path / "run.pth.tar", init=str(tmp_path / "start.pth.tar"))
    table = scans / "findings.csv"
    files = [tmp_path / "run.pth.tar", scans / "data" / "train"]
    argv = [*files, "--labels", table, "--group-by", f"{table}:patient"]
    rows = {row["kind"]: row for row in map(json.loads, compare(capsys, *argv, "--json").splitlines())}
    pixels = rows["pixels"]
    assert pixels["measures"]["findings"]["bright"]["auroc"] > 95
    assert pixels["auroc_low"] < pixels["auroc"] < pixels["auroc_high"]
    assert (pixels["labelled_groups"], set(pixels["measures"]["findings"])) == (16, {"bright", "red", "rare"})
    change = rows["checkpoint"]["against_start"]
    assert change["drop"] == change["least"] == change["most"] == 0  # the same weights
    text = compare(capsys, *argv)
    assert "AUROC % (95 %)" in text
    assert "not told apart" in text


def test_a_change_of_auroc_is_bounded_by_resampling(monkeypatch):
    monkeypatch.setattr("mocov3.evaluation.answers._DRAWS", 60)
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, (200, 2))
    good, bad = truth + rng.normal(0, 0.5, truth.shape), truth + rng.normal(0, 1.5, truth.shape)
    first, second = (Answers(truth, scores, None, ["a", "b"], np.empty(0)) for scores in (good, bad))
    change = second.against(first)
    assert 0 < change["least"] < change["drop"] < change["most"]
    assert change["drop"] == pytest.approx(change["auroc_before"] - change["auroc"])
    assert "worse: keep your weights" in findings_against_start("net", change)
    assert "better" in findings_against_start("net", first.against(second))


def test_answers_of_classes_have_measures_too():
    x, y = torch.randn(60, 6), np.random.default_rng(0).integers(0, 3, 60)
    line = answered(x + torch.nn.functional.one_hot(torch.from_numpy(y), 6), y, ["a", "b", "c"], None).line(
        further=True
    )
    table = np.array(line["measures"]["confusion"])
    assert 100 * table.trace() / 60 == pytest.approx(line["knn"])
    with pytest.raises(UserError, match="all 60 labelled images are of one group"):
        answered(x, y, ["a", "b", "c"], np.zeros(60, np.int32))
