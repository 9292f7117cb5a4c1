"""From a command line with ``--recipe auto`` to a configuration: looks at images and machine, prints the plan.

A resumed run takes the settings of its own ``config.yaml``: nothing is chosen twice.
"""

import dataclasses
import functools
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mocov3.config import PretrainConfig, read_yaml
from mocov3.config.fields import Fields, Layers
from mocov3.config.presets import PRESETS, ViewPreset
from mocov3.config.schedule import budget_hours, latest
from mocov3.data import Source
from mocov3.data.sources.detail import SIDES
from mocov3.data.sources.opening import has_unseen, open_unseen
from mocov3.data.sources.survey import Survey, giants, propose, scattered, survey
from mocov3.errors import UserError, no_file
from mocov3.planning.adapting import choices_of, row_of
from mocov3.planning.auto import Images, Machine, choose_settings
from mocov3.planning.choices import Choice, block
from mocov3.pretraining.inputs import open_images

LOOKED_AT = 400
_FEW = 20_000
_FIELDS = {f.name for f in dataclasses.fields(PretrainConfig)}


@dataclass(frozen=True)
class Proposal:
    """A configuration, how it was found, and what was measured on the way."""

    config: PretrainConfig
    choices: list[Choice]
    images: Images
    machine: Machine
    source: Source
    training: float
    """Seconds of an epoch that steps take."""
    loading: float
    """Seconds of an epoch that the loader processes take."""


def choose(layers: Layers, began: float | None = None) -> PretrainConfig:
    """The configuration of ``--recipe auto`` (or ``adapt``), printed; a resumed run's is its own. ``began``: when the
    command was called, by ``time.time``: planning takes of the budget too.

    Raises:
        UserError: for a bad value, before torch is imported; for images that can't be read.
    """
    given = {name: value for name, value in layers.given.items() if name != "recipe"}
    if saved := saved_fields(layers.merged()):
        limit = {"max_hours": latest(budget_hours(layers.flags["budget"]) or 0)} if "budget" in layers.flags else {}
        return PretrainConfig(**{**saved, **limit, **given})
    if given.get("config"):  # complete, or the user's own
        config = PretrainConfig(**layers.merged())
        if "budget" in layers.flags and config.schedule != "wsd":
            raise UserError(
                f"--budget beside --config {config.config}, which sets the length: give --schedule wsd too, by which "
                "the clock ends the run, or leave --budget out"
            )
        return config
    proposal = propose_settings(layers, began=began)
    _show(proposal, layers)
    return proposal.config


def propose_settings(layers: Layers, facts: Survey | None = None, began: float | None = None) -> Proposal:
    """Settings for the images and the machine; ``facts`` saves looking at images again, ``began`` is that of
    ``choose``.

    Raises:
        UserError: as ``choose``.
    """
    fixed = {**layers.recipe, **{name: value for name, value in layers.given.items() if name != "recipe"}}
    lenient = {"warmup_epochs": 0, "batch_size": 2, "hold_out": 0}
    open_yet = {} if "arch" in fixed else {"heads": None}  # judged with the arch, once that is known
    first = PretrainConfig(**{**lenient, **layers.merged(), **open_yet})
    first.check()
    _check_start(first)
    hours = budget_hours(first.budget)
    source, _, order = open_images(first)
    order.check()
    # fractions of folders (DIR:0.1) make epochs shorter
    seen = look(source, first, facts)
    images = dataclasses.replace(seen, count=order.images, whole=seen.count, unseen=_unseen(first))
    from mocov3.distributed.launch import count_ranks
    from mocov3.planning import speed
    from mocov3.pretraining.assemble import count_memory
    from mocov3.pretraining.footprint import Footprint

    machine = speed.machine(first.device, first.gpu)
    beginning: list[Choice] = []
    if first.init:
        fixed, beginning = _of_start(first, fixed, images)
    times = {"training": 0.0, "loading": 0.0}

    def measured(values: Fields) -> tuple[float, Fields]:
        config = PretrainConfig(**{**lenient, **layers.merged(_known(values))})
        config.check()
        times["training"], times["loading"], batch = speed.epoch_seconds(config, source, order.images)
        fitted = {} if batch == config.batch_size or "batch_size" in fixed else {"batch_size": batch}
        seconds = speed.total_seconds(**times, device=machine.device, workers=config.workers)
        return seconds, fitted

    @functools.cache
    def count(config: PretrainConfig) -> Footprint:
        return count_memory(config, sixteen_bits=machine.trains_in_16_bits(config.precision))

    def counted(values: Fields, batch: int) -> float:
        config = PretrainConfig(**{**lenient, **layers.merged(_known(values))})
        return count(config).peak(max(batch // count_ranks(config).size, 1))

    table = beginning
    if first.recipe == "adapt":  # what goes beside pairs, and what does not: PretrainConfig.check_own
        pairs = fixed.get("lora") != 0 and not (first.fsdp or first.freeze_until)
        row = row_of(fixed["arch"], len(source), pairs=pairs)
        of_another = {"lr"} if fixed.get("optimizer", row.optimizer) != row.optimizer else set()
        table = beginning + [choice for choice in choices_of(row) if choice.name not in of_another]
    choices = choose_settings(
        images,
        machine,
        hours,
        fixed,
        measured,
        counted,
        table,
        spent=lambda: time.time() - began if began is not None else 0.0,
    )
    settings = {**_known(fixed), **_known({c.name: c.value for c in choices})}
    config = PretrainConfig(**layers.merged(settings))
    return Proposal(config, choices, images, machine, source, **times)


def _of_start(first: PretrainConfig, fixed: Fields, images: Images) -> tuple[Fields, list[Choice]]:
    """What the weights of ``--init``, read once, decide: ``fixed`` with arch, heads, patch size and stem, and how
    images are read.
    """
    from mocov3.pretraining.assemble import with_heads
    from mocov3.weights import checkpoint
    from mocov3.weights.convert import settings_of
    from mocov3.weights.find import hint
    from mocov3.weights.locate import guess_arch
    from mocov3.weights.start import is_timms, starting_weights, views_of_start

    contents = None if is_timms(first.init) else checkpoint.read(first.init)
    weights = starting_weights(first.init, fixed.get("heads"), fixed.get("arch"), contents)
    arch = fixed.get("arch") or weights.arch or guess_arch(weights.state)
    if arch is None:
        raise UserError(f"--init {first.init}: does not say which arch it is; {hint(weights)}")
    config = with_heads(dataclasses.replace(first, arch=arch, heads=fixed.get("heads")), weights=weights)
    # patch size and stem are the weights' own, whatever the images' size would suggest
    fixed = {**settings_of(weights.state, arch), **fixed, "arch": arch, "heads": config.heads}
    return fixed, _as_the_start_reads(first, images, *views_of_start(first.init, first.adapter, contents))


def _as_the_start_reads(first: PretrainConfig, images: Images, name: str, views: ViewPreset) -> list[Choice]:
    """Images normalised, and for evaluation cut out, as the weights of ``--init`` know them: of others these would be
    another network from the first step.
    """
    choices = []
    if abs(PRESETS[images.preset].evaluation_zoom - views.evaluation_zoom) > 0.01 and name in PRESETS:
        choices.append(Choice("view_preset", name, "the weights of --init were trained with it"))
    if len(views.mean) == first.channels:
        numbers = ",".join(f"{v:g}" for v in (*views.mean, *views.std))
        choices.append(Choice("mean_std", numbers, "what the weights of --init were trained with"))
    return choices


def measured_normalisation(config: PretrainConfig) -> PretrainConfig:
    """``config`` with the numbers of ``--mean-std auto``, which depend on the images alone.

    Raises:
        UserError: if the images cannot be read.
    """
    if config.mean_std != "auto":
        return config
    config.check()
    source, _, _ = open_images(dataclasses.replace(config, batch_size=1, group_by=""))
    return dataclasses.replace(config, mean_std=look(source, config).mean_std)


def _check_start(config: PretrainConfig) -> None:
    if config.recipe == "adapt" and not config.init:
        raise UserError("--recipe adapt starts from existing weights: give --init FILE or --init timm/NAME")
    if config.init and not config.init.startswith("timm/") and not Path(config.init).is_file():
        raise UserError(f"--init {config.init}: {no_file(config.init)}; give a weights file, or timm/NAME")


def look(source: Source, config: PretrainConfig, facts: Survey | None = None) -> Images:
    """What some of the images show, for the plan.

    Raises:
        UserError: if none of them can be read.
    """
    facts = facts or survey(source, _looked_at(source), workers=0, reading=config.preset.reading, detail=True)
    if not facts.readable:
        index, reason = facts.unreadable[0]
        raise UserError(
            f"data {config.data_title}: none of {facts.examined} images looked at can be read, first: "
            f"{source.name(index)}: {reason}"
        )
    preset, reason = propose(facts)
    return Images(
        len(source),
        facts.short_side[1],
        preset,
        reason,
        facts.mean_std,
        facts.gray_share > 0.95,
        detail=facts.detail.get(SIDES[0], 1.0),
    )


def _looked_at(source: Source) -> np.ndarray:
    """Some images; without the few that would take longer than all others."""
    drawn = scattered(len(source), LOOKED_AT)
    quick = drawn[~giants(source, drawn)]
    return quick if 2 * len(quick) > len(drawn) else drawn


def _unseen(config: PretrainConfig) -> int:
    """Images of the validation part of what is trained on."""
    return len(open_unseen(config.data)) if has_unseen(config.data) else 0


def _known(values: Fields) -> Fields:
    return {name: value for name, value in values.items() if name in _FIELDS}


def saved_fields(values: Fields) -> Fields:
    """Fields of the run that is to be resumed, if its folder tells them."""
    resume = values.get("resume") or ""
    if not resume:
        return {}
    folder = Path(values.get("output_dir") or ".") if resume == "auto" else Path(resume).parent
    file = folder / "config.yaml"
    return read_yaml(file, PretrainConfig) if file.is_file() else {}


def _show(proposal: Proposal, layers: Layers) -> None:
    config, count = proposal.config, proposal.images.count
    if config.quiet:
        return
    where = sys.stderr if config.json else sys.stdout
    machine = proposal.machine.name
    print(f"Settings for {count} images on {machine} (--recipe {config.recipe}; flags override):", file=where)
    print(block(proposal.choices, layers.recipe, layers.given), file=where, flush=True)
    if not config.init and count < _FEW:
        print(
            f"Fewer than {_FEW} images: starting from existing weights mostly does better, if you can have some: "
            "--recipe adapt --init FILE (or timm/NAME).",
            file=where,
            flush=True,
        )
