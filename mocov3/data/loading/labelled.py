"""Labelled images for supervised training: the plain training view, and epochs that leave no image out."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from mocov3.config.presets import RGB, Reading, ViewPreset
from mocov3.data.loading.slots import Work
from mocov3.data.sources.findings import findings_of, refuse_one_sided
from mocov3.data.sources.groups import NONE, without_shared
from mocov3.data.sources.labels import matched, with_labels
from mocov3.data.sources.opening import Source, field_groups, has_unseen, open_source, open_unseen
from mocov3.data.sources.splits import choose
from mocov3.data.views.decode import ImageBytes
from mocov3.data.views.draws import draw, permutation
from mocov3.data.views.operations import Pixels, apply_draw
from mocov3.data.views.two_views import written
from mocov3.errors import UserError

_PLAIN = ViewPreset(
    jitter_probability=0.0, gray_probability=0.0, blur_probability=(0.0, 0.0), solarize_probability=(0.0, 0.0)
)


@dataclass(frozen=True)
class CropView:
    """Random resized crop (bilinear, antialiased) and flip: the training view of linear evaluation and of transfer.

    Args:
        image_size: side of the view in pixels.
        crop_min: smallest crop as a share of the image's area.
        reading: channels of the image, and window of deep samples.
    """

    image_size: int = 224
    crop_min: float = 0.08
    reading: Reading = RGB
    count: int = field(default=1, init=False)

    def __call__(
        self,
        data: bytes | np.ndarray,
        *,
        seed: int,
        epoch: int,
        index: int,
        out: Sequence[Pixels] | np.ndarray | None = None,
    ) -> tuple[Pixels]:
        """The view of the image in ``data``, a function of (seed, epoch, index), written to ``out`` if given.

        Raises:
            DecodeError: if the image cannot be read.
        """
        image = ImageBytes(data, self.reading)
        choice = draw(_PLAIN, self.crop_min, image.width, image.height, seed=seed, epoch=epoch, index=index, view=0)
        pixels = apply_draw(image.pixels()[0], choice, self.image_size, "fast")
        written([pixels], out)
        return (pixels,)


def plan_all(
    n: int, *, seed: int, batch_size: int, rank: int, ranks: int, start: tuple[int, int] = (0, 0), epochs: int
) -> Iterator[Work]:
    """The batches of this rank from ``start`` (epoch, iteration) on; the last part batch of an epoch is kept.

    The global batch of a step does not depend on the number of ranks. Ranks may get parts that differ by one, or
    (of a small last batch) none.
    """
    epoch, iteration = start
    for e in range(epoch, epochs):
        order = permutation(seed, e, n)
        for i in range(iteration if e == epoch else 0, -(-n // batch_size)):
            batch = order[i * batch_size : (i + 1) * batch_size]
            yield Work(e, i, np.array_split(batch, ranks)[rank])


def open_labelled(data: str, group_by: str = "", labels: str = "") -> tuple[Source, Source]:
    """The labelled images of the training and validation part of DATA, or of the built-in ``fashion-mnist[:ROOT]``.

    ``labels`` names a file of findings (``mocov3.data.sources.findings``) in place of classes. Validation images of a
    group (``mocov3.data.sources.groups``) that training has are left out.

    Raises:
        UserError: if one is missing, empty or without classes, or validation has a class that training lacks.
    """
    train, val = open_source(data, "train"), open_unseen(data)
    if labels:
        train, val = findings_of(labels, (train, val))
        judged = without_shared(val, train, group_by, f"data {data}")
        refuse_one_sided(judged, f"data {data} (val)")
        return train, judged
    for part, images in (("train", train), ("val", val)):
        if images.labels is None or len(images.classes) < 2:
            raise UserError(f"data {data} ({part}): needs images of two or more classes: {part}/CLASS/…, or labels")
    where, known = f"data {data}", with_labels(train)
    return known, without_shared(matched(train.classes, val, where), known, group_by, where)


def open_judged(data: str, group_by: str = "", labels: str = "") -> Source:
    """The validation part of DATA alone, without images of a group that the training part has, where there is one.

    Raises:
        UserError: if it is missing or holds no image, or groups cannot be told.
    """
    val = open_source(data, "val")
    if labels:
        (val,) = findings_of(labels, (val,))
    if group_by != NONE and (group_by or field_groups(val, "") is not None) and has_unseen(data):
        val = without_shared(val, open_source(data, "train"), group_by, f"data {data}")
    refuse_one_sided(val, f"data {data} (val)")
    return val


def open_evaluated(folder: str) -> Source:
    """The validation part of a folder, or the whole where it has none: the folder of that part was named itself.

    Raises:
        UserError: if it is missing or holds no image.
    """
    return open_source(folder, "val" if os.path.isdir(folder) and choose(folder, "val") else "train")
