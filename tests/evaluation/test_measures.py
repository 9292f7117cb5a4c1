"""Measures beside accuracy: scikit-learn's on random cases with ties and missing labels; several findings an image."""

import json
import re

import numpy as np
import pytest
import torch
from doors import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn import metrics

from mocov3.cli import main
from mocov3.data.sources.findings import with_findings
from mocov3.data.sources.opening import open_source
from mocov3.errors import UserError
from mocov3.evaluation import measures
from mocov3.evaluation.neighbours import nearest, shares, vote


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


def test_knn_of_findings(scans, capfd):
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
    monkeypatch.setattr(measures, "find_spec", lambda name: None)
    assert "--measures needs scikit-learn: pip install" in refused(
        "knn", images, "--model", "pixels", "--measures", "--device", "cpu"
    )
