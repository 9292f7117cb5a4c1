"""Arrays → the device and back. A GPU does it beside its work: through page-locked memory, waited for when used."""

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

import numpy as np
import torch
from torch import Tensor

from mocov3.data.loading.slots import Batch


def send(array: np.ndarray, device: torch.device) -> Tensor:
    """``array`` on the device, which nothing waits for.

    What lies in page-locked memory (``page_locked``) is fetched from there and must stay until it has been
    (``until_sent``); anything else is copied to such memory first.
    """
    x = torch.from_numpy(array)
    if device.type != "cuda":
        return x.to(device)
    if not x.is_pinned():
        return x.pin_memory().to(device, non_blocking=True)
    beside, here = _beside(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(beside):
        sent = x.to(device, non_blocking=True)
    here.wait_stream(beside)
    sent.record_stream(here)
    return sent


def until_sent(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """``batches``, each asked for when what was sent of the one before, whose memory it takes, has arrived."""
    for batch in batches:
        yield batch
        _wait(device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        _beside(device).synchronize()


@functools.cache
def _beside(device: torch.device) -> "torch.cuda.Stream":
    return torch.cuda.Stream(device)


class Arriving:
    """A copy in the memory of the host, on its way since it was made.

    Args:
        x: on any device; a tensor of the CPU is its own copy.
    """

    def __init__(self, x: Tensor) -> None:
        self._copy, self._made = x, None
        if x.is_cuda:
            self._copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
            self._made = torch.cuda.current_stream(x.device).record_event()

    def wait(self) -> Tensor:
        """The copy, when it is there; what was asked of the device afterwards is not waited for."""
        if self._made is not None:
            self._made.synchronize()
        return self._copy


@contextmanager
def page_locked(memory: np.ndarray, device: torch.device) -> Iterator[bool]:
    """Lock ``memory`` for the time, so that a GPU can fetch from it; yields whether that could be done."""
    address = memory.ctypes.data
    locked = device.type == "cuda" and int(torch.cuda.cudart().cudaHostRegister(address, memory.nbytes, 0)) == 0
    if device.type == "cuda" and not locked:
        with suppress(RuntimeError):  # the refusal is reported by the next launch, to whoever makes it
            torch.zeros(1, device=device)
    try:
        yield locked
    finally:
        if locked:
            _wait(device)
            torch.cuda.cudart().cudaHostUnregister(address)
