"""k-NN evaluation and embedding: exact against scikit-learn, whatever the tiles and ranks; files, resume, bad input."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from doors import refused
from evaluating import ARCH, write_pretrained
from killing import Process
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from mocov3.cli import main
from mocov3.config import EmbedConfig, KnnConfig
from mocov3.data.sources.opening import scan
from mocov3.data.views.two_views import CentreView
from mocov3.evaluation import neighbours
from mocov3.evaluation.embeddings import duplicate_groups
from mocov3.evaluation.features import grid
from mocov3.evaluation.frozen import open_frozen
from mocov3.evaluation.neighbours import Groups, nearest, recalled, vote


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    path = tmp_path_factory.mktemp("pretrained") / "checkpoint_0000.pth.tar"
    write_pretrained(path)
    return path


@pytest.fixture(scope="module")
def vectors():
    rng = np.random.Generator(np.random.PCG64(0))
    labels = rng.integers(0, 20, 5600)
    x = rng.standard_normal((20, 32))[labels] * 0.5 + rng.standard_normal((5600, 32))
    return torch.from_numpy(x.astype(np.float32)), torch.from_numpy(labels)


def test_knn_is_scikit_learns(vectors):
    x, y = vectors
    bank, labels, queries = x[:5000], y[:5000], x[5000:]
    ks, temperatures = (1, 10, 200), (0.07, 0.5)
    found = nearest(bank, queries, 200)
    got = vote(found, labels, ks, temperatures, classes=20)
    for k in ks:
        for t in temperatures:
            theirs = KNeighborsClassifier(
                k, metric="cosine", algorithm="brute", weights=lambda d, t=t: np.exp((1 - d) / t)
            ).fit(bank.double().numpy(), labels.numpy())
            assert np.array_equal(got[k, t].numpy(), theirs.predict(queries.double().numpy())), (k, t)
    distance, index = (
        NearestNeighbors(n_neighbors=200, metric="cosine", algorithm="brute")
        .fit(bank.double().numpy())
        .kneighbors(queries.double().numpy())
    )
    assert np.array_equal(found.index.numpy(), index)
    assert np.abs(found.similarity.numpy() - (1 - distance)).max() < 1e-10
    same = labels.numpy()[index] == y[5000:].numpy()[:, None]
    assert recalled(found, labels, y[5000:], (1, 5)) == [same[:, :k].any(1).sum() for k in (1, 5)]


def test_leave_one_out(vectors):
    x = vectors[0][:300]
    found = nearest(x, x, 5, self_index=torch.arange(300))
    _, index = (
        NearestNeighbors(n_neighbors=6, metric="cosine", algorithm="brute").fit(x.double()).kneighbors(x.double())
    )
    assert np.array_equal(found.index.numpy(), index[:, 1:])


@pytest.mark.parametrize("tile", [131072, 90])
def test_a_query_finds_none_of_its_own_group(vectors, monkeypatch, tile):
    monkeypatch.setattr(neighbours, "_TILE", tile)
    x, rng = vectors[0][:400].clone(), np.random.default_rng(1)
    x[200:300] = x[:100]  # equals, of the same group and of others
    groups = rng.integers(0, 6, 400)
    bank, queries = x[:350], x[300:]  # rows 300 to 349 are both
    own = Groups.between((groups[:350], groups[300:]))
    assert own.available == 350 - np.bincount(groups[:350]).max()
    found = nearest(bank, queries, 30, groups=own)
    for row, (query, group) in enumerate(zip(queries.double().numpy(), groups[300:], strict=True)):
        others = np.flatnonzero(groups[:350] != group)
        distance = 1 - bank.double().numpy()[others] @ query / np.linalg.norm(bank.double().numpy()[others], axis=1)
        order = others[np.lexsort((others, np.round(distance, 9)))][:30]
        assert found.index[row].tolist() == order.tolist()
    with pytest.raises(ValueError, match=str(own.available)):
        nearest(bank, queries, own.available + 1, groups=own)


def test_exact_whatever_the_tiles(vectors, monkeypatch):
    # with many equals, more than candidates are kept: the lower index comes first
    x = vectors[0][:900].clone()
    x[100:400] = x[50]
    x[500:520] = 3 * x[50]
    reference = nearest(x, x[:120], 30)
    assert reference.index[50].tolist() == [50, *range(100, 129)]
    for tile, rows, scored in ((64, 7, 3), (801, 1000, 64)):
        monkeypatch.setattr(neighbours, "_TILE", tile)
        monkeypatch.setattr(neighbours, "_ROWS", rows)
        monkeypatch.setattr(neighbours, "_SCORED", scored)
        again = nearest(x, x[:120], 30)
        assert torch.equal(again.index, reference.index)
        assert torch.equal(again.similarity, reference.similarity)
    parts = [nearest(x, part, 30) for part in x[:120].split(11)]
    assert torch.equal(torch.cat([p.index for p in parts]), reference.index)
    with pytest.raises(ValueError, match="899"):
        nearest(x, x, 900, self_index=torch.arange(900))


def knn(capsys, *argv):
    capsys.readouterr()
    assert main(["knn", *map(str, argv), "--device", "cpu", "-j", "0", "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_program(images, pretrained, capsys):
    result = knn(capsys, images, "--model", pretrained, "-k", "1,5", "-t", "0.07,1")
    assert (result["bank"], result["queries"], result["image_size"]) == (64, 16, 32)
    assert [(r["k"], r["temperature"]) for r in result["accuracy"]] == [(1, 0.07), (1, 1), (5, 0.07), (5, 1)]
    assert result["accuracy"][0]["accuracy"] == result["recall"]["1"]
    # default k's above the bank are left out, and it is said
    result = knn(capsys, images, "--model", pretrained)
    assert [r["k"] for r in result["accuracy"]] == [1, 10, 20]
    assert "100,200 left out" in result["notes"][0]
    # one folder: each image left out in turn; the momentum encoder; after the projector; pixels
    alone = knn(capsys, images / "train", "--model", pretrained)
    assert alone["leave_one_out"]
    assert alone["queries"] == alone["bank"] == 64
    for flags in (["--encoder", "momentum"], ["--layer", "projector"], ["--layer", "mean"]):
        other = knn(capsys, images, "--model", pretrained, *flags)
        assert other["accuracy"][0]["accuracy"] >= 25
    assert knn(capsys, images, "--model", "pixels", "--image-size", "16")["backbone"] == "pixels, no network"
    assert main(["knn", str(images), "--model", str(pretrained), "--device", "cpu", "-j", "0"]) == 0
    out = capsys.readouterr().out
    assert "k-NN of resnet10_w32" in out
    assert "τ 0.07" in out
    assert "note: --k 100,200" in out


def test_two_ranks_are_one(images, pretrained, tmp_path, capfd):
    flags = ["--model", str(pretrained), "--device", "cpu", "-b", "7"]
    outputs = []
    for n in ("0", "2"):
        capfd.readouterr()
        assert main(["knn", str(images), *flags, "--measures", "--nprocs-per-node", n]) == 0
        outputs.append(capfd.readouterr().out)
        embedding = ["embed", str(images), *flags, "-o", str(tmp_path / f"{n}.npy"), "--nprocs-per-node", n]
        Process([sys.executable, "-m", "mocov3", *embedding]).finish()
    assert outputs[0] == outputs[1]
    assert (tmp_path / "0.npy").read_bytes() == (tmp_path / "2.npy").read_bytes()
    assert (tmp_path / "0.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()


def embed(*argv):
    return main(["embed", *map(str, argv), "--device", "cpu", "-j", "0"])


def test_embeddings_are_the_features(images, pretrained, tmp_path):
    import pyarrow.parquet as pq

    data, source = images / "train", scan(images / "train")
    for name in ("a.npy", "a.parquet"):
        assert embed(data, "--model", pretrained, "-o", tmp_path / name, "-b", "10") == 0
    features = np.load(tmp_path / "a.npy")
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [row["path"] for row in rows] == [source.name(i) for i in range(64)]
    assert rows[0]["class"] == "class0"
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.column("path").to_pylist() == [row["path"] for row in rows]
    assert np.array_equal(np.stack(table.column("feature").to_pylist()).astype(np.float32), features)
    frozen = open_frozen(str(pretrained), flag="")
    x = torch.from_numpy(np.stack([CentreView(32)(source.read(i))[0] for i in range(64)])).float() / 255
    mean, std = (torch.tensor(v) for v in (frozen.preset.mean, frozen.preset.std))
    with torch.no_grad():
        direct = frozen.network.features(((x - mean) / std).permute(0, 3, 1, 2)).numpy()
    assert np.abs(features - direct).max() <= 1e-5 * np.abs(direct).max()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert embed(data, "--model", pretrained, "-o", tmp_path / "p.npy", "--layer", "patches") == 0
    patches = np.load(tmp_path / "p.npy")
    assert patches.shape == (64, 4, 256)  # 32 pixels, five halvings but one
    assert np.abs(patches.mean(1) - features).max() < 1e-5
    assert embed(data, "--model", "timm/resnet10t", "--untrained", "--image-size", "32", "-o", tmp_path / "t.npy") == 0
    assert np.load(tmp_path / "t.npy").shape == (64, 512)


def test_layers_of_a_vit(tmp_path):
    write_pretrained(tmp_path / "v.pth.tar", "vit_tiny")
    x = torch.randn(2, 3, 32, 32)
    made = {
        layer: open_frozen(str(tmp_path / "v.pth.tar"), flag="", layer=layer).features(x)
        for layer in ("", "cls", "mean", "patches", "projector")
    }
    torch.testing.assert_close(made[""], made["cls"])  # of the last block only what is asked for is computed
    assert made["patches"].shape == (2, 4, 192)
    assert torch.equal(made["patches"].mean(1), made["mean"])
    assert made["projector"].shape == (2, 16)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX process groups")
def test_embedding_goes_on_after_a_kill(images, pretrained, tmp_path, capsys):
    data = tmp_path / "data"
    for i in range(12):
        shutil.copytree(images / "train", data / str(i))
    flags = ["embed", str(data), "--model", str(pretrained), "--device", "cpu", "-j", "0", "-b", "8"]
    code = (
        "import sys, mocov3.evaluation.embeddings as e; e._FLUSH_SECONDS = 0; "
        "from mocov3.cli import main; sys.exit(main())"
    )
    process = Process([sys.executable, "-c", code, *flags, "-o", str(tmp_path / "killed.npy")])
    marks = tmp_path / ".killed.npy.done"
    process.wait_until(lambda: marks.exists() and sum(marks.read_bytes()) >= 3, pause=0.001)
    process.kill()
    there = sum(marks.read_bytes())
    assert 3 <= there < 96
    assert main([*flags, "-o", str(tmp_path / "killed.npy")]) == 0
    assert f"resuming: {there} of 96" in capsys.readouterr().out
    assert main([*flags, "-o", str(tmp_path / "whole.npy")]) == 0
    assert (tmp_path / "whole.npy").read_bytes() == (tmp_path / "killed.npy").read_bytes()


def test_duplicates_and_unreadable_images(images, pretrained, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(images / "train", data)
    shutil.copy(data / "class1" / "01.png", data / "class2" / "again.png")
    (data / "class0" / "bad.png").write_bytes(b"")
    out = tmp_path / "x.npy"
    assert embed(data, "--model", pretrained, "-o", out, "--duplicates", "0.9999999") == 0
    captured = capsys.readouterr()
    assert "class0/bad.png: the file is empty" in captured.err
    groups = [json.loads(line)["pictures"] for line in (tmp_path / "x.duplicates.jsonl").read_text().splitlines()]
    assert ["class1/01.png", "class2/again.png"] in groups
    features = np.load(out)
    rows = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    broken = [i for i, row in enumerate(rows) if "error" in row]
    assert broken == np.flatnonzero(np.isnan(features).any(1)).tolist() == [rows.index(rows[broken[0]])]
    x = torch.tensor([[1.0, 0], [1, 0.001], [0, 1], [1, 0.002], [0.001, 1], [-1, 0]])
    assert [members for _, members in duplicate_groups(x, 0.999, leave_out=set())] == [[0, 1, 3], [2, 4]]


def test_the_grid_does_not_depend_on_ranks():
    from mocov3.distributed import World

    for n in (0, 1, 10, 11):
        whole = grid(n, 4, World(0, 1, torch.device("cpu")))
        parts = [b for r in range(3) for b in grid(n, 4, World(r, 3, torch.device("cpu")))]
        assert [b.tolist() for b in whole] == [b.tolist() for b in parts]


def test_bad_input(images, pretrained, tmp_path):
    go = ["knn", images, "--device", "cpu", "--model"]
    assert "above the 64" in refused(*go, pretrained, "-k", "65")
    assert "above the 64" in refused(*go, pretrained, "--recall", "100")
    assert "--temperature" in refused(*go, pretrained, "-t", "0")
    assert "1 or more" in refused(*go, pretrained, "-k", "0")
    assert "no such file" in refused(*go, "missing.pth")
    assert "did you mean" in refused(*go, "resnet5")
    assert "no model" in refused("knn", images)
    assert "patches" in refused(*go, pretrained, "--layer", "patches")
    assert "has no cls token" in refused(*go, pretrained, "--layer", "cls")
    assert "has no momentum encoder" in refused(*go, "resnet18", "--encoder", "momentum")
    assert f"give -a {ARCH}" in refused(*go, pretrained, "-a", "resnet18")
    assert "32 or 48" in refused(*go, "vit_small", "--image-size", "40")
    assert "class folders" in refused("knn", images / "train" / "class0", "--model", pretrained)
    assert "timm has no such model" in refused(*go, "timm/resnet10x").replace(__import__("timm").__version__ + " ", "")
    torch.save({"model": {}}, tmp_path / "none.pth")
    assert "no weights" in refused(*go, tmp_path / "none.pth")
    go = ["embed", images, "--device", "cpu", "--model", pretrained]
    assert "ends in .parquet or .npy" in refused(*go, "-o", tmp_path / "x.csv")
    (tmp_path / "there.npy").write_bytes(b"")
    assert "--overwrite" in refused(*go, "-o", tmp_path / "there.npy")
    assert "cannot be written" in refused(*go, "-o", tmp_path / "there.npy" / "x.npy")
    assert "--duplicates must be 0 to 1" in refused(*go, "-o", tmp_path / "y.npy", "--duplicates", "2")
    assert "holds no image" in refused("embed", tmp_path, "--model", pretrained, "-o", tmp_path / "y.npy")
    broken = tmp_path / "nan.pth.tar"
    state = torch.load(pretrained, weights_only=True)
    state["state_dict"]["module.base_encoder.conv1.weight"][:] = torch.nan
    torch.save(state, broken)
    assert "not finite for class0/00.jpg" in refused("knn", images, "--device", "cpu", "--model", broken)
    assert "not finite for" in refused("embed", images, "--model", broken, "-o", tmp_path / "n.npy")


def test_configurations_are_checked():
    KnnConfig(model="pixels").check()
    EmbedConfig(model="vit_small", output="x.parquet").check()
