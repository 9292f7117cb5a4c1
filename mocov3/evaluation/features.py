"""Features of a frozen backbone over a set of images, in evaluation mode, split over ranks.

Images are taken in batches of a fixed grid, which are divided among ranks; so features do not depend on the number of
ranks, nor on where a stopped pass is resumed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor, nn

from mocov3.data import Batch, Loader, Source, Work
from mocov3.data.device.pixels import normalise
from mocov3.data.device.sending import Arriving, page_locked, until_sent
from mocov3.data.loading.filling import Transform
from mocov3.distributed import World
from mocov3.distributed.sharding import gathered
from mocov3.errors import UserError
from mocov3.losses import at_least_float32
from mocov3.output.log import warn_once

Context = Callable[[], AbstractContextManager[object]]
"""The arithmetic that a network is run in."""


class Extractor(NamedTuple):
    """A network, its call for features, and how images are prepared for it."""

    network: nn.Module
    features: Callable[[Tensor], Tensor]
    view: Transform
    mean: tuple[float, ...]
    """Of the normalisation, as ``std``."""
    std: tuple[float, ...]


class Part(NamedTuple):
    """Features of one batch."""

    indices: np.ndarray
    features: Tensor
    """float32 (float64 of a network in float64), on the device, (images, …); NaN where an image cannot be read."""
    corrupt: dict[int, str]
    """Images that could not be read: index → reason."""
    arriving: Arriving
    """A copy of the features on the CPU."""

    @property
    def readable(self) -> np.ndarray:
        """Whether each image could be read."""
        return _readable(self.indices, self.corrupt)


class Collected(NamedTuple):
    """Features of all images of a source, in order, on the CPU of every rank."""

    features: Tensor
    corrupt: dict[int, str]
    """Unreadable images, whose rows are NaN: index → reason."""

    @property
    def readable(self) -> np.ndarray:
        """Whether each image could be read."""
        return _readable(np.arange(len(self.features)), self.corrupt)


def _readable(indices: np.ndarray, corrupt: dict[int, str]) -> np.ndarray:
    return ~np.isin(indices, list(corrupt))


def grid(n: int, batch_size: int, world: World) -> list[np.ndarray]:
    """This rank's batches of ``n`` images: consecutive ones, of ``batch_size`` but the last of all."""
    starts = np.array_split(np.arange(0, n, batch_size), world.size)[world.rank]
    return [np.arange(s, min(s + batch_size, n)) for s in starts.tolist()]


@torch.no_grad()
def stream(
    extractor: Extractor,
    source: Source,
    batches: Sequence[np.ndarray],
    *,
    device: torch.device,
    workers: int = 0,
    autocast: Context = nullcontext,
) -> Iterator[Part]:
    """Features of ``batches`` of images, one batch after the other; the device is at work on the next.

    Args:
        extractor: its network is put in evaluation mode for the time and back.
        source: the images.
        batches: indices of the images of each batch.
        device: where the network is.
        workers: loading processes.
        autocast: context of the arithmetic.
    """
    network, features, view, mean, std = extractor
    works = [Work(0, i, indices) for i, indices in enumerate(batches)]
    largest = max((len(b) for b in batches), default=1)
    training = network.training
    network.eval()
    try:
        loader = Loader(source, view, batch_size=largest, seed=0, workers=workers, replace=False, say=warn_once)
        with gathered(network), loader, page_locked(loader.memory, device):
            before = None
            for batch in until_sent(loader.run(works), device):
                with torch.no_grad(), autocast():
                    made = at_least_float32(features(normalise(batch.pixels[0], device, mean, std)))
                part = part_of(batch, made)
                if before is not None:
                    yield before
                before = part
            if before is not None:
                yield before
    finally:
        network.train(training)


def part_of(batch: Batch, features: Tensor) -> Part:
    """Features of a batch; those of unreadable images become NaN."""
    indices, corrupt = batch.work.indices, {bad.index: bad.reason for bad in batch.corrupt}
    if corrupt:
        rows = torch.from_numpy(np.flatnonzero(~_readable(indices, corrupt))).to(features.device)
        features = features.index_fill(0, rows, torch.nan)
    return Part(indices, features, corrupt, Arriving(features))


def collect(
    extractor: Extractor,
    source: Source,
    *,
    world: World,
    batch_size: int = 256,
    check: bool = True,
    title: str = "",
    workers: int = 0,
    autocast: Context = nullcontext,
) -> Collected:
    """Features of every image of ``source``, and which could not be read, all on every rank; each computes a part.

    Args:
        extractor: as of ``stream``, as ``workers`` and ``autocast``.
        source: the images.
        world: this rank.
        batch_size: images a pass.
        check: refuse features that are not finite.
        title: of the source, for messages.

    Raises:
        UserError: if features are not finite, or no image can be read, naming the images.
    """
    mine = grid(len(source), batch_size, world)
    local, filled = torch.empty(0), 0
    corrupt: dict[int, str] = {}
    for part in stream(extractor, source, mine, device=world.device, workers=workers, autocast=autocast):
        if check:
            refuse_not_finite(part, source)
        if not filled:
            local = torch.empty(sum(map(len, mine)), *part.features.shape[1:])
        local[filled : filled + len(part.indices)] = part.arriving.wait()
        filled += len(part.indices)
        corrupt |= part.corrupt
    if world.size > 1:
        everyone = world.gather((local, corrupt))
        local = torch.cat([part for part, _ in everyone if part.numel()])
        corrupt = {i: reason for _, bad in everyone for i, reason in bad.items()}
    refuse_unreadable(corrupt, source, title)
    return Collected(local, corrupt)


def extract(extractor: Extractor, source: Source, world: World) -> Tensor:
    """Features of every image of ``source``, in order, on the CPU of every rank, as float32 (images, width).

    An unreadable image has NaN.
    """
    return collect(extractor, source, world=world, check=False).features


def refuse_not_finite(part: Part, source: Source) -> None:
    """Refuse features of readable images that are NaN or infinite.

    Raises:
        UserError: naming the first images.
    """
    refuse_rows(part.indices[part.readable], finite_rows(part.arriving.wait())[torch.from_numpy(part.readable)], source)


def finite_rows(x: Tensor) -> Bool[Tensor, "images"]:
    """Whether the features of each image (images, …) are finite."""
    return torch.isfinite(x).flatten(1).all(1)


def refuse_rows(indices: np.ndarray, finite: Bool[Tensor, "images"], source: Source) -> None:
    """Refuse features of which some are not finite, on the CPU.

    Raises:
        UserError: naming the first images.
    """
    rows = np.flatnonzero(~finite.numpy()).tolist()
    if not rows:
        return
    names = ", ".join(source.name(int(indices[row])) for row in rows[:5])
    more = f" and {len(rows) - 5} more of this batch" if len(rows) > 5 else ""
    raise UserError(f"features are not finite for {names}{more}; check the weights and --precision")


def refuse_unreadable(corrupt: dict[int, str], source: Source, title: str) -> None:
    """Refuse a source of which no image could be read.

    Raises:
        UserError: naming the first image and its reason, after the source's ``title``.
    """
    if len(corrupt) == len(source):
        raise UserError(f"{title}: none of {len(source)} images can be read, first: {first_of(corrupt, source)}")


def first_of(corrupt: dict[int, str], source: Source) -> str:
    """The first unreadable image and its reason."""
    first = min(corrupt)
    return f"{source.name(first)}: {corrupt[first]}"
