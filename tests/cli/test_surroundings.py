"""Standard streams that are closed, full or unread, signals of a terminal that goes, a folder that is gone."""

import os
import signal
import sys

import pytest
from killing import environment
from starting import Started

from mocov3.errors import stop_signals

pytestmark = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux")

STREAMS = {
    "closed": "[os.close(n) for n in (0, 1, 2)]; sys.stdin = sys.stdout = sys.stderr = None",
    "full": "[os.dup2(os.open('/dev/full', os.O_WRONLY), n) for n in numbers]",
    "unread": "r, w = os.pipe(); os.close(r); [os.dup2(w, n) for n in numbers]",
}


def go(before, *argv, numbers=(1, 2)):
    """Exit code and standard error of the program after ``before`` was done to its process."""
    code = f"import os, sys; numbers = {numbers}; {before}; from mocov3.cli import main; sys.exit(main())"
    process = Started([sys.executable, "-c", code, *map(str, argv)], env=environment())
    try:
        return process.wait(120), process.text(-1)
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("stream", "expected", "said"),
    [
        ("closed", 0, ""),
        ("full", 2, "mocov3: error: standard output: cannot be written (No space left on device)\n"),
        ("unread", 128 + 13, ""),  # as of a process that SIGPIPE ended
    ],
)
def test_output_that_is_the_result(stream, expected, said):
    assert go(STREAMS[stream], "--version", numbers=(1,)) == (expected, said)


def test_training_goes_on(images, tmp_path):
    argv = "pretrain --recipe defaults -a resnet10_w16 --image-size 16 -b 32 --epochs 1 --warmup-epochs 0 --moco-dim 8"
    argv += f" --moco-mlp-dim 8 --logger none -j 1 --device cpu --output-dir {tmp_path / 'o'}"
    streams = f"os.close(0); {STREAMS['unread']}; numbers = (2,); {STREAMS['full']}"
    assert go(streams, *argv.split(), images, numbers=(1,)) == (0, "")
    assert (tmp_path / "o" / "checkpoint_0000.pth.tar").exists()


def test_a_folder_that_is_gone(tmp_path):
    (tmp_path / "gone").mkdir()
    code, said = go(f"os.chdir({str(tmp_path / 'gone')!r}); os.rmdir(os.getcwd())", "knn", tmp_path)
    assert (code, said) == (2, "mocov3: error: the current folder was removed; change to one that exists\n")


def test_a_hang_up_stops_unless_it_is_ignored():
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert signal.SIGHUP in stop_signals()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        assert stop_signals() == [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGHUP, before)
