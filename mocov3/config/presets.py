"""View presets: the strengths and probabilities of the two augmented views, as data.

``photos`` is the recipe of BYOL (Grill et al. 2020, appendix B) as MoCo v3 uses it (arXiv 2104.02057, §4).
"""

from dataclasses import dataclass

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Reading:
    """How the samples of a file become the channels of an image; the rules are in ``mocov3.data.views.decode``."""

    channels: int = 3
    """1: grey; 3: RGB; any other number: the file's own samples, which must be as many."""
    window: tuple[float, float] | None = None
    """Of samples of more than 8 bits: these values become 0 and 255. ``None``: their upper 8 bits are taken."""


RGB = Reading()


@dataclass(frozen=True)
class ViewPreset:
    """What the views of an image are drawn from. Pairs give the values of view 1 and view 2."""

    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of the crop, drawn uniformly in its logarithm."""
    pad: float = 0.0
    """Black border added on each side before the crop, as a share of the image's side (zooms out, shifts)."""
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    jitter_probability: float = 0.8
    gray_probability: float = 0.2
    blur_probability: tuple[float, float] = (1.0, 0.1)
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Standard deviation of the blur in pixels of the view, drawn uniformly."""
    solarize_probability: tuple[float, float] = (0.0, 0.2)
    flip_probability: float = 0.5
    vertical_flip_probability: float = 0.0
    turn_probability: float = 0.0
    """Chance that a view is turned by 90, 180 or 270 degrees (each as likely); .75 makes all four ways up alike."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    """Of every channel."""
    reading: Reading = RGB
    evaluation_zoom: float = 256 / 224
    """For evaluation the shorter side is resized to ``round(size * zoom)`` and the centre is cut out."""
    crop_min: float = 0.08
    """Smallest crop as a share of the image, where ``--crop-min`` is not given."""
    local_views: bool = True
    """Whether crops of a small part of an image still show what it is of (``--local-views``)."""


PRESETS: dict[str, ViewPreset] = {
    "photos": ViewPreset(),
    "gray": ViewPreset(  # small grey images of centred objects; settings chosen in docs/demo.md
        pad=1 / 28,
        brightness=0.4,
        contrast=0.4,
        saturation=0.0,
        hue=0.0,
        gray_probability=0.0,
        blur_probability=(0.0, 0.0),
        solarize_probability=(0.0, 0.0),
        mean=(0.286, 0.286, 0.286),
        std=(0.353, 0.353, 0.353),
        evaluation_zoom=1.0,
        local_views=False,
    ),
    # Ours, not from a paper. What tells parts apart is often small and its colour counts: whole views, colours kept.
    "inspection": ViewPreset(
        brightness=0.2,
        contrast=0.2,
        saturation=0.1,
        hue=0.02,
        jitter_probability=0.5,
        gray_probability=0.0,
        blur_probability=(0.3, 0.1),
        blur_sigma=(0.1, 1.0),
        solarize_probability=(0.0, 0.0),
        vertical_flip_probability=0.5,
        crop_min=0.4,
        local_views=False,
    ),
    # Ours. Grey of a body that has a left and a right, where brightness has a meaning: mild, and no mirror.
    "xray": ViewPreset(
        brightness=0.2,
        contrast=0.2,
        saturation=0.0,
        hue=0.0,
        gray_probability=0.0,
        blur_probability=(0.5, 0.1),
        blur_sigma=(0.1, 1.0),
        solarize_probability=(0.0, 0.0),
        flip_probability=0.0,
        crop_min=0.2,
    ),
    # Ours. Seen from above nothing is up: all eight turns and reflections are as likely.
    "aerial": ViewPreset(
        gray_probability=0.1,
        hue=0.05,
        blur_probability=(0.5, 0.1),
        solarize_probability=(0.0, 0.1),
        vertical_flip_probability=0.5,
        turn_probability=0.75,
        crop_min=0.2,
    ),
}
