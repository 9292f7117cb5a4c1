"""The fixed position table of the Vision Transformer (arXiv 2104.02057, appendix)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def sincos_position_embedding(
    rows: int, columns: int, dim: int, *, temperature: float = 10000.0
) -> Float[Tensor, "1 tokens dim"]:
    """Fixed 2-D sine-cosine table with zeros for the cls token; a quarter of the channels a (function, axis).

    Channels are [sin row, cos row, sin column, cos column]; tokens run in row-major order, as the patches do.
    """
    if dim % 4:
        raise ValueError(f"the sine-cosine table needs a width divisible by 4, not {dim}")
    quarter = dim // 4
    omega = temperature ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    row = torch.arange(rows, dtype=torch.float64).repeat_interleave(columns)
    column = torch.arange(columns, dtype=torch.float64).repeat(rows)
    angles = [row[:, None] * omega, column[:, None] * omega]
    table = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)
    return torch.cat([torch.zeros(1, dim, dtype=torch.float64), table])[None].float()


def is_sincos_position_embedding(table: Tensor) -> bool:
    """Whether ``table`` is the fixed one for a square grid, as precisely as its numbers are stored.

    Tables of others differ: most are learned, and MAE's has the column's channels before the row's.
    """
    if table.ndim != 3 or len(table) != 1 or table.shape[2] % 4 or not table.is_floating_point():
        return False
    side = math.isqrt(max(table.shape[1] - 1, 0))
    if side < 1 or side**2 + 1 != table.shape[1]:
        return False
    fixed = sincos_position_embedding(side, side, table.shape[2])
    return bool((table.float() - fixed).abs().max() < max(1e-5, torch.finfo(table.dtype).eps))
