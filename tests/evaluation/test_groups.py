"""Groups: images that belong together (here copies) never vote for each other, nor are trained and judged apart."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from doors import refused
from evaluating import write_pretrained
from PIL import Image

from mocov3.cli import main
from mocov3.data.loading.labelled import open_labelled
from mocov3.data.loading.order import hold_out
from mocov3.data.loading.supervised import stratified
from mocov3.data.sources.groups import groups_in, groups_of, suggested, without_shared
from mocov3.data.sources.opening import Roots, Subset, field_groups, open_source, scan
from mocov3.data.sources.transfer import open_pair
from mocov3.errors import UserError
from mocov3.evaluation.intervals import interval, interval_of, mean_by_groups
from mocov3.evaluation.paired import Paired
from mocov3.evaluation.quality import retrieval

PATIENT = r"(patient\d+)_"
CHANCE = (20, 80)  # of two classes over 40 groups: five standard deviations


@pytest.fixture(scope="module")
def patients(tmp_path_factory):
    """40 patients of noise and a class drawn for each: two copies of the image in train, one in val; 20 more in val."""
    root, rng = tmp_path_factory.mktemp("patients"), np.random.default_rng(0)
    classes = rng.permutation(np.arange(60) % 2)
    rows = ["file,patient"]
    for number, kind in enumerate(classes.tolist()):
        image = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        for copy in range(3):
            part = "val" if copy == 2 or number >= 40 else "train"
            path = root / "data" / part / f"class{kind}" / f"patient{number}_{copy}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
            rows.append(f"{part}/class{kind}/{path.name},P{number}")
    (root / "meta.csv").write_text("\n".join(rows))
    return root


@pytest.fixture(params=["names", "table"])
def group_by(request, patients):
    return PATIENT if request.param == "names" else f"{patients / 'meta.csv'}:patient"


def knn(capsys, *argv):
    capsys.readouterr()
    flags = ["--model", "pixels", "--image-size", "16", "-k", "1", "--device", "cpu", "-j", "0", "--json"]
    assert main(["knn", *map(str, argv), *flags]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_knn_does_not_see_copies(patients, group_by, capsys):
    train = patients / "data" / "train"
    leaking = knn(capsys, train)
    assert leaking["accuracy"][0]["accuracy"] == leaking["recall"]["1"] == 100
    honest = knn(capsys, train, "--group-by", group_by)
    assert CHANCE[0] < honest["accuracy"][0]["accuracy"] < CHANCE[1]
    assert honest["groups"] == 40
    low, high = honest["accuracy"][0]["interval"]
    wilson = interval(round(0.8 * honest["accuracy"][0]["accuracy"]), 80)
    assert high - low > 1.2 * (wilson[1] - wilson[0]), "copies agree: they count as one"
    # between parts: 40 of the 100 validation images have their copy in the bank, 60 (20 patients) have none
    data = patients / "data"
    assert knn(capsys, data)["accuracy"][0]["accuracy"] > 40 + 0.6 * CHANCE[0]
    assert CHANCE[0] < knn(capsys, data, "--group-by", group_by)["accuracy"][0]["accuracy"] < CHANCE[1]


def test_compare_does_not_see_copies(patients, tmp_path, capsys):
    write_pretrained(tmp_path / "net.pth.tar")
    train, rows = patients / "data" / "train", {}
    for by in ("", PATIENT):
        capsys.readouterr()
        flags = ["--device", "cpu", "-j", "0", "--json", "--group-by", by]
        assert main(["compare", str(tmp_path / "net.pth.tar"), str(train), *flags]) == 0
        lines = map(json.loads, capsys.readouterr().out.splitlines())
        rows[by] = {line["kind"]: line for line in lines}
    for kind in ("pixels", "checkpoint"):
        assert rows[""][kind]["knn"] > 95  # the copy outweighs 19 others
        assert CHANCE[0] < rows[PATIENT][kind]["knn"] < CHANCE[1]
        # a copy in the same place looks alike: it hides its image until it counts as the same
        assert rows[""][kind]["retrieval"] <= rows[PATIENT][kind]["retrieval"]
    assert rows[PATIENT]["pixels"]["labelled_groups"] == 40


def test_while_training(patients):
    from unittest.mock import create_autospec

    import torch

    from mocov3 import models
    from mocov3.config import PretrainConfig
    from mocov3.distributed import World
    from mocov3.pretraining.inputs import check
    from mocov3.pretraining.log import PretrainingLog
    from mocov3.pretraining.online_knn import OnlineKnn

    config = PretrainConfig(data=str(patients / "data"), arch="resnet10_w16", image_size=32, workers=0, knn_every=1)
    log = create_autospec(PretrainingLog, instance=True, takes_images=True)
    model = models.build(config.arch, dim=8, mlp_dim=8, image_size=32)
    accuracy = {}
    for by in ("", PATIENT):
        world, source = World(0, 1, torch.device("cpu")), open_source(config.data, "train")
        accuracy[by] = OnlineKnn(replace(config, group_by=by), world, model, source, log).knn(0)
    assert accuracy[""] > 38 + 0.6 * CHANCE[0]  # 40 of 100 validation images have copies in training
    assert CHANCE[0] < accuracy[PATIENT] < CHANCE[1]
    assert accuracy[PATIENT] < accuracy[""]
    partial = replace(config, group_by=f"{patients / 'train_only.csv'}:patient", output_dir=str(patients), batch_size=8)
    lines = (patients / "meta.csv").read_text().splitlines()
    (patients / "train_only.csv").write_text("\n".join(line for line in lines if not line.startswith("val")))
    with pytest.raises(UserError, match="100 of 180 images have no row, first class"):
        check(partial, script_door=True)


def test_embeddings_say_their_groups(patients, tmp_path):
    import pyarrow.parquet as pq

    train = patients / "data" / "train"
    for name in ("a.npy", "a.parquet"):
        flags = ["--model", "pixels", "--image-size", "16", "--device", "cpu", "-j", "0", "-o", str(tmp_path / name)]
        assert main(["embed", str(train), *flags, "--group-by", f"{patients / 'meta.csv'}:patient"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    wanted = [f"P{re.search(r'patient([0-9]+)_', line['path'])[1]}" for line in lines]
    assert [line["group"] for line in lines] == wanted
    assert pq.read_table(tmp_path / "a.parquet").column("group").to_pylist() == wanted


def test_linear_evaluation_leaves_out_who_was_trained_on(patients, group_by, tmp_path, capsys):
    data, best = patients / "data", {}
    for name, flags in (("leaking", []), ("honest", ["--group-by", group_by])):
        capsys.readouterr()
        out = tmp_path / name
        common = ["-a", "pixels", "--image-size", "16", "--cache-features", "--solver", "lbfgs", "--epochs", "1"]
        more = ["--device", "cpu", "-j", "0", "--seed", "0", "--output-dir", str(out)]
        assert main(["lincls", str(data), *common, *more, *flags]) == 0
        best[name] = json.loads((out / "lincls.json").read_text())["best"]["acc1"]
    assert "40 of 100 validation images are of groups that training has; left out" in capsys.readouterr().err
    assert best["leaking"] > 40 + 0.6 * CHANCE[0]
    assert CHANCE[0] < best["honest"] < CHANCE[1]


def test_fine_tuning_and_evaluation_leave_them_out_too(patients, group_by, tmp_path, capsys):
    data = str(patients / "data")
    for parts in (open_labelled(data, group_by), open_pair("folder", data, group_by)[:2]):
        assert [len(part) for part in parts] == [80, 60]
        assert not {re.search(PATIENT, parts[0].name(i))[1] for i in range(80)} & {
            re.search(PATIENT, parts[1].name(i))[1] for i in range(60)
        }
    assert [len(part) for part in open_labelled(data)] == [80, 100]
    # a part of which nothing would be left
    for part in ("train", "val"):
        (tmp_path / part).symlink_to(patients / "data" / "train")
    assert "80 of 80 validation images" in refused(
        "lincls", tmp_path, "-a", "pixels", "--group-by", r"(patient\d+)_", "--output-dir", tmp_path
    )


def test_fractions_and_held_out_images_are_whole_groups(patients):
    train = open_source(str(patients / "data"), "train")
    patient = np.array([re.search(PATIENT, train.name(i))[1] for i in range(len(train))])
    small, large = stratified(train, 0.2, PATIENT), stratified(train, 0.5, PATIENT)
    assert set(small.indices) < set(large.indices)
    for part, share in ((small, 0.2), (large, 0.5)):
        inside = np.isin(np.arange(len(train)), part.indices)
        assert not set(patient[inside]) & set(patient[~inside])
        for label in (0, 1):
            assert abs((part.labels == label).sum() - share * (train.labels == label).sum()) <= 2
    kept, held = hold_out(train, 20, PATIENT)
    assert isinstance(held, Subset)
    assert not set(patient[kept.indices]) & set(patient[held.indices])


def test_intervals_and_pairs_resample_groups():
    rng = np.random.default_rng(3)
    groups = np.repeat(np.arange(30), 5)
    right = np.repeat(rng.random(30) < 0.7, 5)
    low, high = interval_of(right, groups)
    alone = interval_of(right[::5], np.arange(30))
    assert (low, high) == pytest.approx(alone, abs=1e-9), "five equal copies say as much as one"
    narrow = interval_of(right, None)
    assert high - low > 1.8 * (narrow[1] - narrow[0])
    # the deviation of the mean of independent groups is that of the textbook
    spread = mean_by_groups(right.astype(float), groups).std()
    assert spread == pytest.approx(right[::5].std() / np.sqrt(30), rel=0.1)
    assert interval_of(np.ones(150, bool), groups) == pytest.approx(interval(30, 30))
    import torch

    before, after = torch.from_numpy(right), torch.from_numpy(np.roll(right, 5))
    one, grouped = Paired.of(before, after), Paired.of(before, after, groups)
    assert grouped.drop == one.drop
    assert grouped.least < one.least <= one.most < grouped.most
    assert Paired.from_dict(json.loads(json.dumps(grouped.as_dict()))) == grouped
    same = Paired.of(before, before, groups)
    assert same.most == -same.least == pytest.approx(Paired(30, 0, 0, 0).most)


def test_copies_are_not_mistaken_for_a_miss():
    import torch

    x = torch.randn(20, 8).repeat_interleave(2, 0)  # every image twice
    assert retrieval(x, x) == 0
    assert retrieval(x, x, np.repeat(np.arange(20), 2)) == 100


def test_fields_of_files(tmp_path):
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    def image(value):
        file = io.BytesIO()
        Image.new("RGB", (8, 8), (value,) * 3).save(file, "PNG")
        return file.getvalue()

    def table(name, patients):
        columns = {"image": [image(10 * i) for i in range(len(patients))], "patient": patients}
        pq.write_table(pa.table(columns), tmp_path / name)
        return open_source(str(tmp_path / name))

    first, second = table("a.parquet", ["x", "y", "x", None]), table("b.parquet", ["y", "z"])
    assert groups_in(first, "patient").tolist() == [0, 1, 0, 2]
    assert [part.tolist() for part in groups_of((first, second), "patient")] == [[0, 1, 0, 2], [1, 3]]
    both = Roots([first, second], [1, 1])
    assert groups_in(Subset(both, np.array([1, 3, 4, 5])), "patient").tolist() == [0, 1, 0, 2]
    assert field_groups(both, "nothing") is None


class OwnGroups(Subset):
    """A source that says groups without being asked, as DICOM does."""

    def groups(self, field):
        return np.array([f"{i // 2}" for i in range(len(self))], object) if field in ("", "PatientID") else None


def test_groups_of_the_images_themselves(patients):
    own = OwnGroups(scan(patients / "data" / "train"), np.arange(10))
    assert groups_in(own, "").tolist() == groups_in(own, "PatientID").tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert groups_in(own, "none") is None
    assert groups_in(Subset(own, np.arange(10)), "").max() == 4
    assert groups_in(own.whole, "") is None


def test_one_patient_alone_is_judged_within_and_that_is_said(patients):
    part = OwnGroups(scan(patients / "data" / "train"), np.arange(2))
    assert groups_in(part, "") is None
    judged = without_shared(part, part, "", "data x")
    assert len(judged) == 2
    assert judged.skipped == [
        "data x: all images, of training too, are of one group of their own; they are judged within it"
    ]
    assert without_shared(part, part, "none", "data x") is part


def test_what_cannot_be_used(patients, tmp_path):
    train = open_source(str(patients / "data"), "train")
    meta = patients / "meta.csv"
    partial, twice = tmp_path / "partial.csv", tmp_path / "twice.csv"
    lines = meta.read_text().splitlines()
    partial.write_text("\n".join([line for line in lines if "patient7_" not in line]))
    twice.write_text("\n".join([*lines, lines[1].replace("P0", "P1")]))
    for by, said in (
        ("(", "is not a regular expression"),
        ("subject", "matches no name, as class0/patient"),
        (r"(patient)\d+", "puts all images into one group"),
        (str(meta), "name a column of it"),
        (f"{meta}:pateint", "has no column pateint; did you mean patient"),
        (f"{tmp_path}/none.csv:patient", "there is no such file"),
        (f"{partial}:patient", "2 of 80 images have no row, first class"),
        (f"{twice}:patient", f"line {len(lines) + 1}: puts an image into another group"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            groups_in(train, by)
    # what says nothing of other images is no groups of those
    assert groups_in(train, "subject", needed=False) is None


def test_names_suggest_groups(patients, tmp_path, capsys):
    names = [f"{kind}/patient{i}_slice{j:03d}.png" for kind in "ab" for i in range(5) for j in range(4)]
    pattern, count = suggested(names)
    assert count == 10
    assert re.search(pattern, "a/patient12_slice003.png")[1] == "a/patient12"
    pattern, count = suggested(names, in_classes=True)  # a patient may have images of both
    assert count == 5
    assert re.search(pattern, "a/patient12_slice003.png")[1] == "patient12"
    assert suggested([f"patient{i}/{j:03d}.png" for i in range(9) for j in range(5)])[1] == 9
    assert suggested([f"{c}/p{i}/{j}.png" for c in "ab" for i in range(4) for j in range(3)], in_classes=True)[1] == 4
    for innocent in (
        [f"ISIC_{j:07d}.jpg" for j in range(99)],
        [f"n0144{i}764/n0144{i}764_{j}.JPEG" for i in range(9) for j in range(5)],
        [f"cat/{j}.png" for j in range(9)] + [f"dog/{j}.png" for j in range(9)],
        [f"class{i}/{j}.png" for i in range(9) for j in range(5)],
        [f"ILSVRC2012_val_{j:08d}.JPEG" for j in range(9)],
    ):
        assert suggested(innocent) is suggested(innocent, in_classes=True) is None, innocent[0]
    train = patients / "data" / "train"
    assert main(["check", str(train), "--sheet", str(tmp_path / "s.png"), "--device", "cpu", "-j", "0"]) == 0
    said = capsys.readouterr().out
    assert "names look like 40 groups" in said
    given = re.search(r"give --group-by '(.*?)'", said)[1]
    assert groups_in(scan(train), given).max() == 39
