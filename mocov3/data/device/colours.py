"""The views' colour operations on a device, a batch at a time, each image by its own draw (``--views-on device``).

Loader processes decode, crop and resize; here follow jitter, grey, blur and solarise, by the same formulas as Pillow's
(``mocov3.data.views.operations``) and with its roundings, so that views differ by less than 2/255 in the mean. What
each image needs is known on the CPU, so nothing waits for the device. As there, images of other than three channels
know no saturation, hue or grey, and their contrast is about the mean of all channels.
"""

import math

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor
from torch.nn import functional

from mocov3.data.device.sending import send

_LUMA = (19595 / 65536, 38470 / 65536, 7471 / 65536)  # ITU-R 601, as Pillow rounds it


@torch.no_grad()
def apply(
    pixels: UInt8[Tensor, "batch channels height width"], colour_draws: Float32[np.ndarray, "batch 12"]
) -> Float[Tensor, "batch channels height width"]:
    """Whole numbers from 0 to 255 as float32: ``pixels`` after what ``colour_draws`` specify.

    Args:
        pixels: crops on any device.
        colour_draws: of ``mocov3.data.views.draws.colour_draw``, on the CPU.
    """
    x = pixels.float()
    jittered, coloured = colour_draws[:, 0] > 0, x.shape[1] == 3
    for place in range(4):
        for operation in range(4 if coloured else 2):
            chosen = np.flatnonzero(jittered & (colour_draws[:, 1 + place] == operation))
            if len(chosen):
                rows = send(chosen, x.device)
                factors = send(colour_draws[chosen, 5 + operation], x.device).view(-1, 1, 1, 1)
                x[rows] = _jitter(x[rows], operation, factors)
    if coloured and len(chosen := np.flatnonzero(colour_draws[:, 9] > 0)):
        rows = send(chosen, x.device)
        x[rows] = _gray(x[rows]).expand(-1, 3, -1, -1)
    if len(chosen := np.flatnonzero(colour_draws[:, 10] > 0)):
        rows = send(chosen, x.device)
        x[rows] = _blur(x[rows], colour_draws[chosen, 10])
    if len(chosen := np.flatnonzero(colour_draws[:, 11] > 0)):
        rows = send(chosen, x.device)
        x[rows] = torch.minimum(x[rows], 255 - x[rows])
    return x


def _jitter(x: Tensor, operation: int, factors: Tensor) -> Tensor:
    if operation == 3:
        return _turn_hue(x, factors)
    if operation == 0:
        away = torch.zeros_like(factors)
    elif operation == 1:
        gray = _gray(x) if x.shape[1] == 3 else x
        away = torch.floor(gray.mean((1, 2, 3), keepdim=True) + 0.5)
    else:
        away = _gray(x)
    return torch.floor((away + factors * (x - away)).clamp_(0, 255))


def _gray(x: Tensor) -> Tensor:
    r, g, b = x.unbind(1)
    return torch.floor(r * _LUMA[0] + g * _LUMA[1] + b * _LUMA[2] + 0.5).unsqueeze(1)


def _turn_hue(x: Tensor, factors: Tensor) -> Tensor:
    """RGB → Pillow's 8-bit HSV, hue turned, → RGB; as in ``mocov3/data/views/native/views.c``."""
    r, g, b = x.unbind(1)
    most, least = x.amax(1), x.amin(1)
    chroma = most - least
    green = most == g
    sector = torch.where(green, 85.0, 170.0).masked_fill_(most == r, 0.0)
    difference = torch.where(most == r, g - b, torch.where(green, b - r, r - g))
    hue = sector + 42.5 * difference / chroma.clamp(min=1) - 1e-4  # what double arithmetic loses below whole numbers
    hue = torch.floor(torch.where(hue < -2e-4, hue + 255, hue).clamp_(min=0))
    saturation = torch.floor(chroma * 255 / most.clamp(min=1))
    shift = torch.trunc(factors.view(-1, 1, 1) * 255)
    six = torch.remainder(hue + shift, 256) * (6 / 255)
    loss = most * saturation / 255
    shares = [
        (2 - (six - 3).abs()).clamp_(0, 1),
        ((six - 2).abs() - 1).clamp_(0, 1),
        ((six - 4).abs() - 1).clamp_(0, 1),
    ]
    return torch.stack([torch.floor(most - loss * share + 0.5) for share in shares], 1)


def _blur(x: Tensor, sigmas: np.ndarray) -> Tensor:
    """Pillow's Gaussian blur (three box blurs), as one kernel along each side; edges repeat."""
    kernels = [box_blur_kernel(float(sigma)) for sigma in sigmas]
    reach = max(len(k) for k in kernels) // 2
    padded = np.stack([np.pad(k, reach - len(k) // 2) for k in kernels]).astype(np.float32)
    n, c, h, w = x.shape
    weight = send(padded, x.device).repeat_interleave(c, 0)
    flat = x.reshape(1, n * c, h, w)
    down = functional.pad(flat, (0, 0, reach, reach), mode="replicate")
    flat = functional.conv2d(down, weight.view(n * c, 1, -1, 1), groups=n * c)
    across = functional.pad(flat, (reach, reach, 0, 0), mode="replicate")
    flat = functional.conv2d(across, weight.view(n * c, 1, 1, -1), groups=n * c)
    return torch.floor(flat.view(n, c, h, w) + 0.5).clamp_(0, 255)


def box_blur_kernel(sigma: float) -> np.ndarray:
    """Weights of three extended box blurs whose variances sum to sigma² (Gwosdek et al. 2011), middle in the middle."""
    variance = sigma * sigma / 3
    whole = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    width = 2 * (whole + part) + 1
    edge = (1 - (2 * whole + 1) / width) / 2
    box = np.array([edge, *[1 / width] * (2 * whole + 1), edge])
    return np.convolve(np.convolve(box, box), box)
