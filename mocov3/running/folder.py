"""A run's folder has one owner: the main rank holds a lock on it while the run lives.

The system releases the lock when the process dies, however it dies, so that a resume starts at once. Where a file
system refuses locks, a lease takes its place: a file that is renewed every ``RENEWED`` seconds, and free once nobody
has renewed it for ``EXPIRES``.
"""

import contextlib
import errno
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from mocov3.distributed import World
from mocov3.errors import UserError
from mocov3.metrics import JsonLine
from mocov3.output.log import warn

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK, LINCLS_LOCK = ".mocov3.lock", ".mocov3-lincls.lock"
"""Linear evaluation has files of its own, and may run in the folder of a run that is still training."""
RENEWED, EXPIRES = 10.0, 30.0
"""Seconds between renewals of a lease, and after which it is free."""
_SETTLED = 0.2  # seconds in which of several that write a lease at once the last one shows


class Owner:
    """This process as the owner of a folder."""

    _lost = False

    def check(self) -> None:
        """Refuse to continue in a folder that another process took, as it may where a lease was not renewed in time.

        Raises:
            UserError: if it did.
        """
        if self._lost:
            raise UserError("another run took the folder while this process stood still; this one ends")

    def release(self) -> None:
        """Give the folder up."""


@contextlib.contextmanager
def owned(world: World, folder: str | Path, flag: str = "--output-dir", name: str = LOCK) -> Iterator[Owner]:
    """Hold ``folder`` for this run, on the main rank for all.

    Args:
        world: this rank; all call this.
        folder: made where it is missing.
        flag: by which the user named it.
        name: of the lock's file; runs of the same name exclude each other.

    Raises:
        UserError: on every rank, naming host and process of a run that holds it, or why it cannot be written.
    """
    owner, refusal = Owner(), ""
    if world.main:
        try:
            owner = take(Path(folder), flag, name)
        except UserError as error:
            refusal = str(error)
    try:
        if refusal := world.broadcast(refusal):
            raise UserError(refusal)
        yield owner
    finally:
        owner.release()


def take(folder: Path, flag: str = "--output-dir", name: str = LOCK) -> Owner:
    """Make this process the owner of ``folder``.

    Raises:
        UserError: naming host and process of the owner, or why the folder cannot be written.
    """
    path = folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if fcntl is not None:
            return _Lock(path, flag)
    except _NoLocks as reason:
        warn(f"{flag} {folder}: its file system has no locks ({reason}); the folder is held by a lease instead")
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot be written ({error.strerror or error})") from None
    try:
        return _Lease(path, flag)
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot be written ({error.strerror or error})") from None


class _NoLocks(Exception):
    """Why a file system refuses locks."""


class _Lock(Owner):
    """By ``flock``, on a file that names the owner."""

    def __init__(self, path: Path, flag: str) -> None:
        self._path = path
        while True:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._file)
                raise UserError(_refusal(path, flag)) from None
            except OSError as error:
                os.close(self._file)
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise UserError(_refusal(path, flag)) from None
                raise _NoLocks(error.strerror or error) from None
            if self._is_current():
                break
            os.close(self._file)  # its owner has removed it between opening and locking: there is another
        os.truncate(self._file, 0)
        os.write(self._file, json.dumps(_about()).encode())

    def _is_current(self) -> bool:
        with contextlib.suppress(OSError):
            return os.path.samestat(os.fstat(self._file), os.stat(self._path))
        return False

    def release(self) -> None:
        """Remove the file, then its lock."""
        if self._file >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = -1


class _Lease(Owner):
    """By a file that is renewed while the process lives."""

    def __init__(self, path: Path, flag: str) -> None:
        self._path, self._token = path, secrets.token_hex(8)
        about = _read(path)
        if about and _age(path) < EXPIRES and not _is_dead(about):
            raise UserError(f"{_refusal(path, flag)} (after a lost machine: in {EXPIRES:.0f} seconds)")
        partial = path.with_name(f"{path.name}.{self._token}")
        partial.write_text(json.dumps({**_about(), "token": self._token}))
        os.replace(partial, path)
        time.sleep(_SETTLED)
        if not self._is_mine():
            raise UserError(_refusal(path, flag))
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def _is_mine(self) -> bool:
        return _read(self._path).get("token") == self._token

    def _renew(self) -> None:
        while not self._ended.wait(RENEWED):
            with contextlib.suppress(OSError):  # a file system that is away for a moment
                if not self._is_mine():
                    self._lost = True
                    return
                os.utime(self._path)

    def release(self) -> None:
        """Stop renewing, and remove the file."""
        if not self._ended.is_set():
            self._ended.set()
            self._thread.join(timeout=RENEWED)
            with contextlib.suppress(OSError):
                if self._is_mine():
                    self._path.unlink()


def _about() -> JsonLine:
    return {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}


def _read(path: Path) -> JsonLine:
    try:
        about = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}


def _refusal(path: Path, flag: str) -> str:
    about = _read(path)
    who = "another run"
    if about:
        who = f"process {about.get('process')} on {about.get('host')} (since {about.get('since')})"
    return f"{flag} {path.parent}: {who} is training there; wait for it, stop it, or name another folder"


def _age(path: Path) -> float:
    """Seconds since the file was renewed, by the clock of its file system: machines differ by theirs."""
    probe = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    probe.touch()
    try:
        return probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return EXPIRES
    finally:
        probe.unlink(missing_ok=True)


def _is_dead(about: JsonLine) -> bool:
    """Whether the owner was a process of this machine that is gone."""
    if about.get("host") != socket.gethostname() or not isinstance(about.get("process"), int):
        return False
    try:
        os.kill(about["process"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
