"""Files of weights, whole and damaged, and how they are read: nothing in them may be looked up or run."""

import contextlib
import io
import json
import os
import pickletools
import random
import struct
import sys
import zipfile
from argparse import Namespace
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from damage import NUMBERS, Kind, damaged, take_all

GLOBALS = (
    *("builtins eval", "builtins exec", "builtins getattr", "builtins __import__", "os system", "posix system"),
    *(
        "torch load",
        "torch.hub load",
        "torch.storage _load_from_bytes",
        "torch.jit load",
        "numpy load",
        "shutil rmtree",
    ),
    *(
        "torch FloatStorage",
        "torch DoubleStorage",
        "torch ByteStorage",
        "torch.nn.modules.linear Linear",
        "pathlib Path",
    ),
    *("collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch _utils._rebuild_tensor_v2", "torch Size"),
    *("torch.serialization load", "operator attrgetter", "functools partial", "pickle loads", "torch device"),
    *(
        "torch._utils _rebuild_parameter",
        "_codecs encode",
        "torch.FloatStorage from_file",
        "torch float32",
        "argparse N",
    ),
)
MAY_BE_LOOKED_UP = {
    *("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor", "torch._utils._rebuild_parameter"),
    *("torch.Size", "torch.device", "collections.OrderedDict", "_codecs.encode"),
}


class Settings:
    """An object of a training program, as it stands in files beside weights."""

    def __init__(self) -> None:
        self.rate, self.again = 0.1, self


def _weights() -> dict[str, bytes]:
    import torch
    from safetensors.torch import save

    from mocov3.models import build_backbone

    torch.manual_seed(0)
    state = {k: v for k, v in build_backbone("resnet10_w16").state_dict().items() if not k.startswith("fc.")}
    own = {"config": {"heads": 3, "image_size": 32, "view_preset": "photos"}, "origin": "here", "step": 1}
    contents = {
        "epoch": 1,
        "arch": "resnet10_w16",
        "mocov3": own,
        "state_dict": {f"module.{k}": state[k] for k in state},
    }
    wrapped = {
        "model": {"backbone": state},
        "arch": "resnet10_w16",
        "args": Namespace(lr=0.1, path=Path("x")),
        "hooks": [Settings(), (1, 2)],
    }
    few = {
        "net": dict(list(state.items())[:4]),
        "parameter": torch.nn.Parameter(torch.ones(2, 3)),
        "settings": Settings(),
    }
    # a file that is nearly all header: the tensors of a whole network leave few changes for the pickle
    made = {}
    for name, value, options in (
        ("own.pth.tar", contents, {}),
        ("wrapped.pth", wrapped, {}),
        ("few.pth", few, {"pickle_protocol": 4}),
        ("old.pth", few, {"_use_new_zipfile_serialization": False}),
    ):
        file = io.BytesIO()
        torch.save(value, file, **options)
        made[name] = file.getvalue()
    about = {
        "arch": "resnet10_w16",
        "config": json.dumps(own["config"]),
        "view": json.dumps({"mean": [0, 0, 0], "std": [1, 1, 1], "zoom": 1}),
    }
    return {**made, "a.safetensors": save(state, about), "b.safetensors": save(dict(list(state.items())[:3]))}


def _operations(data: bytes) -> list[bytes]:
    places = [at for _, _, at in pickletools.genops(data) if at is not None]
    return [data[a:b] for a, b in zip(places, [*places[1:], len(data)], strict=True)]


def _change_pickle(rng: random.Random, data: bytes) -> bytes:
    """Operations left out, moved, repeated; other names, numbers and calls put in."""
    if rng.random() < 0.2:
        return damaged(rng, data)
    parts = _operations(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, other = rng.randrange(len(parts)), rng.randrange(len(parts))
        named = "c" + rng.choice(GLOBALS).replace(" ", "\n") + "\n"
        what = rng.randrange(6)
        if what == 0:
            del parts[at]
        elif what == 1:
            parts.insert(at, parts[other])
        elif what == 2:
            parts[at], parts[other] = parts[other], parts[at]
        elif what == 3:
            globals_ = [i for i, part in enumerate(parts) if part[:1] == b"c"] or [at]
            parts[rng.choice(globals_)] = named.encode()
        elif what == 4:
            extra = (
                b"R",
                b"b",
                b"\x81",
                b"s",
                b"u",
                b"a",
                b"e",
                b"(",
                b"0",
                b"2",
                b"t",
                b"\x90",
                b"Q",
                b"\x93",
                b"\x8f",
            )
            parts.insert(at, rng.choice((named.encode(), *extra)))
        else:
            number = rng.choice(NUMBERS)
            parts[at] = rng.choice((b"J" + struct.pack("<I", number % 2**32), b"\x8a\x08" + struct.pack("<Q", number)))
        if not parts:
            return data
    return b"".join(parts)


def _oddly(rng: random.Random, value: Any) -> Any:
    """A copy of nested dicts and lists with one value, or name, that has no business there."""
    import torch

    odd = (
        None,
        True,
        0,
        -1,
        2.5,
        float("nan"),
        10**400,
        "",
        "x\n" * 9,
        "9" * 5000,
        b"x",
        [],
        {},
        [[1]],
        (1,),
        {"a": {}},
    )
    tensors = (torch.tensor(1.0), torch.ones(0, 3), torch.ones(1, 1, 1, 1), torch.ones(2, dtype=torch.bool))
    if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        return rng.choice((*odd, *tensors))
    if isinstance(value, list):
        at = rng.randrange(len(value))
        return [_oddly(rng, v) if i == at else v for i, v in enumerate(value)]
    at = rng.choice(list(value))
    if rng.random() < 0.2:
        return {rng.choice((0, None, "", "model", f"x.{at}")) if k == at else k: v for k, v in value.items()}
    return {k: _oddly(rng, v) if k == at else v for k, v in value.items()}


def _change_contents(rng: random.Random, data: bytes) -> bytes:
    import torch

    contents, file = torch.load(io.BytesIO(data), weights_only=False), io.BytesIO()
    for _ in range(rng.choice((1, 2, 3))):
        contents = _oddly(rng, contents)
    torch.save(contents, file)
    return file.getvalue()


def _change_weights(rng: random.Random, name: str, data: bytes) -> bytes:
    if rng.random() < 0.1:
        return damaged(rng, data)
    if name == "own.pth.tar":
        return _change_contents(rng, data)
    if name.endswith(".safetensors"):
        end = 8 + int.from_bytes(data[:8], "little")
        head = json.loads(data[8:end])
        about = {k: json.loads(v) if v[:1] == "{" else v for k, v in head.pop("__metadata__", {}).items()}
        about = _oddly(rng, about) if rng.random() < 0.5 else about
        if isinstance(about, dict):
            head["__metadata__"] = {
                k: v if isinstance(v, str) else json.dumps(v, default=str) for k, v in about.items()
            }
        head = _oddly(rng, head) if rng.random() < 0.3 else head
        text = json.dumps(head, default=str).encode()
        text = damaged(rng, text) if rng.random() < 0.2 else text
        return len(text).to_bytes(8, "little") + text + data[end:]
    if data[:2] != b"PK":
        places, file = [0], io.BytesIO(data)
        for _ in range(4):
            pickletools.genops(file)
            list(pickletools.genops(file))
            places.append(file.tell())
        begin, end = places[3], places[4]
        return data[:begin] + _change_pickle(rng, data[begin:end]) + data[end:]
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        for info in old.infolist():
            member = old.read(info)
            if info.filename.endswith("data.pkl"):
                member = _change_pickle(rng, member)
            elif rng.random() < 0.02:
                member = damaged(rng, member)
            new.writestr(info.filename, member)
    return target.getvalue()


def _read_weights(path: Path) -> None:
    from mocov3.weights import tensorfiles
    from mocov3.weights.convert import build_from, views_of
    from mocov3.weights.find import find_backbone
    from mocov3.weights.inspect import describe

    with _watched(path.parent):
        contents = tensorfiles.read(path)
    take_all(
        [
            lambda: build_from(contents, str(path), image_size=32),
            lambda: find_backbone(contents, str(path), momentum=True),
            lambda: describe(str(path)),
            lambda: views_of(contents, str(path)),
        ]
    )


_watched_folders: list[Path] = []


@contextlib.contextmanager
def _watched(folder: Path) -> Iterator[None]:
    """Meanwhile the process ends where something is looked up, run, or written outside of ``folder``."""
    _watched_folders.append(folder)
    try:
        yield
    finally:
        _watched_folders.clear()


def watch() -> None:
    """From now on end the process by what ``_watched`` says; and keep what is slow to make."""
    from mocov3.weights import locate

    locate._skeleton = cache(locate._skeleton)
    runs = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.", "socket.", "shutil.", "tempfile.")

    def event(name: str, arguments: tuple[Any, ...]) -> None:
        if not _watched_folders:
            return
        wrong = name.startswith(runs)
        if name == "pickle.find_class":
            found = ".".join(arguments)
            wrong = (found not in MAY_BE_LOOKED_UP and not found.startswith("torch.")) or found.count(".") > 2
        elif name == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            wrong = not str(arguments[0]).startswith(str(_watched_folders[0]))
        if wrong:
            os.write(2, f"has no business in a file of weights: {name} {arguments}\n".encode())
            os._exit(4)

    sys.addaudithook(event)


WEIGHTS = {"weights": Kind(_weights, _change_weights, _read_weights, 100)}
