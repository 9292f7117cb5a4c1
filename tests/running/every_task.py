"""The three trainings as one driver's commands: tiny, long enough to be disturbed, resumable."""

import sys
from pathlib import Path

import pytest

TASKS = {
    "pretrain": "-a resnet10_w16 --moco-dim 8 --moco-mlp-dim 8 --recipe defaults -b 16 --image-size 32",
    "lincls": "-b 16 --lr 0.1 -p 1",
    "finetune": "-a resnet10_w16 --small-stem --data-set folder -b 16 --input-size 32 --aa none -p 1",
}
LINES = {"pretrain": "metrics.jsonl", "lincls": "lincls.jsonl", "finetune": "metrics.jsonl"}
"""File that grows while a task trains."""
LAST = {"pretrain": "checkpoint_*.pth.tar", "lincls": "checkpoint.pth.tar", "finetune": "checkpoint.pth"}
"""Files that a resume starts from."""

every_task = pytest.mark.parametrize("task", TASKS)


def command(task: str, images: Path, pretrained: Path, folder: Path, *flags: object) -> list[str]:
    """The command line of a task that trains into ``folder``; 9,999 epochs unless told otherwise."""
    data = ["--data-path", str(images)] if task == "finetune" else [str(images)]
    weights = ["--pretrained", str(pretrained)] if task == "lincls" else []
    usual = ["--epochs", "9999", "--seed", "0", "--device", "cpu", "-j", "0", "--quiet", "--output-dir", str(folder)]
    return [sys.executable, "-m", "mocov3", task, *data, *weights, *TASKS[task].split(), *usual, *map(str, flags)]
