"""``--recipe auto``: settings from the images, the machine and a budget of time, each with its reason.

Pure: what is measured (images, memory, speed) comes in as values, so that every plan can be shown and tested for
machines that need not be present. Where a rule rests on something measured or published, the reason says so; the others
are our judgement.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mocov3.config.archs import is_resnet, is_vit
from mocov3.config.fields import Fields
from mocov3.config.presets import PRESETS

GIB = 1 << 30
_SMALL_SIDE = 96
"""Shorter side in pixels up to which images are used at their own size, by networks with a stem for it."""
_CPU_SIDES = (64, 32)
_CPU_REASONS = {
    64: "on a CPU 224 px would take twelve times as long",
    32: "at 64 px the time allows fewer than 40 epochs on this CPU",
}
_FEW_EPOCHS = 40
_PLANNED, _LATEST = 0.85, 1.2
"""Shares of the budget: what steps are planned to take (judging and writing take some too), and where a run is cut."""
_LEAST_BATCH = 64
"""A contrastive step with fewer others to tell an image from teaches little."""
_PASSES = 100 * 1.28e6**0.3
_NO_SETTINGS = ("data", "recipe", "output_dir", "config", "resume", "quiet", "json")
DEFAULT_HOURS = {"cpu": 1.0, "mps": 4.0, "cuda": 12.0}


@dataclass(frozen=True)
class Machine:
    """Where training runs."""

    device: str
    """cpu, cuda or mps."""
    memory: int
    """Bytes that training may use."""
    cores: int
    name: str = ""


@dataclass(frozen=True)
class Images:
    """What a look at some of the images showed."""

    count: int
    short_side: int
    preset: str
    reason: str
    mean_std: str
    gray: bool


@dataclass(frozen=True)
class Choice:
    """One setting and why."""

    name: str
    value: object
    reason: str


Speed = Callable[[Fields], tuple[float, Fields]]
"""Settings so far → seconds an epoch, and settings that had to change to fit the memory."""

Memory = Callable[[Fields, int], float]
"""Settings so far and a batch → bytes of a training step, as ``mocov3.pretraining.footprint`` counts them."""


def choose_settings(
    images: Images,
    machine: Machine,
    hours: float | None,
    given: Fields,
    speed: Speed,
    memory: Memory,
    before: Sequence[Choice] = (),
) -> list[Choice]:
    """Every setting that ``given`` leaves open, in the order they depend on each other.

    Args:
        images: what was seen of them.
        machine: where training runs.
        hours: budget of time; ``None``: that of the device by ``DEFAULT_HOURS``.
        given: fields the user set.
        speed: measures, or supposes, the time of an epoch.
        memory: counts what a step takes.
        before: choices of another table, which go before the rules here; its epochs are what the time may shorten.
    """

    def made(cpu_side: int) -> _Settings:
        return _made(_Settings(given, before), images, machine, hours, speed, memory, cpu_side)

    settings = made(_CPU_SIDES[0])
    few = min([_FEW_EPOCHS, *(c.value for c in before if c.name == "epochs" and isinstance(c.value, int))])
    if machine.device == "cpu" and settings["image_size"] > _CPU_SIDES[1] and settings["epochs"] < few:
        settings = made(_CPU_SIDES[1])
    return settings.choices


def _made(
    settings: "_Settings",
    images: Images,
    machine: Machine,
    hours: float | None,
    speed: Speed,
    memory: Memory,
    cpu_side: int,
) -> "_Settings":
    _views(settings, images, machine, cpu_side)
    _network(settings, images, machine, memory)
    _optimisation(settings)
    _batch(settings, images, machine, memory)
    _length(settings, images, machine, hours, speed)
    _watching(settings, images)
    for choice in list(settings.before.values()):
        settings.choose(choice.name, choice.value, choice.reason)
    return settings


class _Settings:
    def __init__(self, given: Fields, before: Sequence[Choice] = ()) -> None:
        self.given, self.values = given, dict(given)
        self.before = {choice.name: choice for choice in before if choice.name not in given}
        """What goes before the rules and is not chosen yet."""
        self.choices: list[Choice] = []

    def choose(self, name: str, value: object, reason: str) -> Any:
        """The user's value, else that of the other table, else ``value``, noted with its reason."""
        if name not in self.given:
            if choice := self.before.pop(name, None):
                value, reason = choice.value, choice.reason
            self.values[name] = value
            self.choices.append(Choice(name, value, reason))
        return self.values[name]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]


def _views(settings: _Settings, images: Images, machine: Machine, cpu_side: int) -> None:
    preset = settings.choose("view_preset", images.preset, images.reason)
    short = images.short_side
    arch = settings.values.get("arch", "")
    # views of ViTs divide into patches: those of the starting weights or the stem, else the smallest chosen below
    patches = is_vit(arch) or arch.startswith("timm/")
    patch = settings.values.get("patch_size", 4) if patches else 4
    if short <= _SMALL_SIDE:
        side = max(short // 4 * 4, 16)
        reason = f"half of the images are {short} px or less at their shorter side"
        if machine.device == "cpu" and side > cpu_side:
            side, reason = cpu_side, _CPU_REASONS[cpu_side]
    elif machine.device == "cpu":
        side, reason = cpu_side, _CPU_REASONS[cpu_side]
    elif short < 160:
        side, reason = 128, f"images of about {short} px"
    else:
        side, reason = 224, "the size of the paper"
    settings.choose("image_size", max(side // patch, 1) * patch, reason)
    if preset == "gray":
        settings.choose("crop_min", 0.3, "did better than 0.2 and 0.5 in the demo")
    elif preset == "photos":
        settings.choose("crop_min", 0.2, "the reference's in every recipe")
    else:
        settings.choose("crop_min", PRESETS[preset].crop_min, f"of the preset {preset}")
    if preset != "photos" or images.gray:
        settings.choose("mean_std", images.mean_std, "measured on these images")


def _network(settings: _Settings, images: Images, machine: Machine, memory: Memory) -> None:
    n, small, gb = images.count, settings["image_size"] <= _SMALL_SIDE, machine.memory / GIB
    if machine.device == "cpu":
        arch, reason = ("resnet10_w32", "trains in minutes on a CPU")
        if settings["image_size"] > 40:
            arch, reason = "resnet10_w48", "a CPU trains it in an hour"
    elif n < 5_000 or small:
        arch, reason = "resnet18", "few or small images do not fill a larger network"
    elif n >= 100_000 and gb >= 20:
        arch, reason = "vit_small", "enough images and memory for the paper's ViT-S"
    elif not _fits({**settings.values, "arch": "resnet50"}, _LEAST_BATCH, machine, memory):
        arch, reason = "resnet18", f"ResNet-50 would leave memory for fewer than {_LEAST_BATCH} images a step"
    else:
        arch, reason = "resnet50", "the reference's; ViTs need more images or memory"
    arch = settings.choose("arch", arch, reason)
    tiny = arch.startswith("resnet10")
    if is_resnet(arch) and "_w" not in arch:
        settings.choose(
            "small_stem", small, f"views of {settings['image_size']} px" + (" would shrink to nothing" * small)
        )
    if tiny:
        settings.choose("moco_dim", 128, "the demo's head for this width")
        settings.choose("moco_mlp_dim", 512, "the demo's head for this width")
    if is_vit(arch):
        settings.choose("stop_grad_conv1", True, "keeps ViTs stable (paper, §4.2)")
        if settings["image_size"] <= _SMALL_SIDE:
            settings.choose("patch_size", 4, f"views of {settings['image_size']} px")


def _fits(settings: Fields, batch: int, machine: Machine, memory: Memory) -> bool:
    """Whether a step fits the machine, with a seventh kept free."""
    return memory(settings, batch) <= 0.85 * machine.memory


def _batch(settings: _Settings, images: Images, machine: Machine, memory: Memory) -> None:
    cap = 128 if machine.device == "cpu" else 1024 if is_vit(settings["arch"]) else 512
    useful = max(images.count // 8, 16)
    size = min(2 ** int(math.log2(min(cap, useful))), max(images.count, 1))
    limit = "128 did better than 256 in the demo" if cap == 128 else "larger ones need other learning rates"
    if useful < cap:
        limit = f"{images.count} images give too few steps with more"
    while size > 2 and not _fits(settings.values, size, machine, memory):
        size //= 2
        limit = f"fits {machine.memory / GIB:.0f} GB (counted: {memory(settings.values, size) / GIB:.1f} GB)"
    settings.choose("batch_size", max(size, 2), limit)
    settings.choose(
        "precision", "auto", "16 bits where the device has them" if machine.device == "cuda" else "32 bits here"
    )
    settings.choose(
        "workers",
        max(min(machine.cores, 16), 1),
        f"{machine.cores} cores" + (", one of them for loading only while steps wait" * (machine.device == "cpu")),
    )


def _optimisation(settings: _Settings) -> None:
    arch = settings["arch"]
    if is_vit(arch) or arch.startswith("timm/"):
        settings.choose("optimizer", "adamw", "the paper's for ViTs")
        settings.choose("lr", 1.5e-4, "the paper's for ViTs")
        settings.choose("weight_decay", 0.1, "the paper's for ViTs")
    elif arch.startswith("resnet10"):
        settings.choose("optimizer", "adamw", "steadier than LARS at small batches (docs/demo.md)")
        settings.choose("lr", 8e-3, "measured on the demo's images")
        settings.choose("weight_decay", 0.05, "measured on the demo's images")
    else:
        settings.choose("optimizer", "lars", "the reference's for ResNets")
        settings.choose("lr", 0.3, "the reference's for long training")
        settings.choose("weight_decay", 1e-6, "the reference's")
    settings.choose("moco_t", 0.2, "τ 1 is for batches of thousands; 0.2 is the paper's for ViTs")
    settings.choose("moco_m_cos", True, "the reference's in every recipe")


def _length(settings: _Settings, images: Images, machine: Machine, hours: float | None, speed: Speed) -> None:
    budget = 3600 * (hours if hours is not None else DEFAULT_HOURS[machine.device])
    asked = settings.before.pop("epochs", None)
    wanted = min(max(round(_PASSES / max(images.count, 1) ** 0.3), 100), 800)
    if asked is not None and isinstance(asked.value, int):
        wanted = asked.value
    seconds, changed = speed(settings.values)
    for name, value in changed.items():
        settings.values[name] = value
        settings.choices = [c for c in settings.choices if c.name != name]
        settings.choices.append(Choice(name, value, "what fitted the memory when tried"))
    possible = int(_PLANNED * budget / max(seconds, 1e-9))
    if hours is not None and settings.values.get("schedule") == "wsd":
        epochs, reason = max(possible, 1), f"about what {_duration(budget)} allow; the clock decides the end"
    elif possible < 1:
        epochs, reason = (
            1,
            f"one pass takes {_duration(seconds)}: take fewer images (DIR:0.1), a GPU or a longer --budget",
        )
    elif possible < wanted:
        epochs, reason = possible, f"what {_duration(budget)} allow (without a limit: {wanted})"
    else:
        epochs, reason = wanted, "more passes over fewer images, 100 for ImageNet's 1.28 million"
        reason = asked.reason if asked is not None else reason
    epochs = settings.choose("epochs", epochs, reason)
    if epochs < 3:  # too few to hold anything back
        settings.before = {n: c for n, c in settings.before.items() if n not in ("freeze_epochs", "warmup_epochs")}
    warmup = min(40 if is_vit(settings["arch"]) else 10, round(epochs / 10))
    settings.choose("warmup_epochs", warmup, "a tenth, at most the paper's")
    if hours is not None:
        settings.choose("max_hours", round(_LATEST * hours, 4), "the budget and a fifth, should the machine slow down")
    how = f"{_duration(seconds)} an epoch, by the steps just measured" if seconds > 0 else "not measured"
    settings.choices.append(Choice("(predicted time)", _duration(seconds * epochs), how))


def _watching(settings: _Settings, images: Images) -> None:
    epochs = settings["epochs"]
    held = min(2000, images.count // 10) if images.count >= 200 else 0
    held = min(held, images.count - settings["batch_size"])
    if held >= 20:
        held = settings.choose("hold_out", held, "kept from training, to judge without labels")
        if held:
            settings.choose("quality_every", max(epochs // 20, 1), "about twenty judgements; keeps the best network")
    settings.choose("checkpoint_every", max(epochs // 10, 1), "about ten files")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"


def block(choices: list[Choice], recipe: Fields, given: Fields) -> str:
    """The plan as text: a setting a line, with its value and reason."""
    rows = [(c.name.replace("_", "-"), _shown(c.value), c.reason) for c in choices]
    rest = [(name, value, "of the recipe") for name, value in recipe.items() if name not in given]
    rest += [(name, value, "given by you") for name, value in given.items() if name not in _NO_SETTINGS]
    rows += [(name.replace("_", "-"), _shown(value), reason) for name, value, reason in rest]
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    return "\n".join(f"  {name:<{widths[0]}}  {value:<{widths[1]}}  {reason}" for name, value, reason in rows)


def _shown(value: object) -> str:
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)
