"""Reading and writing files of tensors: written atomically, vetted and read without running code."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import safetensors
import torch

from mocov3.errors import UserError
from mocov3.weights import Contents
from mocov3.weights.vetting import vet


def write(path: Path, contents: Contents) -> None:
    """Write ``contents`` so that ``path`` is either as before or complete, even if the machine stops.

    Raises:
        OSError: if the folder cannot be written or is full; ``path`` is then as it was.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb", buffering=0) as file:
            target: Any = _Target(file)
            try:
                torch.save(contents, target)
            except RuntimeError:  # all that torch says of a full disk is that a position is unexpected
                if target.error is None:
                    raise
                raise target.error from None
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        _remove(partial)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class _Target:
    """A file to write to that remembers why it refused."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of ``data``."""
        view = memoryview(data)
        try:
            done = 0
            while done < len(view):
                done += self.file.write(view[done:])
        except OSError as error:
            self.error = self.error or error
            raise
        return len(view)

    def flush(self) -> None:
        """Nothing is held back."""


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # where the folder is gone, the error that led here says more
        path.unlink(missing_ok=True)


def _safetensors(path: Path) -> Contents:
    # names and bytes of tensors alone; what an export of ours says beside them is text
    with safetensors.safe_open(path, "pt") as file:
        about = file.metadata() or {}
        contents: Contents = {"model": {key: file.get_tensor(key) for key in file.keys()}}  # noqa: SIM118
    if "arch" in about:
        contents["arch"] = about["arch"]
        origin = {name: about[name] for name in ("origin", "licence") if name in about}
        read = {name: json.loads(about[name]) for name in ("config", "view") if name in about}
        contents["mocov3"] = {"config": {}, **read, **origin}
    return contents


def read(path: str | Path) -> Contents:
    """The contents of a file of tensors, on the CPU.

    Raises:
        UserError: if it is missing, damaged, or holds anything but tensors, numbers, strings, lists and dicts.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            return _safetensors(path)
        vet(path)
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except PermissionError:
        raise UserError(f"{path}: cannot be read (permission denied)") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # a damaged file can make the readers stumble anywhere
        raise UserError(f"{path}: is damaged or no file of tensors ({type(error).__name__}); use another") from None
    if not isinstance(contents, dict):
        raise UserError(f"{path}: holds a {type(contents).__name__}, not a checkpoint")
    return contents
