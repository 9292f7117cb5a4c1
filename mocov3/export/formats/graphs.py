"""Formats of whole programs, with a dynamic batch: ONNX and torch.export."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mocov3.export.formats.base import Exported, Format

_BATCH = {"images": {0: torch.export.Dim("batch")}}


class _Network(nn.Module):
    def __init__(self, model: Exported) -> None:
        super().__init__()
        self.encoder = model.encoder

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder(images)


def _example(model: Exported) -> Tensor:
    return torch.zeros(2, model.in_chans, model.image_size, model.image_size)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # the exporter reports its progress and its own deprecations on both streams
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


class Onnx(Format):
    """One file; input ``pictures`` (batch, channels, height, width), output ``features`` or ``scores`` (batch, n)."""

    tolerance = 1e-4  # another runtime with sums in its own order

    def fits(self, model: Exported) -> None:
        """Every arch fits."""

    def write(self, model: Exported, place: Path) -> None:
        """Export, describe in the file's metadata, check."""
        import onnx

        with _quiet():
            program = torch.onnx.export(
                _Network(model).eval(),
                (_example(model),),
                dynamo=True,
                input_names=["pictures"],
                output_names=[model.output],
                dynamic_shapes=_BATCH,
                verbose=False,
            )
        assert program is not None
        model_proto = program.model_proto
        metadata = {p.key: p.value for p in model_proto.metadata_props}
        onnx.helper.set_model_props(model_proto, metadata | model.about())
        onnx.checker.check_model(model_proto)
        onnx.save(model_proto, str(place))

    def features(self, model: Exported, place: Path, x: Float[Tensor, "batch channels height width"]) -> Tensor:
        """By onnxruntime on the CPU, the batch in two uneven parts."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(place), options, providers=["CPUExecutionProvider"])
        parts = [session.run([model.output], {"pictures": part.numpy()})[0] for part in (x[:1], x[1:])]
        return torch.cat([torch.from_numpy(part) for part in parts])

    def usage(self, model: Exported, name: str) -> str:
        """By onnxruntime."""
        return (
            "import onnxruntime\n\n"
            f'session = onnxruntime.InferenceSession("{name}")\n'
            f'({model.output},) = session.run(None, {{"pictures": images.numpy()}})'
        )


class TorchExport(Format):
    """A program that torch loads without this package."""

    tolerance = 1e-5

    def fits(self, model: Exported) -> None:
        """Every arch fits."""

    def write(self, model: Exported, place: Path) -> None:
        """One ``.pt2`` file."""
        with _quiet():
            program = torch.export.export(_Network(model).eval(), (_example(model),), dynamic_shapes=_BATCH)
            file = io.BytesIO()  # torch's writer ends the process where a disk is full
            torch.export.save(program, file, extra_files=model.about())
        place.write_bytes(file.getbuffer())

    def features(self, model: Exported, place: Path, x: Float[Tensor, "batch channels height width"]) -> Tensor:
        """By ``torch.export.load``, the batch in two uneven parts."""
        with _quiet(), place.open("rb") as file:
            program = torch.export.load(file)
        module = program.module()
        return torch.cat([module(x[:1]), module(x[1:])])

    def usage(self, model: Exported, name: str) -> str:
        """By torch alone."""
        return f'model = torch.export.load("{name}").module()\n{model.output} = model(images)'
