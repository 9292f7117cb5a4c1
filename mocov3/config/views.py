"""Flags of the views: every strength and probability of a preset, one by one."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from mocov3.config.fields import Fields, flag
from mocov3.config.presets import PRESETS, Reading, ViewPreset
from mocov3.config.running import DATA
from mocov3.errors import UserError

VIEWS = "strengths of the views (default: the preset's)"

_NUMBERS = (
    "jitter_probability",
    "gray_probability",
    "flip_probability",
    "vertical_flip_probability",
    "turn_probability",
    "brightness",
    "contrast",
    "saturation",
    "hue",
    "pad",
)
_PAIRS = {
    "blur_probability": (0.0, 1.0),
    "solarize_probability": (0.0, 1.0),
    "blur_sigma": (1e-3, 50.0),
    "ratio": (0.05, 20.0),
}
_ORDERED = ("blur_sigma", "ratio")
_FLAGS = {"ratio": "crop_ratio", "pad": "crop_pad"}
"""Fields of a preset whose flag is called otherwise."""
MOST_CHANNELS = 64


@dataclass(frozen=True)
class ViewFlags:
    """What of a preset is replaced; ``None`` or empty keeps the preset's."""

    brightness: float | None = flag(
        None, "factors of brightness are drawn from 1 ± this", kind=float, group=VIEWS, low=0, high=10
    )
    contrast: float | None = flag(
        None, "factors of contrast are drawn from 1 ± this", kind=float, group=VIEWS, low=0, high=10
    )
    saturation: float | None = flag(
        None, "factors of saturation are drawn from 1 ± this", kind=float, group=VIEWS, low=0, high=10
    )
    hue: float | None = flag(
        None, "hue is rotated by up to this fraction of the circle", kind=float, group=VIEWS, low=0, high=0.5
    )
    jitter_probability: float | None = flag(
        None, "how often colours are jittered", kind=float, group=VIEWS, low=0, high=1
    )
    gray_probability: float | None = flag(None, "how often a view is grey", kind=float, group=VIEWS, low=0, high=1)
    blur_probability: str = flag("", "how often views are blurred, one number or one a view (1.0,0.1)", group=VIEWS)
    blur_sigma: str = flag("", "smallest,largest standard deviation of the blur in pixels", group=VIEWS)
    solarize_probability: str = flag("", "how often views are solarised, one number or one a view", group=VIEWS)
    flip_probability: float | None = flag(
        None, "how often a view is mirrored left to right", kind=float, group=VIEWS, low=0, high=1
    )
    vertical_flip_probability: float | None = flag(
        None, "how often a view is mirrored top to bottom", kind=float, group=VIEWS, low=0, high=1
    )
    turn_probability: float | None = flag(
        None,
        "how often a view is rotated by 90, 180 or 270 degrees (0.75: all four orientations equally often)",
        kind=float,
        group=VIEWS,
        low=0,
        high=1,
    )
    crop_ratio: str = flag("", "smallest,largest width over height of the crop", group=VIEWS)
    crop_pad: float | None = flag(
        None,
        "black border added on each side before the crop, as a share of the image's side",
        kind=float,
        group=VIEWS,
        low=0,
        high=2,
    )
    mean_std: str = flag(
        "",
        "normalisation: 'auto' measures it on the images; or mean,std or a mean and then a deviation for every "
        "channel, in 0–1",
        group=VIEWS,
    )
    channels: int = flag(
        3,
        "channels of an image: 1 (grey), 3 (RGB), or those that every file holds (TIFF)",
        group=VIEWS,
        low=1,
        high=MOST_CHANNELS,
    )
    bit_window: str = flag(
        "",
        "LOW,HIGH: values that become black and white in images of more than 8 bits (default: their upper 8)",
        group=VIEWS,
    )

    def check_views(self) -> None:
        """Refuse strengths that make no sense.

        Raises:
            UserError: naming the first.
        """
        preset_of(dataclasses.asdict(self))


@dataclass(frozen=True)
class ReadingFlags:
    """How the images are read that weights are used on."""

    channels: int = flag(
        0,
        "channels of an image: 1 (grey), 3 (RGB), or those that every file holds (default: of the weights, else 3)",
        group=DATA,
        low=0,
        high=MOST_CHANNELS,
    )
    bit_window: str = flag(
        "",
        "LOW,HIGH: values that become black and white in images of more than 8 bits (default: of the weights, else "
        "their upper 8)",
        group=DATA,
    )


def preset_of(values: Fields) -> ViewPreset:
    """The views of a configuration, given as its fields by name (as a checkpoint stores them).

    Raises:
        UserError: for a preset or a pair of numbers that cannot be read.
    """
    preset = PRESETS.get(str(values.get("view_preset") or "photos"))
    if preset is None:
        raise UserError(f"view preset {values.get('view_preset')!r} is not known; known: {', '.join(PRESETS)}")
    changed: dict[str, Any] = {}
    for name in _NUMBERS:
        if (value := values.get(_FLAGS.get(name, name))) is not None:
            changed[name] = value
    for name, (low, high) in _PAIRS.items():
        if text := values.get(_FLAGS.get(name, name)):
            changed[name] = _pair(name, str(text), low, high)
    channels = int(values.get("channels") or 3)
    mean_std = str(values.get("mean_std") or "")
    if mean_std and mean_std != "auto":
        changed["mean"], changed["std"] = _mean_std(mean_std, channels)
    return as_read(dataclasses.replace(preset, **changed), channels, str(values.get("bit_window") or ""))


def as_read(preset: ViewPreset, channels: int, bit_window: str) -> ViewPreset:
    """A preset for images that are read so; of another number of channels than it has, all are normalised alike.

    Raises:
        UserError: for a window that cannot be read.
    """
    changed: dict[str, Any] = {"reading": Reading(channels, window(bit_window))}
    if channels != len(preset.mean):  # by the middle
        for name in ("mean", "std"):
            numbers = getattr(preset, name)
            changed[name] = (sum(numbers) / len(numbers),) * channels
    return dataclasses.replace(preset, **changed)


def _option(name: str) -> str:
    return "--" + _FLAGS.get(name, name).replace("_", "-")


def _within(name: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not low <= value <= high:
        raise UserError(f"{_option(name)} must lie between {low:g} and {high:g}, not {value}")


def _numbers(text: str, where: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        raise UserError(f"{where} {text!r}: is not numbers with commas between them")
    return numbers


def _pair(name: str, text: str, low: float, high: float) -> tuple[float, float]:
    numbers = _numbers(text, _option(name))
    if len(numbers) == 1 and name not in _ORDERED:
        numbers *= 2
    if len(numbers) != 2:
        raise UserError(f"{_option(name)} {text!r}: takes two numbers, as in 1.0,0.1")
    for number in numbers:
        _within(name, number, low, high)
    if name in _ORDERED and numbers[0] > numbers[1]:
        raise UserError(f"{_option(name)} {text!r}: the smaller number comes first")
    return numbers[0], numbers[1]


def window(text: str) -> tuple[float, float] | None:
    """LOW,HIGH of a flag; ``None`` where it is not given.

    Raises:
        UserError: if it is not two numbers, the lower one first.
    """
    if not text:
        return None
    numbers = _numbers(text, "--bit-window")
    if len(numbers) != 2 or not numbers[0] < numbers[1]:
        raise UserError(f"--bit-window {text!r}: takes two values, the lower one first, as in 0,4095")
    return numbers[0], numbers[1]


def _mean_std(text: str, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    n = _numbers(text, "--mean-std")
    if len(n) == 2:
        n = [n[0]] * channels + [n[1]] * channels
    if len(n) != 2 * channels or not all(0 <= v <= 1 for v in n) or not all(v > 1e-4 for v in n[channels:]):
        what = "three means and three deviations" if channels == 3 else f"{channels} means and {channels} deviations"
        raise UserError(f"--mean-std {text!r}: takes 'auto', mean,std or {what}, within 0–1")
    return tuple(n[:channels]), tuple(n[channels:])
