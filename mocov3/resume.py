"""Where a run goes on: finds the checkpoint, refuses one of another run, and restores everything counted."""

from pathlib import Path
from typing import Any

from mocov3 import checkpoint
from mocov3.config import PretrainConfig, changed_fields
from mocov3.data import Source
from mocov3.distributed import World
from mocov3.errors import UserError
from mocov3.log import warn
from mocov3.recorder import Counters

Found = tuple[Path, dict[str, Any]]
"""A checkpoint's file and its contents."""


def find(config: PretrainConfig, world: World) -> Found | None:
    """The checkpoint named by ``--resume``; with ``auto`` the newest that can be read, or ``None``.

    Raises:
        UserError: if the named one cannot be read, or ranks do not see the same.
    """
    if not config.resume:
        return None
    if config.resume != "auto":
        path = Path(config.resume)
        return path, checkpoint.read(path)
    found = checkpoint.newest(Path(config.output_dir))
    names = world.gather(found[0].name if found else None)
    if len(set(names)) > 1:
        raise UserError(
            f"--resume auto: ranks see different checkpoints in {config.output_dir} "
            f"({', '.join(map(str, names))}); they must share the folder"
        )
    if found is None:
        return None
    path, contents, passed = found
    if world.main:
        for reason in passed:
            warn(f"passed over: {reason}")
    return path, contents


def check_same_run(found: Found, config: PretrainConfig, source: Source) -> None:
    """Refuse a checkpoint of other result-changing fields, or of other pictures.

    Raises:
        UserError: naming the fields, or the difference in pictures.
    """
    path, contents = found
    own = contents.get("mocov3") or {}
    saved = {k: v for k, v in own.get("config", {}).items() if k != "seed" or config.seed is not None}
    if (changed := changed_fields(config, saved)) and not config.allow_config_change:
        raise UserError(
            f"--resume {path}: these fields differ from the checkpoint's: {', '.join(changed)}; "
            "give them as they were, or --allow-config-change"
        )
    if own.get("data_digest", source.digest) != source.digest and not config.allow_data_change:
        raise UserError(
            f"--resume {path}: was trained on {own.get('pictures')} pictures; {config.data} holds {len(source)}, "
            "or others by name; give the same, or --allow-data-change"
        )


def counters(found: Found | None, source: Source) -> Counters:
    """What was counted before, with one resume more."""
    if found is None:
        return Counters()
    own = found[1].get("mocov3") or {}
    corrupt = {int(i): source.name(int(i)) for i in own.get("corrupt", []) if 0 <= int(i) < len(source)}
    return Counters(int(own.get("resumed", 0)) + 1, int(own.get("skipped", 0)), corrupt)


def saved_seed(found: Found | None) -> int | None:
    """The seed of the checkpoint's run, if it says one."""
    seed = (found[1].get("mocov3") or {}).get("seed") if found else None
    return seed if isinstance(seed, int) else None
