"""The page of a run: curves, diagnoses on real runs; spectra, maps, attention against numpy and scikit-learn; files."""

import html
import json
import math
import os
import re
import subprocess
import sys
import types
from unittest.mock import patch

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, TINY
from report_runs import write_long_run
from sklearn.decomposition import PCA
from starting import Started, run

from mocov3.cli import main
from mocov3.config import PretrainConfig
from mocov3.config.command_lines import parse_pretrain
from mocov3.errors import UserError
from mocov3.evaluation import quality
from mocov3.models import build_backbone
from mocov3.output.log import Session
from mocov3.pretraining import report_process
from mocov3.pretraining.log import PretrainingLog
from mocov3.pretraining.report_process import ReportProcess
from mocov3.report import curves, geometry
from mocov3.report.diagnosis import diagnose
from mocov3.report.runs import read_run

pytest.importorskip("plotly", reason="plotly (extra report) is not installed")
DIAGNOSES = json.loads((ROOT / "tests" / "recorded" / "diagnoses.json").read_text())
EVIL = "<img src=x onerror=alert(1)>&quot;</script>%{x}"


# ---- curves


@pytest.mark.parametrize("n", [0, 1, 2, 2000, 2001, 50_000])
def test_thinning_keeps_ends_and_every_peak(n):
    rng = np.random.Generator(np.random.PCG64(n))
    x, y = np.arange(float(n)), rng.standard_normal(n)
    if n > 100:
        y[37], y[n - 40], y[n // 2] = 1e3, -1e3, np.nan
    kept = curves.thin(x, y)
    assert (np.diff(kept) > 0).all()
    assert len(kept) <= 2 * curves.BUCKETS + 2
    assert np.isfinite(y[kept]).all()
    if n <= 2 * curves.BUCKETS:
        assert len(kept) == np.isfinite(y).sum()
        return
    assert {0, n - 1, 37, n - 40} <= set(kept.tolist())
    for part in np.array_split(np.flatnonzero(np.isfinite(y)), curves.BUCKETS):
        assert {part[np.argmax(y[part])], part[np.argmin(y[part])]} <= set(kept.tolist())


def test_running_mean_is_a_mean():
    line = np.linspace(3, 8, 400)
    np.testing.assert_allclose(curves.smooth(line), line)  # a centred mean leaves a line as it is
    y = np.random.Generator(np.random.PCG64(0)).standard_normal(400)
    np.testing.assert_allclose(curves.smooth(y)[200], y[190:211].mean())
    y[200] = np.nan
    np.testing.assert_allclose(curves.smooth(y)[200], np.nanmean(y[190:211]))


def test_planted_spikes_are_found_and_nothing_else():
    rng = np.random.Generator(np.random.PCG64(1))
    falling = 5 * np.exp(-np.arange(500) / 12) + 0.1  # by a factor 50 within 60 lines, as at the start of a run
    y = falling * rng.lognormal(0, 0.2, 500)
    y[300:] *= 8  # another level is no spike
    planted = [40, 150, 240, 420, 499]
    y[planted] *= 12
    assert np.flatnonzero(curves.spikes(y)).tolist() == planted
    assert not curves.spikes(np.full(500, np.nan)).any()


def test_dips_are_falls_that_recover():
    assert curves.dips(np.array([20.0, 30, 40, 35, 41, 42, 41.5, 43, 30])).tolist() == [3]
    assert curves.dips(np.array([20.0, 10])).tolist() == []


# ---- diagnoses


def folder_of(name, folder):
    """The folder of a stored run."""
    stored = DIAGNOSES["runs"][name]
    names = list(stored["columns"])
    with (folder / "metrics.jsonl").open("w") as file:
        for values in zip(*stored["columns"].values(), strict=True):
            file.write(json.dumps({**dict(zip(names, values, strict=True)), "version": 1}) + "\n")
    config = parse_pretrain(["data", *stored["flags"]], prog="test")
    from mocov3.config import write_yaml

    write_yaml(config, folder / "config.yaml", "stored")
    return folder


@pytest.mark.parametrize("name", DIAGNOSES["runs"])
def test_diagnoses_on_real_runs(name, tmp_path):
    found = diagnose(read_run(folder_of(name, tmp_path)))
    assert found.state == DIAGNOSES["runs"][name]["made to be"], found
    assert all(f.reason.endswith(".") and "nan" not in f.reason for f in found.findings)
    assert found.state in ("learning",) or found.findings[0].advice


def test_there_are_enough_of_each_kind():
    kinds = [run["made to be"] for run in DIAGNOSES["runs"].values()]
    assert {k: kinds.count(k) >= 3 for k in ("learning", "collapsed", "unstable", "starved")} == dict.fromkeys(
        ("learning", "collapsed", "unstable", "starved"), True
    )
    assert len(kinds) >= 12


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("collapse_wd", ["--epochs", "3", "--warmup-epochs", "1", "-p", "1"]),
        ("starve_big", ["-b", "8", "--max-steps", "12", "-p", "1"]),
        ("early", ["--max-steps", "6"]),
    ],
)
def test_diagnoses_on_runs_trained_here(name, more, tmp_path):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import diagnoses

    data = diagnoses.images(tmp_path, name, 24 if "big" in name else 500)  # then as diagnoses.train_apart does
    argv = [sys.executable, diagnoses.__file__, "--train", name, str(data), str(tmp_path / name), *more]
    assert run(argv, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode == 0
    assert diagnose(read_run(tmp_path / name)).state == diagnoses.RUNS[name][0]


def _edited(tmp_path, change, name="resnet"):
    folder = folder_of(name, tmp_path)
    lines = [json.loads(t) for t in (folder / "metrics.jsonl").read_text().splitlines()]
    for i, line in enumerate(lines):
        change(i, line, len(lines))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return diagnose(read_run(folder))


def test_skips_and_a_loss_that_comes_back_are_unstable(tmp_path):
    def skipping(i, line, n):
        line["skipped"] = i // 10

    assert _edited(tmp_path, skipping).state == "unstable"

    def back(i, line, n):
        line["loss"] = line["loss_start"] if i < 5 or i > 0.7 * n else line["loss_floor"] + 1

    found = _edited(tmp_path, back)
    assert found.state in ("unstable", "collapsed")
    assert "fallen back" in str(found) or "at its start" in str(found)


# ---- spectra, maps, attention


def features(n=60, dim=12):
    rng = np.random.Generator(np.random.PCG64(2))
    return torch.from_numpy(rng.standard_normal((n, dim)) * np.linspace(3, 0.1, dim) + 1)


def test_effective_rank_of_a_gram_matrix_is_that_of_the_features():
    x = features()
    values = np.linalg.svd(x.numpy(), compute_uv=False)
    p = values / values.sum()
    expected = math.exp(-(p * np.log(p)).sum())
    assert quality.rankme(x) == pytest.approx(expected, rel=1e-5)
    assert quality.rank_of_gram(3 * x.T @ x) == pytest.approx(expected, rel=1e-5)
    assert quality.rank_of_gram(torch.ones(8, 8)) == pytest.approx(1, abs=1e-4)
    assert quality.rank_of_gram(torch.eye(8)) == pytest.approx(8)


def test_metrics_hold_the_effective_rank_of_the_queries():
    from mocov3.models import build

    model = build("resnet10_w32", dim=16, mlp_dim=32, small_stem=True).train()
    x1, x2 = torch.randn(2, 8, 3, 32, 32)
    _, statistics = model.contrast(x1, x2, 1.0)
    rows = statistics.embeddings
    assert rows.shape == (16, 16)
    np.testing.assert_allclose(rows.norm(dim=1), 1, rtol=1e-5)
    assert float(statistics.feature_std) == pytest.approx(float(rows.std(0).mean()) * 4, rel=1e-5)


def test_spectrum_is_numpys():
    x = features()
    expected = np.linalg.eigvalsh(np.cov(x.numpy().T))[::-1]
    np.testing.assert_allclose(geometry.spectrum(x).numpy(), expected / expected.sum(), rtol=1e-9)
    assert geometry.spectrum(torch.ones(5, 3)).abs().max() < 1e-9


def test_map_is_scikit_learns():
    x = features()
    unit = (x / x.norm(dim=1, keepdim=True)).numpy()
    expected = PCA(2, svd_solver="full").fit_transform(unit)
    found = geometry.flat_map(x).numpy()
    for mine, theirs in zip(found.T, expected.T, strict=True):
        sign = np.sign(mine @ theirs)
        np.testing.assert_allclose(mine, sign * theirs, atol=1e-12)
        assert mine[np.abs(mine).argmax()] > 0
    assert geometry.flat_map(torch.ones(4, 1)).shape == (4, 2)


def attention_by_numpy(block, tokens, heads, prefix):
    """Softmax of q·k of the cls token, written out."""
    x = tokens.numpy()
    norm = block.norm1
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + norm.eps)
    x = x * norm.weight.numpy() + norm.bias.numpy()
    qkv = x @ block.attn.qkv.weight.numpy().T + (0 if block.attn.qkv.bias is None else block.attn.qkv.bias.numpy())
    q, k, _ = np.split(qkv, 3, axis=-1)
    shape = (*q.shape[:2], heads, -1)
    q, k = q.reshape(shape), k.reshape(shape)
    scores = np.einsum("bhd,bnhd->bhn", q[:, 0], k) / math.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True))[:, :, prefix:]


@torch.no_grad()
def test_attention_is_the_softmax_written_out():
    ours = build_backbone("vit_small", image_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4)
    theirs = timm.create_model("test_vit", img_size=32, pretrained=False)
    for network, size, heads, grid in ((ours, 16, 4, 4), (theirs, 32, 2, 2)):
        network.eval()
        network.double()
        x = torch.randn(3, 3, size, size, dtype=torch.float64)
        caught = []
        hook = network.blocks[-1].register_forward_pre_hook(lambda _, given, into=caught: into.append(given[0]))
        network.forward_features(x)
        hook.remove()
        fused = network.blocks[-1].attn.fused_attn
        found = geometry.cls_attention(network, x)
        expected = attention_by_numpy(network.blocks[-1], caught[0], heads, network.num_prefix_tokens)
        assert found.shape == (3, heads, grid, grid)
        np.testing.assert_allclose(found.flatten(2).numpy(), expected, rtol=1e-5)
        assert network.blocks[-1].attn.fused_attn == fused
        assert not network.blocks[-1].attn.attn_drop._forward_pre_hooks
    resnet = build_backbone("resnet10_w32", image_size=32)
    assert geometry.cls_attention(resnet.eval(), torch.randn(1, 3, 32, 32)) is None


# ---- the page


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def lines_of(folder):
    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """A run with k-NN and quality, and its page made during training (by processes that start at once)."""
    folder = tmp_path_factory.mktemp("report") / "run"
    more = ["--knn-every", "1", "--quality-every", "1", "--report-every", "1", "--output-dir", str(folder), "--quiet"]
    at_once = {**vars(subprocess), "Popen": lambda argv, *, env, **_: Started(argv, env=env)}
    with patch.object(report_process, "subprocess", types.SimpleNamespace(**at_once)):
        assert main(["pretrain", str(images), *TINY, *more]) == 0
    return folder


def test_training_leaves_its_page(trained):
    page = (trained / "report.html").read_text()
    for title in ("Diagnosis", "Learning", "Stability", "Collapse", "What it sees", "What it learned", "The run"):
        assert re.search(rf"<h2>\d\. {title}</h2>", page)
    assert "checkpoint_0001.pth.tar" in page  # the last page knows all
    assert not [p.name for p in trained.iterdir() if p.name.startswith(".")]
    assert "all 16 validation images" in page
    machine = [json.loads(t) for t in (trained / "machine.jsonl").read_text().splitlines()]
    assert [m["step"] for m in machine] == [0]
    assert machine[0]["torch"] == torch.__version__.partition("+")[0]


def test_charts_hold_the_metrics(trained):
    charts = data_of((trained / "report.html").read_text())["charts"]
    lines = [line for line in lines_of(trained) if line["knn"] is None]
    names = {
        "loss": ("loss", 1),
        "retrieval": ("retrieval_accuracy", 100),
        "lr": ("lr", 1),
        "momentum": ("momentum", 1),
        "speed": ("images_per_second", 1),
        "wait": ("data_wait", 100),
        "feature_std": ("feature_std", 1),
        "rank": ("effective_rank", 1),
    }
    for id, (name, scale) in names.items():
        curve = charts[id]["data"][0]
        assert curve["x"] == [line["step"] for line in lines]
        assert curve["y"] == pytest.approx([line[name] * scale for line in lines], rel=1e-4), id
    first, last = charts["gradients"]["data"][:2]
    assert first["y"] == pytest.approx([line["grad_norm_first"] for line in lines], rel=1e-4)
    assert last["y"] == pytest.approx([line["grad_norm_last"] for line in lines], rel=1e-4)
    knn = [line for line in lines_of(trained) if line["knn"] is not None]
    assert charts["knn"]["data"][0]["y"] == pytest.approx([line["knn"] for line in knn], rel=1e-4)
    shown = {a["text"] for a in charts["loss"]["layout"]["annotations"]}
    assert shown == {f"start {lines[0]['loss_start']:.2f}", f"floor {lines[0]['loss_floor']:.2f}"}
    quality_lines = [json.loads(t) for t in (trained / "quality.jsonl").read_text().splitlines()]
    assert charts["found"]["data"][0]["y"] == pytest.approx(
        [q["retrieval"] for q in quality_lines if q["name"] == "epoch"], rel=1e-4
    )


def test_neighbours_and_map_are_of_the_checkpoint(trained, images):
    from mocov3 import load_backbone
    from mocov3.data import CentreView, open_source
    from mocov3.data.device.pixels import normalise

    page = (trained / "report.html").read_text()
    found = data_of(page)
    source, network = open_source(str(images), "val"), load_backbone(trained / "checkpoint_0001.pth.tar").eval()
    view = CentreView(32)
    pixels = np.stack([view(source.read(i))[0] for i in range(len(source))])
    preset = parse_pretrain([str(images), *TINY], prog="test").preset
    with torch.no_grad():
        x = network(normalise(pixels, torch.device("cpu"), preset.mean, preset.std)).numpy()
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    placed = np.zeros((16, 2))
    for trace in found["charts"]["map-r0-1"]["data"]:
        placed[trace["customdata"]] = np.stack([trace["x"], trace["y"]], 1)
    expected = PCA(2).fit_transform(unit)
    for mine, theirs in zip(placed.T, expected.T, strict=True):
        np.testing.assert_allclose(mine, np.sign(mine @ theirs) * theirs, atol=2e-3)
    similar = unit @ unit.T
    np.fill_diagonal(similar, -1)
    rows = re.findall(r"<tr><td class=\"name\">.*?</tr>", page, re.S)
    assert len(rows) == 4  # a class each
    query = [source.name(i) for i in range(16)].index(html.unescape(re.search(r"name\">(.*?) \(", rows[2])[1]))
    named = re.findall(r'title="(.*?)"', rows[2].rsplit("<td>", 1)[1])
    assert [html.unescape(n) for n in named] == [source.name(i) for i in np.argsort(-similar[query])[:6].tolist()]


def test_the_page_asks_nobody(trained):
    page = (trained / "report.html").read_text()
    assert "default-src 'none'" in page
    body = re.sub(r'<script type="text/plain" id="plotly">.*?</script>', "", page, flags=re.S)
    addresses = re.findall(r'(?:src|href)="(?!data:|#)([^"]*)"|url\((?!"?data:)([^)]*)\)', body)
    assert addresses == []
    assert len(page) < 6e6


def test_a_page_beside_does_not_change_the_training(trained, images, tmp_path):
    assert main(["pretrain", str(images), *TINY, "--output-dir", str(tmp_path / "plain"), "--quiet"]) == 0
    with_page = [line["loss"] for line in lines_of(trained) if line["knn"] is None]
    assert [line["loss"] for line in lines_of(tmp_path / "plain")] == with_page


def test_names_with_markup_stay_text(tmp_path, capsys):
    from PIL import Image

    rng = np.random.Generator(np.random.PCG64(0))
    data = tmp_path / "<b>data"
    for split in ("train", "val"):
        for label in ("<img src=x onerror=alert(1)>", "b&quot;"):
            (data / split / label).mkdir(parents=True)
            for i in range(16):
                pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(data / split / label / f"{i}<script>alert(2)<.png")
    run = tmp_path / "run <script>alert(3)<"
    flags = ["--epochs", "1", "--output-dir", str(run), "--quiet"]
    assert main(["pretrain", str(data), *TINY, *flags]) == 0
    assert main(["report", str(run), "--device", "cpu"]) == 0
    assert "report.html" in capsys.readouterr().out
    page = (run / "report.html").read_text()
    assert page.count("<script") == page.count("</script") == 3  # data, plotly, ours
    assert "<img src=x" not in page
    assert "onerror" in html.unescape(page)
    charts = data_of(page)["charts"]
    assert charts["map-r0-1"]["data"][0]["name"] == "&lt;img src=x onerror=alert(1)&gt;"  # plotly reads entities


def test_what_is_missing_is_said(trained, tmp_path, capsys):
    import shutil

    folder = tmp_path / "bare"
    folder.mkdir()
    shutil.copy(trained / "metrics.jsonl", folder)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('[1]\n{"step": 9, "epo')  # another program's, and one being written

    def said(*flags):
        assert main(["report", str(folder), "--device", "cpu", *flags]) == 0
        return capsys.readouterr().out

    out = said("--output", str(tmp_path / "sub" / "p.html"))
    page = html.unescape((tmp_path / "sub" / "p.html").read_text())
    assert "2 lines of metrics.jsonl could not be read" in page
    assert "config.yaml could not be read" in out + page
    config = (trained / "config.yaml").read_text()
    (folder / "config.yaml").write_text(re.sub(r"^data: .*$", "data: nowhere", config, flags=re.M))
    out = said()
    assert "images are not available" in out
    assert "no checkpoint" in out
    shutil.copy(trained / "config.yaml", folder)
    (folder / "checkpoint_0001.pth.tar").write_bytes(b"damaged")
    assert "checkpoint_0001.pth.tar" in said()
    assert "What it sees" in (folder / "report.html").read_text()


def test_numbers_of_any_kind_make_a_page(tmp_path, capsys):
    odd = [
        {},
        {"loss": 1e308, "loss_start": 0, "loss_floor": 0, "lr": "x", "skipped": 5, "retrieval_accuracy": 1e300},
        {"loss": None, "iteration": -7, "grad_norm_first": -1, "data_wait": {"a": 1}},
    ]
    for i, more in enumerate(odd):
        folder = tmp_path / str(i)
        folder.mkdir()
        lines = [json.dumps({"step": step, "epoch": 0, **more}) for step in range(12)]
        (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": NaN, "epoch": Infinity}']))
        (folder / "quality.jsonl").write_text('{"name": ["start"], "epoch": 1, "retrieval": 5, "rankme": "x"}\n[]\n')
        (folder / "machine.jsonl").write_text('{"time": {"a": 1}}\n{}\n3\n')
        assert main(["report", str(folder), "--pictures", "0"]) == 0
        assert capsys.readouterr().err == ""
        data_of((folder / "report.html").read_text())


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "required"),
        (["nowhere"], "no such folder"),
        (["."], "holds no metrics.jsonl"),
        (["empty"], "holds no line"),
        (["empty", "empty"], "--output"),
        (["empty", "--pictures", "-1"], "--pictures"),
        (["empty", "--output", "."], "is a folder"),
    ],
)
def test_refusals(argv, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").write_text("\n{}\nnull\n")
    try:
        code = main(["report", *argv])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert error.count("\n") <= (2 if said == "required" else 0)


def test_without_plotly_a_line_says_so(trained, monkeypatch, capsys):
    from mocov3 import demo
    from mocov3.pretraining import inputs
    from mocov3.report.page import packed_plotly

    packed_plotly.cache_clear()
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert main(["report", str(trained)]) == 2
    assert "pip install 'mocov3[report]'" in capsys.readouterr().err
    demo._write_page(trained)
    assert "pip install 'mocov3[report]'" in capsys.readouterr().out
    monkeypatch.setattr(inputs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="report"):
        inputs.check(parse_pretrain(["fashion-mnist", *TINY, "--report-every", "1"], prog="t"), script_door=True)
    packed_plotly.cache_clear()


def test_a_page_that_fails_is_a_warning(tmp_path, capsys):
    config = PretrainConfig(output_dir=str(tmp_path), quiet=True)
    log = PretrainingLog(config, Session(1, writes=False, shows=False))
    pages = ReportProcess(tmp_path, 1, log, active=True)
    pages.finish()
    assert "report.html could not be made" in (said := capsys.readouterr().err)
    assert "holds no metrics.jsonl" in said
    pages.epoch_ended(1)
    pages.close()
    assert pages._process is None
    ReportProcess(tmp_path, 1, log, active=False).finish()
    assert capsys.readouterr().err == ""


def test_runs_are_compared(trained, tmp_path, capsys):
    other = folder_of("collapse_wd", tmp_path)
    assert main(["report", str(trained), str(other), "--output", str(tmp_path / "both.html"), "--pictures", "0"]) == 0
    assert capsys.readouterr().out.count("\n") >= 3
    page = (tmp_path / "both.html").read_text()
    found = data_of(page)["charts"]
    assert len({t["meta"]["colour"] for t in found["loss"]["data"]}) == 2
    assert "What differs between the runs" in page
    assert "--weight-decay" in page
    assert "Collapsed" in page


def test_a_long_run_stays_small(tmp_path):
    from mocov3.report.command import write_page

    write_long_run(tmp_path)
    run = read_run(tmp_path)
    write_page([run], tmp_path / "report.html", images=0)
    assert (tmp_path / "report.html").stat().st_size < 6e6
    curve = data_of((tmp_path / "report.html").read_text())["charts"]["loss"]["data"][0]
    assert len(curve["x"]) <= 2 * curves.BUCKETS + 2
    assert max(curve["y"]) == pytest.approx(run.columns["loss"].max(), rel=1e-4)
