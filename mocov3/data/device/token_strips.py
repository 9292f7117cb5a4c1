"""Views as strips: what a cheap stage keeps of them, packed so that it can be cut into batches like images.

A strip holds the kept patches of a view side by side, and in two more channels the row and column of each in the grid
of full views. So the network needs to know neither what was dropped nor how large views and patches were: a token's
place in the image is the same at every size.
"""

import functools

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mocov3.config.cheap import Stage
from mocov3.data import Work
from mocov3.data.device.pixels import ViewBatch
from mocov3.data.device.sending import send
from mocov3.data.views.draws import kept_tokens


def cheaper(
    x1: ViewBatch, x2: ViewBatch, stage: Stage, work: Work, *, seed: int, device: torch.device
) -> tuple[ViewBatch, ViewBatch]:
    """What the network is given of two views in a stage: the views, or strips of them.

    Args:
        x1: view 1, (batch, channels, height, width).
        x2: view 2, likewise.
        stage: what is kept.
        work: which images they are.
        seed: of the draws, which are functions of (seed, epoch, image, view).
        device: where the views are.
    """
    if not stage.grid:
        return x1, x2
    both = []
    for view, x in enumerate((x1, x2)):
        tokens = kept_tokens(stage.tokens, stage.kept, seed=seed, epoch=work.epoch, indices=work.indices, view=view)
        both.append(Strips(x, send(tokens, device), stage.patch_size, stage.grid))
    return both[0], both[1]


class Strips:
    """One view of every image of a batch, as strips made on demand.

    Args:
        views: (batch, channels, height, width), or what gives such parts.
        tokens: numbers of patches, (batch, kept).
        side: of the patches, in pixels.
        grid: patches on a side of full views.
    """

    def __init__(self, views: ViewBatch, tokens: Tensor, side: int, grid: int) -> None:
        self.views, self.tokens, self.side, self.grid = views, tokens, side, grid

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, part: slice, /) -> Tensor:
        return strips(self.views[part], self.tokens[part], self.side, self.grid)


def strips(
    x: Float[Tensor, "batch channels height width"], tokens: Int[Tensor, "batch kept"], side: int, grid: int
) -> Float[Tensor, "batch more side length"]:
    """The patches ``tokens`` (row-major numbers) of each view side by side, with their places.

    Args:
        x: views.
        tokens: numbers of patches.
        side: of the patches, in pixels.
        grid: patches on a side of full views; places are given in these.
    """
    (n, channels), (rows, columns) = x.shape[:2], (x.shape[-2] // side, x.shape[-1] // side)
    patches = x.reshape(n, channels, rows, side, columns, side).permute(0, 2, 4, 1, 3, 5).reshape(n, rows * columns, -1)
    chosen = patches.gather(1, tokens[:, :, None].expand(-1, -1, patches.shape[2])).view(n, -1, channels, side, side)
    row, column = _places(rows, columns, grid, x.device, torch.promote_types(x.dtype, torch.float32))
    places = torch.stack([row[tokens], column[tokens]], 2)[..., None, None].expand(-1, -1, -1, side, side)
    return torch.cat([chosen, places], 2).permute(0, 2, 3, 1, 4).reshape(n, channels + 2, side, -1)


@functools.lru_cache
def _places(rows: int, columns: int, grid: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # the middle of a large patch lies between the middles of the small ones it covers
    row, column = (((torch.arange(n, dtype=torch.float64) + 0.5) * grid / n - 0.5) for n in (rows, columns))
    whole = torch.meshgrid(row, column, indexing="ij")
    return whole[0].flatten().to(device, dtype), whole[1].flatten().to(device, dtype)
