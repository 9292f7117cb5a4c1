"""Judging without labels: measures against closed forms and numpy, during training, and side by side."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import timm
import torch
from conftest import TINY
from doors import refused
from scipy.sparse.csgraph import minimum_spanning_tree

from mocov3 import load_backbone
from mocov3.cli import main
from mocov3.data import CentreView, open_source
from mocov3.data.views.probes import ProbeViews
from mocov3.evaluation import network_scores, quality
from mocov3.evaluation.intervals import interval, rank_correlation
from mocov3.evaluation.label_free import judge
from mocov3.evaluation.neighbours import right_among
from mocov3.pretraining import label_free_evaluation


def gaussian(*shape, seed=0):
    return torch.from_numpy(np.random.Generator(np.random.PCG64(seed)).normal(size=shape))


def orthogonal(n, d):
    return torch.linalg.qr(gaussian(n, d))[0]


def test_rankme_of_known_spectra():
    # k orthogonal directions of one size: rank k; geometric sizes: exp of their entropy
    for k in (1, 5, 20):
        assert quality.rankme(orthogonal(50, k)) == pytest.approx(k, rel=1e-4)
    sizes = 0.5 ** torch.arange(20, dtype=torch.float64)
    p = (sizes / sizes.sum()).numpy()
    assert quality.rankme(orthogonal(50, 20) * sizes) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-4)


def test_alpha_of_power_laws():
    for alpha in (0.5, 1.0, 2.3):
        u = orthogonal(400, 120)
        u = torch.linalg.qr(u - u.mean(0))[0]  # centred, so that the covariance has this very spectrum
        rank = torch.arange(1, 121, dtype=torch.float64)
        assert quality.alpha_req(u * rank ** (-alpha / 2)) == pytest.approx(alpha, abs=0.02)
    assert math.isnan(quality.alpha_req(torch.ones(10, 5)))


def test_lidar_is_the_discriminant_of_numpy():
    x = gaussian(40, 6, 8) * 0.3 + gaussian(40, 1, 8, seed=1) * torch.linspace(0.2, 2, 8, dtype=torch.float64)
    views = x.numpy()
    means = views.mean(1)
    b = np.einsum("ni,nj->ij", means - means.mean(0), means - means.mean(0)) / len(means)
    w = views - means[:, None]
    w = np.einsum("nvi,nvj->ij", w, w) / (40 * 6) + 1e-4 * np.eye(8)
    values, vectors = np.linalg.eigh(w)
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    p = np.linalg.eigvalsh(root @ b @ root)
    p = p / p.sum() + 1e-7
    assert quality.lidar(x) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-9)


def test_alignment_and_uniformity_of_known_points():
    x = torch.eye(4, dtype=torch.float64)
    assert quality.alignment(x, 3 * x) == pytest.approx(0)
    assert quality.alignment(x, -x) == pytest.approx(4)
    assert quality.alignment(x, x.roll(1, 0)) == pytest.approx(2)
    assert quality.uniformity(x) == pytest.approx(-4)  # every squared distance is 2
    assert quality.uniformity(torch.ones(5, 3)) == pytest.approx(0)
    many = gaussian(1500, 6)
    unit = (many / many.norm(dim=1, keepdim=True)).numpy()
    d = ((unit[:, None] - unit[None]) ** 2).sum(2)[np.triu_indices(1500, 1)]
    assert quality.uniformity(many) == pytest.approx(np.log(np.exp(-2 * d).mean()), rel=1e-9)


def test_the_dimension_of_trees_is_that_of_the_points():
    rng = np.random.Generator(np.random.PCG64(0))
    turn = np.linalg.qr(rng.normal(size=(16, 16)))[0]
    for dimension in (1, 2, 5):
        points = np.zeros((1500, 16))
        points[:, :dimension] = rng.uniform(size=(1500, dimension))
        assert quality.tree_dimension(torch.from_numpy(points @ turn)) == pytest.approx(dimension, rel=0.15)
    x = gaussian(200, 6)
    squares = torch.cdist(x, x).square().numpy()
    assert quality._tree_length(squares) == pytest.approx(minimum_spanning_tree(squares**0.5).sum(), rel=1e-9)
    assert quality.tree_dimension(torch.ones(100, 3)) == 0
    assert math.isnan(quality.tree_dimension(x[:60]))


def test_retrieval_counts_the_nearest_and_no_ties():
    x = gaussian(1300, 16)
    assert quality.retrieval(x, 2 * x) == 100
    assert quality.retrieval(x, x.roll(1, 0)) == 0
    assert quality.retrieval(torch.ones(10, 4), torch.ones(10, 4)) == 0  # a collapsed network finds nothing
    noisy = x + 1.5 * gaussian(1300, 16, seed=1)
    cosine = np.corrcoef(np.r_[x.numpy(), noisy.numpy()])  # of centred rows, so compare by the plain form
    a, b = (v.numpy() / np.linalg.norm(v.numpy(), axis=1, keepdims=True) for v in (x, noisy))
    assert quality.retrieval(x, noisy) == pytest.approx(100 * ((a @ b.T).argmax(1) == np.arange(1300)).mean())
    assert cosine.shape == (2600, 2600)


def test_judge_puts_each_measure_in_its_place():
    views = gaussian(30, 4, 12).float()
    label_free = judge(views)
    assert label_free.images == 30
    assert label_free.rankme == quality.rankme(views[:, 0])
    assert label_free.lidar == quality.lidar(views[:, 1:])
    assert label_free.alignment == quality.alignment(views[:, 1], views[:, 2])


def test_probes_are_fixed_and_of_their_own_kind():
    pixels = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    probes = ProbeViews(32, 1.0)
    first, again = (probes(pixels, seed=0, index=3) for _ in range(2))
    assert len(first) == probes.count == 5
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert np.array_equal(first[0], CentreView(32, 1.0)(pixels)[0])
    assert len({v.tobytes() for v in first}) == 5
    assert not np.array_equal(probes(pixels, seed=0, index=4)[1], first[1])


def test_leave_one_out_and_intervals():
    from sklearn.neighbors import KNeighborsClassifier

    x = gaussian(60, 5)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
    unit = (x / x.norm(dim=1, keepdim=True)).numpy()
    hits = 0
    for i in range(60):
        rest = np.arange(60) != i
        weigh = lambda d: np.exp((1 - d) / 0.07)
        votes = KNeighborsClassifier(20, metric="cosine", weights=weigh, algorithm="brute")
        hits += int(votes.fit(unit[rest], y.numpy()[rest]).predict(unit[i : i + 1])[0] == y[i])
    assert int(right_among(x, y).sum()) == hits
    low, high = interval(8, 10)  # Wilson's interval as tables give it
    assert (low, high) == (pytest.approx(49.0, abs=0.1), pytest.approx(94.3, abs=0.1))
    from scipy.stats import spearmanr

    a, b = [1, 2, 2, 5, 3], [9, 1, 4, 4, 4]
    assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic)


@pytest.fixture(scope="module")
def watched(images, tmp_path_factory):
    """A run of 2 epochs with judgements each epoch, on DIR/val."""
    folder = tmp_path_factory.mktemp("watched")
    assert main(["pretrain", str(images), *TINY, "--output-dir", str(folder), "--quality-every", "1"]) == 0
    return folder


def test_judgements_of_a_run(watched, images):
    lines = [json.loads(line) for line in (watched / "quality.jsonl").read_text().splitlines()]
    assert [(line["name"], line["step"]) for line in lines] == [("start", 0), ("pixels", 0), ("epoch", 4), ("epoch", 8)]
    best = torch.load(watched / "best_unlabelled.pth.tar", weights_only=True)
    assert best["mocov3"]["step"] == 8  # the last
    assert best["mocov3"]["quality"]["retrieval"] == lines[-1]["retrieval"]
    assert best["mocov3"]["origin"] == "trained from scratch by mocov3"
    backbone = load_backbone(watched / "best_unlabelled.pth.tar")
    whole = load_backbone(watched / f"checkpoint_{best['epoch'] - 1:04d}.pth.tar")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(backbone(x), whole(x))
    # judging changes nothing: weights and statistics are those of a run without
    assert all(torch.isfinite(torch.tensor(line["rankme"])) for line in lines)


def test_judging_does_not_change_training(watched, images, tmp_path):
    assert main(["pretrain", str(images), *TINY, "--output-dir", str(tmp_path)]) == 0
    a, b = (torch.load(f / "checkpoint_0001.pth.tar", weights_only=True)["state_dict"] for f in (watched, tmp_path))
    assert all(torch.equal(v, b[k]) for k, v in a.items())


def test_a_resumed_run_judges_on(watched, images, tmp_path):
    folder = tmp_path / "run"
    flags = [*TINY, "--output-dir", str(folder), "--quality-every", "1"]
    assert main(["pretrain", str(images), *flags, "--max-steps", "6"]) == 0
    with (folder / "quality.jsonl").open("a") as file:
        file.write('{"name": "epoch", "step": 7, "retr')  # cut short by a kill
    assert main(["pretrain", str(images), *flags, "--resume", "auto"]) == 0
    assert (folder / "quality.jsonl").read_text() == (watched / "quality.jsonl").read_text()


def test_a_run_that_begins_judges_anew(watched, images, tmp_path):
    """In the folder of a try that died before its first checkpoint, and had another start."""
    other = {"name": "start", "epoch": 0, "step": 0, "retrieval": 99.0}
    lines = [other, {**other, "name": "pixels"}, {**other, "name": "epoch"}]
    (tmp_path / "quality.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["pretrain", str(images), *TINY, "--output-dir", str(tmp_path), "--quality-every", "1"]) == 0
    assert (tmp_path / "quality.jsonl").read_text() == (watched / "quality.jsonl").read_text()


def test_a_network_that_says_nothing_is_not_the_best(images, tmp_path, monkeypatch, capsys):
    """Features that collapsed, or are no numbers."""
    nothing = {"retrieval": 0.0, "rankme": 0.0}
    monkeypatch.setattr(label_free_evaluation, "judge", lambda *found: dataclasses.replace(judge(*found), **nothing))
    assert main(["pretrain", str(images), *TINY, "--output-dir", str(tmp_path), "--quality-every", "1"]) == 0
    assert not (tmp_path / "best_unlabelled.pth.tar").exists()
    assert "kept without labels" not in capsys.readouterr().out


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize(
    ("found", "kept"), [([40, 60, 31], 3), ([40, 60, 29], 2), ([60, 29, 31], 3), ([0, 0, 1], 3), ([1, 60, 20], 2)]
)
def test_the_last_network_is_kept_unless_it_has_collapsed(images, tmp_path, monkeypatch, capsys, found, kept, resumed):
    shares = iter([5.0, 5.0, *map(float, found)])  # the start, pixels, three epochs
    monkeypatch.setattr(
        label_free_evaluation, "judge", lambda *given: dataclasses.replace(judge(*given), retrieval=next(shares))
    )
    flags = [str(images), *TINY, "--epochs", "3", "--output-dir", str(tmp_path), "--quality-every", "1"]
    if resumed:
        assert main(["pretrain", *flags, "--max-steps", "8"]) == 0
    assert main(["pretrain", *flags, "--resume", "auto"]) == 0
    best = torch.load(tmp_path / "best_unlabelled.pth.tar", weights_only=True)
    assert (best["mocov3"]["step"], best["mocov3"]["quality"]["retrieval"]) == (4 * kept, found[kept - 1])
    said = capsys.readouterr().out
    assert f"best_unlabelled.pth.tar ({found[kept - 1]:.1f} % retrieved)" in said
    assert ("which stays" in said) == (kept == 2 or found == [60, 29, 31])


def test_patience_stops_the_run(images, tmp_path, capsys):
    flags = [*TINY, "--epochs", "9", "--lr", "0", "--output-dir", str(tmp_path), "--quality-every", "1"]
    assert main(["pretrain", str(images), *flags, "--patience", "2", "--hold-out", "12", "-b", "8"]) == 0
    assert "no improvement in 2 judgements" in capsys.readouterr().out
    assert not (tmp_path / "checkpoint_0008.pth.tar").exists()
    assert (tmp_path / "best_unlabelled.pth.tar").exists()


def test_judging_needs_unseen_images(images, tmp_path):
    flat = images / "train" / "class0"
    out = ["--output-dir", tmp_path / "out", "-b", "4"]
    assert "--hold-out" in refused("pretrain", flat, *TINY, *out, "--quality-every", "1")
    assert "give both" in refused("pretrain", flat, *TINY, *out, "--patience", "1")


def test_compare(watched, images, tmp_path, capsys):
    files = [str(watched / f"checkpoint_000{i}.pth.tar") for i in (0, 1)]
    assert main(["compare", *files, str(images), "--json", "-j", "0"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["kind"] for row in rows] == ["pixels", "untrained", "checkpoint", "checkpoint"]
    lines = [json.loads(line) for line in (watched / "quality.jsonl").read_text().splitlines()]
    for name in ("retrieval", "rankme", "alignment"):  # the numbers of the run itself, on the same images
        assert rows[3][name] == pytest.approx(lines[3][name], rel=1e-4)
    assert all(row["knn_low"] <= row["knn"] <= row["knn_high"] for row in rows)
    # a few labels, by names below the folder or ends of paths
    source = open_source(str(images), "val")
    table = tmp_path / "some.csv"
    table.write_text("path,label\n" + "".join(f"x/val/{source.name(i)},{source.name(i)[:6]}\n" for i in range(16)))
    assert main(["compare", *files, str(images), "--labels", str(table), "-j", "0"]) == 0
    out = capsys.readouterr().out
    assert "16 labelled images of 4 classes" in out
    assert "untrained" in out
    assert main(["knn", str(images / "val"), "--model", files[0], "--labels", str(table), "-j", "0", "--json"]) == 0
    knn = json.loads(capsys.readouterr().out)
    assert (knn["bank"], knn["leave_one_out"], knn["classes"]) == (16, True, 4)
    assert all(low <= row["accuracy"] <= high for row in knn["accuracy"] for low, high in [row["interval"]])


def test_compare_refuses(watched, images, tmp_path):
    ckpt = watched / "checkpoint_0001.pth.tar"
    assert "CKPT" in refused("compare", ckpt)
    assert "no such checkpoint" in refused("compare", tmp_path / "none", images)
    assert "no such folder" in refused("compare", ckpt, tmp_path / "none")
    few = tmp_path / "few"
    few.mkdir()
    shutil.copy(images / "val" / "class0" / "00.jpg", few)
    assert "too few" in refused("compare", ckpt, few)
    table = tmp_path / "l.csv"
    for text, message in (
        ("class0/none.jpg,a\n", "names none of the 16 images"),
        ("class0/none.jpg,a\nclass0/00.jpg,b\n", "none of the images judged"),
        ("class0/00.jpg,a\nclass0/00.jpg,b\n", "two labels"),
        ("class0/00.jpg,a\n", "too few"),
        ("class0/00.jpg\n", "holds no labels"),
        ("00.jpg,a\n", "several"),
    ):
        table.write_text(text)
        assert message in refused("compare", ckpt, images, "--labels", table), text
    assert "no such file" in refused("compare", ckpt, images, "--labels", tmp_path / "none.csv")


def test_compare_takes_the_images_kept_back(images, tmp_path, capsys):
    run, many = tmp_path / "run", tmp_path / "many"
    shutil.copytree(images / "train", many)
    flags = [*TINY, "--output-dir", str(run), "--hold-out", "20", "-b", "4", "--max-steps", "4"]
    assert main(["pretrain", str(many), *flags]) == 0
    file = next(run.glob("checkpoint_*"))
    capsys.readouterr()
    assert main(["compare", str(file), str(many), "-j", "0"]) == 0
    assert "20 images that these runs kept back" in capsys.readouterr().out
    assert main(["compare", str(file), str(many / "class1"), "-j", "0"]) == 0
    assert "16 images, by views" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_the_row_of_the_start_has_the_published_weights(name, monkeypatch):
    """Not those of a network of the same name that nobody trained."""
    torch.manual_seed(7)
    sizes = {"img_size": 32} if "vit" in name else {}
    published, build = timm.create_model(name, num_classes=0, **sizes).eval(), timm.create_model

    def offline(name, pretrained=False, **kwargs):
        return published if pretrained else build(name, **kwargs)

    monkeypatch.setattr("timm.create_model", offline)
    torch.manual_seed(8)
    before = network_scores._beginning({"init": f"timm/{name}"}, {"arch": f"timm/{name}", "image_size": 32}).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(before.features(x), published(x), atol=1e-5)


@pytest.mark.parametrize("scale", [1e7, 1e12, 1e18])
def test_lidar_where_delta_is_lost(scale):
    views = torch.randn(20, 3, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    views = views.mean(1, keepdim=True) + 0.1 * views  # a rank below the dimension, within and between
    views[..., 30:] = views[..., :10]
    value = quality.lidar(views * scale)
    assert 1 <= value <= 40
    assert quality.lidar(views * scale, delta=1e-4 * scale**2) == pytest.approx(quality.lidar(views), rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_features_that_are_not_finite_are_not_measured(bad, capsys):
    views = torch.randn(12, 4, 8, generator=torch.Generator().manual_seed(0))
    views[3, 2, 5] = views[7, 0, 0] = bad
    judged = judge(views)
    assert (judged.images, judged.retrieval) == (12, 0.0)
    assert all(math.isnan(value) for name, value in judged.as_dict().items() if name not in ("pictures", "retrieval"))
    assert "features of 2 of 12 images are not finite" in capsys.readouterr().err


def test_an_interval_stays_within_percents():
    for hits, n in ((0, 2), (2, 2), (0, 7), (44, 44)):
        low, high = interval(hits, n)
        assert 0 <= low <= 100 * hits / n <= high <= 100
        assert not str(low).startswith("-")
