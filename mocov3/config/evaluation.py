"""Configuration of k-NN evaluation and of embedding, and what the evaluation tasks share."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mocov3.config.archs import BUILT_IN_ARCHS, check_arch, check_heads
from mocov3.config.fields import check_bounds, flag, path
from mocov3.config.own import ADAPTER_HELP, GROUP_HELP
from mocov3.config.presets import PRESETS
from mocov3.config.running import DATA, DEVICES, FROZEN_PRECISIONS, MODEL, RUN
from mocov3.config.views import ReadingFlags, window
from mocov3.errors import UserError, nearest, no_file

OUTPUT = "result"
HEADS_HELP = (
    "attention heads of a ViT, of a file that does not record them (ViT-S: 12 in MoCo v3; 6 in DeiT, DINO, timm)"
)
FINDINGS_HELP = (
    "several findings an image in place of classes: a CSV of paths and a column of 1, 0 or nothing (not known) a "
    "finding, for the images of both parts; columns may be named"
)
MEASURES_HELP = (
    "also AUROC, average precision, balanced accuracy, macro-F1 and the confusion table, by scikit-learn "
    "(pip install 'mocov3[measures]')"
)
LAYERS = ("", "cls", "mean", "patches", "projector")
KS, TEMPERATURES, RECALLS = (1, 10, 20, 100, 200), (0.07,), (1, 5, 10)


def listed(given: Any) -> Sequence[Any]:
    """The parts of a comma list or of a list; of anything else that alone."""
    return given.split(",") if isinstance(given, str) else given if isinstance(given, list | tuple) else [given]


def integers(given: object) -> tuple[int, ...]:
    """``1,10,20`` → several integers; raises ValueError for anything else."""
    return tuple(int(part) for part in listed(given))


def several(given: object) -> tuple[float, ...]:
    """``0.07,0.1`` → several numbers; raises ValueError for anything else."""
    return tuple(float(part) for part in listed(given))


integers.__name__, several.__name__ = "comma list of integers", "comma list of numbers"


@dataclass(frozen=True)
class FeatureConfig(ReadingFlags):
    """Which features of which images: shared by k-NN evaluation and embedding."""

    data: str = flag(
        "", "folder of images, or the built-in fashion-mnist[:ROOT]", kind=path, positional=True, metavar="DIR"
    )
    model: str = flag(
        "",
        "a weights file (ours, the reference's, DeiT's, timm's), the name of an arch (untrained), "
        "timm/NAME (timm's published weights), or pixels",
        "--model",
        "--pretrained",
        kind=path,
        group=MODEL,
    )
    adapter: str = flag("", ADAPTER_HELP, kind=path, group=MODEL, metavar="FILE")
    arch: str = flag("", "backbone of a file that does not name it", "-a", "--arch", group=MODEL)
    heads: int | None = flag(None, HEADS_HELP, kind=int, group=MODEL)
    encoder: str = flag("base", "which encoder of a pre-training checkpoint", choices=("base", "momentum"), group=MODEL)
    layer: str = flag(
        "",
        "cls (token of a ViT), mean (of the patch tokens), patches (all of them), projector (its "
        "output); unless given the features that linear evaluation uses",
        choices=LAYERS,
        group=MODEL,
    )
    untrained: bool = flag(False, "timm/NAME without its published weights", group=MODEL)
    image_size: int = flag(0, "side of the views in pixels; 0: that of pre-training, else 224", group=DATA, low=0)
    group_by: str = flag(
        "",
        f"{GROUP_HELP}; k-NN lets no image vote for one of its group, embed writes them down",
        group=DATA,
        metavar="GROUPS",
    )
    view_preset: str = flag(
        "",
        "normalisation and centre crop; unless given that of pre-training, else photos",
        choices=("", *PRESETS),
        group=DATA,
    )
    batch_size: int = flag(256, "images a pass", "-b", "--batch-size", group=RUN, low=1)
    workers: int = flag(
        32,
        "data loading processes of a rank; at most the usable cores",
        "-j",
        "--workers",
        result=False,
        group=RUN,
        low=0,
    )
    device: str = flag("auto", "device", choices=DEVICES, result=False, group=RUN)
    precision: str = flag(
        "auto", "arithmetic of the backbone; auto: tf32 on CUDA, else fp32", choices=FROZEN_PRECISIONS, group=RUN
    )
    nprocs_per_node: int = flag(
        0, "processes to start on this node (torchrun needs no flag)", result=False, group=RUN, low=0
    )
    seed: int = flag(0, "seed of an untrained network", group=MODEL, low=0, below=2**63)

    def check(self) -> None:
        """Refuse values that cannot work.

        Raises:
            UserError: naming the first bad field, its value and what is allowed.
        """
        if not self.model:
            raise UserError("no model: give --model FILE, an arch, timm/NAME or pixels")
        names = ["pixels", *BUILT_IN_ARCHS]
        if not Path(self.model).is_file() and not self.model.startswith("timm/") and self.model not in names:
            if "/" in self.model or "." in self.model or Path(self.model).exists():
                raise UserError(f"--model {self.model}: {no_file(self.model)}")
            raise UserError(f"--model {self.model!r}: is neither a file nor an arch; {nearest(self.model, names)}")
        if self.arch:
            check_arch(self.arch)
        check_heads(self.heads, self.arch if Path(self.model).is_file() else self.model)
        check_bounds(self)
        window(self.bit_window)
        check_model_flags(self)


@dataclass(frozen=True)
class KnnConfig(FeatureConfig):
    """Weighted k-NN on frozen features (Wu et al. 2018; Caron et al. 2021), and retrieval recall@k."""

    k: tuple[int, ...] = flag(
        KS, "neighbours, a comma list", "-k", "--k", kind=integers, group=OUTPUT, metavar="K[,K…]"
    )
    temperature: tuple[float, ...] = flag(
        TEMPERATURES,
        "temperatures of the vote, a comma list",
        "-t",
        "--temperature",
        kind=several,
        group=OUTPUT,
        metavar="T[,T…]",
    )
    recall: tuple[int, ...] = flag(RECALLS, "recall@k of these", kind=integers, group=OUTPUT, metavar="K[,K…]")
    labels: str = flag(
        "",
        "CSV of path,label: use these images of the folder (10–100 are enough), each left out in turn; or of path and "
        "a column of 1, 0 or nothing a finding (FILE.csv:COLUMN,COLUMN names them)",
        kind=path,
        group=DATA,
        metavar="FILE",
    )
    measures: bool = flag(False, MEASURES_HELP, result=False, group=OUTPUT)
    json: bool = flag(False, "print the result as JSON", result=False, group=OUTPUT)

    def check(self) -> None:
        """Refuse values that cannot work.

        Raises:
            UserError: naming the first bad field, its value and what is allowed.
        """
        super().check()
        if self.layer == "patches":
            raise UserError("--layer patches gives many features an image; k-NN needs one: use mean or cls")
        for name, ks in (("--k", self.k), ("--recall", self.recall)):
            if not ks or min(ks) < 1:
                raise UserError(f"{name} must be 1 or more, not {','.join(map(str, ks))}")
        for value in self.temperature:
            if not (value > 0 and math.isfinite(value)):
                raise UserError(f"--temperature must be above 0 and finite, not {value}")


@dataclass(frozen=True)
class EmbedConfig(FeatureConfig):
    """Features of every image of a folder as a table."""

    output: str = flag(
        "",
        "file to write: NAME.parquet, or NAME.npy beside NAME.jsonl with the paths",
        "-o",
        "--output",
        kind=path,
        group=OUTPUT,
    )
    duplicates: float = flag(
        0.0,
        "also list groups of images whose features agree to at least this cosine, for "
        "example 0.98, in NAME.duplicates.jsonl",
        result=False,
        group=OUTPUT,
        metavar="COSINE",
        low=0,
        high=1,
    )
    overwrite: bool = flag(False, "replace the output if it exists", result=False, group=OUTPUT)

    def check(self) -> None:
        """Refuse values that cannot work.

        Raises:
            UserError: naming the first bad field, its value and what is allowed.
        """
        super().check()
        if Path(self.output).suffix not in (".parquet", ".npy"):
            raise UserError(f"--output {self.output!r}: name a file that ends in .parquet or .npy")
        if self.duplicates and self.layer == "patches":
            raise UserError("--duplicates needs one feature an image; --layer patches gives many")


def check_model_flags(config: object) -> None:
    """Refuse a missing weights file and unknown backends."""
    pretrained = getattr(config, "pretrained", "")
    if pretrained and not Path(pretrained).is_file():
        raise UserError(f"--pretrained {pretrained}: {no_file(pretrained)}")
    resume = getattr(config, "resume", "")
    if resume not in ("", "auto") and not Path(resume).is_file():
        raise UserError(f"--resume {resume}: {no_file(resume)}")
    if (backend := getattr(config, "dist_backend", "gloo")) not in ("nccl", "gloo"):
        raise UserError(f"--dist-backend {backend!r} is not known; use nccl or gloo")
