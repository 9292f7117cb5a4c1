"""Batches between loader processes and training: what is to be made, what was made, and its memory."""

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


@dataclass(frozen=True)
class Slot:
    """Memory for one batch."""

    pixels: np.ndarray
    colour_draws: np.ndarray

    def batch(self, work: Work, corrupt: list[Corrupt]) -> Batch:
        """The contents, as the batch of ``work``."""
        n = len(work.indices)
        return Batch(work, self.pixels[:, :n], corrupt, self.colour_draws[:, :n] if self.colour_draws.size else None)


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

    @property
    def bytes(self) -> int:
        """Bytes of a slot."""
        return -(-self.count * self.batch_size * (4 * self.colour_draws + self.channels * self.side**2) // 64) * 64

    def slots(self, memory: np.ndarray) -> list[Slot]:
        """The slots in ``memory``, uint8."""
        slots = []
        images = self.count * self.batch_size
        head = 4 * images * self.colour_draws  # parameters first, so that they are aligned
        for part in memory.reshape(-1, self.bytes):
            colour_draws = part[:head].view(np.float32).reshape(self.count, self.batch_size, self.colour_draws)
            pixels = part[head : head + self.channels * images * self.side**2]
            shape = (self.count, self.batch_size, self.side, self.side, self.channels)
            slots.append(Slot(pixels.reshape(shape), colour_draws))
        return slots
