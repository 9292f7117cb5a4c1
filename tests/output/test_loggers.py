"""TensorBoard, W&B and MLflow behind the same three calls, without a network; and what happens when one fails."""

import json
import time

import numpy as np
import pytest
from conftest import TINY

from mocov3.cli import main
from mocov3.config import logger_names
from mocov3.errors import UserError
from mocov3.output.loggers import _OPEN, Loggers, _run_id

IMAGE = np.arange(8 * 6 * 3, dtype=np.uint8).reshape(8, 6, 3)


def said():
    lines = []
    return lines, lines.append


def use(folder, name, *, first_step=0, steps=range(5)):
    """Log a little and close."""
    lines, warn = said()
    loggers = Loggers(
        [name], folder, config={"lr": 0.3, "seed": None, "data": "a|b"}, first_step=first_step, quiet=True, warn=warn
    )
    for step in steps:
        loggers.scalars({"loss": 10.0 - step, "knn": None}, step)
    loggers.image("views", IMAGE, steps[-1])
    loggers.close()
    assert lines == []


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    found.Reload()
    return found


def test_tensorboard(tmp_path):
    import io

    from PIL import Image

    use(tmp_path, "tensorboard")
    # TensorBoard reads event files by name: the second of their start, then the process, then how many it has opened
    # (10 before 9). A resumed run starts in a process of its own, seconds later.
    time.sleep(1.01 - time.time() % 1)
    use(tmp_path, "tensorboard", first_step=3, steps=range(3, 7))  # steps 3 and 4 never happened
    found = events(tmp_path)
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [(i, 10.0 - i) for i in range(7)]
    image = Image.open(io.BytesIO(found.Images("views")[-1].encoded_image_string))
    assert np.array_equal(np.asarray(image), IMAGE)
    assert "a b" in found.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    use(tmp_path, "wandb")
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    run = (tmp_path / "logger_run.txt").read_text().strip()
    assert file.stem == f"run-{run}"
    assert _run_id(tmp_path, 3) == run  # a resumed run is the same there
    history, config = wandb_records(file)
    assert [(row["step"], row["loss"]) for row in history if "loss" in row] == [(i, 10.0 - i) for i in range(5)]
    assert any(value == "image-file" for row in history for value in row.values())
    assert config["lr"] == 0.3
    images = list(file.parent.glob("files/media/images/*.png"))
    assert len(images) == 1


def wandb_records(file):
    """(rows of history, configuration) of an offline run's file, once W&B's own process has written it out."""
    records, end = [], time.monotonic() + 60
    while not records or records[-1].WhichOneof("record_type") != "exit":
        assert time.monotonic() < end, "the file has no end"
        time.sleep(0.02)
        records = wandb_parsed(file.read_bytes())
    rows = [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in r.history.item}
        for r in records
        if r.WhichOneof("record_type") == "history"
    ]
    config = next(r.run.config for r in records if r.WhichOneof("record_type") == "run")
    return rows, {item.key: json.loads(item.value_json) for item in config.update}


def wandb_parsed(data):
    """Records in LevelDB's log format (blocks of 32 KiB, heads of 7 bytes) behind a head of the file."""
    from wandb.proto import wandb_internal_pb2

    at, records, part = 7, [], b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4) and at <= len(data):  # whole, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            records.append(record)
            part = b""
    return records


def test_mlflow_in_files(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "clothes")
    use(tmp_path, "mlflow")
    use(tmp_path, "mlflow", first_step=3, steps=range(3, 7))
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("clothes")
    (run,) = client.search_runs([experiment.experiment_id])  # the resumed run is the same
    assert run.info.status == "FINISHED"
    assert run.data.params["lr"] == "0.3"
    history = {(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")}
    assert history == {(i, 10.0 - i) for i in range(7)}
    assert any(f.path.endswith(".png") for f in client.list_artifacts(run.info.run_id, "images"))


def test_a_run_logs_numbers_and_images(images, tmp_path):
    argv = ["pretrain", str(images), *TINY, "--knn-every", "2", "--quality-every", "2", "--output-dir", str(tmp_path)]
    assert main([*argv, "--logger", "tensorboard"]) == 0
    found = events(tmp_path)
    tags = found.Tags()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [e.value for e in found.Scalars("knn")] == pytest.approx([lines[-1]["knn"]])
    # every number of metrics.jsonl under its name, whatever the schema holds
    numbers = {k for line in lines for k, v in line.items() if isinstance(v, int | float)}
    numbers -= {"step", "epoch", "iteration", "version"}
    assert {"effective_rank", "skipped", "corrupt", "resumed", "feature_std"} <= numbers
    scalars = set(tags["scalars"])
    assert {name for name in scalars if not name.startswith("quality/")} == numbers
    assert {"quality/retrieval", "quality/rankme"} <= scalars
    assert [e.value for e in found.Scalars("effective_rank")] == pytest.approx(
        [line["effective_rank"] for line in lines if line["knn"] is None]
    )
    assert set(tags["images"]) == {"views", "neighbours"}
    (views,), (neighbours,) = found.Images("views"), found.Images("neighbours")
    assert (views.step, views.width) == (0, 940)
    assert (neighbours.step, neighbours.width, neighbours.height) == (7, 912, 820)


class Failing:
    """A logger whose server goes away after some calls."""

    def __init__(self, *_):
        self.calls = 0

    def scalars(self, values, step):
        self.calls += 1
        if self.calls > 2:
            raise ConnectionError("the server\nis gone")

    image = scalars

    def close(self):
        raise AssertionError("was given up before")


def test_a_failing_logger_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setitem(_OPEN, "wandb", Failing)
    lines, warn = said()
    loggers = Loggers(["wandb"], tmp_path, config={}, first_step=0, quiet=True, warn=warn)
    for step in range(6):
        loggers.scalars({"loss": 1.0}, step)
    loggers.close()
    assert lines == ["logger wandb is disabled (the server)"]
    assert not loggers


def test_one_that_cannot_be_opened(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("no key\nlong story")

    monkeypatch.setitem(_OPEN, "mlflow", broken)
    lines, warn = said()
    with pytest.raises(UserError, match=r"--logger mlflow: cannot be opened \(no key\)"):
        Loggers(["mlflow"], tmp_path, config={}, first_step=0, quiet=True, warn=warn)
    # a run that goes on, perhaps alone at night, does so
    assert not Loggers(["mlflow"], tmp_path, config={}, first_step=5, quiet=True, warn=warn)
    assert len(lines) == 1


def test_an_mlflow_server_that_goes_away_stops_nothing(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    lines, warn = said()
    loggers = Loggers(["mlflow"], tmp_path, config={}, first_step=0, quiet=True, warn=warn)

    def gone(*_, **__):
        raise ConnectionError("connection refused")

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", gone)
    for step in range(3):
        loggers.scalars({"loss": 1.0}, step)
    loggers.close()
    assert lines == ["logger mlflow is disabled (connection refused)"]


def test_names(monkeypatch):
    assert logger_names("") == logger_names("none") == ()
    assert logger_names("tensorboard,tensorboard") == ("tensorboard",)
    with pytest.raises(UserError, match=r"'wandbb' is not known; did you mean wandb\?"):
        logger_names("tensorboard,wandbb")
    monkeypatch.setattr("mocov3.config.loggers.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'mocov3\[mlflow\]'"):
        logger_names("mlflow")
