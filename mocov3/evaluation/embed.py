"""Features of every image of a folder: ``mocov3 embed --model FILE DIR --output NAME.parquet``.

As for training, these are the images of its training part where it has parts; name DIR/val for those of the other.

Features are written as they come; a stopped pass resumes where it stopped when the same command is given again.
"""

import importlib.util
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mocov3.config import EmbedConfig
from mocov3.config.fields import check_writable
from mocov3.data import Source, open_source
from mocov3.data.sources.groups import named_groups
from mocov3.data.sources.opening import has_unseen
from mocov3.errors import UserError, printable
from mocov3.metrics import JsonLine
from mocov3.output.log import warn, warn_left_out

if TYPE_CHECKING:
    from mocov3.distributed import World
    from mocov3.evaluation.frozen import Frozen
else:
    World = Frozen = object  # with torch, which takes seconds to import


def main(config: EmbedConfig) -> int:
    """Check, start the ranks, embed.

    Raises:
        UserError: for anything the user can fix.
    """
    config.check()
    output = Path(config.output)
    if output.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UserError("--output: parquet needs pyarrow; pip install 'mocov3[parquet]', or name a .npy file")
    if output.exists() and not (config.overwrite and output.is_file()):
        raise UserError(f"--output {output}: exists; name another, or give --overwrite")
    source = open_source(config.data)
    named_groups([source], config.group_by)
    check_writable(output.parent, "--output")
    # remarks come last: a refusal is one line
    warn_left_out(source)
    from mocov3.distributed import launch

    return launch(embed, config, device=config.device, processes=config.nprocs_per_node)


def other_part(data: str) -> str:
    """What to add where a folder has a part that is not embedded."""
    return "; its training part, the validation part is not in it" if os.path.isdir(data) and has_unseen(data) else ""


def embed(world: World, config: EmbedConfig) -> int:
    """Embed this rank's batches; the main rank finishes the files."""
    import torch

    from mocov3.data.loading.loader import loader_workers
    from mocov3.evaluation.embeddings import Spool
    from mocov3.evaluation.features import refuse_not_finite, refuse_unreadable, stream
    from mocov3.evaluation.frozen import open_configured
    from mocov3.models.precision import frozen_precision

    frozen = open_configured(config)
    source = open_source(config.data)
    precision = frozen_precision(config.precision, world.device)
    key = _key(config, source, frozen, precision.name)
    frozen.to(world.device)
    side, channels = frozen.image_size, frozen.preset.reading.channels
    with torch.no_grad(), precision.autocast():
        shape = tuple(frozen.features(torch.zeros(1, channels, side, side, device=world.device)).shape[1:])
    spool = Spool(Path(config.output), key, images=len(source), shape=shape, batch=config.batch_size, world=world)
    if world.main and spool.count_done:
        _say(f"resuming: {spool.count_done} of {spool.batches} batches are there")
    mine = spool.todo()
    began, done = 0.0, 0  # from the first batch on: until then processes start
    for part in stream(
        frozen.extractor,
        source,
        mine,
        device=world.device,
        workers=loader_workers(config.workers, world.local_size, sum(map(len, mine))),
        autocast=precision.autocast,
    ):
        refuse_not_finite(part, source)
        spool.put(part.indices, part.arriving.wait().numpy(), part.corrupt)
        done, began = (done + len(part.indices), began) if began else (0, time.perf_counter())
    spool.flush()
    world.barrier()
    errors = world.broadcast(spool.errors() if world.main else {})
    if world.main and len(errors) == len(source):
        spool.remove()
    refuse_unreadable(errors, source, f"data {config.data}")
    if world.main:
        rate = world.size * done / max(time.perf_counter() - began, 1e-9)
        groups = next(iter(named_groups([source], config.group_by) or ()), None)
        spool.finish(source, frozen.about, errors, groups)
        speed = f"; {rate:.0f} images/s" if done else ""
        _tell(config, source, f"images × {'×'.join(map(str, shape))} of {frozen.about}{speed}", errors)
        if config.duplicates:
            _duplicates(config, source, errors, world, groups)
    world.barrier()
    return 0


def _key(config: EmbedConfig, source: Source, frozen: Frozen, precision: str) -> JsonLine:
    """What makes the features; a pass with other settings is not resumed."""
    return {
        "pictures": source.digest,
        "backbone": frozen.digest(),
        "arch": frozen.arch,
        "heads": frozen.heads,
        "layer": config.layer,
        "image_size": frozen.image_size,
        "mean": list(frozen.preset.mean),
        "std": list(frozen.preset.std),
        "zoom": frozen.preset.evaluation_zoom,
        "window": list(frozen.preset.reading.window or ()),
        "precision": precision,
        "batch": config.batch_size,
    }


def _tell(config: EmbedConfig, source: Source, made: str, errors: dict[int, str]) -> None:
    from mocov3.evaluation.features import first_of

    _say(f"{printable(config.output)}: {len(source)} {made}{other_part(config.data)}")
    if errors:
        warn(f"{len(errors)} unreadable images have NaN features, first: {first_of(errors, source)}")


def _duplicates(
    config: EmbedConfig, source: Source, errors: dict[int, str], world: World, named: np.ndarray | None
) -> None:
    from mocov3.evaluation.embeddings import duplicate_groups, load

    features = load(Path(config.output))
    groups = duplicate_groups(features, config.duplicates, leave_out=set(errors), device=world.device)
    file = Path(config.output).with_suffix(".duplicates.jsonl")
    with file.open("w", encoding="utf-8") as out:
        for least, members in groups:
            line: JsonLine = {"least_cosine": round(least, 6), "pictures": [source.name(i) for i in members]}
            line |= {} if named is None else {"groups": [named[i] for i in members]}
            out.write(json.dumps(line) + "\n")
    extra = sum(len(members) - 1 for _, members in groups)
    _say(
        f"{len(groups)} groups of images with cosine ≥ {config.duplicates:g}, {extra} beyond the first of each: "
        f"{printable(str(file))}"
    )
    for least, members in groups[:5]:
        _say(
            f"  {least:.4f}  "
            + "  ".join(printable(source.name(i)) for i in members[:4])
            + (f"  and {len(members) - 4} more" if len(members) > 4 else "")
        )


def _say(text: str) -> None:
    print(text, flush=True)
