"""From images to views in a slot, and what becomes of images that cannot be read."""

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from mocov3.config.presets import RGB, Reading
from mocov3.data.loading.slots import Corrupt, Slot
from mocov3.data.sources.opening import Source
from mocov3.data.views import remarks
from mocov3.data.views.bare import TIFF
from mocov3.data.views.decode import DecodeError, ImageBytes
from mocov3.data.views.draws import replacement
from mocov3.errors import UserError, printable, reason

_ATTEMPTS = 20


@runtime_checkable
class Transform(Protocol):
    """Bytes of an image → ``count`` views, written to ``out``."""

    @property
    def count(self) -> int:
        """Views of an image."""

    @property
    def image_size(self) -> int:
        """Side of the views in pixels."""

    def __call__(
        self, data: bytes | np.ndarray, /, *, seed: int, epoch: int, index: int, out: np.ndarray | None = None
    ) -> object:
        """Make the views.

        A transform with an attribute ``colour_draws`` above 0 is also given ``colour_draws``, float32 (count, that
        many), to write beside the pixels what is left to do with them; one whose ``reading`` is not RGB says so. One
        that has ``local`` views is given ``local_out`` for them.
        """


class Unreadable(Exception):
    """No readable image was found in place of an unreadable one."""


class Filler(NamedTuple):
    """Fills slots with the views of images."""

    source: Source
    transform: Transform
    seed: int
    """Of the draws."""
    replace: bool
    """Use another image for one that cannot be read; else it is left black."""

    def __call__(
        self, slot: Slot, first: int, indices: list[int], epoch: int
    ) -> tuple[list[Corrupt], list[tuple[int, str]]]:
        """Write views to places from ``first`` on: which images could not be read, and (index, remark) of others.

        Raises:
            Unreadable: if an image and all its replacements cannot be read.
        """
        corrupt: list[Corrupt] = []
        remarked: list[tuple[int, str]] = []
        for place, index in enumerate(indices, first):
            bad = self._fill(slot, place, index, epoch)
            corrupt += bad
            if text := remarks.taken():
                remarked.append((bad[-1].replaced_by if bad else index, text))
        return corrupt, remarked

    def _fill(self, slot: Slot, place: int, index: int, epoch: int) -> list[Corrupt]:
        """Write one image's views; one that cannot be read is replaced as (seed, epoch, index) decides, or black."""
        source, seed, tried = self.source, self.seed, index
        corrupt: list[Corrupt] = []
        out = slot.pixels[:, place]
        left = {"colour_draws": slot.colour_draws[:, place]} if slot.colour_draws.size else {}
        if slot.local_pixels.size:
            left["local_out"] = slot.local_pixels[:, place]
        for attempt in range(_ATTEMPTS):
            try:
                self.transform(source.read(tried), seed=seed, epoch=epoch, index=tried, out=out, **left)
                return corrupt
            except (DecodeError, OSError) as error:
                remarks.taken()  # of the image that is given up
                why = printable(reason(error))[:200]
            following = replacement(seed, epoch, index, attempt, len(source)) if self.replace else index
            corrupt.append(Corrupt(tried, printable(source.name(tried)), why, following))
            if not self.replace:
                out[:] = 0
                return corrupt
            tried = following
        raise Unreadable(
            f"{corrupt[0].name} and {_ATTEMPTS - 1} images in its place cannot be read: {corrupt[0].reason}"
        )


def check_readable(source: Source, reading: Reading | None, title: str) -> None:
    """Refuse images to evaluate on of which none can be read, before a run starts; as a rule one is looked at.

    Args:
        source: the images.
        reading: which channels; ``None`` where weights say so that are not read yet, and any TIFF may do.
        title: of the source, for the message.

    Raises:
        UserError: naming the first and its reason.
    """
    first = ""
    for index in range(len(source)):
        try:
            data = source.read(index)
            if reading is None and isinstance(data, bytes) and data.startswith(TIFF):
                return
            ImageBytes(data, reading or RGB).pixels()
            remarks.taken()  # counted when the image is read to be used, perhaps otherwise
            return
        except (DecodeError, OSError) as error:
            first = first or f"{source.name(index)}: {reason(error)}"
    raise UserError(f"{title}: none of {len(source)} images can be read, first: {first}")
