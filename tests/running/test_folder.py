"""A run's folder has one owner, on file systems with locks and without."""

import errno
import fcntl
import os
import socket
import subprocess
import sys

import pytest
import torch

from mocov3.distributed import World
from mocov3.errors import UserError
from mocov3.running import folder as folders
from mocov3.running.folder import LOCK, owned, take

ALONE = World(0, 1, torch.device("cpu"))


def test_an_owner_is_named_and_gives_the_folder_up(tmp_path):
    with owned(ALONE, tmp_path / "new") as owner:
        owner.check()
        with pytest.raises(UserError, match=f"--out .*process {os.getpid()} on {socket.gethostname()}"):
            take(tmp_path / "new", "--out")
    assert not list((tmp_path / "new").iterdir())
    with owned(ALONE, tmp_path / "new"):
        pass


def test_linear_evaluation_may_run_beside_a_training(tmp_path):
    training, evaluation = take(tmp_path), take(tmp_path, name=folders.LINCLS_LOCK)
    with pytest.raises(UserError):
        take(tmp_path, name=folders.LINCLS_LOCK)
    training.release()
    evaluation.release()
    assert not list(tmp_path.iterdir())


def test_a_lock_whose_file_was_removed_in_between_is_taken_again(tmp_path, monkeypatch):
    real, removed = fcntl.flock, []

    def slow(file, how):
        if not removed:  # the former owner removes its file after this process opened it
            removed.append((tmp_path / LOCK).unlink())
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", slow)
    owner = take(tmp_path)
    assert (tmp_path / LOCK).exists()
    with pytest.raises(UserError):
        take(tmp_path)
    owner.release()


@pytest.fixture
def no_locks(monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(folders, "_SETTLED", 0.01)


def of_another_machine(path):
    path.write_text(path.read_text().replace(socket.gethostname(), "another-machine"))


def test_without_locks_a_lease_is_said_once_and_refuses_a_second_run(no_locks, tmp_path, capsys):
    owner = take(tmp_path)
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(UserError, match=f"process {os.getpid()} on {socket.gethostname()}.*30 seconds"):
        take(tmp_path)
    owner.release()
    assert not list(tmp_path.iterdir())


def test_a_lease_is_renewed_while_its_process_lives(no_locks, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "RENEWED", 0.02)
    owner = take(tmp_path)
    os.utime(tmp_path / LOCK, (1, 1))
    for _ in range(500):
        if (tmp_path / LOCK).stat().st_mtime > 1:
            break
        owner._ended.wait(0.02)
    assert (tmp_path / LOCK).stat().st_mtime > 1
    owner.release()


def test_a_lease_that_nobody_renews_is_free_after_its_time(no_locks, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "RENEWED", 0.05)
    stood_still = take(tmp_path)
    stood_still._ended.set()
    stood_still._thread.join()
    of_another_machine(tmp_path / LOCK)
    with pytest.raises(UserError, match="another-machine"):
        take(tmp_path)
    before = (tmp_path / LOCK).stat().st_mtime - folders.EXPIRES - 1
    os.utime(tmp_path / LOCK, (before, before))
    other = take(tmp_path)
    stood_still._ended.clear()
    stood_still._renew()  # awake again: it finds the other, and ends
    with pytest.raises(UserError, match="another run"):
        stood_still.check()
    other.check()
    other.release()


def test_a_lease_of_a_process_of_this_machine_that_is_gone_is_free_at_once(no_locks, tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    lease = take(tmp_path)
    path = tmp_path / LOCK
    path.write_text(path.read_text().replace(str(os.getpid()), str(gone.pid)))
    take(tmp_path).release()
    lease.release()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        take(tmp_path / "file" / "run")
