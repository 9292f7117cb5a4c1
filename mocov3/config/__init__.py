"""Configuration: one frozen dataclass a task, from which flags, help, ``config.yaml`` and checks are made.

Nothing in this package imports torch, so that help and errors are immediate.
"""

from mocov3.config.archs import BUILT_IN_ARCHS
from mocov3.config.evaluation import EmbedConfig, KnnConfig
from mocov3.config.fields import changed_fields, parse, read_yaml, write_yaml
from mocov3.config.finetune import FinetuneConfig
from mocov3.config.lincls import LinclsConfig
from mocov3.config.loggers import logger_names
from mocov3.config.presets import PRESETS, ViewPreset
from mocov3.config.pretrain import PretrainConfig
from mocov3.config.views import preset_of

RunConfig = PretrainConfig | LinclsConfig | FinetuneConfig
"""The configuration of a training."""

__all__ = [
    "BUILT_IN_ARCHS",
    "PRESETS",
    "EmbedConfig",
    "FinetuneConfig",
    "KnnConfig",
    "LinclsConfig",
    "PretrainConfig",
    "RunConfig",
    "ViewPreset",
    "changed_fields",
    "logger_names",
    "parse",
    "preset_of",
    "read_yaml",
    "write_yaml",
]
