"""``--recipe auto``: settings from the images, the machine and a budget of time, each with its reason.

Pure: what is measured (images, memory, speed) comes in as values, so that every plan can be shown and tested for
machines that need not be present. Where a rule rests on something measured or published, the reason says so; the others
are our judgement.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mocov3.config.archs import CONV_VITS, SMALL_RESNETS, SMALL_VITS, VITS, is_resnet, is_vit
from mocov3.config.cheap import sizes_of
from mocov3.config.fields import Fields
from mocov3.config.presets import PRESETS
from mocov3.config.schedule import latest
from mocov3.planning.choices import Choice, duration
from mocov3.planning.rungs import RUNGS, SMALL_VIEWS, Rung

GIB = 1 << 30
_SMALL_SIDE = 96
"""Shorter side in pixels up to which images are used at their own size, by networks with a stem for it."""
_PLANNED = 0.85
"""Share of the budget that steps are planned to take; judging and writing take some too."""
_BY_CLOCK = 0.95
"""Share of what is left of the budget that steps take where the clock decides the end."""
_LEAST_BATCH = 64
"""A contrastive step with fewer others to tell an image from teaches little."""
_FEWEST_JUDGED = 20
"""Images that quality without labels is measured on, at least."""
_FEW_CORES = 2
"""Cores of which steps on small views leave enough for one loader process, and too little for two."""
_BETWEEN = 120
"""Seconds between judgements, at least: each takes a few."""
_WARMED = 3
"""Epochs of the shortest run that is warmed up."""
_PASSES = 100 * 1.28e6**0.3
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
    bf16: bool = False
    """Whether its CPU has instructions for products of bfloat16 matrices."""

    def trains_in_16_bits(self, precision: str) -> bool:
        """Whether ``--precision`` means 16 bits here."""
        return self.device == "cuda" or precision == "bf16"


@dataclass(frozen=True)
class Images:
    """What a look at some of the images showed."""

    count: int
    """Of an epoch."""
    short_side: int
    preset: str
    reason: str
    mean_std: str
    gray: bool
    unseen: int = 0
    """Images of a validation part, which are not trained on."""
    detail: float = 1.0
    """Share of the energy of their edges that 32 px keep."""
    whole: int = 0
    """Images that an epoch is drawn from, where it takes a fraction of them (DIR:0.1)."""

    @property
    def everything(self) -> int:
        """Images that are trained on, in one epoch or another."""
        return max(self.whole, self.count)


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
    spent: Callable[[], float] = lambda: 0.0,
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
        spent: seconds of the budget that planning has taken so far.
    """

    made, seen, possible, seconds = _Settings(given, before), None, 0, 0.0
    asked = [n for n in (given.get("epochs"), *(c.value for c in before if c.name == "epochs")) if isinstance(n, int)]
    for rung in RUNGS:
        settings = _Settings(given, before)
        _views(settings, images, machine, rung)
        _network(settings, images, machine, memory, rung)
        what = settings["image_size"], settings["arch"]
        wide = rung is RUNGS[0] and "arch" not in given and settings["image_size"] <= SMALL_VIEWS
        if machine.device == "cpu" and (wide or not rung.suits(settings["image_size"], images.detail)):
            continue
        if seen is not None and settings["image_size"] < max(_scheduled(settings), default=0):
            continue  # the user's cheap part would be the larger
        if what != seen:
            made, seen = settings, what
            _optimisation(made)
            _precision(made, machine)
            _batch(made, images, machine, memory)
            possible, seconds = _length(made, images, machine, hours, speed, spent)
        if machine.device != "cpu" or rung.allowed(possible, images.count, min([_unlimited(images), *asked])):
            break
    _watching(made, images, seconds)
    for choice in list(made.before.values()):
        made.choose(choice.name, choice.value, choice.reason)
    return made.choices


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


def _views(settings: _Settings, images: Images, machine: Machine, rung: Rung) -> None:
    preset = settings.choose("view_preset", images.preset, images.reason)
    short = images.short_side
    arch = settings.values.get("arch", "")
    # views of ViTs divide into patches: those of the starting weights or the stem, else the smallest chosen below
    patches = is_vit(arch) or arch.startswith("timm/")
    patch = settings.values.get("patch_size", _patch(arch, machine)) if patches else 4
    if short <= _SMALL_SIDE:
        side = max(short // 4 * 4, 16)
        reason = f"half of the images are {short} px or less at their shorter side"
        if machine.device == "cpu" and side > rung.side:
            side, reason = rung.side, rung.side_reason
    elif machine.device == "cpu":
        side, reason = rung.side, rung.side_reason
    elif short < 160:
        side, reason = 128, f"images of about {short} px"
    else:
        side, reason = 224, "the size of the paper"
    settings.choose("image_size", max(int(side / patch + 0.5), 1) * patch, reason)  # the nearest, up at a half
    if preset == "gray":
        settings.choose("crop_min", 0.3, "did better than 0.2 and 0.5 in the demo")
    elif preset == "photos":
        settings.choose("crop_min", 0.2, "the reference's in every recipe")
    else:
        settings.choose("crop_min", PRESETS[preset].crop_min, f"of the preset {preset}")
    if preset == "photos" and settings["image_size"] <= SMALL_VIEWS:
        settings.choose(
            "blur_probability", "0,0", "k-NN on CIFAR-10: 47.7 % without, 46.3 with blur of up to 2 px (docs/budget.md)"
        )
    if preset != "photos" or images.gray:
        settings.choose("mean_std", images.mean_std, "measured on these images")


def _patch(arch: str, machine: Machine) -> int:
    """Pixels of a side of the patches of small views."""
    return 8 if machine.device == "cpu" and arch in CONV_VITS else 4


def _network(settings: _Settings, images: Images, machine: Machine, memory: Memory, rung: Rung) -> None:
    n, small, gb = images.count, settings["image_size"] <= _SMALL_SIDE, machine.memory / GIB
    if machine.device == "cpu":
        arch, reason = rung.arch, rung.arch_reason
    elif n < 5_000 or small:
        arch, reason = "resnet18", "few or small images do not fill a larger network"
    elif n >= 100_000 and gb >= 20:
        arch, reason = "vit_small", "enough images and memory for the paper's ViT-S"
    elif not _fits({**settings.values, "arch": "resnet50"}, _LEAST_BATCH, machine, memory):
        arch, reason = "resnet18", f"ResNet-50 would leave memory for fewer than {_LEAST_BATCH} images a step"
    else:
        arch, reason = "resnet50", "the reference's; ViTs need more images or memory"
    arch = settings.choose("arch", arch, reason)
    tiny = arch in SMALL_RESNETS or arch in SMALL_VITS
    if is_resnet(arch) and "_w" not in arch:
        settings.choose(
            "small_stem", small, f"views of {settings['image_size']} px" + (" would shrink to nothing" * small)
        )
    if _takes_local_views(settings, machine):
        reason = "gained 1.4 to 2 points of k-NN in the same time on CIFAR-10 (docs/budget.md)"
        settings.choose("local_views", f"2:{settings['image_size'] // 2}", reason)
    if tiny:
        settings.choose("moco_dim", 128, "the demo's head for this width")
        settings.choose("moco_mlp_dim", 512, "the demo's head for this width")
    if arch in VITS:
        settings.choose("stop_grad_conv1", True, "keeps ViTs stable (paper, §4.2)")
    if is_vit(arch) and small:
        patch, reason = _patch(arch, machine), f"views of {settings['image_size']} px"
        if patch > 4:
            reason = "patches of 4 would see the images a third as often in the same time (docs/budget.md)"
        settings.choose("patch_size", patch, reason)


def _takes_local_views(settings: _Settings, machine: Machine) -> bool:
    """Where they were measured: small views of photographs, a small ResNet from scratch on a CPU."""
    small = settings["view_preset"] == "photos" and settings["image_size"] <= SMALL_VIEWS
    small = small and settings["image_size"] // 2 <= min(_scheduled(settings), default=math.inf)
    return small and machine.device == "cpu" and settings["arch"] in SMALL_RESNETS and not settings.values.get("init")


def _scheduled(settings: _Settings) -> list[float]:
    return sizes_of(settings.values.get("image_size_schedule", ""))


def _fits(settings: Fields, batch: int, machine: Machine, memory: Memory) -> bool:
    """Whether a step fits the machine, with a seventh kept free."""
    return memory(settings, batch) <= 0.85 * machine.memory


def _precision(settings: _Settings, machine: Machine) -> None:
    if machine.device == "cpu" and machine.bf16:
        settings.choose(
            "precision",
            "bf16",
            "this CPU multiplies 16-bit matrices: a third more steps, for 0.9 points of k-NN (docs/budget.md)",
        )
    else:
        settings.choose(
            "precision", "auto", "16 bits where the device has them" if machine.device == "cuda" else "32 bits here"
        )


def _batch(settings: _Settings, images: Images, machine: Machine, memory: Memory) -> None:
    if settings["arch"] in SMALL_VITS:
        cap = 256
    elif machine.device == "cpu":
        cap = 128
    else:
        cap = 1024 if is_vit(settings["arch"]) else 512
    useful = max(images.count // 8, 16)
    size = min(2 ** int(math.log2(min(cap, useful))), max(images.count, 1))
    limit = (
        "k-NN on CIFAR-10: 48.3 % by 128, 46.3 by 256 (docs/budget.md)"
        if cap == 128
        else "larger ones need other learning rates"
    )
    if useful < cap:
        limit = f"{images.count} images give too few steps with more"
    while size > 2 and not _fits(settings.values, size, machine, memory):
        size //= 2
        limit = f"fits {machine.memory / GIB:.0f} GB (counted: {memory(settings.values, size) / GIB:.1f} GB)"
    settings.choose("batch_size", max(size, 2), limit)
    workers = max(min(machine.cores, 16), 1)
    if machine.device == "cpu" and machine.cores <= _FEW_CORES and images.short_side <= _SMALL_SIDE:
        workers, reason = 1, f"{machine.cores} cores: steps leave enough of them for one (docs/budget.md)"
    elif machine.device == "cpu":
        reason = f"{machine.cores} cores, one of them for loading only while steps wait"
    else:
        reason = f"{machine.cores} cores"
    settings.choose("workers", workers, reason)


def _optimisation(settings: _Settings) -> None:
    arch = settings["arch"]
    vit, small = is_vit(arch) or arch.startswith("timm/"), arch in SMALL_RESNETS
    if vit:
        optimizer = "adamw", "the paper's for ViTs"
    elif small and settings.given.get("fsdp"):
        optimizer = "adamw", "steadier than LARS at small batches (docs/demo.md)"
    elif small:
        optimizer = "muon", "k-NN on CIFAR-10: 56.2 % where AdamW has 51.4 (docs/budget.md)"
    else:
        optimizer = "lars", "the reference's for ResNets"
    chosen = settings.choose("optimizer", *optimizer)
    if chosen == "lars":
        rate, decay = (0.3, "the reference's for long training"), (1e-6, "the reference's")
    elif arch in SMALL_VITS:
        rate = 1e-3, "half and twice as much did not do better on CIFAR-10 (docs/budget.md)"
        decay = 0.05, "that of the small ResNets"
    elif vit:
        rate, decay = (1.5e-4, "the paper's for ViTs"), (0.1, "the paper's for ViTs")
    elif small:
        muon = 1.6e-2, "measured on CIFAR-10 (docs/budget.md)"
        rate = muon if chosen == "muon" else (8e-3, "measured on the demo's images")
        decay = 0.05, "measured on the demo's images"
    else:
        rate, decay = (1e-3, f"usual for {chosen}; not measured here"), (0.05, "that of the small ResNets")
    settings.choose("lr", *rate)
    settings.choose("weight_decay", *decay)
    settings.choose("moco_t", 0.2, "τ 1 is for batches of thousands; 0.2 is the paper's for ViTs")
    settings.choose("moco_m_cos", True, "the reference's in every recipe")


def _unlimited(images: Images) -> int:
    """Epochs where no time limits them."""
    return int(min(max(round(_PASSES / max(images.count, 1) ** 0.3), 100), 800))


def _length(
    settings: _Settings, images: Images, machine: Machine, hours: float | None, speed: Speed, spent: Callable[[], float]
) -> tuple[int, float]:
    """Choose the epochs; how many the time allows, and what one takes (seconds)."""
    budget = 3600 * (hours if hours is not None else DEFAULT_HOURS[machine.device])
    asked = settings.before.pop("epochs", None)
    wanted = asked.value if asked is not None and isinstance(asked.value, int) else _unlimited(images)
    seconds, changed = speed(settings.values)
    for name, value in changed.items():
        settings.values[name] = value
        settings.choices = [c for c in settings.choices if c.name != name]
        settings.choices.append(Choice(name, value, "what fitted the memory when tried"))
    if "hold_out" not in settings.given:  # else they are not among the images
        seconds *= 1 - _kept_back(images) / max(images.everything, 1)
    left = max(budget - (spent() if hours is not None else 0.0), 0.0) / max(seconds, 1e-9)
    possible = int(_PLANNED * left)
    if hours is not None and asked is None and "epochs" not in settings.given and possible < wanted:
        settings.choose("schedule", "wsd", "uses the budget up: the clock decides when the rate falls (docs/budget.md)")
    if possible < 1:
        fewer = f"one pass takes {duration(seconds)}: take fewer images (DIR:0.1), a GPU or a longer --budget"
        epochs, reason = 1, fewer
    elif hours is not None and settings.values.get("schedule") == "wsd":
        possible = int(_BY_CLOCK * left)
        epochs, reason = possible, f"about what {duration(budget)} allow; the clock decides the end"
    elif possible < wanted:
        epochs, reason = possible, f"what {duration(budget)} allow (without a limit: {wanted})"
    else:
        epochs, reason = wanted, "more passes over fewer images, 100 for ImageNet's 1.28 million"
        reason = asked.reason if asked is not None else reason
    epochs = settings.choose("epochs", epochs, reason)
    if epochs < 3:  # too few to hold anything back
        settings.before = {n: c for n, c in settings.before.items() if n not in ("freeze_epochs", "warmup_epochs")}
    least = 1 if epochs >= _WARMED else 0
    warmup = min(40 if is_vit(settings["arch"]) else 10, max(round(epochs / 10), least))
    settings.choose("warmup_epochs", warmup, "a tenth, an epoch at least, at most the paper's")
    if hours is not None:
        settings.choose("max_hours", latest(hours), "the budget and a fifth, should the machine slow down")
    how = f"{duration(seconds)} an epoch, by the steps just measured" if seconds > 0 else "not measured"
    settings.choices.append(Choice("(predicted time)", duration(seconds * epochs), how))
    return possible, seconds


def _kept_back(images: Images) -> int:
    """Images that are kept from training, to judge by."""
    whole = images.everything
    return min(2000, whole // 10) if whole >= 200 and images.unseen < _FEWEST_JUDGED else 0


def _watching(settings: _Settings, images: Images, seconds: float) -> None:
    epochs, apart = settings["epochs"], images.unseen >= _FEWEST_JUDGED
    batch = math.ceil(settings["batch_size"] * images.everything / max(images.count, 1))  # an epoch has one at least
    held = max(min(_kept_back(images), images.everything - batch), 0)
    reason = "the validation part is there to judge by" if apart else "kept from training, to judge without labels"
    if apart or held >= _FEWEST_JUDGED:
        held = settings.choose("hold_out", held, reason)
        if apart or held:
            apart_by = min(math.ceil(_BETWEEN / seconds), epochs) if seconds > 0 else 1
            every = max(epochs // 20, apart_by, 1)
            settings.choose(
                "quality_every", every, "about twenty, two minutes apart; a network that collapses is not kept"
            )
    settings.choose("checkpoint_every", max(epochs // 10, 1), "about ten files")
