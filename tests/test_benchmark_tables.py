"""What benchmarks of choices make of their measurements: regret, trials, measures; without training anything."""

import importlib
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from sklearn.linear_model import Ridge

KINDS = ("photographs", "drawings", "clothes")


@pytest.fixture
def program(monkeypatch):
    """Imports a benchmark as when it is called; what that sets is taken back."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(ROOT / "benchmarks") in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def checkpoint(step, knn, retrieval, rankme, loss):
    others = dict.fromkeys(("lidar", "alignment", "uniformity", "dimension"), 0.0)
    return {"step": step, "knn": knn, "retrieval": retrieval, "rankme": rankme, "loss": loss, "alpha": 2.0, **others}


def test_regret_is_what_a_choice_costs_and_a_kind_is_left_out(program):
    choosing = program("choosing")
    # RankMe finds the best where it may choose, but for clothes; the share found again is right there alone
    good = [checkpoint(1, 40, 9, 1, 3.0), checkpoint(2, 50, 1, 9, 2.0), checkpoint(3, 47, 2, 2, 1.0)]
    last = [checkpoint(1, 40, 9, 9, 3.0), checkpoint(2, 50, 9.5, 1, 2.0), checkpoint(3, 44, 2, 2, 1.0)]
    assert [choosing.regret(good, p) for p in ("last checkpoint", "training loss", "RankMe")] == [3, 3, 0]
    assert choosing.regret(good, "share found again") == 10
    text = choosing.tables({kind: {"recipe": last if kind == "clothes" else good} for kind in KINDS})
    rows = dict(line.strip("| ").split(" | ", 1) for line in text.splitlines() if line.startswith("| "))
    assert rows["RankMe"] == "0.0 | 0.0 | 10.0 | 3.33"
    assert rows["last checkpoint"] == "3.0 | 3.0 | 6.0 | 4.00"
    assert rows["best less worst"] == "10.0 | 10.0 | 10.0 | 10.00"
    assert rows["clothes"] == "RankMe | 10.00 | 6.00 | 6.00"  # what the two others choose fails here
    assert text.endswith("9 checkpoints of 3 runs on 3 kinds of images.")


def test_a_race_gives_every_method_its_best_trial(program):
    race = program("race")
    results = {f"look/{name}/{i}": {"knn": 30.0 + (i == 2), "seconds": 240} for name in race.TRIALS for i in range(4)}
    assert {len(trials) for trials in race.TRIALS.values()} == {4}, "as many trials for each"
    assert {race.best_of(name, results) for name in race.TRIALS} == {2}
    runs = {f"a/ours/{seed}": {"knn": 50.0 + seed, "ridge": 40.0, "images": 1000, "seconds": 600} for seed in range(3)}
    text = race.tables(results | runs)
    assert "| ours | 51.0 ± 1.0 | 40.0 ± 0.0 | 1,000 | 10.0 |" in text
    assert text.count("| 31.0 |") == len(race.TRIALS)


def test_the_ridge_probe_is_scikit_learns(program):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 300)
    x = rng.normal(size=(300, 8)) + 1.5 * np.eye(8)[y]
    bank, queries = slice(0, 200), slice(200, 300)
    mean, std = x[bank].mean(0), x[bank].std(0, ddof=1)
    scaled = (x - mean) / std
    theirs = Ridge(alpha=0.01 * 200).fit(scaled[bank], np.eye(3)[y[bank]])
    right = 100 * float((theirs.predict(scaled[queries]).argmax(1) == y[queries]).mean())
    a, b = torch.from_numpy(x).float(), torch.from_numpy(y)
    assert program("equal_time").ridge(a[bank], b[bank], a[queries], b[queries]) == pytest.approx(right, abs=1.01)
