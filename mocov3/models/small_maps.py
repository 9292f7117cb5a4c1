"""Convolutions of maps so small that every position sees every other: one dense product instead.

A 3×3 convolution of a 2×2 map spends more than half of its multiplications on the padding around it, and libraries
are slow on such short rows. Such maps are the last stage of a ResNet on images of up to 64 px. Here the kernel is
expanded to a matrix from all positions of the map to all positions, once for the whole batch. The
order of the sums differs; weights and files do not change.

A convolution that halves its map does so with a map of one position: there it is the kernel's middle. (oneDNN's
gradient of its weights is garbage in bfloat16 on processors without instructions for it, so batches of any size come
here.)
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mocov3.models.products import mkl_is_half_wide

LEAST_BATCH = 32
"""Images from which spreading the kernel is earned (measured)."""


class SmallMapConv2d(nn.Conv2d):
    """``nn.Conv2d`` that multiplies small maps as a whole."""

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Conv2d``."""
        if not self._worth_it(input):
            return super().forward(input)
        precision = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else input.dtype
        output: Tensor = _WholeMaps.apply(input.to(precision), self.weight)
        return output

    def _worth_it(self, x: Tensor) -> bool:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False  # exported networks keep their convolutions
        if x.device.type != "cpu" or x.ndim != 4 or x.dtype == torch.float64:
            return False
        if self.stride != (1, 1):
            return x.shape[2:] == (1, 1)
        fits = all(2 * side - 1 <= kernel for side, kernel in zip(x.shape[2:], self.kernel_size, strict=True))
        return fits and len(x) >= LEAST_BATCH


def use_whole_maps(network: nn.Module) -> None:
    """Make every convolution of a network for which it can pay a ``SmallMapConv2d``; parameters and names stay."""
    for module in network.modules():
        if type(module) is nn.Conv2d and _is_centred(module):
            module.__class__ = SmallMapConv2d


def _is_centred(layer: nn.Conv2d) -> bool:
    """Whether its kernel lies around each position it computes; it keeps the size of maps, or halves it."""
    kernel = layer.kernel_size
    return (
        max(kernel) > 1
        and all(k % 2 for k in kernel)
        and layer.padding == tuple(k // 2 for k in kernel)
        and layer.padding_mode == "zeros"
        and layer.bias is None
        and layer.stride in ((1, 1), (2, 2))
        and (layer.dilation, layer.groups) == ((1, 1), 1)
    )


class _WholeMaps(torch.autograd.Function):
    """(batch, channels, height, width) and the kernel (out, channels, rows, columns) → the convolved maps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        rows = x.permute(0, 2, 3, 1).reshape(batch, -1)  # no copy in channels-last
        spread = _spread(kernel, height, width, x.dtype)
        ctx.save_for_backward(rows, spread)
        ctx.kernel, ctx.map = kernel, x.shape
        return _as_map(_times_transposed(rows, spread), height, width)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, spread = ctx.saved_tensors
        batch, _, height, width = ctx.map
        gradient = gradient.permute(0, 2, 3, 1).reshape(batch, -1)
        by_map, by_kernel = ctx.needs_input_grad
        return (
            _as_map(_times(gradient, spread), height, width) if by_map else None,
            _gathered(_times(gradient.t().contiguous(), rows), ctx.kernel, height, width) if by_kernel else None,
        )


def _as_map(rows: Tensor, height: int, width: int) -> Tensor:
    return rows.view(len(rows), height, width, -1).permute(0, 3, 1, 2)


def _pairs(kernel: Tensor, height: int, width: int) -> list[tuple[int, int, int, int]]:
    """Number of a place of the output, number of a place of the input, and row and column of the kernel between."""
    up, left = kernel.shape[2] // 2, kernel.shape[3] // 2
    places = [(y, x) for y in range(height) for x in range(width)]
    return [(p, q, b - a + up, d - c + left) for p, (a, c) in enumerate(places) for q, (b, d) in enumerate(places)]


def _spread(kernel: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """The matrix of all places and channels by all places and channels: (place, out) × (place, channel)."""
    out, channels = kernel.shape[:2]
    places = height * width
    matrix = kernel.new_empty(places, out, places, channels, dtype=dtype)
    for p, q, row, column in _pairs(kernel, height, width):
        matrix[p, :, q].copy_(kernel[:, :, row, column])
    return matrix.view(places * out, places * channels)


def _gathered(matrix: Tensor, kernel: Tensor, height: int, width: int) -> Tensor:
    """The gradient of the kernel from that of the matrix spread from it."""
    out, channels = kernel.shape[:2]
    parts = matrix.view(height * width, out, height * width, channels)
    gradient = torch.zeros_like(kernel)
    for p, q, row, column in _pairs(kernel, height, width):
        gradient[:, :, row, column] += parts[p, :, q]
    return gradient


def _times(a: Tensor, b: Tensor) -> Tensor:
    """a·b; in float32 by way of a convolution where that is faster (``mocov3.models.products``)."""
    if not _by_convolution(a):
        return a @ b
    return _rows(F.conv_transpose2d(_image(a), b[:, :, None, None]))


def _times_transposed(a: Tensor, b: Tensor) -> Tensor:
    """a·bᵀ, likewise."""
    if not _by_convolution(a):
        return a @ b.t()
    return _rows(F.conv2d(_image(a), b[:, :, None, None]))


def _by_convolution(a: Tensor) -> bool:
    # of fewer than 16 images, one thread does not hand convolutions to oneDNN (torch's own rule)
    return a.dtype == torch.float32 and len(a) % 16 == 0 and mkl_is_half_wide()


def _image(a: Tensor) -> Tensor:
    """Rows as the pixels of sixteen images, in channels-last."""
    return a.view(16, len(a) // 16, 1, a.shape[1]).permute(0, 3, 1, 2)


def _rows(image: Tensor) -> Tensor:
    return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])
