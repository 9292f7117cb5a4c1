"""The formats a backbone is exported to. Each writes, says how its own library loads it, and loads it so."""

from mocov3.export.formats.base import Exported, Format, Unfit
from mocov3.export.formats.graphs import Onnx, TorchExport
from mocov3.export.formats.hub import Transformers
from mocov3.export.formats.weights import Deit, Safetensors, Timm, Torchvision
from mocov3.export.places import FORMATS

_WRITERS = (Deit(), Timm(), Torchvision(), Transformers(), Onnx(), Safetensors(), TorchExport())

WRITERS: dict[str, Format] = dict(zip(FORMATS, _WRITERS, strict=True))
"""By name, in the order of ``mocov3.export.places.FORMATS``."""

__all__ = ["WRITERS", "Exported", "Format", "Unfit"]
