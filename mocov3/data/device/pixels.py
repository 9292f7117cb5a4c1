"""Pixels of views as the loader gives them → what networks are given: normalised floats on the device."""

import functools
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mocov3.data.device import colours
from mocov3.data.device.sending import send


@runtime_checkable
class ViewBatch(Protocol):
    """One view of every image of a batch: a tensor, or an object that makes parts of one on demand."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Tensor: ...


class PixelViewBatch:
    """One view of a batch as the loader gives it; parts are sent to the device and normalised on demand.

    Args:
        pixels: uint8, (batch, height, width, channels).
        device: of the parts.
        mean: of the normalisation.
        std: of the normalisation.
        colour_draws: what is left of the views to be done on the device, (batch, …).
    """

    def __init__(
        self,
        pixels: np.ndarray,
        device: torch.device,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        colour_draws: np.ndarray | None = None,
    ) -> None:
        self._pixels, self._colour_draws = pixels, colour_draws
        self._settings = (device, mean, std)

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, part: slice, /) -> Tensor:
        left = self._colour_draws[part] if self._colour_draws is not None else None
        return normalise(self._pixels[part], *self._settings, left)


def normalise(
    pixels: np.ndarray,
    device: torch.device,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    colour_draws: np.ndarray | None = None,
) -> Float[Tensor, "batch channels height width"]:
    """uint8 pixels (batch, height, width, channels) → normalised channels-last floats on the device, in one place.

    ``colour_draws`` say what is left of the views to be done on the device (``mocov3.data.device.colours``). The floats
    are torch's default ones; on a GPU under autocast they have its 16 bits, as networks would round them first of all.
    """
    sent = send(pixels, device).permute(0, 3, 1, 2)
    halves = torch.get_autocast_dtype("cuda") if device.type == "cuda" and torch.is_autocast_enabled("cuda") else None
    with torch.autocast(device.type, enabled=False):
        x = sent if colour_draws is None else colours.apply(sent, colour_draws)
        offset, scale = _constants(mean, std, device, torch.get_default_dtype())
        return x.to(scale.dtype).sub_(offset).mul_(scale) if halves is None else rounded(x, offset, scale, halves)


def rounded(x: Tensor, offset: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``(x − offset) · scale`` in 16 bits by one kernel: numbers are read once and written once."""
    out = torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=x.device)
    return torch.addcmul(-offset * scale, x, scale, out=out)


@functools.lru_cache
def _constants(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    # sent once: sending waits for the device
    shape = (1, -1, 1, 1)
    offset = torch.tensor(mean, device=device, dtype=dtype).view(shape) * 255
    return offset, 1 / (torch.tensor(std, device=device, dtype=dtype).view(shape) * 255)
