"""Configuration of linear evaluation: the reference's flags with their defaults (``tests/golden/f_sched.json``)."""

from dataclasses import dataclass

from mocov3.config.fields import flag


@dataclass(frozen=True)
class LinclsConfig:
    """A linear classifier on frozen features (arXiv 2104.02057, §4)."""

    data: str = flag("", "folder with train and val class folders", positional=True, result=False, metavar="DIR")
    arch: str = flag("resnet50", "backbone, or timm/NAME", "-a", "--arch")
    workers: int = flag(32, "data loading processes of a rank", "-j", "--workers", kind=int, result=False)
    epochs: int = flag(90, "epochs", kind=int)
    start_epoch: int = flag(0, "epoch to start at", kind=int, result=False)
    batch_size: int = flag(1024, "pictures a step, over all ranks", "-b", "--batch-size", kind=int)
    lr: float = flag(0.1, "learning rate for 256 pictures", "--lr", "--learning-rate", kind=float)
    momentum: float = flag(0.9, "momentum of SGD", kind=float)
    weight_decay: float = flag(0.0, "weight decay", "--wd", "--weight-decay", kind=float)
    print_freq: int = flag(10, "steps between log lines", "-p", "--print-freq", kind=int, result=False)
    resume: str = flag("", "checkpoint to go on from", result=False)
    evaluate: bool = flag(False, "only evaluate on the validation set", "-e", "--evaluate", kind=bool, result=False)
    world_size: int = flag(-1, "nodes, or processes", kind=int, result=False)
    rank: int = flag(-1, "rank of this node, or of this process", kind=int, result=False)
    dist_url: str = flag("tcp://224.66.41.62:23456", "where ranks meet", result=False)
    dist_backend: str = flag("nccl", "nccl or gloo", result=False)
    seed: int | None = flag(None, "seed", kind=int)
    gpu: int | None = flag(None, "use only this GPU", kind=int, result=False)
    multiprocessing_distributed: bool = flag(False, "start one process a GPU on this node", kind=bool, result=False)
    pretrained: str = flag("", "pre-training checkpoint", result=False)

    @property
    def initial_lr(self) -> float:
        """Learning rate of epoch 0: linear scaling with the batch."""
        return self.lr * self.batch_size / 256
