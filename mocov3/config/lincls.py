"""Configuration of linear evaluation: the reference's flags with their defaults, and ours.

Defaults of the reference are recorded in ``tests/golden/f_sched.json``; a test compares them.
"""

import math
from dataclasses import dataclass

from mocov3.config.archs import check_arch, check_heads
from mocov3.config.evaluation import FINDINGS_HELP, HEADS_HELP, MEASURES_HELP, check_model_flags, several
from mocov3.config.fields import check_bounds, flag, path
from mocov3.config.loggers import HELP as LOGGER_HELP
from mocov3.config.loggers import logger_names
from mocov3.config.own import ADAPTER_HELP, GROUP_HELP
from mocov3.config.presets import PRESETS
from mocov3.config.running import DATA, FROZEN_PRECISIONS, METHOD, MODEL, RANKS, RUN, RankFlags
from mocov3.config.views import ReadingFlags, window
from mocov3.errors import UserError

KINDS = ("linear", "bn-linear")


def numbers(given: object) -> float | tuple[float, ...]:
    """``0.1`` or ``0.1,0.3,1`` → a number or several; raises ValueError for anything else."""
    values = several(given)
    if not values:
        raise ValueError("no number")
    return values[0] if len(values) == 1 else values


numbers.__name__ = "number or comma list"  # argparse names it in its message


@dataclass(frozen=True)
class LinclsConfig(ReadingFlags, RankFlags):
    """Linear classifiers on frozen features (arXiv 2104.02057, §4): one, or many in one pass."""

    data: str = flag(
        "",
        "folder with train and val class folders, or the built-in fashion-mnist[:ROOT]",
        kind=path,
        positional=True,
        result=False,
        per_rank=True,
        metavar="DIR",
    )
    # --- the reference's flags -------------------------------------------------------------------------
    arch: str = flag(
        "resnet50", "backbone, timm/NAME, or pixels (no network: the baseline)", "-a", "--arch", group=MODEL
    )
    epochs: int = flag(90, "epochs", group=METHOD, low=1)
    batch_size: int = flag(1024, "images a step, over all ranks", "-b", "--batch-size", group=METHOD, low=1)
    lr: float | tuple[float, ...] = flag(
        0.1,
        "learning rate for 256 images; a comma list trains a head for each",
        "--lr",
        "--learning-rate",
        kind=numbers,
        group=METHOD,
        metavar="LR[,LR…]",
    )
    momentum: float = flag(0.9, "momentum of SGD", group=METHOD, low=0)
    weight_decay: float | tuple[float, ...] = flag(
        0.0,
        "weight decay; a comma list trains a head for each",
        "--wd",
        "--weight-decay",
        kind=numbers,
        group=METHOD,
        metavar="WD[,WD…]",
    )
    resume: str = flag(
        "",
        "linear file to resume from or to evaluate; 'auto': checkpoint.pth.tar of the output folder",
        kind=path,
        result=False,
        per_rank=True,
        group=RUN,
    )
    evaluate: bool = flag(
        False, "only evaluate the linear file of --resume", "-e", "--evaluate", result=False, group=RUN
    )
    seed: int | None = flag(
        None,
        "seed of heads, order and draws; drawn, printed and stored unless given",
        kind=int,
        group=METHOD,
        low=0,
        below=2**63,
    )
    pretrained: str = flag(
        "",
        "weights file of the backbone; without it the backbone is untrained",
        kind=path,
        result=False,
        per_rank=True,
        group=MODEL,
    )
    adapter: str = flag("", ADAPTER_HELP, kind=path, group=MODEL, metavar="FILE")
    # --- ours ------------------------------------------------------------------------------------------
    head: str = flag(
        "linear",
        "comma list of heads: linear, bn-linear (after a batch norm without parameters, folded into the saved layer)",
        group=METHOD,
    )
    cache_features: bool = flag(
        False,
        "compute features once, without augmentation, and train on them: quick, but not the published protocol",
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
    image_size: int = flag(0, "side of the views in pixels; 0: that of pre-training, else 224", group=DATA, low=0)
    view_preset: str = flag(
        "",
        "normalisation and centre crop; unless given that of pre-training, else photos",
        choices=("", *PRESETS),
        group=DATA,
    )
    labels: str = flag("", FINDINGS_HELP, kind=path, result=False, per_rank=True, group=DATA, metavar="CSV[:COLUMN,…]")
    measures: bool = flag(False, MEASURES_HELP, result=False, group=RUN)
    group_by: str = flag(
        "", f"{GROUP_HELP}; validation images of a group that training has are left out", group=DATA, metavar="GROUPS"
    )
    crop_min: float = flag(
        0.08, "smallest crop of the training view, as a share of the image", group=DATA, low=0, high=1
    )
    precision: str = flag(
        "auto",
        "arithmetic of the backbone (auto: tf32 on CUDA, else fp32; a resumed run as it began); heads are always fp32",
        choices=FROZEN_PRECISIONS,
        group=RANKS,
    )
    logger: str = flag("none", LOGGER_HELP, result=False, group=RUN, metavar="NAMES")

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
        window(self.bit_window)
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
