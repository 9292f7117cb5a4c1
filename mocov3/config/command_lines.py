"""What the command line of each task means, as a configuration. Nothing is measured, and torch is not imported."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mocov3.config import recipes
from mocov3.config.evaluation import EmbedConfig, KnnConfig
from mocov3.config.fields import Fields, Layers, Parser, parse, path, read_layers, read_yaml
from mocov3.config.finetune import FinetuneConfig
from mocov3.config.lincls import LinclsConfig
from mocov3.config.presets import PRESETS
from mocov3.config.pretrain import PretrainConfig

_DECIDED = ("decay", "stage_ends", "max_hours")
"""What a run decides about its length within ``--budget``."""
_OF_ONE_RUN = ("output_dir", "resume", "config", "budget", "max_steps", *_DECIDED, "prolong", "quiet", "json")


def parse_pretrain(argv: Sequence[str], *, prog: str, defaults: Fields | None = None) -> PretrainConfig:
    """Command line of pre-training; both commands share it, only defaults differ. Nothing is measured."""
    return merged(read_pretrain(argv, prog, defaults))


def read_pretrain(argv: Sequence[str], prog: str, defaults: Fields | None) -> Layers:
    """Command line of pre-training, as layers that are not merged yet.

    Where flags ask for another length, what the run of ``--config`` decided about its own does not count.
    """
    layers = read_layers(
        PretrainConfig,
        argv,
        prog=prog,
        description="Self-supervised pre-training by MoCo v3.",
        defaults=defaults,
        recipes=recipes.settings(),
        epilog=recipes.listing(),
    )
    return layers.without(*_DECIDED) if {"budget", "prolong"} & set(layers.flags) else layers


def merged(layers: Layers) -> PretrainConfig:
    """The configuration of layers that leave nothing to be chosen or measured."""
    preset = PRESETS[layers.merged().get("view_preset", PretrainConfig.view_preset)]
    return PretrainConfig(**layers.merged({"crop_min": preset.crop_min}))


def prolonged(folder: str) -> Fields:
    """The fields of a run that ``--prolong`` goes on from, but for places, limits and what it decided.

    Raises:
        UserError: if it has no configuration.
    """
    fields = read_yaml(Path(folder) / "config.yaml", PretrainConfig)
    return {name: value for name, value in fields.items() if name not in _OF_ONE_RUN}


def parse_finetune(argv: Sequence[str], *, prog: str) -> FinetuneConfig:
    """Command line of fine-tuning and transfer; both commands share it."""
    return parse(
        FinetuneConfig,
        argv,
        prog=prog,
        description="Train a classifier end to end from pre-trained weights (DeiT's recipe).",
        recipes=recipes.finetune_settings(),
        epilog=recipes.listing(recipes.FINETUNE_RECIPES, "accuracy"),
    )


def parse_lincls(argv: Sequence[str], *, prog: str, defaults: Fields | None = None) -> LinclsConfig:
    """Command line of linear evaluation; both commands share it, only defaults differ."""
    return parse(
        LinclsConfig,
        argv,
        prog=prog,
        description=LinclsConfig.__doc__ or "",
        defaults=defaults,
        recipes=recipes.settings(recipes.LINCLS_RECIPES),
        epilog=recipes.listing(recipes.LINCLS_RECIPES),
    )


def parse_knn(argv: Sequence[str], *, prog: str) -> KnnConfig:
    """Command line of the k-NN evaluation."""
    return parse(KnnConfig, argv, prog=prog, description=KnnConfig.__doc__ or "")


def parse_embed(argv: Sequence[str], *, prog: str) -> EmbedConfig:
    """Command line of embedding."""
    return parse(EmbedConfig, argv, prog=prog, description=EmbedConfig.__doc__ or "")


def parse_convert(argv: Sequence[str], *, prog: str) -> argparse.Namespace:
    """Command line of the conversion."""
    parser = Parser(prog=prog, description="Convert a pre-training checkpoint to DeiT's format.")
    parser.add_argument("--input", type=path, required=True, help="pre-training checkpoint, ours or the reference's")
    parser.add_argument("--output", type=path, required=True, help="file to write; its folder is made if missing")
    return parser.parse_args(list(argv))
