"""Where an export is written: its formats, and a temporary place that becomes the output once it is complete."""

import os
import shutil
from pathlib import Path
from typing import NamedTuple

from mocov3.errors import UserError, reason


class Place(NamedTuple):
    """What an export in a format is, known without its libraries."""

    text: str
    is_folder: bool = False
    needs: tuple[str, ...] = ()
    """Modules that are not of mocov3's own dependencies."""


FORMATS = {
    "deit": Place("a file {'model': …} as DeiT's --resume reads"),
    "timm": Place("a folder for timm.create_model", is_folder=True),
    "torchvision": Place("a file of a state dict for torchvision's ResNet or VisionTransformer"),
    "transformers": Place(
        "a folder for ViTModel or ResNetModel .from_pretrained", is_folder=True, needs=("transformers",)
    ),
    "onnx": Place("a file with a dynamic batch", needs=("onnx", "onnxscript", "onnxruntime")),
    "safetensors": Place("a file with our names of keys"),
    "torch-export": Place("a program of torch.export with a dynamic batch (.pt2)"),
}
"""By the name that ``--to`` takes; ``mocov3.export.formats`` writes them."""


class Staged:
    """A place beside ``output`` that becomes ``output`` once it is complete, and is removed otherwise."""

    def __init__(self, output: Path) -> None:
        self.output = output
        # onnx and torch.export look at the suffix, so it stays
        self.place = output.with_name(f".{os.getpid()}.partial-{output.name}")

    def __enter__(self) -> Path:
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self._clear()
            probe = self.place.with_name(self.place.name + ".probe")
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(f"--output {self.output}: cannot be written ({error.strerror or error})") from None
        return self.place

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is not None:
            self._clear()
            if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
                raise UserError(f"--output {self.output}: cannot be written ({reason(error)})") from None
            return
        if self.output.is_dir():
            self.output.rmdir()  # empty: checked
        os.replace(self.place, self.output)

    def _clear(self) -> None:
        if self.place.is_dir():
            shutil.rmtree(self.place)
        else:
            self.place.unlink(missing_ok=True)
