"""Where a run goes on: finds the checkpoint, refuses one of another run, and restores everything counted."""

from pathlib import Path
from typing import Any

from mocov3.config import PretrainConfig, changed_fields
from mocov3.data import Source
from mocov3.distributed import World
from mocov3.errors import UserError
from mocov3.output.log import warn
from mocov3.pretraining.inputs import restarted_by_torchrun
from mocov3.pretraining.recorder import Counters
from mocov3.pretraining.saver import image_changes
from mocov3.weights import checkpoint

Found = tuple[Path, dict[str, Any]]
"""A checkpoint's file and its contents."""


def find(config: PretrainConfig, world: World) -> Found | None:
    """The checkpoint named by ``--resume``; with ``auto`` the newest that can be read, or ``None``.

    Raises:
        UserError: if none can be read, or ranks do not see the same.
    """
    name = config.resume
    if restarted_by_torchrun() and _same_run_in(Path(config.output_dir), world):
        name = "auto"
    if not name:
        return None
    if name != "auto":
        path = Path(name)
        return path, checkpoint.read(path)
    return _newest(Path(config.output_dir), world)


def _newest(folder: Path, world: World) -> Found | None:
    # the main rank chooses, so that all go on from the same
    found, passed, error = None, [], ""
    if world.main:
        try:
            if newest := checkpoint.newest(folder):
                found, passed = newest[:2], newest[2]
        except UserError as refusal:
            error = str(refusal)
    path, error = world.broadcast((found[0] if found else None, error))
    if error:
        raise UserError(error)
    for reason in passed:
        warn(f"passed over: {reason}")
    if path is None:
        return None
    if found is None and not path.is_file():
        raise UserError(
            f"--resume auto: rank {world.rank} does not see {path}, which rank 0 goes on from; they must "
            "share the folder"
        )
    return found or (path, checkpoint.read(path))


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


def check_same_run(found: Found, config: PretrainConfig, source: Source) -> None:
    """Refuse a checkpoint of other result-changing fields, or of other images.

    Raises:
        UserError: naming the fields, or the difference in images.
    """
    path, contents = found
    own = contents.get("mocov3") or {}
    left_out = {"heads"} | ({"seed"} if config.seed is None else set())  # heads: compared with the weights already
    saved = {k: v for k, v in own.get("config", {}).items() if k not in left_out}
    if (changed := changed_fields(config, saved)) and not config.allow_config_change:
        raise UserError(
            f"--resume {path}: these fields differ from the checkpoint's: {', '.join(changed)}; "
            "give them as they were, or --allow-config-change"
        )
    if own.get("data_digest", source.digest) != source.digest and not config.allow_data_change:
        change = image_changes(source, path.parent)
        raise UserError(
            f"--resume {path}: was trained on {own.get('pictures')} images; {config.data_title} holds {len(source)}"
            f"{f' ({change})' if change else ', or others by name'}; give the same, or --allow-data-change"
        )


def counters(found: Found | None, source: Source) -> Counters:
    """What was counted before, with one resume more."""
    if found is None:
        return Counters()
    own = found[1].get("mocov3") or {}
    corrupt = {int(i): source.name(int(i)) for i in own.get("corrupt", []) if 0 <= int(i) < len(source)}
    return Counters(int(own.get("resumed", 0)) + 1, int(own.get("skipped", 0)), corrupt)


def saved_run(found: Found | None) -> str:
    """The name of the checkpoint's run, '' if it says none."""
    name = (found[1].get("mocov3") or {}).get("run") if found else None
    return name if isinstance(name, str) else ""


def saved_seed(found: Found | None) -> int | None:
    """The seed of the checkpoint's run, if it says one."""
    seed = (found[1].get("mocov3") or {}).get("seed") if found else None
    return seed if isinstance(seed, int) else None
