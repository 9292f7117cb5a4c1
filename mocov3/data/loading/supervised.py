"""Labelled images for fine-tuning: subsets, repeated images, and DeiT's training transform.

``DeitAugment`` imports torch, in the loader processes too (the others do not): RandAugment and its ranges are timm's,
and timm needs torch (about 3 s at the start of each process). What is drawn is a function of (seed, epoch, image,
repetition) all the same: the global generators that timm draws from are seeded for every image.
"""

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from mocov3.config.presets import RGB, Reading
from mocov3.config.views import MOST_CHANNELS
from mocov3.data.sources.groups import groups_in
from mocov3.data.sources.opening import Source, Subset
from mocov3.data.views.decode import ImageBytes
from mocov3.data.views.draws import permutation
from mocov3.data.views.operations import Pixels
from mocov3.data.views.two_views import written
from mocov3.errors import UserError

_AUGMENT = 8  # a stream of the seed; 0 to 3 are those of draws.py
_SUBSET_SEED = 20210405
TRANSFER_CROP = 0.05
"""Smallest crop of the reference's transfer runs, as a share of the image."""
_PADDED_UP_TO = 32  # DeiT crops images of at most this side out of a border of 4 instead of resizing them


def stratified(source: Source, fraction: float, group_by: str = "") -> Source:
    """``fraction`` of the images of every class (rounded, at least one): always the same ones, whatever the seed.

    A smaller fraction is contained in a larger one. Groups (``mocov3.data.sources.groups``) are drawn whole, each with
    the class that most of its images have, as many as fit into the fraction of the class. Of images with several
    findings ``fraction`` is drawn of all.
    """
    if fraction >= 1:
        return source
    labels = source.labels
    assert labels is not None
    order = permutation(_SUBSET_SEED, 0, len(source))
    found = groups_in(source, group_by)
    groups = np.arange(len(source), dtype=np.int32) if found is None else found
    if labels.ndim == 2:  # of findings there are no classes to draw by
        labels = np.zeros(len(source), np.int32)
    sizes, classes = np.bincount(groups), _classes_of_groups(groups, labels)
    drawn = groups[order][np.sort(np.unique(groups[order], return_index=True)[1])]  # by their first image
    chosen = []
    for label in np.unique(classes):
        of_class = drawn[classes[drawn] == label]
        ends = np.cumsum(sizes[of_class])
        chosen.append(of_class[: max(int(np.searchsorted(ends, round(fraction * ends[-1]), side="right")), 1)])
    return Subset(source, np.flatnonzero(np.isin(groups, np.concatenate(chosen))))


def _classes_of_groups(groups: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The class that most images of each group have, the lowest of equals."""
    pairs, counts = np.unique(np.stack([groups, labels], axis=1), axis=0, return_counts=True)
    first = np.lexsort((pairs[:, 1], -counts, pairs[:, 0]))
    ordered: np.ndarray = pairs[first]
    classes: np.ndarray = ordered[np.unique(ordered[:, 0], return_index=True)[1], 1]
    return classes


@dataclass(frozen=True)
class Repeated:
    """Every image ``repeats`` times: image i, repetition r has index ``i · repeats + r``."""

    source: Source
    repeats: int

    def __len__(self) -> int:
        return len(self.source) * self.repeats

    @property
    def labels(self) -> np.ndarray | None:
        """Class of every repetition."""
        labels = self.source.labels
        return None if labels is None else np.repeat(labels, self.repeats, axis=0)

    @property
    def classes(self) -> list[str]:
        """As the source."""
        return self.source.classes

    @property
    def digest(self) -> str:
        """As the source."""
        return self.source.digest

    def read(self, index: int) -> bytes | np.ndarray:
        """As the source."""
        return self.source.read(index // self.repeats)

    def name(self, index: int) -> str:
        """As the source."""
        return self.source.name(index // self.repeats)


def key(seed: int, stream: int, epoch: int, index: int) -> int:
    """63 random bits that belong to (seed, stream, epoch, index) alone."""
    bits = np.random.Philox(key=[seed, stream], counter=[0, 0, index, epoch])
    return int(bits.random_raw()) >> 1


@contextlib.contextmanager
def seeded(value: int) -> Iterator[None]:
    """Python's, numpy's and torch's (CPU) global generators seeded with ``value``; afterwards they are as before."""
    import torch

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.default_generator.manual_seed(value)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@dataclass(frozen=True)
class DeitAugment:
    """DeiT's training transform without random erasing (Touvron et al. 2021, table 9), by timm's factory.

    Images of other than three channels are changed channel by channel, each as a grey image by the same draws, which
    never depend on pixels: no saturation, and contrast about the mean of the channel.

    Args:
        image_size: side of the view in pixels. Images that have this side already, up to 32 px, are cropped out of
            a border of 4, as in DeiT.
        auto_augment: timm's name of the policy, '' for none.
        color_jitter: strength where there is no policy.
        interpolation: of the crop and the policy.
        mean: what is outside of a turned image, 0–1, of every channel.
        reading: channels of the image, and window of deep samples.
    """

    image_size: int = 224
    auto_augment: str = "rand-m9-mstd0.5-inc1"
    color_jitter: float = 0.4
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    reading: Reading = RGB
    count: int = field(default=1, init=False)

    def check(self) -> None:
        """Refuse a policy that timm does not know.

        Raises:
            UserError: naming it.
        """
        try:
            _pipeline(self, False)
        except (AssertionError, ValueError, KeyError, IndexError) as error:
            raise UserError(
                f"--aa {self.auto_augment!r}: timm has no such policy ({error}); as rand-m9-mstd0.5-inc1, or none"
            ) from None

    def __call__(
        self,
        data: bytes | np.ndarray,
        *,
        seed: int,
        epoch: int,
        index: int,
        out: Sequence[Pixels] | np.ndarray | None = None,
    ) -> tuple[Pixels]:
        """The view of the image in ``data``, written to ``out`` if given; as ``TwoViews``."""
        pixels = ImageBytes(data, self.reading).pixels()[0]
        small = self.image_size <= _PADDED_UP_TO and pixels.shape[:2] == (self.image_size, self.image_size)
        made = []
        for image, augment in self._images(pixels):
            with seeded(key(seed, _AUGMENT, epoch, index)):
                made.append(np.asarray(_pipeline(augment, small)(image)))  # an array or a tensor, by timm's version
        view = np.ascontiguousarray(np.concatenate(made).transpose(1, 2, 0))
        written([view], out)
        return (view,)

    def _images(self, pixels: Pixels) -> "list[tuple[Image.Image, DeitAugment]]":
        """The images that timm is given: one in colour, or the channels in grey; and what is done to each."""
        if self.reading.channels == 3:
            return [(Image.fromarray(pixels), self)]
        return [
            (Image.fromarray(pixels[..., channel]), replace(self, mean=(mean,)))
            for channel, mean in enumerate(self.mean)
        ]


@lru_cache(maxsize=2 * MOST_CHANNELS)
def _pipeline(of: DeitAugment, padded: bool) -> Any:
    from timm.data import create_transform
    from torchvision.transforms import RandomCrop

    pipeline = create_transform(
        input_size=of.image_size,
        is_training=True,
        color_jitter=of.color_jitter,
        auto_augment=of.auto_augment or None,
        interpolation=of.interpolation,
        mean=of.mean,
        use_prefetcher=True,  # ends in uint8, (3, height, width)
    )
    if padded:
        pipeline.transforms[0] = RandomCrop(of.image_size, padding=4)
    for step in pipeline.transforms:
        for operation in [*getattr(step, "ops", []), *(o for part in getattr(step, "policy", []) for o in part)]:
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize
    return pipeline


def _posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    # timm's ranges reach 0 bits, which Pillow refuses since 12; before, and in DeiT's runs, such an image went black
    if bits < 1:
        return Image.new(image.mode, image.size)
    return ImageOps.posterize(image, bits) if bits < 8 else image
