"""Where and with what a run was made: a line of ``machine.jsonl`` a start, resumes included. Names no host or user."""

import json
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mocov3.data.loading.loader import usable_cores
from mocov3.metrics import JsonLine
from mocov3.output.log import warn
from mocov3.version import __version__

MACHINE = "machine.jsonl"
_PACKAGES = ("torch", "torchvision", "timm", "numpy", "opencv-python-headless", "Pillow")


def facts(*, step: int, ranks: int, cores: int, device: str, precision: str) -> JsonLine:
    """One start of a run.

    Args:
        step: it begins at.
        ranks: processes.
        cores: that this process may use.
        device: name of the GPU, or ``cpu``.
        precision: arithmetic of the networks.
    """
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "step": step,
        "system": f"{platform.system()} {platform.machine()}",
        "device": device,
        "ranks": ranks,
        "cores": cores,
        "precision": precision,
        "python": platform.python_version(),
        "mocov3": __version__,
        **{name: _version(name) for name in _PACKAGES},
    }


def note(folder: Path, entry: JsonLine) -> None:
    """Add ``entry`` to the folder's file; a warning where the disk refuses."""
    try:
        with (folder / MACHINE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
    except OSError as error:
        warn(f"{MACHINE} could not be written ({error.strerror or error})")


def note_start(folder: Path, world: Any, step: int, precision: str) -> None:
    """Note that a run starts or resumes at ``step``, on ``world`` (a ``mocov3.distributed.World``)."""
    device = world.device.type
    if device == "cuda":
        import torch

        device = torch.cuda.get_device_name(world.device)
    note(folder, facts(step=step, ranks=world.size, cores=usable_cores(), device=device, precision=precision))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "?"
