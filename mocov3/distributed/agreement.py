"""Ranks that were started differently: detected before the first step, by digest, naming field and ranks.

Each rank reads its own command line, files and images. Where these differ the run would hang, or silently average
gradients of different trainings.
"""

import dataclasses
import hashlib

from mocov3.config import RunConfig
from mocov3.distributed import World
from mocov3.errors import UserError
from mocov3.version import __version__


def check_agreement(world: World, config: RunConfig, images: dict[str, str]) -> None:
    """Refuse ranks of different configuration, images or versions.

    Args:
        world: this rank; all call this.
        config: as this rank read it.
        images: name of a set of images → its digest.

    Raises:
        UserError: on every rank, naming the first field that differs, its values and ranks.
    """
    shared = [f.name for f in dataclasses.fields(config) if not f.metadata["per_rank"]]
    fields = {name: _shown(getattr(config, name)) for name in shared}
    facts = {"the version of mocov3": __version__, **images}
    facts |= {f"--{name.replace('_', '-')}": value for name, value in fields.items()}
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()
    if len(set(world.gather(digest))) == 1:
        return
    everyone = world.gather(facts)
    for name in facts:
        values: dict[str, list[int]] = {}
        for rank, theirs in enumerate(everyone):
            values.setdefault(theirs.get(name, "not known"), []).append(rank)
        if len(values) > 1:
            raise UserError(_difference(name, values, config))


def _difference(name: str, values: dict[str, list[int]], config: RunConfig) -> str:
    parts = [f"{value} on rank {_ranks(ranks)}" for value, ranks in list(values.items())[:3]]
    cure = "start all with the same command and files"
    if name.endswith("images"):
        cure = "every machine needs the same images under the same names"
    elif config.recipe in ("auto", "adapt"):
        cure = f"--recipe {config.recipe} measures on each rank: give {name}, or --nprocs-per-node instead of torchrun"
    more = " …" if len(values) > 3 else ""
    return f"ranks differ in {name}: {'; '.join(parts)}{more}; {cure}"


def _ranks(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:4])) + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")


def _shown(value: object) -> str:
    return repr(value)[:100]
