"""Configuration of fine-tuning and transfer: DeiT's flag names, as the reference's transfer commands use them.

Only what those commands name is here yet; the task itself is not part of this version.
"""

from dataclasses import dataclass

from mocov3.config.fields import flag


@dataclass(frozen=True)
class FinetuneConfig:
    """End-to-end fine-tuning (DeiT, Touvron et al. 2021); ``batch_size`` is per process, as there."""

    data_set: str = flag("IMNET", "data set", "--data-set")
    data_path: str = flag("", "its folder", "--data-path", result=False)
    output_dir: str = flag("", "folder of checkpoints", "--output_dir", "--output-dir", result=False)
    batch_size: int = flag(64, "pictures a step and process", "--batch-size", kind=int)
    epochs: int = flag(300, "epochs", kind=int)
    lr: float = flag(5e-4, "learning rate for 512 pictures", "--lr", kind=float)
    weight_decay: float = flag(0.05, "weight decay", "--weight-decay", kind=float)
    warmup_epochs: int = flag(5, "epochs of warm-up", "--warmup-epochs", kind=int)
    pin_mem: bool = flag(True, "page-locked memory for the transfer", "--pin-mem", kind=bool, result=False)
    repeated_aug: bool = flag(True, "repeated augmentation", "--repeated-aug", kind=bool)
    reprob: float = flag(0.25, "probability of random erasing", "--reprob", kind=float)
    drop_path: float = flag(0.1, "stochastic depth", "--drop-path", kind=float)
    mixup: float = flag(0.8, "mixup α", "--mixup", kind=float)
    cutmix: float = flag(1.0, "cutmix α", "--cutmix", kind=float)
    resume: str = flag("", "checkpoint to go on from; a file with `model` only means start from it", result=False)
    finetune: str = flag("", "weights to start from", result=False)
