"""The report of a running run (``--report-every``), made by a process of its own, so that nothing there harms the run.

It reads the run's folder as anybody would: metrics and the newest checkpoint on the disk. It runs on one CPU core,
starts no second time while it is at work, and a failure is a warning.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mocov3.output.log import warn
from mocov3.pretraining.log import PretrainingLog

_LONGEST = 900.0  # seconds that the end of a run waits for its page
_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class ReportProcess:
    """Pages of one run; does nothing on ranks that do not write, or without ``every``.

    Args:
        folder: the run's.
        every: epochs between pages; 0: none.
        active: whether this rank writes.
        log: where the last page is told.
    """

    def __init__(self, folder: Path, every: int, log: PretrainingLog, *, active: bool) -> None:
        self.folder, self.every, self.log = folder, every if active else 0, log
        self._process: subprocess.Popen[bytes] | None = None
        self._output: Any = None

    def epoch_ended(self, done: int) -> None:
        """Begin a page where due; of what is on the disk by now."""
        if self.every and done % self.every == 0 and self._ended():
            self._start()

    def finish(self) -> None:
        """Make the last page, of everything that was written, and wait for it."""
        if not self.every:
            return
        self._wait()
        self._start()
        if self._wait():
            self.log.say(f"report: {self.folder / 'report.html'}")

    def close(self) -> None:
        """Terminate what is still running."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._tidy()

    def _start(self) -> None:
        environment = {k: v for k, v in os.environ.items() if k not in _RANKS and not k.startswith("TORCHELASTIC")}
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "mocov3", "report", str(self.folder), "--device", "cpu", "--quiet"]
        try:
            self._output = tempfile.TemporaryFile()  # noqa: SIM115 (read when the process has ended)
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._output, env=environment
            )
        except OSError as error:
            warn(f"report.html could not be made ({error.strerror or error}); the run continues")
            self._tidy()

    def _ended(self) -> bool:
        """Whether none is at work; a warning if the last one failed."""
        if self._process is None:
            return True
        if self._process.poll() is None:
            return False
        self._succeeded()
        return True

    def _wait(self) -> bool:
        if self._process is None:
            return False
        try:
            self._process.wait(_LONGEST)
        except subprocess.TimeoutExpired:
            self.close()
            warn(f"report.html took longer than {_LONGEST / 60:.0f} minutes and was cancelled; mocov3 report makes it")
            return False
        return self._succeeded()

    def _succeeded(self) -> bool:
        assert self._process is not None
        code = self._process.returncode
        if code:
            self._output.seek(0)
            said = self._output.read()[-2000:].decode(errors="replace").strip().splitlines() or [f"exit code {code}"]
            warn(f"report.html could not be made ({said[-1].removeprefix('mocov3: error: ')}); the run is not affected")
        self._tidy()
        return code == 0

    def _tidy(self) -> None:
        self._process = None
        if self._output is not None:
            self._output.close()
            self._output = None
