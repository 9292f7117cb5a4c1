"""A run that was killed anywhere and resumed is the run that was never killed (docs/reliability.md)."""

import random
import sys

import pytest
import torch
from conftest import ROOT, TINY
from killing import Process, assert_same_run, difference, kill_until_done, steady
from trials import record, trials

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX process groups")
EPOCHS = trials(8, 12)
LAST = f"checkpoint_{EPOCHS - 1:04d}.pth.tar"


def command(images, *flags, program=("-m", "mocov3", "pretrain")):
    """A run of 32 steps (48 in make soak) that checkpoints every other step and goes on from what it finds."""

    def argv(folder):
        return [
            sys.executable,
            *program,
            str(images),
            *TINY,
            "--logger",
            "tensorboard",
            "--epochs",
            str(EPOCHS),
            "--checkpoint-every",
            "4",
            "--checkpoint-steps",
            "2",
            "--output-dir",
            str(folder),
            "--resume",
            "auto",
            "--quiet",
            *flags,
        ]

    return argv


def whole(images, folder, *flags):
    Process(command(images, *flags)(folder)).finish()
    return folder


def kill_many(command, folder, *, count, seed):
    """Runs that are killed six times each until ``count`` kills came; every one must end as the first."""
    rng = random.Random(seed)
    kills = writing = runs = 0
    while kills < count:
        report = kill_until_done(command, folder / str(runs), kills=min(6, count - kills), rng=rng, within=0.5)
        kills, writing, runs = kills + report.kills, writing + report.while_writing, runs + 1
        assert runs <= 2 + count, "runs end before they are killed"
    return kills, writing, [folder / str(i) for i in range(runs)]


def test_killed_and_resumed_is_never_killed(images, tmp_path):
    workers = [command(images, "-j", str(n)) for n in (0, 1, 2)]
    kills, writing, folders = kill_many(workers, tmp_path, count=trials(6, 200), seed=1)
    reference = whole(images, tmp_path / "whole")
    for folder in folders:
        assert_same_run(reference, folder, last=LAST)
    record(
        "SIGKILL at a random moment, resumed with 0, 1, 2 loader processes",
        kills,
        f"all {len(folders)} runs bit-equal to the run never killed; {writing} kills fell into a write",
    )


@pytest.fixture(scope="module")
def whole_of_two(images, tmp_path_factory):
    return whole(images, tmp_path_factory.mktemp("two") / "whole", "--nprocs-per-node", "2")


def test_killed_and_resumed_with_two_ranks(images, whole_of_two, tmp_path):
    two = command(images, "--nprocs-per-node", "2")
    kills, writing, folders = kill_many(two, tmp_path, count=trials(3, 80), seed=2)
    for folder in folders:
        assert_same_run(whole_of_two, folder, last=LAST)
    record("the same with 2 ranks", kills, f"all {len(folders)} runs bit-equal; {writing} kills fell into a write")


def test_own_images_killed_and_resumed(images, tmp_path):
    """Recipe auto chooses once: a resumed run takes what the first start chose, and judges as it did."""

    def auto(folder):
        return [
            sys.executable,
            "-m",
            "mocov3",
            "pretrain",
            str(images),
            *TINY,
            "--recipe",
            "auto",
            "--epochs",
            "9",
            "--hold-out",
            "16",
            "--quality-every",
            "3",
            "--checkpoint-steps",
            "2",
            "--output-dir",
            str(folder),
            "--resume",
            "auto",
            "--quiet",
        ]

    kills, _, folders = kill_many(auto, tmp_path, count=trials(2, 20), seed=5)
    Process(auto(tmp_path / "whole")).finish()
    for folder in folders:
        assert_same_run(tmp_path / "whole", folder, last="checkpoint_0008.pth.tar")
        assert steady(folder, "quality.jsonl") == steady(tmp_path / "whole", "quality.jsonl")
        best = [torch.load(f / "best_unlabelled.pth.tar", weights_only=True) for f in (folder, tmp_path / "whole")]
        assert not difference(*best, ignore=("output_dir", "run"))
    record("recipe auto with judgements without labels, killed", kills, f"all {len(folders)} runs bit-equal")


def test_killed_and_resumed_with_other_ranks(images, tmp_path):
    # float64, since sums over ranks are in another order (habit 11)
    program = (str(ROOT / "tests" / "pretrain64.py"),)
    both = [command(images, "--nprocs-per-node", str(n), program=program) for n in (1, 2)]
    kills, _, folders = kill_many(both, tmp_path, count=trials(1, 20), seed=3)
    Process(both[0](tmp_path / "whole")).finish()
    a = torch.load(tmp_path / "whole" / LAST, weights_only=True)["state_dict"]
    worst = 0.0
    for folder in folders:
        b = torch.load(folder / LAST, weights_only=True)["state_dict"]
        for key, value in a.items():
            if value.is_floating_point() and value.norm() > 0 and not key.endswith("predictor.1.running_mean"):
                assert value.dtype == torch.float64
                worst = max(worst, float((b[key] - value).norm() / value.norm()))
        assert worst <= 1e-9
        lines = [[(x["step"], x["epoch"], x["lr"]) for x in steady(f)] for f in (tmp_path / "whole", folder)]
        assert not difference(*lines)
    record("SIGKILL, resumed with 1 and 2 ranks in turn, float64", kills, f"largest relative difference {worst:.1e}")


def test_a_killed_worker_restarts_the_group(images, whole_of_two, tmp_path):
    # torchrun starts the group again with the same command line, and it goes on from its own checkpoint
    script = tmp_path / "dies_once.py"
    script.write_text(
        "import os, signal, sys, threading, time\n"
        "from pathlib import Path\n"
        "from mocov3.cli import main\n"
        "folder = Path(sys.argv[sys.argv.index('--output-dir') + 1])\n"
        "def die():\n"
        "    while not list(folder.glob('checkpoint_*step*')):\n"
        "        time.sleep(0.002)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' and os.environ['RANK'] == '1':\n"
        "    threading.Thread(target=die, daemon=True).start()\n"
        "sys.exit(main(['pretrain', *sys.argv[1:]]))\n"
    )
    argv = command(
        images,
        program=(
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "--max-restarts",
            "2",
            "--monitor-interval",
            "0.1",
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            "127.0.0.1:0",
            str(script),
        ),
    )(tmp_path / "dies")
    argv[argv.index("--logger") + 1] = "none"  # every worker is a real start, which need not load it
    at = argv.index("--resume")
    argv[at : at + 2] = []  # it resumes without being told
    text = Process(argv).finish()
    assert "Traceback" not in text, text
    assert steady(whole_of_two) == steady(tmp_path / "dies")
    assert_same_run(whole_of_two, tmp_path / "dies", last=LAST)
    lines = (tmp_path / "dies" / "metrics.jsonl").read_text().splitlines()
    assert '"resumed": 1' in lines[-1]
    record("a worker killed under torchrun: the group restarts and resumes by itself", 1, "bit-equal")
