"""Sending to a GPU, as far as that goes without one: memory is locked, and given back only when all has arrived."""

from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mocov3.data import Batch, CentreView, Loader, Work, open_source
from mocov3.data.device import sending
from mocov3.data.device.sending import page_locked, send, until_sent

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_the_next_batch_is_asked_for_when_the_last_has_arrived(monkeypatch):
    events = []

    def made():
        for i in range(2):
            events.append(f"made {i}")
            yield Batch(Work(0, i, np.arange(1)), np.full((1, 1, 2, 2, 3), i, np.uint8), [])

    monkeypatch.setattr(sending, "_wait", lambda device: events.append("arrived"))
    for batch in until_sent(made(), CPU):
        events.append(f"used {batch.work.iteration}")
    assert events == ["made 0", "used 0", "arrived", "made 1", "used 1", "arrived"]


@pytest.mark.parametrize("code", [0, 712])
def test_memory_is_locked_for_the_time_where_the_system_lets_it(monkeypatch, code):
    calls = []
    runtime = SimpleNamespace(
        cudaHostRegister=lambda address, size, flags: calls.append(("lock", address, size, flags)) or code,
        cudaHostUnregister=lambda address: calls.append(("unlock", address)),
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(sending, "_wait", lambda device: calls.append("arrived"))
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("refused before")))
    memory = np.zeros(100, np.uint8)
    lock = ("lock", memory.ctypes.data, 100, 0)
    with suppress(KeyError), page_locked(memory, CUDA) as locked:
        assert locked == (code == 0)
        assert calls == [lock]
        raise KeyError
    assert calls == ([lock, "arrived", ("unlock", memory.ctypes.data)] if locked else [lock])


def test_on_a_cpu_nothing_is_locked():
    memory = np.arange(6, dtype=np.uint8)
    with page_locked(memory, CPU) as locked:
        assert not locked
        assert send(memory, CPU).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_lie_in_the_memory_of_their_loader(tmp_path, workers):
    for i in range(3):
        Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / f"{i}.png")
    with Loader(open_source(str(tmp_path)), CentreView(8), batch_size=2, seed=0, workers=workers) as loader:
        for batch in loader.run([Work(0, 0, np.array([1, 2]))]):
            assert np.shares_memory(batch.pixels, loader.memory)
            assert batch.pixels[0, :, 0, 0, 0].tolist() == [1, 2]
