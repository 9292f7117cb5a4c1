"""A cheap part of the golden runs, in float32; on its own: for a process with settings of its own."""

import torch
from golden_runs import fine_tuning, linear_evaluation, trajectory


def main():
    torch.set_num_threads(1)
    # not the "mid" run: one unit before a ReLU is at 1.8e-6 there, and other kernels flip it (test_golden_training.py)
    trajectory("vit_tiny_adamw_readme_lr", "float32", steps=5).check()
    linear_evaluation("resnet18_wd", "float32", epochs=1).check()
    fine_tuning("smoothing", "float32").check()


if __name__ == "__main__":
    main()
