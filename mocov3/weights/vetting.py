"""Files of tensors are vetted before torch sees them: nothing in them may run code or claim what it does not hold.

The zip archive must be whole (every member stored, no larger than the file, its CRC-32 right), and the pickle in it
is walked by an interpreter that knows only tensors, numbers, strings, lists and dicts. Objects of other classes, as
training programs store beside weights, are named: whoever loads the file puts nothing in their place. Functions of the
interpreter and the system are refused by name, and so is a tensor that claims more than its storage holds. Files of
torch before 1.6 (no archive, no checksums) are vetted alike.
"""

import builtins
import os
import pickletools
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from mocov3.errors import UserError, printable

_CHUNK = 4 << 20
_FOLDER = 0x10  # of DOS's attributes, which no checksum covers: for a folder torch's reader fills nothing in
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
_LEGACY_HEADER = 3  # magic number, protocol, facts of the system: a pickle each, before the one that counts


def vet(path: Path) -> list[str]:
    """Refuse a file that is damaged, or holds what could run code or claim memory that it does not fill.

    Returns:
        Names of the classes and functions of other programs in it: none of them may be looked up.

    Raises:
        UserError: saying which.
        Exception: whatever the readers raise on bytes that are no such file.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise UserError(f"{path}: is empty")
        if file.read(2) == b"PK":
            return _vet_archive(file, path, size)
        file.seek(0)
        return _vet_legacy(file, path, size)


def is_plain(name: str) -> bool:
    """Whether a global is one that tensors and dicts are made by, and may be looked up."""
    module, _, last = name.rpartition(".")
    storage = module == "torch" and last in _ITEM_BYTES
    kind = module == "torch" and isinstance(getattr(torch, last, None), torch.dtype)
    return storage or kind or name in _CALLS


def _vet_archive(file: IO[bytes], path: Path, size: int) -> list[str]:
    try:
        with zipfile.ZipFile(file) as archive:
            members = {}
            for info in archive.infolist():
                _, _, name = info.filename.partition("/")  # below the archive's own name
                stored = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
                if not stored or info.flag_bits & 1 or info.external_attr & _FOLDER or name in members:
                    raise UserError(f"{path}: holds {printable(info.filename)!r}, which torch does not write; refused")
                members[name] = info.file_size
            if sum(members.values()) > size:
                raise UserError(f"{path}: claims more bytes than it has; refused")
            if "data.pkl" not in members or "constants.pkl" in members:
                raise UserError(f"{path}: is an archive, but not one of tensors")
            pickled = b""
            for info in archive.infolist():
                with archive.open(info) as member:  # reading to the end compares the CRC-32
                    if info.filename.endswith("/data.pkl"):
                        pickled = member.read()
                    while member.read(_CHUNK):
                        pass
    except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError):
        raise UserError(f"{path}: is damaged or truncated (its checksums do not match); use another") from None
    return _Vetter(path, lambda key: members.get(f"data/{key}", -1)).run(pickletools.genops(pickled))


def _vet_legacy(file: IO[bytes], path: Path, size: int) -> list[str]:
    bounded: Any = _Bounded(file, size)
    for _ in range(_LEGACY_HEADER):
        _Vetter(path, lambda _: -1).run(pickletools.genops(bounded))
    return _Vetter(path, lambda _: size).run(pickletools.genops(bounded))


class _Bounded:
    """A file that is never asked for more than it has: asked for 2⁶² bytes, Python's own takes memory for them."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file, self.size = file, size
        self.readline, self.tell = file.readline, file.tell

    def read(self, count: int) -> bytes:
        return self.file.read(max(min(count, self.size - self.file.tell()), 0))


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


class _Vetter:
    """Walks one pickle on a stack of stand-ins and refuses what has no business in a file of tensors.

    Args:
        path: for messages.
        stored: bytes of the storage of a key, −1 if there is none.
    """

    def __init__(self, path: Path, stored: Callable[[str], int]) -> None:
        self.path, self.stored = path, stored
        self.stack: list[Any] = []
        self.memo: dict[_Argument, Any] = {}
        self.foreign: list[str] = []

    def run(self, operations: Iterator[_Operation]) -> list[str]:
        """Walk to the end; returns the names of what other programs have put in."""
        for opcode, argument, _ in operations:
            name = opcode.name
            if handler := getattr(self, f"_{name.lower()}", None):
                handler(argument)
            elif name in _SCALARS:
                self.stack.append(argument if isinstance(argument, str | int | float) else _OTHER)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name in _PUTS:
                self.memo[len(self.memo) if argument is None else argument] = self.stack[-1]
            elif name in _GETS:
                self.stack.append(self.memo[argument])
            elif name not in _SILENT:
                self.refuse(f"the pickle operation {name}")
        if len(self.stack) != 1:
            raise ValueError("unbalanced pickle")
        return self.foreign

    def refuse(self, what: str) -> None:
        raise UserError(
            f"{self.path}: holds {what}, which could run code or is no tensor, number, string, list or dict; refused"
        )

    def _since_mark(self) -> list[object]:
        values: list[object] = []
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

    def _append(self, _: _Argument) -> None:
        self.stack.pop()

    def _appends(self, _: _Argument) -> None:
        self._since_mark()

    _additems = _appends

    def _setitem(self, _: _Argument) -> None:
        self._check_keys([self.stack[-2]])
        del self.stack[-2:]

    def _setitems(self, _: _Argument) -> None:
        self._check_keys(self._since_mark()[::2])

    def _check_keys(self, keys: list[object]) -> None:
        for key in keys:  # hashing a deeply nested key would overflow the stack
            if not (key is None or key is _FOREIGN or isinstance(key, str | int | float)):
                self.refuse("a dict whose keys are no strings or numbers")

    def _build(self, _: _Argument) -> None:
        self.stack.pop()
        if self.stack[-1] not in (_CONTAINER, _FOREIGN):  # an ordered dict's own attributes are all that torch writes
            self.refuse("an object with a state of its own")

    def _global(self, argument: str) -> None:
        self._found(argument.replace(" ", "."))

    def _stack_global(self, _: _Argument) -> None:
        name = self.stack.pop()
        self._found(f"{self.stack.pop()}.{name}")

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
        what, kind, key, _location, items = reference[:5]
        if what != "storage" or not isinstance(kind, _Global) or not isinstance(items, int):
            self.refuse("a reference to something outside")
        item = _ITEM_BYTES[kind.name.rpartition(".")[2]]
        if items < 0 or items * item > self.stored(key):
            raise UserError(f"{self.path}: claims a tensor larger than what is stored; it is damaged or forged")
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

    def tensor(self, arguments: tuple[Any, ...]) -> object:
        """A tensor over a storage: must lie within it."""
        storage, offset, sizes, strides = arguments[:4]
        numbers = (offset, *sizes, *strides)
        if not isinstance(storage, _Storage) or not all(isinstance(n, int) and n >= 0 for n in numbers):
            self.refuse("a tensor without a storage")
        last = offset + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
        if 0 not in sizes and last >= storage.items:
            raise UserError(f"{self.path}: claims a tensor larger than what is stored; it is damaged or forged")
        return _TENSOR


_CALLS: dict[str, Callable[[_Vetter, tuple[Any, ...]], Any]] = {
    "torch._utils._rebuild_tensor_v2": _Vetter.tensor,
    "torch._utils._rebuild_tensor": _Vetter.tensor,
    "torch._utils._rebuild_parameter": lambda _, arguments: arguments[0],
    "torch.Size": lambda _, arguments: arguments[0],
    "torch.device": lambda *_: _OTHER,
    "collections.OrderedDict": lambda *_: _CONTAINER,
    "_codecs.encode": lambda *_: _OTHER,  # how protocol 2 writes bytes
}
_CONSTANTS = {
    "EMPTY_DICT": _CONTAINER,
    "EMPTY_LIST": _CONTAINER,
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
_PUTS = ("BINPUT", "LONG_BINPUT", "MEMOIZE")
_GETS = ("BINGET", "LONG_BINGET")
_SILENT = ("PROTO", "STOP", "FRAME")
