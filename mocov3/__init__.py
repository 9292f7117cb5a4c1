"""MoCo v3: self-supervised pre-training of ResNet and ViT (arXiv 2104.02057), independent of the published code.

``import mocov3`` is light; what needs torch is imported on first use.
"""

from typing import Any

from mocov3.moved import install
from mocov3.version import __version__

__all__ = ["__version__", "load_backbone"]

install()


def __getattr__(name: str) -> Any:
    if name == "load_backbone":
        from mocov3.weights.convert import load_backbone

        return load_backbone
    raise AttributeError(f"module 'mocov3' has no attribute {name!r}")
