"""Processes that torchrun started take the first one's decision, or its refusal."""

import sys
import threading

import pytest

from mocov3.config import PretrainConfig
from mocov3.distributed.launch import count_ranks, decided_once, free_loopback_address
from mocov3.errors import UserError

HERE = threading.local()
launch = sys.modules["mocov3.distributed.launch"]


@pytest.fixture
def ranks(monkeypatch):
    """Runs a function as each of three ranks, in threads; what they return or raise, in their order."""
    port = free_loopback_address().rpartition(":")[2]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", port)
    monkeypatch.setattr(launch, "from_torchrun", lambda: (HERE.rank, 3, HERE.rank))
    monkeypatch.setattr(launch, "_open_stores", [])

    def run(task):
        results = {}

        def as_rank(rank):
            HERE.rank = rank
            try:
                results[rank] = task(rank)
            except UserError as error:
                results[rank] = str(error)

        threads = [threading.Thread(target=as_rank, args=(rank,)) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return [results[rank] for rank in range(3)]

    return run


def test_the_first_process_decides_for_all(ranks):
    asked = []

    def decide(rank):
        asked.append(rank)
        return f"as rank {rank} says: ü"

    assert ranks(lambda rank: decided_once(lambda: decide(rank), "plan", 1)) == ["as rank 0 says: ü"] * 3
    assert asked == [0]
    # started again, in the store that torchrun keeps
    assert ranks(lambda rank: decided_once(lambda: "now otherwise", "plan", 1)) == ["now otherwise"] * 3


def test_a_refusal_is_everybodys(ranks):
    def refuse():
        raise UserError("data: holds no image")

    assert ranks(lambda _: decided_once(refuse, "plan", 1)) == ["data: holds no image"] * 3


def test_alone_nobody_is_asked(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert decided_once(lambda: "mine", "plan") == "mine"


@pytest.mark.parametrize(
    ("flags", "gpus", "expected"),
    [
        ({}, 4, (1, 1)),
        ({"multiprocessing_distributed": True, "world_size": 2, "rank": 0}, 4, (8, 4)),
        ({"nprocs_per_node": 3, "device": "cpu"}, 4, (3, 3)),
        ({"world_size": 2, "rank": 1}, 0, (2, 1)),
    ],
)
def test_processes_are_counted_as_they_are_started(monkeypatch, flags, gpus, expected):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert count_ranks(PretrainConfig(**flags)) == expected
