"""Patches of other sizes and at other places than those of full views, as cheap stages have them."""

import functools

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def sincos_of_places(
    places: Float[Tensor, "batch 2 tokens"], dim: int, *, temperature: float = 10000.0
) -> Float[Tensor, "batch tokens dim"]:
    """Rows of the position table at any (row, column), whole numbers or between."""
    quarter = dim // 4
    omega = temperature ** -(torch.arange(quarter, device=places.device, dtype=places.dtype) / quarter)
    row, column = (places[:, axis, :, None] * omega for axis in (0, 1))
    return torch.cat([row.sin(), row.cos(), column.sin(), column.cos()], dim=2)


def resized_kernel(weight: Float[Tensor, "out channels old old"], side: int) -> Float[Tensor, "out channels new new"]:
    """The patch projection for patches of another side (FlexiViT, Beyer et al. 2023, §3.4).

    A patch enlarged to ``side`` by bilinear interpolation gives the same token as before.
    """
    with torch.autocast(weight.device.type, enabled=False):  # weights are rounded once, by the convolution
        flat = weight.flatten(2) @ _kernel_map(weight.shape[-1], side, weight.device, weight.dtype)
    kernel: Tensor = flat.view(*weight.shape[:2], side, side)
    return kernel


@functools.lru_cache
def _kernel_map(old: int, new: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    pixels = torch.eye(old * old, dtype=torch.float64).view(-1, 1, old, old)
    resized = F.interpolate(pixels, (new, new), mode="bilinear", antialias=True).flatten(1)
    inverse: Tensor = torch.linalg.pinv(resized)
    return inverse.T.to(device=device, dtype=dtype)
