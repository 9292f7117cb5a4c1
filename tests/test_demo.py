"""The demo's length: the recipe's epochs, or what 8 minutes hold on the machine at hand."""

import pytest

from mocov3 import demo
from mocov3.config.recipes import RECIPES
from mocov3.planning import speed
from mocov3.pretraining import task

EPOCHS = RECIPES[demo.RECIPE].settings["epochs"]


@pytest.fixture
def started(monkeypatch):
    """Configurations of the runs that were started, none of which trains."""
    configs = []
    monkeypatch.setattr(task, "main", lambda config, script_door: configs.append(config) or 7)
    return configs


@pytest.mark.parametrize(("training", "loading", "epochs"), [(2.0, 0.5, EPOCHS), (9.0, 1.0, 45), (500.0, 1.0, 6)])
def test_a_slow_machine_trains_as_long_as_8_minutes_hold(
    started, monkeypatch, tmp_path, capsys, training, loading, epochs
):
    monkeypatch.setattr(speed, "epoch_seconds", lambda *_, best: (training, loading, 128))
    assert demo.main(["--output-dir", str(tmp_path)]) == 7
    assert started[0].epochs == epochs
    assert started[0].epochs > started[0].warmup_epochs
    said = capsys.readouterr().out
    assert (f"{epochs} epochs instead of {EPOCHS}" in said) == (epochs < EPOCHS)


def test_epochs_can_be_given(started, monkeypatch, tmp_path):
    monkeypatch.setattr(speed, "epoch_seconds", lambda *_, **__: pytest.fail("measured without need"))
    for asked, warmup in (("3", 0), ("120", 5)):
        demo.main(["--output-dir", str(tmp_path), "--epochs", asked])
        assert started[-1].epochs == int(asked)
        assert started[-1].warmup_epochs == warmup


def test_a_run_that_goes_on_keeps_its_epochs(started, monkeypatch, tmp_path):
    (tmp_path / "config.yaml").write_text("epochs: 33\n")
    monkeypatch.setattr(speed, "epoch_seconds", lambda *_, best: (0.1, 0.1, 128))
    demo.main(["--output-dir", str(tmp_path), "--resume"])
    demo.main(["--output-dir", str(tmp_path)])
    assert [config.epochs for config in started] == [33, EPOCHS]


def test_the_speed_is_measured(tmp_path):
    """A real measurement: an epoch of the demo takes seconds, not milliseconds or hours."""
    from mocov3.config.command_lines import parse_pretrain
    from mocov3.data import FashionMnist

    config = parse_pretrain(["fashion-mnist", "--recipe", demo.RECIPE, "--output-dir", str(tmp_path)], prog="t")
    training, loading, batch = speed.epoch_seconds(config, FashionMnist("train"), 8000)
    assert 0.2 < training < 600
    assert 0.05 < loading < 60
    assert batch == 128
