"""Flags that every training has: where it runs, what it keeps, when it stops, what it shows."""

from dataclasses import dataclass

from mocov3.config.fields import flag, path
from mocov3.config.loggers import HELP as LOGGER_HELP

MODEL, METHOD, DATA = "model", "method", "images"
RUN, RANKS = "run and files", "ranks and devices"
DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "fp32", "fp16", "bf16")
FROZEN_PRECISIONS = (*PRECISIONS, "tf32")
"""Of networks that are not trained."""


@dataclass(frozen=True)
class RunFlags:
    """Of one process; each is its own or agreed on, and none changes what is trained."""

    workers: int = flag(
        32,
        "data loading processes of a rank; at most the usable cores",
        "-j",
        "--workers",
        result=False,
        group=DATA,
        low=0,
        per_rank=True,
    )
    print_freq: int = flag(
        10, "steps between log lines", "-p", "--print-freq", result=False, group=RUN, low=1, per_rank=True
    )
    output_dir: str = flag(
        ".", "folder of checkpoints, metrics and logs", kind=path, result=False, group=RUN, per_rank=True
    )
    recipe: str = flag(
        "", "named set of flags (below); any flag still overrides", result=False, group=RUN, per_rank=True
    )
    config: str = flag(
        "", "YAML file of fields, as a run's config.yaml", kind=path, result=False, group=RUN, per_rank=True
    )
    checkpoint_steps: int = flag(
        0, "steps between checkpoints within an epoch (0: none)", result=False, group=RUN, metavar="N", low=0
    )
    max_steps: int = flag(
        0, "stop after this many steps in all, with a checkpoint (0: never)", result=False, group=RUN, low=0
    )
    max_hours: float = flag(
        0.0, "stop after this time, with a checkpoint (0: never)", result=False, group=RUN, low=0, per_rank=True
    )
    device: str = flag("auto", "device", choices=DEVICES, result=False, group=RANKS, per_rank=True)
    nprocs_per_node: int = flag(
        0,
        "processes to start on this node (default: torchrun's; its GPUs with --multiprocessing-distributed; else 1)",
        result=False,
        group=RANKS,
        low=0,
        per_rank=True,
    )
    deterministic: bool = flag(False, "only deterministic operations", result=False, group=RANKS)
    allow_config_change: bool = flag(False, "resume although result-changing fields differ", result=False, group=RUN)
    logger: str = flag("tensorboard", LOGGER_HELP, result=False, group=RUN, metavar="NAMES")
    quiet: bool = flag(False, "print warnings and the result only", result=False, group=RUN, per_rank=True)
    json: bool = flag(
        False, "print every line of metrics as JSON instead of text", result=False, group=RUN, per_rank=True
    )


@dataclass(frozen=True)
class RankFlags(RunFlags):
    """How the reference's scripts start ranks."""

    world_size: int = flag(
        -1, "nodes (with --multiprocessing-distributed), else processes", result=False, group=RANKS, per_rank=True
    )
    rank: int = flag(-1, "rank of this node, or of this process", result=False, group=RANKS, per_rank=True)
    dist_url: str = flag(
        "tcp://224.66.41.62:23456",
        "address at which ranks meet: tcp://HOST:PORT or env://; on one node a free loopback port unless given",
        result=False,
        group=RANKS,
        per_rank=True,
    )
    dist_backend: str = flag("nccl", "nccl or gloo", result=False, group=RANKS, per_rank=True)
    gpu: int | None = flag(None, "use only this GPU", kind=int, result=False, group=RANKS, per_rank=True)
    multiprocessing_distributed: bool = flag(
        False, "start one process a GPU on this node", result=False, group=RANKS, per_rank=True
    )
    start_epoch: int = flag(
        0, "epoch to begin at without a checkpoint; --resume sets it from the file", result=False, group=RUN, low=0
    )
