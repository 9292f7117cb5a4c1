"""Images that cannot be read: every evaluation leaves them out, as if they had not been in the folder."""

import json
import shutil
from unittest.mock import create_autospec

import numpy as np
import pytest
import torch
from doors import refused
from evaluating import write_pretrained
from starting import launch_ranks

from mocov3 import models
from mocov3.cli import main
from mocov3.config import EmbedConfig, PretrainConfig
from mocov3.data import CentreView, Loader, Source, Work, open_source
from mocov3.data.views.probes import ProbeViews
from mocov3.distributed import World
from mocov3.errors import UserError
from mocov3.evaluation import label_free
from mocov3.evaluation.embed import embed
from mocov3.evaluation.features import Extractor, collect
from mocov3.evaluation.label_free import ViewsToJudge, features_of_views
from mocov3.evaluation.neighbours import knn_accuracy
from mocov3.finetuning.evaluate import evaluate
from mocov3.models.precision import Precision
from mocov3.pretraining.log import PretrainingLog
from mocov3.pretraining.online_knn import OnlineKnn

ONE = World(0, 1, torch.device("cpu"))
SIZE = 16
NORMAL = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
NETWORK = ["--model", "resnet10_w16", "--image-size", "32", "--device", "cpu", "-j", "0"]


def spoil(folder, names):
    """Make files of the folder unreadable, each in another way; their names."""
    for i, name in enumerate(names):
        file = folder / name
        file.write_bytes((b"", b"no image", file.read_bytes()[:60])[i % 3])
    return set(names)


@pytest.fixture
def sets(images, tmp_path):
    """A set with unreadable images in both parts (all of one class in training), and the same without these files."""
    spoilt, clean = tmp_path / "spoilt", tmp_path / "clean"
    shutil.copytree(images, spoilt)
    shutil.copytree(images, clean)
    for part, names in (
        ("train", [*[f"class0/{p.name}" for p in (images / "train" / "class0").iterdir()][:-2], "class2/04.png"]),
        ("val", [f"class1/{next((images / 'val' / 'class1').iterdir()).name}"]),
    ):
        present = [name for name in names if (spoilt / part / name).exists()]
        for name in spoil(spoilt / part, present):
            (clean / part / name).unlink()
    return spoilt, clean


def flat(x):
    return torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)


def features(source, world=ONE, batch=5, workers=0):
    extractor = Extractor(torch.nn.Identity(), flat, CentreView(SIZE), *NORMAL.values())
    return collect(extractor, source, world=world, batch_size=batch, workers=workers, title="these")


@pytest.mark.parametrize("workers", [0, 1])
def test_rows_are_black_and_features_nan(sets, workers):
    source, clean = (open_source(str(folder), "train") for folder in sets)
    bad = sorted({source.name(i) for i in range(len(source))} - {clean.name(i) for i in range(len(clean))})
    everything = np.arange(len(source))
    with Loader(source, CentreView(SIZE), batch_size=99, seed=0, workers=workers, replace=False) as loader:
        batch = next(loader.run([Work(0, 0, everything)]))
        met = [c.index for c in batch.corrupt]
        assert [source.name(i) for i in met] == bad
        assert np.flatnonzero((batch.pixels[0] == 0).all((1, 2, 3))).tolist() == met
    found = features(source, workers=workers)
    assert torch.equal(found.features[torch.from_numpy(found.readable)], features(clean).features)
    assert bool(found.features[met].isnan().all())
    assert sorted(found.corrupt) == met
    assert all(found.corrupt.values())


def test_knn_is_that_of_the_readable(sets, capsys):
    printed = []
    for folder in sets:
        assert main(["knn", str(folder), *NETWORK, "--json"]) == 0
        out, err = capsys.readouterr()
        printed.append({**json.loads(out.splitlines()[-1]), "data": ""})
        assert ("unreadable" in err) == (folder == sets[0])
    assert printed[0] == printed[1]


def test_online_knn_is_that_of_the_readable(sets):
    config = PretrainConfig(data=str(sets[0]), arch="resnet10_w16", image_size=32, workers=0)
    log = create_autospec(PretrainingLog, instance=True, takes_images=True)
    model = models.build(config.arch, dim=8, mlp_dim=8, image_size=32)
    online = OnlineKnn(config, ONE, model, open_source(config.data, "train"), log)
    clean = [open_source(str(sets[1]), part) for part in ("train", "val")]
    view, preset = CentreView(32, config.preset.evaluation_zoom), config.preset
    extractor = Extractor(model.base_encoder, model.features, view, preset.mean, preset.std)
    bank, asked = (collect(extractor, s, world=ONE).features for s in clean)
    labels = [torch.as_tensor(s.labels, dtype=torch.long) for s in clean]
    assert online.knn(0) == knn_accuracy(bank, labels[0], asked, labels[1])
    assert log.image.call_args.args[0] == "neighbours"


@pytest.mark.parametrize("name", ["x.npy", "x.parquet"])
def test_embed_marks_rows_and_refuses_nothing_readable(sets, tmp_path, name):
    go = ["embed", *NETWORK, "-o", str(tmp_path / name), "-b", "7"]
    folder = sets[0] / "train"
    shutil.rmtree(folder / "class3")
    assert main([*go, str(folder)]) == 0
    if name == "x.npy":
        rows = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
        errors, x = [row.get("error") for row in rows], np.load(tmp_path / name)
    else:
        table = __import__("pyarrow.parquet", fromlist=["read_table"]).read_table(tmp_path / name)
        errors, x = table.column("error").to_pylist(), np.stack(table.column("feature").to_numpy())
    missing = [i for i, error in enumerate(errors) if error]
    assert missing == np.flatnonzero(np.isnan(x).all(1)).tolist()
    assert len(missing) == len(list(folder.rglob("*.*"))) - np.isfinite(x).all(1).sum() > 1
    spoil(folder, [str(p.relative_to(folder)) for p in folder.rglob("*.*")])
    before = sorted(p.name for p in tmp_path.iterdir())
    assert f"none of {len(x)} images can be read, first: class0/" in refused(*go, folder, "--overwrite")
    assert sorted(p.name for p in tmp_path.iterdir()) == before  # no spool is left behind


def same_as_alone(world: World, folder: str) -> int:
    """What two ranks find, of which the first has nothing readable, is what one finds."""
    source: Source = open_source(folder, "train")
    for name, parts in (
        ("features", [features(source, w, batch=8).features.nan_to_num(-1) for w in (world, ONE)]),
        ("views", [views(source, w)[0] for w in (world, ONE)]),
        ("counts", [torch.tensor([counted(source, w).total, counted(source, w).hits5]) for w in (world, ONE)]),
    ):
        assert torch.equal(*parts), name
    assert len(views(source, world)[1]) == len(views(source, world)[0]) == counted(source, world).total > 0
    config = EmbedConfig(data=f"{folder}/class0", model="pixels", image_size=8, output=f"{folder}.npy", workers=0)
    with pytest.raises(UserError, match="none of 16 images can be read"):  # on both ranks, so that neither waits
        embed(world, config)
    return 0


def views(source, world=ONE):
    images = ViewsToJudge(source, ProbeViews(SIZE, 1.0), world=world, batch_size=8)
    return features_of_views(Extractor(torch.nn.Identity(), flat, images.view, *NORMAL.values()), images)


@pytest.mark.parametrize("room", [label_free._KEPT, 0])
@pytest.mark.parametrize("workers", [0, 1])
def test_views_are_read_once_for_all_networks_where_there_is_room(sets, workers, room, monkeypatch):
    monkeypatch.setattr(label_free, "_KEPT", room)
    monkeypatch.setattr(label_free, "_SMALL", 0)  # else no process starts for so few
    opened = []
    source = open_source(str(sets[0]), "train")
    images = ViewsToJudge(source, ProbeViews(SIZE, 1.0), world=ONE, workers=workers, batch_size=8)
    run = Loader.run
    monkeypatch.setattr(Loader, "run", lambda loader, works: opened.append(1) or run(loader, works))
    first, second = (
        features_of_views(Extractor(torch.nn.Identity(), made, images.view, *NORMAL.values()), images)
        for made in (flat, lambda x: 2 * flat(x))
    )
    assert torch.equal(2 * first[0], second[0])
    assert np.array_equal(first[1], second[1])
    assert len(opened) == (1 if room else 2)
    clean = open_source(str(sets[1]), "train")
    assert [source.name(i) for i in first[1].tolist()] == [clean.name(i) for i in range(len(clean))]


def counted(source, world=ONE):
    head = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(12, 4))
    torch.nn.init.eye_(head[2].weight)
    torch.nn.init.zeros_(head[2].bias)
    settings = {"precision": Precision("fp32", torch.device("cpu")), "batch_size": 7, "workers": 0}
    return evaluate(Extractor(head.eval(), head, CentreView(SIZE), *NORMAL.values()), source, world=world, **settings)


def test_a_rank_with_nothing_readable(images, tmp_path):
    folder = tmp_path / "half"
    shutil.copytree(images / "train", folder)
    source = open_source(str(folder), "train")
    spoil(folder, [source.name(i) for i in range(len(source) // 2 + 3)])
    launch_ranks(same_as_alone, str(folder), 2)


def test_counts_are_those_of_the_readable(sets):
    spoilt, clean = (counted(open_source(str(folder), "train")) for folder in sets)
    assert np.array_equal(spoilt.hits, clean.hits)
    assert np.array_equal(spoilt.images, clean.images)
    assert spoilt.loss == pytest.approx(clean.loss)
    assert "unreadable left out, first: class0/" in spoilt.left_out
    assert not clean.left_out


def test_compare_goes_on(sets, tmp_path, capsys):
    write_pretrained(tmp_path / "c.pth.tar")
    capsys.readouterr()
    folder = sets[0] / "val"
    assert main(["compare", str(tmp_path / "c.pth.tar"), str(folder), "-j", "0", "--json", "--device", "cpu"]) == 0
    for row in (json.loads(line) for line in capsys.readouterr().out.splitlines()):
        assert row["pictures"] == row["labelled"] == len(open_source(str(sets[1] / "val"))) == 15


def test_nothing_readable_is_one_line_before_training(images, tmp_path):
    data = tmp_path / "d"
    shutil.copytree(images, data)
    val = data / "val"
    spoil(val, [str(p.relative_to(val)) for p in val.rglob("*.*")])
    out = tmp_path / "o"
    small = ["-a", "resnet10_w16", "--image-size", "32", "-j", "0", "--device", "cpu"]
    for command in (
        ["knn", data, *NETWORK],
        ["lincls", data, "-a", "resnet10_w16", "--output-dir", out],
        ["finetune", *small, "--data-set", "IMNET", "--data-path", data, "--output-dir", out],
        ["pretrain", data, *small, "--recipe", "defaults", "-b", "8", "--knn-every", "1", "--output-dir", out],
    ):
        assert "none of 16 images can be read, first: class0/" in refused(*command)
