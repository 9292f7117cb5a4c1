"""The formats a backbone is exported to. Each writes, says how its own library loads it, and loads it so."""

from mocov3.export.formats.base import Exported, Format, Unfit
from mocov3.export.formats.graphs import Onnx, TorchExport
from mocov3.export.formats.hub import Transformers
from mocov3.export.formats.weights import Deit, Safetensors, Timm, Torchvision

FORMATS: dict[str, Format] = {
    "deit": Deit(),
    "timm": Timm(),
    "torchvision": Torchvision(),
    "transformers": Transformers(),
    "onnx": Onnx(),
    "safetensors": Safetensors(),
    "torch-export": TorchExport(),
}

ANY_CHANNELS = ("onnx", "safetensors", "torch-export")
"""Formats that hold networks of other than three channels; the others' own classes begin with RGB."""

__all__ = ["ANY_CHANNELS", "FORMATS", "Exported", "Format", "Unfit"]
