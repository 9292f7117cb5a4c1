"""The walk through a pickle by which ``vetting`` judges a file of tensors: nothing in it is built."""

import builtins
import math
import pickletools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mocov3.errors import UserError, printable

_ITEM_BYTES = {
    "DoubleStorage": 8,
    "LongStorage": 8,
    "FloatStorage": 4,
    "IntStorage": 4,
    "HalfStorage": 2,
    "BFloat16Storage": 2,
    "ShortStorage": 2,
    "CharStorage": 1,
    "ByteStorage": 1,
    "BoolStorage": 1,
    "ComplexFloatStorage": 8,
    "ComplexDoubleStorage": 16,
}
_SYSTEM = (
    "os",
    "posix",
    "nt",
    "sys",
    "subprocess",
    "importlib",
    "runpy",
    "shutil",
    "socket",
    "pty",
    "ctypes",
    "pickle",
)
"""Modules whose names are in a file to do harm: nothing of it is read then."""


def is_plain(name: str) -> bool:
    """Whether a global is one that tensors and dicts are made by, and may be looked up."""
    module, _, last = name.rpartition(".")
    storage = module == "torch" and last in _ITEM_BYTES
    kind = module == "torch" and isinstance(getattr(torch, last, None), torch.dtype)
    return storage or kind or name in _CALLS


class _Global(NamedTuple):
    name: str


class _Storage(NamedTuple):
    items: int


class _Mark:
    pass


_MARK, _TENSOR, _CONTAINER, _FOREIGN, _OTHER = _Mark(), object(), object(), object(), object()
"""Stand-ins of the walk: nothing of the file is built, only what is needed to judge it."""

_Argument = str | bytes | int | float | None
_Operation = tuple[pickletools.OpcodeInfo, _Argument, int | None]


class Walk:
    """Walks one pickle on a stack of stand-ins and refuses what has no business in a file of tensors.

    Args:
        path: for messages.
        size: of the file, in bytes.
        stored: bytes of the storage of a key, −1 if there is none.
    """

    def __init__(self, path: Path, size: int, stored: Callable[[str], int]) -> None:
        self.path, self.size, self.stored = path, size, stored
        self.stack: list[Any] = []
        self.memo: dict[_Argument, Any] = {}
        self.foreign: list[str] = []
        """Names of what other programs have put in."""
        self.storages: dict[str, int] = {}
        """Key → bytes."""
        self._kinds: dict[str, tuple[_Global, int]] = {}

    def run(self, operations: Iterator[_Operation]) -> Any:
        """Walk to the end; returns the stand-in of what the pickle holds."""
        for opcode, argument, _ in operations:
            name = opcode.name
            if handler := getattr(self, f"_{name.lower()}", None):
                handler(argument)
            elif name in _SCALARS:
                self.stack.append(argument if isinstance(argument, str | int | float) else _OTHER)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name in _PUTS:
                place = len(self.memo) if argument is None else argument
                if isinstance(place, int) and place > 2 * len(self.memo) + _SPARE:
                    raise UserError(f"{self.path}: is damaged (its pickle skips {place} numbers); use another")
                self.memo[place] = self.stack[-1]
            elif name in _GETS:
                self.stack.append(self.memo[argument])
            elif name not in _SILENT:
                self.refuse(f"the pickle operation {name}")
        if len(self.stack) != 1:
            raise ValueError("unbalanced pickle")
        return self.stack[0]

    def refuse(self, what: str) -> None:
        """Raise a UserError that says what the file holds."""
        raise UserError(
            f"{self.path}: holds {what}, which could run code or is no tensor, number, string, list or dict; refused"
        )

    def _since_mark(self) -> list[Any]:
        values: list[Any] = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def _mark(self, _: _Argument) -> None:
        self.stack.append(_MARK)

    def _tuple(self, _: _Argument) -> None:
        self.stack.append(tuple(self._since_mark()))

    def _tuple1(self, _: _Argument, count: int = 1) -> None:
        values = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.stack.append(values)

    def _tuple2(self, _: _Argument) -> None:
        self._tuple1(_, 2)

    def _tuple3(self, _: _Argument) -> None:
        self._tuple1(_, 3)

    def _pop(self, _: _Argument) -> None:
        self.stack.pop()

    def _empty_list(self, _: _Argument) -> None:
        self.stack.append([])

    def _append(self, _: _Argument) -> None:
        self._extend([self.stack.pop()])

    def _appends(self, _: _Argument) -> None:
        self._extend(self._since_mark())

    def _extend(self, values: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1] += values

    def _additems(self, _: _Argument) -> None:
        self._check_keys(self._since_mark())

    def _setitem(self, _: _Argument) -> None:
        self._check_keys([self.stack[-2]])
        del self.stack[-2:]

    def _setitems(self, _: _Argument) -> None:
        self._check_keys(self._since_mark()[::2])

    def _check_keys(self, keys: list[Any]) -> None:
        for key in keys:  # hashing a deeply nested key would overflow the stack
            if not (key is None or key is _FOREIGN or isinstance(key, str | int | float)):
                self.refuse("a dict whose keys are no strings or numbers")

    def _build(self, _: _Argument) -> None:
        self.stack.pop()
        if (
            self.stack[-1] is not _CONTAINER and self.stack[-1] is not _FOREIGN
        ):  # an ordered dict's own attributes are all that torch writes
            self.refuse("an object with a state of its own")

    def _global(self, argument: str) -> None:
        self._found(argument.replace(" ", "."))

    def _stack_global(self, _: _Argument) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            self.refuse("a name that is no text")
        self._found(f"{module}.{name}")

    def _found(self, name: str) -> None:
        if is_plain(name):
            self.stack.append(_Global(name))
            return
        module, _, last = name.rpartition(".")
        function = module in ("builtins", "__builtin__") and not isinstance(getattr(builtins, last, None), type)
        if function or module.split(".")[0] in _SYSTEM or module.startswith("torch._"):  # tensors of other kinds
            self.refuse(printable(name[:80]))
        self.foreign.append(name)
        self.stack.append(_FOREIGN)

    def _binpersid(self, _: _Argument) -> None:
        reference = self.stack.pop()
        if not isinstance(reference, tuple) or len(reference) < 5:  # old files refer so to the code of a module
            self.refuse("a reference to something outside")
        what, kind, key, _location, items, *view = reference
        known = isinstance(kind, _Global) and isinstance(items, int) and isinstance(key, str) and key.isascii()
        if what != "storage" or not known or view not in ([], [None]):
            self.refuse("a reference to something outside")
        size = items * _ITEM_BYTES[kind.name.rpartition(".")[2]]
        # of several references to a storage torch reads the first
        if items < 0 or size > self.stored(key) or self._kinds.setdefault(key, (kind, items)) != (kind, items):
            raise UserError(f"{self.path}: claims a tensor larger than what is stored; it is damaged or forged")
        self.storages[key] = size
        self.stack.append(_Storage(items))

    def _newobj(self, _: _Argument) -> None:
        _arguments, kind = self.stack.pop(), self.stack.pop()
        if kind is not _FOREIGN:
            self.refuse("an object")
        self.stack.append(_FOREIGN)

    def _reduce(self, _: _Argument) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if function is _FOREIGN:
            self.stack.append(_FOREIGN)
            return
        if not isinstance(function, _Global) or function.name not in _CALLS or not isinstance(arguments, tuple):
            self.refuse("a call")
        self.stack.append(_CALLS[function.name](self, arguments))

    def tensor(self, arguments: tuple[Any, ...]) -> Any:
        """A tensor over a storage: must lie within it."""
        storage, offset, sizes, strides = arguments[:4]
        numbers = (offset, *sizes, *strides)
        if not isinstance(storage, _Storage) or not all(isinstance(n, int) and n >= 0 for n in numbers):
            self.refuse("a tensor without a storage")
        last = offset + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
        if 0 not in sizes and (last >= storage.items or math.prod(sizes) > self.size):  # of one item, by strides of 0
            raise UserError(f"{self.path}: claims a tensor larger than what is stored; it is damaged or forged")
        return _TENSOR

    def ordered(self, arguments: tuple[Any, ...]) -> Any:
        """An ordered dict, maybe of a list of its pairs, as Python 2 wrote it."""
        pairs = arguments[0] if arguments and arguments[0] is not _CONTAINER else []
        if not isinstance(pairs, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
            self.refuse("an ordered dict that is not made of pairs")
        self._check_keys([pair[0] for pair in pairs])
        return _CONTAINER

    def encoded(self, arguments: tuple[Any, ...]) -> Any:
        """Bytes, as protocol 2 writes them."""
        if len(arguments) != 2 or not isinstance(arguments[0], str) or arguments[1] not in ("latin1", "latin-1"):
            self.refuse("text in another encoding")
        return _OTHER


_CALLS: dict[str, Callable[[Walk, tuple[Any, ...]], Any]] = {
    "torch._utils._rebuild_tensor_v2": Walk.tensor,
    "torch._utils._rebuild_tensor": Walk.tensor,
    "torch._utils._rebuild_parameter": lambda _, arguments: arguments[0],
    "torch.Size": lambda _, arguments: arguments[0],
    "torch.device": lambda *_: _OTHER,
    "collections.OrderedDict": Walk.ordered,
    "_codecs.encode": Walk.encoded,
}
_CONSTANTS = {
    "EMPTY_DICT": _CONTAINER,
    "EMPTY_TUPLE": (),
    "EMPTY_SET": _CONTAINER,
    "NEWTRUE": True,
    "NEWFALSE": False,
    "NONE": None,
}
_SCALARS = (
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "LONG4",
    "INT",
    "LONG",
    "BINFLOAT",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
    "SHORT_BINSTRING",
    "BINSTRING",
    "SHORT_BINBYTES",
    "BINBYTES",
)
_SPARE = 1000
"""Numbers that a memo may skip: Python's unpickler makes an array of as many as the largest."""
_PUTS = ("BINPUT", "LONG_BINPUT", "MEMOIZE")
_GETS = ("BINGET", "LONG_BINGET")
_SILENT = ("PROTO", "STOP", "FRAME")
