"""Where a run resumes: finds the checkpoint, refuses one of another run, and restores everything counted."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from mocov3.config import PretrainConfig
from mocov3.config.cheap import ends_of, ends_text, stages
from mocov3.config.schedule import STABLE, decays_of, decays_text
from mocov3.data import Source
from mocov3.distributed import World
from mocov3.errors import UserError
from mocov3.models import MoCo
from mocov3.output.log import warn
from mocov3.pretraining.inputs import restarted_by_torchrun
from mocov3.pretraining.saver import image_changes
from mocov3.pretraining.step import Step
from mocov3.running.changes import refuse_changes
from mocov3.running.counters import Counters
from mocov3.weights import Contents, checkpoint, our_entry, trained_with
from mocov3.weights.checkpoint import Position

T = TypeVar("T")
ResumeFrom = tuple[Path, Contents]
"""A checkpoint's file and its contents."""


def find(config: PretrainConfig, world: World) -> ResumeFrom | None:
    """The checkpoint named by ``--resume``; with ``auto`` the newest that can be read, or ``None``.

    Raises:
        UserError: if none can be read, or ranks do not see the same.
    """
    name = config.resume
    if restarted_by_torchrun() and _same_run_in(Path(config.output_dir), world):
        name = "auto"
    if name == "auto" and (newest := _newest(Path(config.output_dir), world)) is not None:
        return newest
    if name in ("", "auto"):
        name = str(Path(config.prolong) / STABLE) if config.prolong else ""
    return (Path(name), checkpoint.read(Path(name))) if name else None


def is_of_other_run(resume_from: ResumeFrom | None, config: PretrainConfig) -> bool:
    """Whether a checkpoint is of the run that is prolonged (``--prolong``), which another begins with."""
    return resume_from is not None and bool(config.prolong) and resume_from[0] == Path(config.prolong) / STABLE


def recorded(
    resume_from: ResumeFrom | None, config: PretrainConfig, iterations: int
) -> tuple[PretrainConfig, float | None]:
    """The configuration with the decisions so far, and the seconds that the run was up, where it counts them.

    A run that is prolonged keeps the ends of its cheap stages, and decides all else anew.

    Args:
        resume_from: a checkpoint, of this run or of the one that is prolonged.
        config: as given.
        iterations: steps of an epoch.

    Raises:
        UserError: if other decisions are given than the checkpoint was trained by.
    """
    if resume_from is None:
        return config, None
    path, contents = resume_from
    saved, entry = trained_with(contents), our_entry(contents)
    decay, ends = (value if isinstance(value := saved.get(name), str) else "" for name in ("decay", "stage_ends"))
    if is_of_other_run(resume_from, config):
        step = int(entry.get("step", 0))
        if not config.budget and config.epochs * iterations <= step:
            raise UserError(
                f"--epochs {config.epochs} ends before the stable part of --prolong {config.prolong} did, after "
                f"{step / iterations:.1f} epochs; give more, or --budget"
            )
        kept = _ended(config, saved, ends, step, iterations)
        return dataclasses.replace(config, stage_ends=config.stage_ends or ends_text(kept)), None
    decays = _longer(path, "--decay", decays_of(config.decay), decays_of(decay), decays_text)
    stage_ends = _longer(path, "--stage-ends", ends_of(config.stage_ends), ends_of(ends), ends_text)
    seconds = entry.get("seconds")
    config = dataclasses.replace(config, decay=decays, stage_ends=stage_ends)
    if not isinstance(seconds, int | float):
        _check_budget(path, config, saved)
        return config, None
    return config, float(seconds)


def _ended(config: PretrainConfig, saved: Contents, ends: str, step: int, iterations: int) -> list[int]:
    """Ends of the cheap stages of a run that is prolonged from ``step``; those to come too, where epochs say them."""

    def planned(epochs: int) -> list[int]:
        by_epochs = dataclasses.replace(config, epochs=epochs, budget="", stage_ends="")
        return [stage.end * iterations for stage in stages(by_epochs)[:-1]]

    recorded = ends_of(ends)
    if not recorded and not saved.get("budget"):  # by epochs
        recorded = planned(int(saved.get("epochs", config.epochs)))
    kept = [end for end in recorded if end <= step]
    if config.budget or not kept:
        return kept
    for end in planned(config.epochs)[len(kept) :]:
        kept.append(max(end, step, kept[-1] + 1))
    return kept


def _check_budget(path: Path, config: PretrainConfig, saved: Contents) -> None:
    """Refuse a budget for a run whose end the clock does not decide; one that it was planned for may be repeated."""
    if config.budget and config.budget != saved.get("budget") and not config.decay:
        cosine = config.schedule == "cosine"
        raise UserError(
            f"--resume {path}: the run's length was given by {'a cosine' if cosine else 'epochs'}, its time was not "
            "counted; leave --budget out"
            + ("" if cosine else f", or go on within it from the end of the stable part: --prolong {path.parent}")
        )


def _longer(path: Path, name: str, given: list[T], taken: list[T], text: Callable[[list[T]], str]) -> str:
    few, many = sorted((given, taken), key=len)  # a kill can come between checkpoint and config.yaml
    if many[: len(few)] != few:
        raise UserError(f"--resume {path}: was trained with {name} {text(taken)}, not {text(given)}; leave it out")
    return text(many)


def _newest(folder: Path, world: World) -> ResumeFrom | None:
    # the main rank chooses, so that all resume from the same
    newest_file, passed, error = None, [], ""
    if world.main:
        try:
            if newest := checkpoint.newest(folder):
                newest_file, passed = newest[:2], newest[2]
        except UserError as refusal:
            error = str(refusal)
    path, error = world.broadcast((newest_file[0] if newest_file else None, error))
    if error:
        raise UserError(error)
    for reason in passed:
        warn(f"passed over: {reason}")
    if path is None:
        return None
    if newest_file is None and not path.is_file():
        raise UserError(
            f"--resume auto: rank {world.rank} does not see {path}, which rank 0 resumes from; they must "
            "share the folder"
        )
    return newest_file or (path, checkpoint.read(path))


def _same_run_in(folder: Path, world: World) -> bool:
    """Whether the newest checkpoint is of the run that config.yaml was written for, not of a former one."""
    same = False
    if world.main:
        try:
            first = (folder / "config.yaml").read_text(encoding="utf-8", errors="replace").partition("\n")[0]
            newest = checkpoint.newest(folder)
            same = newest is not None and f"run {saved_run(newest[:2])};" in first
        except (OSError, UserError):
            same = False
    return world.broadcast(same)


def check_same_run(resume_from: ResumeFrom, config: PretrainConfig, source: Source) -> None:
    """Refuse a checkpoint of other result-changing fields, or of other images.

    Raises:
        UserError: naming the fields, or the difference in images.
    """
    path, contents = resume_from
    entry = our_entry(contents)
    if not is_of_other_run(resume_from, config):
        refuse_changes(f"--resume {path}", config, contents, left_out=() if config.seed is not None else ("seed",))
    if entry.get("data_digest", source.digest) != source.digest and not config.allow_data_change:
        change = image_changes(source, path.parent)
        raise UserError(
            f"--resume {path}: was trained on {entry.get('pictures')} images; {config.data_title} holds {len(source)}"
            f"{f' ({change})' if change else ', or others by name'}; give the same, or --allow-data-change"
        )


def restore(
    resume_from: ResumeFrom, arch: str, model: MoCo, optimizer: torch.optim.Optimizer, step: Step, iterations: int
) -> Position:
    """Read a checkpoint into a run's parts; the position it was written at.

    Raises:
        UserError: if it does not fit.
    """
    scaler = step.precision.scaler
    position = checkpoint.restore(
        *resume_from, arch=arch, model=model, optimizer=optimizer, scaler=scaler, iterations=iterations
    )
    entry = our_entry(resume_from[1])
    if step.spikes is not None and "spikes" in entry:
        step.spikes.restore(entry["spikes"])
    # another batch size (--allow-config-change) may have fewer iterations an epoch
    return position if position.iteration < iterations else Position(position.epoch + 1, 0, position.step)


def counters(resume_from: ResumeFrom | None, source: Source) -> Counters:
    """What this run counted before, with one resume more."""
    if resume_from is None:
        return Counters()
    entry = our_entry(resume_from[1])
    corrupt = {int(i): source.name(int(i)) for i in entry.get("corrupt", []) if 0 <= int(i) < len(source)}
    return Counters(int(entry.get("resumed", 0)) + 1, int(entry.get("skipped", 0)), corrupt)


def saved_run(resume_from: ResumeFrom | None) -> str:
    """The name of the checkpoint's run, '' if it says none."""
    name = our_entry(resume_from[1]).get("run") if resume_from else None
    return name if isinstance(name, str) else ""
