"""Patches → tokens: the projection, and patches of other sizes and at other places, as cheap stages have them."""

import functools

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class PatchProjection(nn.Conv2d):
    """The patch projection of a ViT; on a GPU one matrix product: cuDNN's convolution takes 10 times as long."""

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Conv2d``."""
        whole = not any(self.padding) and self.stride == self.kernel_size
        if not whole or self.groups > 1 or input.shape[-2] % self.stride[0] or input.shape[-1] % self.stride[1]:
            return super().forward(input)
        return patch_maps(input, self.weight, self.bias)


def use_patch_products(projection: nn.Module) -> None:
    """Make a plain convolution a ``PatchProjection``; parameters, names and hooks stay."""
    if type(projection) is nn.Conv2d:
        projection.__class__ = PatchProjection


def patch_maps(
    x: Float[Tensor, "batch channels height width"],
    weight: Float[Tensor, "out channels side side"],
    bias: Tensor | None,
) -> Float[Tensor, "batch out rows columns"]:
    """The convolution of patches that lie side by side, whatever is fastest on the device."""
    if x.device.type == "cuda":
        return project_patches(x, weight, bias).permute(0, 3, 1, 2)
    return F.conv2d(x, weight, bias, stride=weight.shape[-1])


def project_patches(
    x: Float[Tensor, "batch channels height width"],
    weight: Float[Tensor, "out channels side side"],
    bias: Tensor | None,
) -> Float[Tensor, "batch rows columns out"]:
    """The convolution of patches that lie side by side, as one matrix product; the same sums in another order."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))  # before the patches are copied, not after
    n, channels, height, width = x.shape
    side = weight.shape[-1]
    patches = x.permute(0, 2, 3, 1).view(n, height // side, side, width // side, side, channels).transpose(2, 3)
    return F.linear(patches.flatten(3), weight.permute(0, 2, 3, 1).flatten(1), bias)


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
