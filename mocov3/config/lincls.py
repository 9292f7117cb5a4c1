"""Configuration of linear evaluation: the reference's flags with their defaults, and ours.

Defaults of the reference are recorded in ``tests/golden/f_sched.json``; a test compares them.
"""

import math
from dataclasses import dataclass
from typing import Any

from mocov3.config.archs import check_arch, check_heads
from mocov3.config.evaluation import DEVICES, HEADS_HELP, MODEL, PRECISIONS, check_model_flags
from mocov3.config.fields import check_bounds, flag, path
from mocov3.config.loggers import HELP as LOGGER_HELP
from mocov3.config.loggers import logger_names
from mocov3.config.presets import PRESETS
from mocov3.errors import UserError

RUN, METHOD, DATA, RANKS = "run and files", "method", "data", "ranks and devices"
KINDS = ("linear", "bn-linear")


def numbers(given: Any) -> float | tuple[float, ...]:
    """``0.1`` or ``0.1,0.3,1`` → a number or several; raises ValueError for anything else."""
    parts = given.split(",") if isinstance(given, str) else given if isinstance(given, list | tuple) else [given]
    values = tuple(float(part) for part in parts)
    if not values:
        raise ValueError("no number")
    return values[0] if len(values) == 1 else values


numbers.__name__ = "number or comma list"  # argparse names it in its message


@dataclass(frozen=True)
class LinclsConfig:
    """Linear classifiers on frozen features (arXiv 2104.02057, §4): one, or many in one pass."""

    data: str = flag(
        "",
        "folder with train and val class folders, or the built-in fashion-mnist[:ROOT]",
        kind=path,
        positional=True,
        result=False,
        metavar="DIR",
    )
    # --- the reference's flags -------------------------------------------------------------------------
    arch: str = flag(
        "resnet50", "backbone, timm/NAME, or pixels (no network: the baseline)", "-a", "--arch", group=MODEL
    )
    workers: int = flag(
        32,
        "data loading processes of a rank; at most the usable cores",
        "-j",
        "--workers",
        kind=int,
        result=False,
        group=DATA,
        low=0,
    )
    epochs: int = flag(90, "epochs", kind=int, group=METHOD, low=1)
    start_epoch: int = flag(0, "epoch to begin at without a checkpoint", kind=int, result=False, group=RUN, low=0)
    batch_size: int = flag(1024, "images a step, over all ranks", "-b", "--batch-size", kind=int, group=METHOD, low=1)
    lr: float | tuple[float, ...] = flag(
        0.1,
        "learning rate for 256 images; a comma list trains a head for each",
        "--lr",
        "--learning-rate",
        kind=numbers,
        group=METHOD,
        metavar="LR[,LR…]",
    )
    momentum: float = flag(0.9, "momentum of SGD", kind=float, group=METHOD, low=0)
    weight_decay: float | tuple[float, ...] = flag(
        0.0,
        "weight decay; a comma list trains a head for each",
        "--wd",
        "--weight-decay",
        kind=numbers,
        group=METHOD,
        metavar="WD[,WD…]",
    )
    print_freq: int = flag(
        10, "steps between log lines", "-p", "--print-freq", kind=int, result=False, group=RUN, low=1
    )
    resume: str = flag(
        "",
        "linear file to resume from or to evaluate; 'auto': checkpoint.pth.tar of the output folder",
        kind=path,
        result=False,
        group=RUN,
    )
    evaluate: bool = flag(
        False, "only evaluate the linear file of --resume", "-e", "--evaluate", kind=bool, result=False, group=RUN
    )
    world_size: int = flag(
        -1, "nodes (with --multiprocessing-distributed), else processes", kind=int, result=False, group=RANKS
    )
    rank: int = flag(-1, "rank of this node, or of this process", kind=int, result=False, group=RANKS)
    dist_url: str = flag(
        "tcp://224.66.41.62:23456",
        "address at which ranks meet: tcp://HOST:PORT or env://; on one node a free loopback port unless given",
        result=False,
        group=RANKS,
    )
    dist_backend: str = flag("nccl", "nccl or gloo", result=False, group=RANKS)
    seed: int | None = flag(
        None,
        "seed of heads, order and draws; drawn, printed and stored unless given",
        kind=int,
        group=METHOD,
        low=0,
        below=2**63,
    )
    gpu: int | None = flag(None, "use only this GPU", kind=int, result=False, group=RANKS)
    multiprocessing_distributed: bool = flag(
        False, "start one process a GPU on this node", kind=bool, result=False, group=RANKS
    )
    pretrained: str = flag(
        "", "weights file of the backbone; without it the backbone is untrained", kind=path, result=False, group=MODEL
    )
    # --- ours ------------------------------------------------------------------------------------------
    head: str = flag(
        "linear",
        "comma list of heads: linear, bn-linear (after a batch norm without parameters, folded into the saved layer)",
        group=METHOD,
    )
    cache_features: bool = flag(
        False,
        "compute features once, without augmentation, and train on them: quick, but not the published protocol",
        kind=bool,
        group=METHOD,
    )
    solver: str = flag(
        "sgd",
        "with --cache-features: sgd, or lbfgs (full batch to convergence; --lr is not used)",
        choices=("sgd", "lbfgs"),
        group=METHOD,
    )
    heads: int | None = flag(None, HEADS_HELP, kind=int, group=MODEL)
    encoder: str = flag("base", "which encoder of a pre-training checkpoint", choices=("base", "momentum"), group=MODEL)
    image_size: int = flag(
        0, "side of the views in pixels; 0: that of pre-training, else 224", kind=int, group=DATA, low=0
    )
    view_preset: str = flag(
        "",
        "normalisation and centre crop; unless given that of pre-training, else photos",
        choices=("", *PRESETS),
        group=DATA,
    )
    crop_min: float = flag(
        0.08, "smallest crop of the training view, as a share of the image", kind=float, group=DATA, low=0, high=1
    )
    output_dir: str = flag(".", "folder of the files", kind=path, result=False, group=RUN)
    recipe: str = flag("", "named set of flags, see the list at the end", result=False, group=RUN)
    config: str = flag("", "YAML file of flags, for example a run's lincls.yaml", kind=path, result=False, group=RUN)
    checkpoint_steps: int = flag(
        0, "steps between writes of checkpoint.pth.tar within an epoch", kind=int, result=False, group=RUN, low=0
    )
    max_steps: int = flag(
        0, "stop after this many steps in all, with a checkpoint", kind=int, result=False, group=RUN, low=0
    )
    max_hours: float = flag(
        0.0, "stop after this many hours, with a checkpoint", kind=float, result=False, group=RUN, low=0
    )
    device: str = flag("auto", "device", choices=DEVICES, result=False, group=RANKS)
    precision: str = flag(
        "fp32", "arithmetic of the backbone; heads are always float32", choices=PRECISIONS, group=RANKS
    )
    nprocs_per_node: int = flag(0, "processes to start on this node", kind=int, result=False, group=RANKS, low=0)
    allow_config_change: bool = flag(
        False, "resume although result-changing flags differ", kind=bool, result=False, group=RUN
    )
    logger: str = flag("none", LOGGER_HELP, result=False, group=RUN, metavar="NAMES")
    quiet: bool = flag(False, "print warnings and the result only", kind=bool, result=False, group=RUN)
    json: bool = flag(False, "print every line of lincls.jsonl instead of text", kind=bool, result=False, group=RUN)

    @property
    def lrs(self) -> tuple[float, ...]:
        """Learning rates for 256 images, in the order given."""
        return self.lr if isinstance(self.lr, tuple) else (self.lr,)

    @property
    def weight_decays(self) -> tuple[float, ...]:
        """Weight decays, in the order given."""
        return self.weight_decay if isinstance(self.weight_decay, tuple) else (self.weight_decay,)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of linear heads, in the order given."""
        return tuple(self.head.split(","))

    @property
    def initial_lr(self) -> float:
        """Learning rate of epoch 0 of the first head: linear scaling with the batch."""
        return self.lrs[0] * self.lr_scale

    @property
    def lr_scale(self) -> float:
        """What a learning rate for 256 images is multiplied by."""
        return self.batch_size / 256

    def check(self) -> None:
        """Refuse values that cannot work.

        Raises:
            UserError: naming the first bad field, its value and what is allowed.
        """
        if self.arch and self.arch != "pixels":
            check_arch(self.arch)
        check_heads(self.heads, self.arch)
        check_bounds(self)
        for name, values in (("--lr", self.lrs), ("--wd", self.weight_decays)):
            for value in values:
                if not (value >= 0 and math.isfinite(value)):
                    raise UserError(f"{name} must be finite and 0 or more, not {value}")
            if len(set(values)) < len(values):
                raise UserError(f"{name} names a value twice: {','.join(f'{v:g}' for v in values)}")
        if unknown := [kind for kind in self.kinds if kind not in KINDS]:
            raise UserError(f"--head {unknown[0]!r} is not known; give {' or '.join(KINDS)}, or both with a comma")
        if len(set(self.kinds)) < len(self.kinds):
            raise UserError(f"--head names a head twice: {self.head}")
        if self.solver == "lbfgs" and not self.cache_features:
            raise UserError("--solver lbfgs needs --cache-features: it works on all features at once")
        check_model_flags(self)
        logger_names(self.logger)
        if self.evaluate and not self.resume:
            raise UserError("-e evaluates a linear file: name it by --resume (--pretrained has no classifier)")
