"""Features of a backbone over a set of pictures, in evaluation mode, split over ranks."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from mocov3.data import CentreView, Loader, Source, Work
from mocov3.distributed import World
from mocov3.step import normalise


@torch.no_grad()
def extract(
    network: nn.Module,
    features: Callable[[Tensor], Tensor],
    source: Source,
    view: CentreView,
    *,
    world: World,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    batch_size: int = 256,
    workers: int = 0,
) -> Tensor:
    """Features of every picture of ``source``, in order, on the CPU of every rank, as float32 (pictures, width).

    Args:
        network: put in evaluation mode for the time and back.
        features: its call for features.
        source: the pictures; an unreadable one gets another's features, as in training.
        view: the evaluation view.
        world: this rank; each takes a part.
        mean: of the normalisation.
        std: of the normalisation.
        batch_size: pictures a pass.
        workers: loading processes.
    """
    mine = np.array_split(np.arange(len(source)), world.size)[world.rank]
    works = [Work(0, i, mine[i : i + batch_size]) for i in range(0, len(mine), batch_size)]
    training = network.training
    network.eval()
    parts = []
    try:
        with Loader(source, view, batch_size=batch_size, seed=0, workers=workers) as loader:
            for batch in loader.run(works):
                x = normalise(batch.pixels[0], world.device, mean, std)
                parts.append(features(x).float().cpu())
    finally:
        network.train(training)
    own = torch.cat(parts) if parts else torch.empty(0)
    return torch.cat([part for part in world.gather(own) if part.numel()])
