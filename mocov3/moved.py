"""Module paths that the documents named before the package was divided into folders: they still work, with a warning.

Kept for two minor versions (docs/releases.md).
"""

import importlib
import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Iterable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "mocov3.checkpoint": "mocov3.weights.checkpoint",
    "mocov3.convert": "mocov3.weights.convert",
    "mocov3.data.decode": "mocov3.data.views.decode",
    "mocov3.features": "mocov3.evaluation.features",
    "mocov3.frozen": "mocov3.evaluation.frozen",
    "mocov3.neighbours": "mocov3.evaluation.neighbours",
    "mocov3.origin": "mocov3.weights.origin",
    "mocov3.precision": "mocov3.models.precision",
    "mocov3.recipes": "mocov3.config.recipes",
    "mocov3.start": "mocov3.weights.start",
    "mocov3.step": "mocov3.pretraining.step",
}
"""Old path → where its names are now, but for ``_ELSEWHERE``."""

_ELSEWHERE = {
    "mocov3.step": {
        "normalise": ("mocov3.data.device.pixels", "normalise"),
        "Precision": ("mocov3.models.precision", "Precision"),
        "resolve_precision": ("mocov3.models.precision", "resolve_precision"),
    },
    "mocov3.data.decode": {"Picture": ("mocov3.data.views.decode", "ImageBytes")},
}
"""Names that went elsewhere, or are called otherwise."""


class _Moved(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Iterable[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return importlib.util.spec_from_loader(name, self) if name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        elsewhere = _ELSEWHERE.get(name, {})

        def find(attribute: str) -> Any:
            place, called = elsewhere.get(attribute, (MOVED[name], attribute))
            value = getattr(importlib.import_module(place), called)
            if not attribute.startswith("__"):
                warnings.warn(f"{name}.{attribute} is now {place}.{called}", DeprecationWarning, stacklevel=2)
            return value

        module.__getattr__ = find  # type: ignore[method-assign]


def install() -> None:
    """Make old paths importable."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Moved())
