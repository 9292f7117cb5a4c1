"""A rank that is lost where calls hang instead of failing, as nccl's do: the others say which, and end."""

import sys
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import mocov3.distributed.launch  # noqa: F401
from mocov3.distributed import heartbeat
from mocov3.distributed.heartbeat import Heartbeat
from mocov3.errors import RankLost

launch = sys.modules["mocov3.distributed.launch"]


@pytest.fixture
def ends(monkeypatch):
    """Exit codes of ranks that ended; their threads end as their processes would."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    codes = []

    def end(code):
        codes.append(code)
        raise SystemExit

    def connect():
        return dist.TCPStore("127.0.0.1", store.port, wait_for_workers=False, timeout=timedelta(seconds=5))

    monkeypatch.setattr(heartbeat, "PERIOD", 0.05)
    monkeypatch.setattr(heartbeat, "_own_connection", connect)
    monkeypatch.setattr(heartbeat.os, "_exit", end)
    return codes


def _wait(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("announced", [True, False])
def test_ranks_that_hang_end_and_name_the_lost_one(ends, capfd, announced):
    ranks = [Heartbeat(r, 3, group="g", silence=2.0, patience=0.5) for r in range(3)]
    _wait(lambda: all(r._store.check([r._key(r.rank)]) for r in ranks))
    if announced:
        ranks[2].leave("no memory is left")
    else:
        ranks[2]._stop.set()
    _wait(lambda: len(ends) == 2)
    said = capfd.readouterr().err
    reason = "rank 2 stopped: no memory is left" if announced else "rank 2 has not been heard of for 2 s"
    assert ends == [RankLost.exit_code] * 2
    assert said.count("mocov3: error: ") == 2
    assert f"mocov3: error: {reason}" in said
    assert f"mocov3: error: rank 0 stopped: {reason}" in said


@pytest.mark.parametrize("error", [OSError, ValueError, MemoryError, KeyError, RuntimeError, SystemExit])
def test_a_rank_that_ends_by_any_error_says_so(monkeypatch, error):
    """Else the others would wait for it: nothing but a reason tells an end from a regular one."""
    left = []
    world = SimpleNamespace(finish=left.append, blame=lambda: "")
    monkeypatch.setattr(launch, "start", lambda *_, **__: world)

    def task(*_):
        raise error("broken")

    with pytest.raises(error):
        launch._run(task, None, 1, 2, 1, torch.device("cpu"), launch.Meeting("gloo", "", 1.0))
    assert left == [error.__name__]


def test_a_regular_end_and_a_rank_that_fails_by_itself_end_nobody(ends):
    patient = [Heartbeat(r, 2, group="p", silence=60, patience=0.2) for r in range(2)]
    _wait(lambda: all(r._store.check([r._key(r.rank)]) for r in patient))
    patient[1].leave("")
    gloo = [Heartbeat(r, 2, group="q", silence=60) for r in range(2)]
    gloo[1].leave("no memory is left")
    time.sleep(1)
    assert not ends
    assert gloo[0].blame(within=5) == "rank 1 stopped: no memory is left"
    patient[0].leave("")
    gloo[0].leave("")
