"""A cheap part of the golden runs in float32, for a process of its own (``test_golden_processors.py``)."""

import torch
from golden_runs import fine_tuning, linear_evaluation, trajectory


def main():
    torch.set_num_threads(1)
    trajectory("vit_tiny_adamw_mid", "float32", steps=6).check()
    trajectory("resnet18_lars", "float32", steps=2).check()
    linear_evaluation("resnet18_wd", "float32", epochs=1).check()
    fine_tuning("smoothing", "float32").check()


if __name__ == "__main__":
    main()
