"""Configuration of fine-tuning and transfer: DeiT's flags with its defaults (facebookresearch/deit), and ours.

Both ``mocov3 finetune`` and ``transfer/main.py`` parse it.
"""

from dataclasses import dataclass

from mocov3.config.archs import check_arch, check_heads, is_resnet, is_vit
from mocov3.config.evaluation import FINDINGS_HELP, MEASURES_HELP
from mocov3.config.fields import check_bounds, flag, path
from mocov3.config.loggers import logger_names
from mocov3.config.own import GROUP_HELP
from mocov3.config.presets import ViewPreset
from mocov3.config.running import DATA, METHOD, MODEL, PRECISIONS, RANKS, RUN, RunFlags
from mocov3.config.views import ReadingFlags, preset_of
from mocov3.errors import UserError

DATA_SETS = ("IMNET", "folder", "cifar10", "cifar100", "flowers", "pets", "fashion-mnist")
TRANSFER_SETS = ("cifar10", "cifar100", "flowers", "pets")
"""Data sets of the reference's transfer runs: random resized crop and flip in place of DeiT's augmentation."""
_DEIT_NAMES = {f"deit_{size}_patch16_224": f"vit_{size}" for size in ("tiny", "small", "base")}


@dataclass(frozen=True)
class FinetuneConfig(ReadingFlags, RunFlags):
    """End-to-end fine-tuning (DeiT, Touvron et al. 2021); ``batch_size`` is per process, as there."""

    data_set: str = flag(
        "IMNET", "data set; IMNET and folder: PATH/train/CLASS, PATH/val/CLASS", choices=DATA_SETS, group=DATA
    )
    data_path: str = flag("", "its folder", kind=path, result=False, per_rank=True, group=DATA, metavar="PATH")
    fraction: float = flag(
        1.0, "share of the training images of every class, whole groups, a fixed choice", group=DATA, above=0, high=1
    )
    labels: str = flag("", FINDINGS_HELP, kind=path, result=False, per_rank=True, group=DATA, metavar="CSV[:COLUMN,…]")
    measures: bool = flag(False, f"with --eval: {MEASURES_HELP}", result=False, group=RUN)
    group_by: str = flag(
        "", f"{GROUP_HELP}; test images of a group that training has are left out", group=DATA, metavar="GROUPS"
    )
    output_dir: str = flag(
        "",
        "folder of checkpoints and logs (default runs/TIME-finetune)",
        "--output_dir",
        "--output-dir",
        kind=path,
        result=False,
        per_rank=True,
        group=RUN,
    )
    arch: str = flag(
        "",
        "backbone, timm/NAME, or DeiT's name (default: of the weights, else vit_base)",
        "--model",
        "-a",
        "--arch",
        group=MODEL,
    )
    image_size: int = flag(
        0,
        "side of the images in pixels (default: of the weights, else 224)",
        "--input-size",
        "--image-size",
        group=MODEL,
        low=0,
    )
    patch_size: int = flag(
        0, "side of a ViT's patches in pixels (default: of the weights, else 16)", group=MODEL, low=0
    )
    heads: int | None = flag(
        None,
        "attention heads of a ViT (default: of the weights where they record it, else 12 for vit_small as in MoCo v3; "
        "DeiT, DINO and timm have 6)",
        kind=int,
        group=MODEL,
    )
    small_stem: bool | None = flag(
        None, "3×3 stride-1 stem without pooling, for ResNets (default: as the weights)", kind=bool, group=MODEL
    )
    view_preset: str = flag(
        "", "normalise as this preset of pre-training (default: of the weights, else photos)", group=DATA
    )
    mean_std: str = flag(
        "", "normalise by mean,std or six numbers (default: of the weights, unless a preset is given)", group=DATA
    )
    finetune: str = flag(
        "",
        "weights to start from (ours, the reference's, DeiT's)",
        kind=path,
        result=False,
        per_rank=True,
        group=RUN,
        metavar="FILE",
    )
    resume: str = flag(
        "",
        "checkpoint to resume from, or 'auto' for the output folder's; a file without optimizer: its weights only",
        kind=path,
        result=False,
        per_rank=True,
        group=RUN,
    )
    eval: bool = flag(False, "only evaluate the weights of --resume", result=False, group=RUN)
    eval_freq: int = flag(1, "epochs between evaluations", result=False, group=RUN, low=1)
    # --- optimisation ------------------------------------------------------------------------------------
    batch_size: int = flag(64, "images a step and process", "-b", "--batch-size", group=METHOD, low=1)
    accum_iter: int = flag(
        1,
        "batches that a process accumulates for a step; equals as many times the processes",
        result=False,
        group=METHOD,
        low=1,
    )
    epochs: int = flag(300, "epochs", group=METHOD, low=1)
    lr: float = flag(5e-4, "learning rate for 512 images", group=METHOD, low=0)
    warmup_lr: float = flag(1e-6, "learning rate at the beginning of warm-up, not scaled", group=METHOD, low=0)
    min_lr: float = flag(1e-5, "learning rate at the end, not scaled", group=METHOD, low=0)
    warmup_epochs: int = flag(5, "epochs of warm-up", group=METHOD, low=0)
    weight_decay: float = flag(
        0.05, "weight decay, of weights only (not biases, norms, cls token, position table)", group=METHOD, low=0
    )
    layer_decay: float = flag(
        1.0, "factor of the learning rate from one layer to the one below", group=METHOD, above=0, high=1
    )
    clip_grad: float = flag(0.0, "largest gradient norm (0: not clipped)", group=METHOD, low=0)
    model_ema: bool = flag(True, "also keep an average of the weights", group=METHOD)
    model_ema_decay: float = flag(0.99996, "its decay", group=METHOD, low=0, high=1)
    drop_path: float = flag(0.1, "stochastic depth of the last block (ViTs and timm's)", group=METHOD, low=0, below=1)
    smoothing: float = flag(0.1, "label smoothing", group=METHOD, low=0, below=1)
    # --- augmentation ------------------------------------------------------------------------------------
    aa: str = flag("rand-m9-mstd0.5-inc1", "timm's name of the auto augmentation, or none", group=DATA)
    color_jitter: float = flag(0.4, "colour jitter, where there is no auto augmentation", group=DATA, low=0)
    train_interpolation: str = flag("bicubic", "interpolation", choices=("bicubic", "bilinear", "random"), group=DATA)
    reprob: float = flag(0.25, "probability of random erasing", group=DATA, low=0, high=1)
    repeated_aug: bool = flag(
        True, "repeated augmentation: a third of the images an epoch, each three times", group=DATA
    )
    mixup: float = flag(0.8, "mixup α (0: none)", group=DATA, low=0)
    cutmix: float = flag(1.0, "cutmix α (0: none)", group=DATA, low=0)
    mixup_prob: float = flag(1.0, "share of batches that are mixed", group=DATA, low=0, high=1)
    mixup_switch_prob: float = flag(0.5, "share of cutmix where both are enabled", group=DATA, low=0, high=1)
    transfer_transform: bool | None = flag(
        None,
        "random resized crop (.05–1) and flip alone, as the reference's transfer (default: for its four data sets)",
        kind=bool,
        group=DATA,
    )
    # --- running -----------------------------------------------------------------------------------------
    seed: int = flag(0, "seed of head, order and draws", group=METHOD, low=0, below=2**63)
    workers: int = flag(
        10,
        "data loading processes of a rank; at most the usable cores",
        "--num_workers",
        "-j",
        "--workers",
        result=False,
        per_rank=True,
        group=DATA,
        low=0,
    )
    pin_mem: bool = flag(True, "accepted; batches are in shared memory", result=False, group=DATA)
    precision: str = flag("auto", "arithmetic of the network", choices=PRECISIONS, group=METHOD)
    world_size: int = flag(
        1, "accepted; torchrun sets it", "--world_size", "--world-size", result=False, per_rank=True, group=RANKS
    )
    dist_url: str = flag(
        "env://", "accepted; torchrun sets it", "--dist_url", "--dist-url", result=False, per_rank=True, group=RANKS
    )

    @property
    def transfer(self) -> bool:
        """Whether the reference's transfer transform takes the place of DeiT's augmentation."""
        return self.data_set in TRANSFER_SETS if self.transfer_transform is None else self.transfer_transform

    @property
    def repeats(self) -> int:
        """How often an image of an epoch is drawn (Hoffer et al. 2020; 3 in DeiT)."""
        return 3 if self.repeated_aug else 1

    @property
    def mixes(self) -> bool:
        """Whether batches are mixed."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def preset(self) -> ViewPreset:
        """How images are read, normalised and cut out for evaluation."""
        names = ("view_preset", "mean_std", "channels", "bit_window")
        return preset_of({name: getattr(self, name) for name in names})

    def check(self) -> None:
        """Refuse values that cannot train.

        Raises:
            UserError: naming the first bad field, its value and what is allowed.
        """
        if self.arch:
            check_arch(known_arch(self.arch))
        check_bounds(self)
        if self.warmup_epochs > self.epochs:
            raise UserError(
                f"--warmup-epochs {self.warmup_epochs} is longer than --epochs {self.epochs}; lower the first"
            )
        if self.mixes and self.batch_size % 2:
            raise UserError(
                f"--batch-size {self.batch_size} is odd: mixing pairs images; make it even, or --mixup 0 --cutmix 0"
            )
        if self.measures and not self.eval:
            raise UserError("--measures is for --eval: evaluate the file that the run writes")
        if self.labels and self.data_set not in ("IMNET", "folder"):
            raise UserError(f"--labels gives findings of images in folders: --data-set folder, not {self.data_set}")
        if self.eval and not self.resume:
            raise UserError("--eval: name the weights by --resume")
        if self.mean_std == "auto":
            raise UserError("--mean-std auto is measured in pre-training; give numbers, or the weights that hold them")
        count = self.mean_std.count(",") + 1
        channels = self.channels or (3 if count % 2 else count // 2)  # once known, the weights' own are checked
        preset_of({"mean_std": self.mean_std, "bit_window": self.bit_window, "channels": channels})
        logger_names(self.logger)
        self.check_model()

    def check_model(self) -> None:
        """Refuse a model that cannot be built; again once what was left open is known from the weights."""
        check_heads(self.heads, known_arch(self.arch))
        arch, size, patch = known_arch(self.arch or "vit_base"), self.image_size or 224, self.patch_size or 16
        if is_vit(arch) and size % patch and (self.image_size or self.arch):
            raise UserError(
                f"--input-size {size} does not divide into patches of {patch} px; change it or --patch-size"
            )
        if self.small_stem and self.arch and not is_resnet(arch):
            raise UserError(f"--small-stem is for ResNets; {arch} has no such stem")


def known_arch(name: str) -> str:
    """Our name of a backbone that DeiT's users call ``deit_…_patch16_224``."""
    return _DEIT_NAMES.get(name, name)
