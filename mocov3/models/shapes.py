"""Networks that have shapes but no numbers, for counting and comparing."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Networks that are built inside allocate no memory for their weights (torch's device ``meta``)."""
    with torch.device("meta"), _Readable():
        yield


class _Readable(TorchFunctionMode):
    # timm 1.0.20 asks torch for the rates of stochastic depth and reads them, which have no numbers on "meta" either
    def __torch_function__(self, func: Callable[..., object], types: object, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.linspace:
            return func(*args, **{"device": "cpu", **(kwargs or {})})
        return func(*args, **(kwargs or {}))
