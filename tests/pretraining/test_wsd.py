"""Warm-up, stable, decay: its rates, the clock that decides, decisions that survive kills, runs that are prolonged."""

import itertools
import json
import math
import random
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY
from doors import refused
from killing import Process, assert_same_run, difference, kill_until_done, steady

from mocov3.cli import main
from mocov3.cli.commands import chosen
from mocov3.config import PretrainConfig, read_yaml
from mocov3.config.cheap import ends_of
from mocov3.config.command_lines import read_pretrain
from mocov3.config.schedule import STABLE, decays_of, decays_text
from mocov3.distributed import World
from mocov3.errors import UserError
from mocov3.pretraining.length import Clock, Length
from mocov3.pretraining.loop import Pretraining
from mocov3.schedules import Decay, decay_progress, stable_rate
from mocov3.weights.checkpoint import Position, listed, read

ALONE = World(0, 1, torch.device("cpu"))
SMALL = [*TINY, "-a", "resnet10_w16", "--schedule", "wsd", "--moco-m-cos"]
OF_A_RUN = ("config", "resumed", "run", "seconds")


def test_rates_are_flat_and_then_fall():
    config = PretrainConfig(schedule="wsd", epochs=10, warmup_epochs=2, lr=0.6, batch_size=256, moco_m_cos=True)
    length = Length(config, ALONE, 10)
    rates = []
    for step in range(100):
        rates.append(length.rates(step / 10, step))
        if decay := length.due(Position(0, 0, step + 1)):
            assert decay.decays == (Decay(80, 20),)
            length.take(decay)
    lr, m = zip(*rates, strict=True)
    assert lr[:20] == pytest.approx([0.6 * step / 20 for step in range(20)])
    assert lr[20:80] == pytest.approx([0.6] * 60)
    assert lr[80:] == pytest.approx([0.6 * (1 - math.sqrt(i / 20)) for i in range(20)])
    assert m[:80] == pytest.approx([0.99] * 80)
    assert m[80:] == pytest.approx([1 - 0.01 * (1 + math.cos(math.pi * i / 20)) / 2 for i in range(20)])
    assert length.is_over(Position(10, 0, 100))
    assert not length.is_over(Position(9, 9, 99))


def test_a_corrected_decay_goes_on_from_where_it_is():
    decays = [Decay(100, 40), Decay(110, 15), Decay(120, 20)]
    assert decays_of(decays_text(decays)) == decays
    assert [decay_progress(step, decays) for step in (0, 100, 104, 110)] == pytest.approx([0, 0, 0.1, 0.25])
    assert decay_progress(116, decays) == pytest.approx(0.25 + 0.75 * 0.4)
    assert decay_progress(120, decays) == pytest.approx(0.75)
    assert decay_progress(130, decays) == pytest.approx(0.875)
    assert decay_progress(140, decays) == 1
    assert stable_rate(5, 0.25, peak=0.8, warmup_epochs=0) == pytest.approx(0.4)


class Watch:
    """A clock that is moved by hand."""

    def __init__(self):
        self.seconds = 1000.0

    def __call__(self):
        return self.seconds


@pytest.mark.parametrize("epochs", [3, 100])  # expected; the clock's shares are of the time
@pytest.mark.parametrize("cheap", ["", "16:0.3,24:0.2"])
@pytest.mark.parametrize("disturbed", ["never", "early", "late", "in turns", "from the decay on", "at the end"])
def test_the_end_is_within_the_budget_though_the_machine_is_disturbed(disturbed, cheap, epochs):
    budget, now = 600.0, Watch()
    clock = Clock(budget, began=0, now=now)
    clock._start = now()  # whatever the time of day
    sizes = {"image_size": 32, "image_size_schedule": cheap}
    config = PretrainConfig(
        schedule="wsd", batch_size=256, epochs=epochs, warmup_epochs=0, recipe="auto", budget="10m", **sizes
    )
    length = Length(config, ALONE, 50, clock)
    rng = random.Random(0)
    when = {
        "never": lambda t: False,
        "early": lambda t: t < 1 / 3,
        "late": lambda t: 1 / 3 < t < 2 / 3,
        "in turns": lambda t: t * 9 % 3 < 1,
        "from the decay on": lambda t: t > 0.8,
        "at the end": lambda t: t > 0.9,
    }[disturbed]
    step, times, expected = 0, [], []
    assert length.expected(0) == config.epochs * 50  # until the pace is known
    while not length.is_over(at := Position(step // 50, step % 50, step)):
        cost = length.stage(at).image_size ** 2 / 32**2
        step += 1
        now.seconds += 0.2 * cost * rng.uniform(0.8, 1.3) * (2 if when(clock.spent() / budget) else 1)
        if decisions := length.due(Position(step // 50, step % 50, step)):
            length.take(decisions)
            times.append(clock.spent())
            now.seconds += 0.3  # writing it
        expected.append(length.expected(step))
    assert clock.spent() == pytest.approx(budget, rel=0.03)
    assert expected[-1] == step
    if disturbed == "never" and not cheap:
        assert expected[len(expected) // 2 :] == pytest.approx([step] * (len(expected) - len(expected) // 2), rel=0.05)
    decays, ends = length.decisions
    assert 1 <= len(decays) <= 6
    shares = (0.3, 0.5, 0.8) if cheap else (0.8,)
    assert times[: len(shares)] == pytest.approx([share * budget for share in shares], rel=0.02)
    if cheap:
        assert [length.stage(Position(0, 0, s)).image_size for s in (ends[0] - 1, *ends)] == [16, 24, 32]
    else:
        assert 0.08 < decays[0].steps / decays[-1].end < 0.3


def test_time_down_does_not_count():
    now = Watch()
    clock = Clock(100, began=0, before=30.0, now=now)
    first = clock.spent()
    now.seconds += 5
    assert clock.spent() - first == pytest.approx(5)
    fresh = Clock(100, began=0, now=now)
    assert clock.spent() - fresh.spent() == pytest.approx(35, abs=0.1)


def test_a_decision_that_the_disk_refused_waits_a_while():
    """Every rank is told the same; a tenth of a second is a hundredth of the decay here."""
    now = Watch()
    config = PretrainConfig(schedule="wsd", warmup_epochs=0, recipe="auto", budget="50s", decay_share=0.2)
    length = Length(config, ALONE, 10, Clock(50.0, began=math.inf, now=now))
    asked = []
    for step in range(1, 900):  # no end: nothing is followed that is not kept
        now.seconds += 0.05
        before = length.decisions
        if decisions := length.due(Position(0, 0, step)):
            asked.append(now() - 1000)
            length.take(decisions)
            length.take(before)
            length.postpone(step)
        assert not length.is_over(Position(0, 0, step))
    assert asked[0] == pytest.approx(0.8 * 49.5, abs=0.1)
    assert len(asked) >= 20
    assert min(b - a for a, b in itertools.pairwise(asked)) >= 0.1


def test_a_budget_is_not_exceeded_by_more_than_a_fifth(images, tmp_path, monkeypatch, capsys):
    """The disk stays full, so that the decay never begins."""
    monkeypatch.setattr(Pretraining, "flushed", lambda self: "full" if self.config.decay else "")
    flags = [str(images), *SMALL, "--budget", "4s", "--epochs", "100000", "--output-dir", str(tmp_path)]
    began = time.monotonic()
    assert main(["pretrain", *flags]) == 0
    assert 4 < time.monotonic() - began < 15
    assert recorded(tmp_path) == ""


def run(images, folder, *flags):
    assert main(["pretrain", str(images), *SMALL, *flags, "--output-dir", str(folder)]) == 0
    return folder


def recorded(folder, name="decay"):
    return read_yaml(folder / "config.yaml", PretrainConfig)[name]


@pytest.fixture(scope="module")
def plain(images, tmp_path_factory):
    """Four epochs of 4 steps by their number: the decay begins before step 13."""
    return run(images, tmp_path_factory.mktemp("plain"), "--epochs", "4")


def last_of(folder):
    return listed(folder)[0].name


def test_resumes_across_the_decay_are_bit_exact(images, plain, tmp_path):
    for steps in ("12", "13", "15", "0"):
        run(images, tmp_path, "--epochs", "4", "--max-steps", steps, "--resume", "auto")
    assert_same_run(plain, tmp_path, last="checkpoint_0003.pth.tar", ignore=OF_A_RUN)
    assert recorded(plain) == recorded(tmp_path) == "13:3"
    rates = [line["lr"] for line in steady(plain)]
    assert rates[12] == pytest.approx(rates[5])
    assert 0 < rates[15] < rates[14] < rates[13] == pytest.approx(rates[12])
    files = [read(folder / STABLE) for folder in (plain, tmp_path)]
    assert not difference(*files, ignore=OF_A_RUN)
    assert files[0]["mocov3"]["step"] == 13


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX process groups")
def test_a_run_that_is_prolonged_and_killed_is_the_longer_run(images, plain, tmp_path):
    def argv(folder):
        flags = ["--prolong", str(plain), "--epochs", "12", "--checkpoint-steps", "2", "--output-dir", str(folder)]
        return [sys.executable, "-m", "mocov3", "pretrain", *flags, "--resume", "auto", "--quiet"]

    whole = run(images, tmp_path / "whole", "--epochs", "12")
    report = kill_until_done(argv, tmp_path / "on", kills=1, rng=random.Random(1), within=0.3)
    assert report.kills == 1
    assert recorded(tmp_path / "on") == recorded(whole) == "38:10"
    a, b = (torch.load(f / "checkpoint_0011.pth.tar", weights_only=True) for f in (tmp_path / "on", whole))
    assert not difference(a, b, ignore=OF_A_RUN)
    assert steady(tmp_path / "on") == steady(whole)[13:]


def budgeted(images, budget, *flags):
    def argv(folder):
        command = [sys.executable, "-m", "mocov3", "pretrain", str(images), *SMALL, "--budget", budget, *flags]
        return [*command, "--checkpoint-steps", "2", "--output-dir", str(folder), "--resume", "auto", "--quiet"]

    return argv


def assert_equal_from_the_decisions(images, folder, again, *flags):
    """A run by the recorded decisions, without a clock, is the run."""
    decays = decays_of(recorded(folder))
    last = last_of(folder)
    entry = read(folder / last)["mocov3"]
    assert entry["step"] == decays[-1].end
    assert entry["config"]["decay"] == recorded(folder)
    assert read(folder / STABLE)["mocov3"]["step"] == decays[0].step
    config = ["--config", str(folder / "config.yaml"), *flags, "--output-dir", str(again)]
    Process([sys.executable, "-m", "mocov3", "pretrain", *config]).finish()
    assert_same_run(again, folder, last=last, ignore=OF_A_RUN)
    assert not difference(*(read(f / STABLE) for f in (folder, again)), ignore=OF_A_RUN)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX process groups")
def test_killed_by_the_clock_is_bit_equal_from_the_recorded_decisions(images, tmp_path):
    report = kill_until_done(budgeted(images, "5s"), tmp_path / "killed", kills=2, rng=random.Random(4), within=0.5)
    assert report.kills >= 1
    assert_equal_from_the_decisions(images, tmp_path / "killed", tmp_path / "again")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX process groups")
def test_ranks_share_the_decision(images, tmp_path):
    """Also of a cheap part, which the clock ends within an epoch or after it."""
    flags = "--nprocs-per-node", "2", "--image-size-schedule", "16:0.5"
    two = tmp_path / "two"
    Process(budgeted(images, "5s", *flags)(two)).finish()
    (end,) = ends_of(recorded(two, "stage_ends"))
    assert 0 < end <= decays_of(recorded(two))[0].step
    assert read(two / last_of(two))["mocov3"]["config"]["stage_ends"] == str(end)
    assert_equal_from_the_decisions(images, two, tmp_path / "again", *flags[:2])
    assert recorded(tmp_path / "again", "stage_ends") == str(end)


def test_a_prolonged_run_keeps_the_cheap_parts_that_had_ended(images, tmp_path):
    flags = [*SMALL, "--image-size-schedule", "16:0.3,24:0.5", "--stage-ends", "3", "--decay", "6:2"]
    assert main(["pretrain", str(images), *flags, "--epochs", "6", "--output-dir", str(tmp_path / "a")]) == 0
    on = ["--prolong", str(tmp_path / "a"), "--budget", "1h", "--max-steps", "8", "--output-dir", str(tmp_path / "b")]
    assert main(["pretrain", *on]) == 0
    assert (recorded(tmp_path / "b"), recorded(tmp_path / "b", "stage_ends")) == ("", "3")
    by_epochs = [*on[:2], "--epochs", "12", "--max-steps", "8", "--output-dir", str(tmp_path / "c")]
    assert main(["pretrain", *by_epochs]) == 0  # the second part ends after 0.8 of the epochs
    assert recorded(tmp_path / "c", "stage_ends") == "3,40"


@pytest.mark.parametrize("more", [["--budget", "1h"], ["--epochs", "20"]])
def test_a_run_by_epochs_does_not_go_back_to_its_cheap_part(images, tmp_path, more):
    flags = [*SMALL, "--image-size-schedule", "16:0.5", "--epochs", "4", "--decay-share", "0.25"]
    assert main(["pretrain", str(images), *flags, "--output-dir", str(tmp_path / "a")]) == 0
    assert read(tmp_path / "a" / STABLE)["mocov3"]["step"] == 12
    on = ["--prolong", str(tmp_path / "a"), *more, "--max-steps", "14", "--output-dir", str(tmp_path / "b")]
    assert main(["pretrain", *on]) == 0
    assert recorded(tmp_path / "b", "stage_ends") == "8"


@pytest.mark.parametrize(("warmup", "freeze", "warned"), [(1, 0, False), (10, 0, True), (1, 10, True)])
def test_a_warm_up_that_the_clock_cuts_is_told_early(warmup, freeze, warned):
    now = Watch()
    config = PretrainConfig(schedule="wsd", warmup_epochs=warmup, freeze_epochs=freeze, recipe="auto", budget="100s")
    length = Length(config, ALONE, 10, Clock(100.0, began=math.inf, now=now))
    said = []
    for step in range(1, 30):  # an epoch takes 10 seconds
        now.seconds += 1
        length.due(Position(0, 0, step))
        if text := length.foreseen(step):
            said.append((step, text))
    assert [step for step, _ in said] == ([5] if warned else [])
    assert all("about 7.9 epochs before the learning rate falls" in text for _, text in said)


def test_another_budget_is_not_bound_by_what_a_run_decided(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("recipe: auto\nschedule: wsd\nbudget: 10m\ndecay: '6:2'\nmax_hours: 0.2\n")
    known = ["data", "--config", str(file), "--output-dir", str(tmp_path)]
    for more, expected in (([], ("10m", "6:2", 0.2)), (["--budget", "2h"], ("2h", "", 0.0))):
        config = chosen(read_pretrain([*known, *more], "x", {"recipe": "auto"}))
        assert (config.budget, config.decay, config.max_hours) == expected
    resumed = ["data", "--resume", "auto", "--output-dir", str(tmp_path), "--budget", "1h"]
    assert chosen(read_pretrain(resumed, "x", {"recipe": "auto"})).max_hours == pytest.approx(1.2)
    file.write_text("recipe: auto\nepochs: 3\n")
    with pytest.raises(UserError, match="give --schedule wsd too"):
        chosen(read_pretrain([*known, "--budget", "2h"], "x", {"recipe": "auto"}))


def test_epochs_that_are_a_guess_refuse_no_warm_up():
    PretrainConfig(schedule="wsd", recipe="auto", budget="10m", epochs=3, warmup_epochs=5, freeze_epochs=4).check()


def test_prolonging_asks_for_how_long(plain, tmp_path):
    prolong = ["pretrain", "--prolong", str(plain), "--output-dir", str(tmp_path)]
    assert "for how long? Give --budget, or --epochs" in refused(*prolong)
    assert "--epochs 3 ends before" in refused(*prolong, "--epochs", "3")


def test_a_run_by_epochs_takes_no_budget_when_it_goes_on(images, tmp_path):
    flags = [str(images), *SMALL, "--output-dir", str(tmp_path), "--max-steps", "2"]
    assert main(["pretrain", *flags]) == 0
    assert "leave --budget out, or go on" in refused("pretrain", *flags, "--resume", "auto", "--budget", "1h")


def test_a_decision_is_durable_before_it_is_followed(images, tmp_path, monkeypatch):
    """Killed between checkpoint and config.yaml, and where the disk is full: the decision is followed or not taken."""

    class Killed(BaseException):
        pass

    said, flushes, written, refusals = [], [], Pretraining._write_config, iter([1])

    def killed(self):
        if self.config.decay:
            raise Killed
        written(self)

    flags = ["pretrain", str(images), *SMALL, "--epochs", "4", "--output-dir", str(tmp_path), "--resume", "auto"]
    monkeypatch.setattr(Pretraining, "_write_config", killed)
    with pytest.raises(Killed):
        main(flags)
    monkeypatch.undo()
    newest = read(listed(tmp_path)[0])["mocov3"]
    assert (newest["step"], newest["config"]["decay"], recorded(tmp_path)) == (13, "13:3", "")
    assert [line["step"] for line in steady(tmp_path)] == list(range(13))  # no decayed step was made
    assert main([*flags, "--max-steps", "14"]) == 0
    assert recorded(tmp_path) == "13:3"

    full = tmp_path / "full"
    flushed = Pretraining.flushed
    monkeypatch.setattr(
        Pretraining, "flushed", lambda self: flushes.append(flushed(self)) or "full" * (len(flushes) < 3)
    )
    monkeypatch.setattr("mocov3.pretraining.loop.warn", said.append)
    assert main([*flags[:-3], str(full), "--max-steps", "15"]) == 0
    assert recorded(full) == "15:1"  # 13 and 14 waited for the disk
    assert sum("waits for the disk" in text for text in said) == 2
    lr = [json.loads(line)["lr"] for line in (full / "metrics.jsonl").read_text().splitlines()]
    assert lr[14] == lr[12]

    monkeypatch.setattr(Pretraining, "flushed", flushed)

    def refusing(self):
        if self.config.decay and next(refusals, 0):
            raise OSError(28, "No space left on device")
        written(self)

    monkeypatch.setattr(Pretraining, "_write_config", refusing)
    full = tmp_path / "configless"
    assert main([*flags[:-3], str(full), "--max-steps", "15"]) == 0
    assert recorded(full) == "14:2"
    assert "(No space left on device)" in said[-1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"decay": "5:2"}, "decisions of --schedule wsd"),
        ({"schedule": "wsd", "decay": "5"}, "takes STEP:STEPS"),
        ({"schedule": "wsd", "decay": "5:2,9:1"}, "within the decay before it"),
        ({"schedule": "wsd", "decay": "5:0"}, "takes STEP:STEPS"),
        ({"schedule": "wsd", "warmup_epochs": 90}, "leaves no stable part of 100 epochs"),
        ({"schedule": "wsd", "budget": "soon"}, "write a time above 0"),
        ({"warmup_epochs": 5, "epochs": 3}, "is longer than --epochs 3"),
        ({"schedule": "wsd", "stage_ends": "5,3"}, "whole numbers above 0 that rise"),
        ({"schedule": "wsd", "stage_ends": "5"}, "ends 1 cheap parts; with --schedule wsd 0 end by the clock"),
        ({"arch": "resnet18", "image_size_schedule": "112:0.5", "stage_ends": "5"}, "with --schedule cosine 0 end"),
        ({"budget": "1h"}, "--schedule wsd uses up"),
        ({"prolong": "nowhere"}, "needs a run with --schedule wsd"),
        ({"prolong": "nowhere", "schedule": "wsd"}, "has no stable.pth.tar"),
    ],
)
def test_what_means_nothing_is_refused(flags, message):
    with pytest.raises(UserError, match=message) as error:
        PretrainConfig(**flags).check()
    assert "\n" not in str(error.value)


def test_other_decisions_than_the_checkpoints_are_refused(images, plain, capsys):
    flags = [*SMALL, "--epochs", "4", "--resume", "auto", "--output-dir", str(plain)]
    assert main(["pretrain", str(images), *flags, "--decay", "12:4"]) == 2
    assert "was trained with --decay 13:3, not 12:4" in capsys.readouterr().err
    assert Path(plain / STABLE).is_file()
