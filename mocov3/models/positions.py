"""The fixed position table of the Vision Transformer (arXiv 2104.02057, appendix)."""

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
