"""Batches between loader processes and training: what is to be made, what was made, and its memory."""

import itertools
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Work:
    """One batch to make: images by index, in order, and the place in training it belongs to."""

    epoch: int
    iteration: int
    indices: np.ndarray


@dataclass(frozen=True)
class Corrupt:
    """An image that could not be read, and the one used instead (itself, left black, where none is)."""

    index: int
    name: str
    reason: str
    replaced_by: int


@dataclass(frozen=True)
class Batch:
    """Pixels of a batch. They lie in a shared slot and are overwritten once the next batch is asked for."""

    work: Work
    pixels: np.ndarray
    """uint8, (views, batch, height, width, channels)."""
    corrupt: list[Corrupt]
    colour_draws: np.ndarray | None = None
    """float32, (views, batch, …): what the transform left to do, where it leaves anything."""
    local_pixels: np.ndarray | None = None
    """uint8, (local views, batch, side, side, channels), where there are any; their ``colour_draws`` come last."""


@dataclass(frozen=True)
class Slot:
    """Memory for one batch."""

    pixels: np.ndarray
    colour_draws: np.ndarray
    local_pixels: np.ndarray

    def batch(self, work: Work, corrupt: list[Corrupt]) -> Batch:
        """The contents, as the batch of ``work``."""
        n = len(work.indices)
        draws, local = (a[:, :n] if a.size else None for a in (self.colour_draws, self.local_pixels))
        return Batch(work, self.pixels[:, :n], corrupt, draws, local)


@dataclass(frozen=True)
class Layout:
    """Memory layout of slots."""

    count: int
    """Views of an image."""
    batch_size: int
    side: int
    """Of the views, in pixels."""
    colour_draws: int
    """Numbers beside a view."""
    channels: int = 3
    local: tuple[int, int] = (0, 0)
    """Number and side of local views."""

    @property
    def _bytes_of_an_image(self) -> tuple[int, int, int]:
        """Numbers beside its views, its views, its local views."""
        count, side = self.local
        return (
            4 * self.colour_draws * (self.count + count),
            self.channels * self.count * self.side**2,
            self.channels * count * side**2,
        )

    @property
    def bytes(self) -> int:
        """Bytes of a slot."""
        return -(-self.batch_size * sum(self._bytes_of_an_image) // 64) * 64

    def slots(self, memory: np.ndarray) -> list[Slot]:
        """The slots in ``memory``, uint8."""
        (count, side), images = self.local, self.batch_size
        # parameters first, so that they are aligned
        ends = np.cumsum([0, *(images * size for size in self._bytes_of_an_image)])
        shapes = (
            (self.count + count, images, self.colour_draws),
            (self.count, images, self.side, self.side, self.channels),
            (count, images, side, side, self.channels),
        )
        slots = []
        for part in memory.reshape(-1, self.bytes):
            draws, pixels, local = (part[a:b] for a, b in itertools.pairwise(ends))
            slots.append(
                Slot(pixels.reshape(shapes[1]), draws.view(np.float32).reshape(shapes[0]), local.reshape(shapes[2]))
            )
        return slots
