"""Files of tensors are vetted before torch sees them: nothing in them may run code or claim what it does not hold.

The zip archive must be whole (every member stored, no larger than the file, its CRC-32 right), and the pickle in it
is walked by an interpreter that knows only tensors, numbers, strings, lists and dicts. Objects of other classes, as
training programs store beside weights, are named: whoever loads the file puts nothing in their place. Functions of the
interpreter and the system are refused by name, and so is a tensor that claims more than its storage holds. Files of
torch before 1.6 (no archive, no checksums) are vetted alike.
"""

import contextlib
import os
import pickletools
import tarfile
import zipfile
from pathlib import Path
from typing import IO, Any

from mocov3.errors import UserError, printable
from mocov3.weights.walk import Walk

_CHUNK = 4 << 20
_LOCAL = b"PK\3\4"  # how an archive begins
_ENDS = 22 + 20 + 56  # bytes of the records at the end of an archive
_FOLDER = 0x10  # of DOS's attributes, which no checksum covers: for a folder torch's reader fills nothing in
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
        if file.read(2) == _LOCAL[:2]:
            return _vet_archive(file, path, size)
        file.seek(0)
        return _vet_legacy(file, path, size)


def _vet_archive(file: IO[bytes], path: Path, size: int) -> list[str]:
    try:
        _check_ends(file, size)
        with zipfile.ZipFile(file) as archive:
            members: dict[str, int] = {}
            for info in archive.infolist():
                _, _, name = info.orig_filename.partition("/")  # below the archive's own name
                stored = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
                folder = info.external_attr & _FOLDER or name.endswith("/")
                plain = name.isascii() and name.isprintable() and name.lower() not in members
                if not stored or info.flag_bits & 1 or folder or not plain:
                    raise UserError(f"{path}: holds {printable(info.filename)!r}, which torch does not write; refused")
                members[name.lower()] = info.file_size  # for torch's reader X and x are one
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
    vetter = Walk(path, size, lambda key: members.get(f"data/{key}".lower(), -1))
    vetter.run(pickletools.genops(pickled))
    return vetter.foreign


def _check_ends(file: IO[bytes], size: int) -> None:
    """Refuse an archive in which two readers could find two directories: torch's reader is another than Python's.

    As torch writes it, the archive begins with the file, the directory ends where its end is recorded, and that record
    ends the file; of large archives there is a second record before, whose place is told where it is.
    """
    file.seek(0)
    begins = file.read(4) == _LOCAL
    file.seek(-min(size, _ENDS), os.SEEK_END)
    ends = file.read()
    end, wide, place = ends[-22:], ends[-98:-42], size - 22
    length, start = int.from_bytes(end[12:16], "little"), int.from_bytes(end[16:20], "little")
    if ends[-42:-38] == b"PK\6\7":
        place = size - 98
        told = int.from_bytes(ends[-34:-26], "little") == place and wide[:4] == b"PK\6\6"
        length, start = int.from_bytes(wide[40:48], "little"), int.from_bytes(wide[48:56], "little")
    else:
        told = True
    if not (begins and told and end[:4] == b"PK\5\6" and end[20:] == bytes(2) and start + length == place):
        raise zipfile.BadZipFile


def _vet_legacy(file: IO[bytes], path: Path, size: int) -> list[str]:
    with contextlib.suppress(tarfile.TarError), tarfile.open(fileobj=file, mode="r:"):
        raise UserError(f"{path}: is in torch's format of 2016 (tar), which is not read; refused")
    file.seek(0)
    bounded: Any = _Bounded(file, size)
    for _ in range(_LEGACY_HEADER):
        Walk(path, size, lambda _: -1).run(pickletools.genops(bounded))
    vetter = Walk(path, size, lambda _: size)
    vetter.run(pickletools.genops(bounded))
    keys = Walk(path, size, lambda _: -1).run(pickletools.genops(bounded))
    if not isinstance(keys, list) or {*keys} != {*vetter.storages} or sum(vetter.storages.values()) > size:
        raise UserError(f"{path}: claims tensors that are not stored; it is damaged or forged")
    return vetter.foreign


class _Bounded:
    """A file that is never asked for more than it has: asked for 2⁶² bytes, Python's own takes memory for them."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file, self.size = file, size
        self.readline, self.tell = file.readline, file.tell

    def read(self, count: int) -> bytes:
        return self.file.read(max(min(count, self.size - self.file.tell()), 0))
