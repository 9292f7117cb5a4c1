"""Backbones, the momentum-contrast model around them, and the way to build both by name."""

from mocov3.models.backbones import Encoder, build_backbone, build_encoder, linear_classifier
from mocov3.models.moco import MoCo, Statistics, build
from mocov3.models.positions import sincos_position_embedding
from mocov3.models.shapes import shapes_only

__all__ = [
    "Encoder",
    "MoCo",
    "Statistics",
    "build",
    "build_backbone",
    "build_encoder",
    "linear_classifier",
    "shapes_only",
    "sincos_position_embedding",
]
