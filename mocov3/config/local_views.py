"""Flags of local views: small crops whose queries are compared with the keys of both views (SwAV, DINO: multi-crop).

Caron et al. 2020 (arXiv 2006.09882) and 2021 (arXiv 2104.14294) add crops of 5 to 40 % of an image at 96 pixels to
views of 224; the defaults here keep that ratio.
"""

from dataclasses import dataclass

from mocov3.config.archs import is_vit
from mocov3.config.cheap import sizes_of
from mocov3.config.fields import flag
from mocov3.config.presets import PRESETS
from mocov3.errors import UserError, printable

CROPS = (0.05, 0.4)
"""Smallest and largest local crop as shares of the image, where none are given."""
RATIO = 96 / 224
"""Side of local views against that of the two views, likewise."""
_MOST = 64


@dataclass(frozen=True)
class LocalViews:
    """The local views of an image."""

    count: int
    pixels: int
    """Side."""
    smallest: float
    """Smallest crop as a share of the image's area."""
    largest: float


@dataclass(frozen=True)
class LocalFlags:
    """Local views; off by default."""

    local_views: str = flag(
        "",
        "small crops of each image, as more queries for the keys of both views: N[:PIXELS[:SMALLEST-LARGEST]], their "
        f"number, side and share of the image (default: {RATIO:.2f} of --image-size, {CROPS[0]:g}-{CROPS[1]:g})",
        group="method",
        metavar="N:PIXELS:CROPS",
    )
    local_weight: float = flag(
        1.0, "weight of the mean loss of local views beside that of the two views", group="method", above=0, below=1e3
    )


def local_views_of(config: LocalFlags) -> LocalViews | None:
    """The local views of a pre-training configuration, ``None`` where there are none.

    Raises:
        UserError: for a value that cannot be read, or does not fit the views, the network or the preset.
    """
    text, values = config.local_views, vars(config)
    if not text:
        return None
    side, patch = values["image_size"], values["patch_size"] if is_vit(values["arch"]) else 1
    words = text.split(":")
    try:
        count = int(words[0])
        pixels = int(words[1]) if len(words) > 1 else max(int(RATIO * side) // patch, 1) * patch
        low, high = map(float, words[2].split("-")) if len(words) > 2 else CROPS
        if len(words) > 3:
            raise ValueError
    except ValueError:
        raise UserError(
            f"--local-views '{printable(text)}': takes N, N:PIXELS or N:PIXELS:SMALLEST-LARGEST, as in 4:96:0.05-0.4"
        ) from None
    _check(LocalViews(count, pixels, low, high), side, patch, str(values["view_preset"]))
    _check_stages(values, pixels)
    return LocalViews(count, pixels, low, high)


def _check(local: LocalViews, side: int, patch: int, preset: str) -> None:
    if not 1 <= local.count <= _MOST:
        raise UserError(f"--local-views takes 1 to {_MOST} views, not {local.count}")
    if not (1 <= local.pixels <= side and local.pixels % patch == 0):
        divides = f" that patches of {patch} px divide" if patch > 1 else ""
        raise UserError(
            f"--local-views {local.count}:{local.pixels}: give a side from {patch} to --image-size {side}{divides}"
        )
    if not 0 < local.smallest <= local.largest <= 1:
        raise UserError(
            f"--local-views: crops of {local.smallest:g}-{local.largest:g} of an image; give shares above 0, at most "
            "1, the smaller first"
        )
    if not PRESETS[preset].local_views:
        raise UserError(
            f"--local-views: small crops lose what --view-preset {preset} is for, the whole object; leave it out, or "
            "take another preset"
        )


def _check_stages(values: dict[str, object], pixels: int) -> None:
    """Views of a cheap stage must not be smaller than the local ones."""
    for size in sizes_of(str(values["image_size_schedule"] or "")):
        if size < pixels:
            raise UserError(
                f"--image-size-schedule {size:g} is smaller than local views of {pixels} px; lower --local-views, or "
                "raise it"
            )
