"""What is exported, and what a format must be able to do."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mocov3.config.archs import is_vit
from mocov3.config.fields import Fields
from mocov3.config.presets import Reading
from mocov3.data import CentreView
from mocov3.models.backbones import Encoder
from mocov3.weights.convert import view_entry


@dataclass(frozen=True)
class Exported:
    """A backbone in evaluation mode, and what a card says about it."""

    encoder: Encoder
    """Its head is the identity, or the linear classifier that is exported too."""
    arch: str
    image_size: int
    patch_size: int
    small_stem: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    zoom: float
    """The shorter side is resized to ``round(image_size · zoom)`` for evaluation."""
    source: str
    sha256: str
    recipe: Fields
    epochs: int | None
    licence: str
    origin: str
    momentum: bool
    in_chans: int = 3
    classes: int = 0
    """Of the classifier; 0 without."""
    class_names: tuple[str, ...] = ()
    bicubic: bool = False
    """Whether images were resized so for evaluation (DeiT's), instead of bilinearly."""
    window: tuple[float, float] | None = None
    """Of samples of more than 8 bits, see ``mocov3.config.presets.Reading``."""

    @property
    def output(self) -> str:
        """What the network gives."""
        return "scores" if self.classes else "features"

    @property
    def resized(self) -> int:
        """Shorter side in pixels, before the centre is cut out."""
        return round(self.image_size * self.zoom)

    @property
    def interpolation(self) -> str:
        """Of the resizing, as torchvision and timm call it."""
        return "bicubic" if self.bicubic else "bilinear"

    @property
    def reading(self) -> Reading:
        """How files become images."""
        return Reading(self.in_chans, self.window)

    @property
    def channels(self) -> str:
        """The channels of its images in words, in their order, and what becomes of deeper samples than 8 bits."""
        count = self.in_chans
        names = {1: "grey", 3: "RGB"}.get(count, f"{count} channels in the order of the file's samples")
        window = ", of more than 8 bits the values {:g} to {:g} (0 to 1)".format(*self.window) if self.window else ""
        return names + window

    @property
    def view_entry(self) -> Fields:
        """The evaluation view as files of ours say it."""
        return view_entry(self.mean, self.std, self.zoom, self.reading)

    @property
    def view(self) -> CentreView:
        """From file bytes to the pixels of evaluation."""
        kind = Image.Resampling.BICUBIC if self.bicubic else Image.Resampling.BILINEAR
        return CentreView(self.image_size, self.zoom, kind, self.reading)

    @property
    def depth(self) -> int:
        """Blocks of a ViT."""
        return len(cast(Any, self.encoder).blocks)

    @property
    def heads(self) -> int:
        """Attention heads of a ViT."""
        return int(cast(Any, self.encoder).blocks[0].attn.num_heads)

    @property
    def dims(self) -> Fields:
        """What one of our ViTs is built with besides its sizes."""
        return {"num_heads": self.heads} if is_vit(self.arch) else {}

    def state(self) -> dict[str, Tensor]:
        """The weights, contiguous."""
        return {k: v.detach().contiguous() for k, v in self.encoder.state_dict().items()}

    def about(self) -> dict[str, str]:
        """Metadata for formats that can hold strings."""
        return {
            "arch": self.arch,
            "image_size": str(self.image_size),
            "config": json.dumps(
                {
                    "image_size": self.image_size,
                    "patch_size": self.patch_size,
                    "small_stem": self.small_stem,
                    "channels": self.in_chans,
                    "bit_window": ",".join(map(str, self.window or ())),
                    **({"heads": self.heads} if is_vit(self.arch) else {}),
                    "view_preset": self.recipe.get("view_preset", "photos"),
                    "mean_std": self.recipe.get("mean_std", ""),
                }
            ),
            "mean": json.dumps(self.mean),
            "std": json.dumps(self.std),
            "resize": str(self.resized),
            "interpolation": self.interpolation,
            "channels": self.channels,
            "view": json.dumps(self.view_entry),
            "source_sha256": self.sha256,
            "licence": self.licence,
            "origin": self.origin,
        } | ({"class_names": json.dumps(self.class_names)} if self.class_names else {})


class Unfit(Exception):
    """The format cannot hold this arch; the message is the reason and the alternative."""


@runtime_checkable
class Format(Protocol):
    """A format that a backbone is exported to."""

    tolerance: float
    """Largest difference of a feature allowed, as a share of the largest feature (at least 1)."""

    def fits(self, model: Exported) -> None:
        """Raise ``Unfit`` for what this format cannot hold."""

    def write(self, model: Exported, place: Path) -> None:
        """Write the file or folder."""

    def features(self, model: Exported, place: Path, x: Float[Tensor, "batch channels height width"]) -> Tensor:
        """Features by the target's own classes, loaded strictly from what was written: (batch, features)."""

    def usage(self, model: Exported, name: str) -> str:
        """Python that loads it and computes features or scores of ``images``, for the card."""

    own: str = ""
    """The library's preprocessing that the written configuration sets up; empty where it has none."""
    own_note: str = ""
    """How it differs from ours."""

    def prepared(self, place: Path, images: Sequence[Image.Image]) -> Tensor | None:
        """RGB or grey images by ``own``: (batch, channels, height, width); ``None`` where it cannot."""
        return None
