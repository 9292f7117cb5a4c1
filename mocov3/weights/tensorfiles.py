"""Reading and writing files of tensors: written atomically, vetted and read without running code."""

import contextlib
import json
import os
import pickle
from io import FileIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import safetensors
import torch

from mocov3.errors import UserError, nature, no_file, printable
from mocov3.weights import Contents
from mocov3.weights.vetting import vet
from mocov3.weights.walk import is_plain


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

    def __init__(self, file: FileIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
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


class _Object:
    """In the place of an object of another program, and of its class: takes whatever it is given and does nothing."""

    def __init__(self, *_: object) -> None:
        pass

    def __new__(cls, *_: object) -> "_Object":
        return super().__new__(cls)

    def __call__(self, *_: object) -> "_Object":
        return self

    def __setitem__(self, *_: object) -> None:
        pass

    __setstate__ = append = extend = __init__


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        """What tensors are made by, by its name; in any other's place nothing that it names."""
        return super().find_class(module, name) if is_plain(f"{module}.{name}") else _Object


def _load(file: Any, **arguments: Any) -> object:
    return _Unpickler(file, **arguments).load()


_NOTHING_RUNS: Any = SimpleNamespace(__name__="pickle", Unpickler=_Unpickler, load=_load)
"""What torch unpickles by where a vetted file holds objects: it looks up nothing but what tensors are made by."""


def _by_index(index: Path) -> Contents:
    """The tensors of all parts that an index of Hugging Face's names; they lie beside it."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        beside = names and all(name == os.path.basename(name) for name in names)
    except (ValueError, KeyError, TypeError, AttributeError):
        beside = False
    if not beside:
        raise UserError(f"{index}: is no index of weights beside it (weight_map: key → file)")
    parts = [read(index.with_name(name)) for name in sorted(names)]
    return {"model": {key: value for part in parts for key, value in part.get("model", part).items()}}


def _without_objects(value: Any, done: dict[int, Any]) -> Any:
    """``value`` with the lists and dicts in it, each made once however often it is referred to."""
    if isinstance(value, dict | list) and id(value) not in done:
        if isinstance(value, dict):
            items = [(k, v) for k, v in value.items() if not (_is_object(k) or _is_object(v))]
            done[id(value)] = {k: _without_objects(v, done) for k, v in items}
        else:
            done[id(value)] = [_without_objects(v, done) for v in value if not _is_object(v)]
    return done.get(id(value), value)


def _is_object(value: object) -> bool:
    return isinstance(value, _Object) or value is _Object


def _holds_tensors(value: Any) -> bool:
    waiting, seen = [value], set[int]()
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            return True
        if isinstance(value, dict | list) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value
    return False


def read(path: str | Path) -> Contents:
    """The contents of a file of tensors, on the CPU; objects of other programs in it are left out.

    Raises:
        UserError: if it is missing, damaged, could run code, or holds no tensors, only objects.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: {no_file(path)}")
    try:
        if path.name.endswith(".index.json"):
            return _by_index(path)
        if path.suffix == ".safetensors":
            return _safetensors(path)
        foreign = vet(path)
        if foreign:
            contents = _without_objects(torch.load(path, "cpu", _NOTHING_RUNS, weights_only=False), {})
        else:
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except PermissionError:
        raise UserError(f"{path}: cannot be read (permission denied)") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # a damaged file can make the readers stumble anywhere
        with path.open("rb") as file:
            known = nature(file.read(64))
        reason = known or f"is damaged or no file of tensors ({type(error).__name__}); use another"
        raise UserError(f"{path}: {reason}") from None
    if foreign and not _holds_tensors(contents):
        raise UserError(
            f"{path}: holds no tensors, only objects ({printable(foreign[0][:80])}), which could run code: refused; "
            "save the network's state_dict() instead"
        )
    if not isinstance(contents, dict):
        raise UserError(f"{path}: holds a {type(contents).__name__}, not a checkpoint")
    return contents
