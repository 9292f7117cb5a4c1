"""Processes for the tests that start at once: forked from one that has imported torch already (Linux only).

Importing torch takes two core-seconds and more, and tests start this program some hundred times. ``start`` asks a
helper, one for each process of pytest, to fork. What comes is a real process: it has its own id, session, signal
handlers, environment, folder and files, it imports the program itself, and it ends as Python ends. What it shares with
the others is the hash seed of strings, and what the libraries read from the environment while they were loaded.

A real start it is wherever that could matter (``forkable``), in ``make soak`` and under ``MOCOV3_REAL_STARTS=1``.
"""

import contextlib
import gc
import importlib
import json
import os
import pickle
import re
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).parent
ROOT = HERE.parent
LIBRARIES = (
    "torch._dynamo",  # every optimizer imports it
    "torch.distributed.fsdp",
    "torch.utils.serialization",
    "torchvision",
    "torch.utils.tensorboard",
    "tensorboard.compat.proto.event_pb2",
    "cv2",
    "simplejpeg",
    "PIL.Image",
    "PIL.JpegImagePlugin",
    "PIL.PngImagePlugin",
    "timm",
    "safetensors.torch",
    "jaxtyping",
    "rich.console",
    "yaml",
)
"""What the program imports from others; nothing of the program itself."""
_READ_WHILE_LOADED = re.compile(
    r"(OMP|GOMP|KMP|MKL|ATEN|DNNL|ONEDNN|OPENBLAS|TORCH|PYTORCH|(CUDA|HIP)(?!_VISIBLE_DEVICES)|LD|PYTHON|LC)_?|LANG$"
)


class Started:
    """A started process: what of ``subprocess.Popen`` the tests use, its output in files."""

    def __init__(
        self,
        argv: Sequence[str],
        *,
        cwd: str | Path | None = None,
        env: dict[str, str] | None = None,
        merged: bool = False,
        beside: "Started | None" = None,
    ) -> None:
        """Start ``argv`` in a process group of its own.

        ``merged`` output is all in one file; ``beside`` is a process into whose files it writes.
        """
        # appended to, since reading here moves the place where the process would write
        if beside is None:
            self._files = [tempfile.TemporaryFile("a+") for _ in range(1 if merged else 2)]  # noqa: SIM115
        else:
            self._files = beside._files
        environment = dict(os.environ if env is None else env)
        out, err = self._files[0], self._files[-1]
        self.returncode: int | None = None
        self._popen: subprocess.Popen[str] | None = None
        self._server: _Server | None = None
        if forkable(argv, environment):
            self._server = _Server.running()
            self.pid = self._server.fork(argv, str(cwd or os.getcwd()), environment, out, err)
            self._end = os.pidfd_open(self.pid)
        else:
            self._popen = subprocess.Popen(
                argv, cwd=cwd, env=environment, stdout=out, stderr=err, start_new_session=True
            )
            self.pid = self._popen.pid

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Exit code at its end.

        Raises:
            subprocess.TimeoutExpired: if it does not come in time.
        """
        if self.returncode is None and self._popen is not None:
            self.returncode = self._popen.wait(timeout)
        elif self.returncode is None:
            assert self._server is not None
            if not select.select([self._end], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            self.returncode = self._server.reap(self.pid)
            os.close(self._end)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def text(self, index: int = 0) -> str:
        """Its output so far (0), or what it wrote on standard error (-1)."""
        self._files[index].seek(0)
        return self._files[index].read()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Output and errors at its end.

        Raises:
            subprocess.TimeoutExpired: if it does not come in time.
        """
        self.wait(timeout)
        return self.text(), self.text(-1)


def run(
    argv: Sequence[str], *, cwd: str | Path | None = None, env: dict[str, str] | None = None, timeout: float = 120
) -> "subprocess.CompletedProcess[str]":
    """``subprocess.run`` with its output as text."""
    process = Started(argv, cwd=cwd, env=env)
    try:
        out, err = process.communicate(timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(argv, process.wait(), out, err)


def forkable(argv: Sequence[str], environment: dict[str, str]) -> bool:
    """Whether a fork does what this start would: this Python, a program, and the same settings of the libraries."""
    if not sys.platform.startswith("linux") or os.environ.get("MOCOV3_SOAK") or os.environ.get("MOCOV3_REAL_STARTS"):
        return False

    def settings(variables: dict[str, str]) -> dict[str, str]:
        return {k: v for k, v in variables.items() if _READ_WHILE_LOADED.match(k)}

    is_program = len(argv) > 1 and argv[0] == sys.executable and (argv[1] in ("-m", "-c") or argv[1].endswith(".py"))
    return is_program and settings(environment) == settings({**os.environ, "PYTHONPATH": str(ROOT)})


def start_ranks(argv: Sequence[str], size: int, *, env: dict[str, str]) -> list[Started]:
    """Start ``argv`` so many times, as torchrun does; all write into the files of the first."""
    from mocov3.distributed import free_loopback_address  # not above: the helper imports nothing of the program

    address, port = free_loopback_address().removeprefix("tcp://").split(":")
    ranks: list[Started] = []
    for rank in map(str, range(size)):
        given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
        environment = {**env, **given, "MASTER_ADDR": address, "MASTER_PORT": port}
        ranks.append(Started(argv, env=environment, merged=True, beside=ranks[0] if ranks else None))
    return ranks


def launch_ranks(task: Callable[[Any, Any], int], payload: Any, processes: int) -> int:
    """``mocov3.distributed.launch`` on so many CPU processes that are started at once.

    Raises:
        AssertionError: if a rank fails, with what all of them said.
    """
    from mocov3.distributed import launch

    places = [str(HERE), str(Path(task.__code__.co_filename).parent)]
    code = (
        f"import pickle, sys; sys.path[:0] = {places!r}; from mocov3.distributed import launch; "
        f"task, payload = pickle.loads({pickle.dumps((task, payload))!r}); "
        "sys.exit(launch(task, payload, device='cpu'))"
    )
    argv = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if processes == 1 or not forkable(argv, environment):
        return launch(task, payload, device="cpu", processes=processes)
    ranks = start_ranks(argv, processes, env=environment)
    try:
        codes = [rank.wait(290) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert not any(codes), f"exit codes {codes}:\n{ranks[0].text()}"
    return 0


class _Server:
    """The helper that forks, as its client sees it."""

    _running: "_Server | None" = None

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._popen = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                start_new_session=True,
            )

    @classmethod
    def running(cls) -> "_Server":
        """The one of this process."""
        if cls._running is None:
            cls._running = cls()
        return cls._running

    def fork(self, argv: Sequence[str], cwd: str, env: dict[str, str], out: IO[str], err: IO[str]) -> int:
        """Start a program; its process id."""
        request = {"argv": list(argv[1:]), "cwd": cwd, "env": env}
        socket.send_fds(self._socket, [json.dumps(request).encode()], [out.fileno(), err.fileno()])
        return self._answer()

    def reap(self, pid: int) -> int:
        """Exit code of a process that ended."""
        self._socket.send(json.dumps({"reap": pid}).encode())
        return self._answer()

    def _answer(self) -> int:
        answer = self._socket.recv(1000)
        assert answer, "the process that starts others is gone"
        return int(answer)


def _serve(control: socket.socket) -> list[str]:
    """Fork and reap as asked; returns in every forked process, with its arguments."""
    while True:
        message, files, _, _ = socket.recv_fds(control, 1 << 20, 2)
        if not message:
            os._exit(0)
        request: dict[str, Any] = json.loads(message)
        if "reap" in request:
            control.send(str(os.waitstatus_to_exitcode(os.waitpid(request["reap"], 0)[1])).encode())
        elif os.fork() == 0:
            os.setsid()
            for number, file in zip((1, 2), files, strict=True):
                os.dup2(file, number)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.chdir(request["cwd"])
            os.environ.clear()
            os.environ.update(request["env"])
            control.send(str(os.getpid()).encode())  # from now on it may be killed, with its group
            control.close()
            for file in files:
                os.close(file)
            return request["argv"]
        else:
            for file in files:
                os.close(file)


def _become(argv: list[str]) -> None:
    """Run ``-m module …``, ``-c code …`` or ``script.py …`` as Python does."""
    import numpy as np

    np.random.seed()  # Python's own is seeded by the fork
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    kind, given = argv[0], argv[1:]
    if kind not in ("-m", "-c"):
        sys.argv, sys.path[0] = argv, str(Path(kind).resolve().parent)
        runpy.run_path(kind, run_name="__main__")
        return
    sys.path[0] = os.getcwd() if kind == "-m" else ""
    sys.argv = [kind, *given[1:]]
    if kind == "-m":
        runpy.run_module(given[0], run_name="__main__", alter_sys=True)
    else:
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(given[0], "<string>", "exec"), main.__dict__)


def load_libraries() -> None:
    """Import what the program imports from others."""
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    load_libraries()
    gc.collect()
    gc.freeze()  # so that no collection copies what is shared
    _become(_serve(socket.socket(fileno=int(sys.argv[1]))))


if __name__ == "__main__":
    _main()
