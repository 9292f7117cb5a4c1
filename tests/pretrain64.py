"""``mocov3 pretrain`` in float64: what is equal in exact arithmetic can be compared across orders of summation."""

import sys

import torch

from mocov3.cli import guarded
from mocov3.config.command_lines import parse_pretrain
from mocov3.distributed import launch
from mocov3.models import backbones
from mocov3.pretraining.inputs import check
from mocov3.pretraining.loop import train
from mocov3.running.job import Job

backbones._VITS["vit_tiny"]["depth"] = 2  # more blocks are the same again


def train64(world, job):
    torch.set_default_dtype(torch.float64)
    return train(world, job)


def main():
    config = parse_pretrain(sys.argv[1:], prog="pretrain64")
    check(config, script_door=False)
    return launch(train64, Job(config), device="cpu", processes=config.nprocs_per_node)


if __name__ == "__main__":
    sys.exit(guarded(main))
