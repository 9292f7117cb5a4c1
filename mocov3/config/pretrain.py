"""Configuration of pre-training: the reference's flags with their defaults, and ours.

Defaults of the reference are recorded in ``tests/golden/f_sched.json``; a test compares them.
"""

from dataclasses import dataclass

from mocov3.config.archs import CONV_VITS, STEM_PARTS, check_arch, check_heads, is_resnet, is_vit
from mocov3.config.cheap import CheapFlags, stages
from mocov3.config.fields import check_bounds, flag, path
from mocov3.config.local_views import LocalFlags, LocalViews, local_views_of
from mocov3.config.loggers import logger_names
from mocov3.config.presets import PRESETS, ViewPreset
from mocov3.config.running import DATA, METHOD, MODEL, PRECISIONS, RANKS, RUN, RankFlags
from mocov3.config.scale import ScaleFlags
from mocov3.config.schedule import ScheduleFlags, ends_by_clock
from mocov3.config.views import preset_of
from mocov3.errors import UserError


@dataclass(frozen=True)
class PretrainConfig(RankFlags, ScaleFlags, CheapFlags, LocalFlags, ScheduleFlags):
    """Everything a pre-training run is made from. ``result`` fields may not change at a resume."""

    data: str = flag(
        "",
        "folder of images (DIR/train is used where it exists), list of them (.txt, .csv), several of these "
        "(DIR2:0.3 uses 30 % of DIR2 in each epoch), or the built-in fashion-mnist[:ROOT]",
        kind=path,
        positional=True,
        result=False,
        metavar="DIR",
        many=True,
        per_rank=True,
    )
    # --- the reference's flags -------------------------------------------------------------------------
    arch: str = flag("resnet50", "backbone, or timm/NAME", "-a", "--arch", group=MODEL)
    epochs: int = flag(100, "epochs of the whole schedule", group=METHOD, low=1)
    batch_size: int = flag(4096, "images a step, over all ranks", "-b", "--batch-size", group=METHOD, low=2)
    lr: float = flag(0.6, "learning rate for 256 images", "--lr", "--learning-rate", group=METHOD, low=0)
    momentum: float = flag(0.9, "momentum of LARS", group=METHOD, low=0)
    weight_decay: float = flag(1e-6, "weight decay", "--wd", "--weight-decay", group=METHOD, low=0)
    resume: str = flag(
        "",
        "checkpoint to resume from, or 'auto' for the newest valid one in the output folder",
        kind=path,
        result=False,
        group=RUN,
        per_rank=True,
    )
    seed: int | None = flag(
        None,
        "seed of weights, order and draws; drawn, printed and stored unless given",
        kind=int,
        group=METHOD,
        low=0,
        below=2**63,
    )
    moco_dim: int = flag(256, "width of the embedding", group=MODEL, low=1)
    moco_mlp_dim: int = flag(4096, "hidden width of projector and predictor", group=MODEL, low=1)
    moco_m: float = flag(0.99, "momentum of the momentum encoder", group=METHOD, low=0, high=1)
    moco_m_cos: bool = flag(False, "raise the momentum to 1 by a half cosine", group=METHOD)
    moco_t: float = flag(1.0, "temperature τ of the loss", group=METHOD, above=0)
    stop_grad_conv1: bool = flag(False, "keep the patch projection of a ViT as initialised", group=METHOD)
    optimizer: str = flag("lars", "optimizer", choices=("lars", "adamw", "muon"), group=METHOD)
    warmup_epochs: int = flag(10, "epochs of linear warm-up", group=METHOD, low=0)
    crop_min: float = flag(0.08, "smallest crop as a share of the image", group=DATA, low=0, high=1)
    # --- ours ------------------------------------------------------------------------------------------
    precision: str = flag("auto", "arithmetic of the networks", choices=PRECISIONS, group=METHOD)
    image_size: int = flag(224, "side of the views in pixels", group=DATA, low=1)
    patch_size: int = flag(16, "side of a ViT's patches in pixels", group=MODEL, low=1)
    heads: int | None = flag(
        None,
        "attention heads of a ViT, new or from an --init that does not record them (ViT-S: 12 in "
        "MoCo v3; 6 in DeiT, DINO, timm)",
        kind=int,
        group=MODEL,
    )
    small_stem: bool = flag(False, "3×3 stride-1 stem without pooling, for ResNets on images of 28–64 px", group=MODEL)
    init: str = flag(
        "",
        "weights both backbones start from: a file (ours, the reference's, timm's, torchvision's) or timm/NAME",
        kind=path,
        group=MODEL,
    )
    view_preset: str = flag("photos", "strengths and probabilities of the views", choices=tuple(PRESETS), group=DATA)
    views: str = flag(
        "fast",
        "pillow: the reference's operations; fast: the same draws, several times faster",
        choices=("fast", "pillow"),
        group=DATA,
    )
    views_on: str = flag(
        "cpu",
        "where colours and blur are made; with device, loading processes only decode and crop",
        choices=("cpu", "device"),
        group=DATA,
    )
    smaller_copies: bool = flag(
        True,
        "images many times larger than any view can use are kept as smaller copies in the cache folder, of 2 GB at "
        "most (not with --views pillow)",
        group=DATA,
    )
    max_corrupt: float = flag(
        0.01,
        "share of unreadable images (from 10 on) that stops the run",
        result=False,
        group=DATA,
        low=0,
        high=1,
        per_rank=True,
    )
    checkpoint_every: int = flag(
        1, "epochs between checkpoints that are kept", result=False, group=RUN, metavar="EPOCHS", low=1
    )
    keep_last: int = flag(
        0, "keep only this many of the newest epoch checkpoints (0: all)", result=False, group=RUN, metavar="K", low=0
    )
    keep_every: int = flag(
        0, "with --keep-last, also keep every N-th epoch's", result=False, group=RUN, metavar="N", low=0
    )
    knn_every: int = flag(
        0, "epochs between k-NN evaluations on DIR/val (0: none)", result=False, group=RUN, metavar="EPOCHS", low=0
    )
    report_every: int = flag(
        0,
        "epochs between refreshed pages report.html, made in the background and at the end (0: none)",
        result=False,
        group=RUN,
        metavar="EPOCHS",
        low=0,
    )
    compile: bool | None = flag(
        None,
        "compile the backbones with torch.compile (default: on CUDA; a resumed run as it began)",
        kind=bool,
        result=False,
        group=RANKS,
    )
    grad_checkpoint: bool = flag(
        False, "save memory by recomputing a ViT's blocks in the backward pass", result=False, group=RANKS
    )
    skip_spikes: float = flag(
        0.0, "skip steps whose gradient norm is FACTOR times its usual one (0: none)", group=METHOD, metavar="FACTOR"
    )
    dist_timeout: float = flag(
        30.0,
        "minutes until a silent rank counts as lost",
        result=False,
        group=RANKS,
        metavar="MINUTES",
        above=0,
        below=1e6,
        per_rank=True,
    )
    allow_data_change: bool = flag(False, "resume although the images differ", result=False, group=RUN)

    @property
    def peak_lr(self) -> float:
        """Learning rate after warm-up: linear scaling with the batch (Goyal et al. 2017)."""
        return self.lr * self.batch_size / 256

    @property
    def preset(self) -> ViewPreset:
        """The view preset with the strengths that flags replace."""
        return preset_of(vars(self))

    @property
    def local(self) -> LocalViews | None:
        """The local views, ``None`` where there are none."""
        return local_views_of(self)

    @property
    def data_title(self) -> str:
        """The images, for messages."""
        return self.data.replace("\n", " ")

    def check(self) -> None:
        """Refuse values that cannot train.

        Raises:
            UserError: naming the first bad field, its value and what is allowed.
        """
        check_arch(self.arch)
        check_heads(self.heads, self.arch)
        check_bounds(self)
        self.check_views()
        self.check_own()
        self.check_schedule()
        logger_names(self.logger)
        if self.optimizer == "muon" and self.fsdp:
            raise UserError("--optimizer muon needs whole matrices, of which --fsdp gives each process a part")
        if self.compile and self.fsdp:
            raise UserError("--fsdp gathers weights block by block, which --compile cannot see; give one of them")
        if self.compile and self.deterministic:
            raise UserError(
                "--compile tries kernels and takes the fastest, which --deterministic rules out; give one of them"
            )
        if self.skip_spikes and not 1 < self.skip_spikes < float("inf"):
            raise UserError(f"--skip-spikes is a factor above 1, or 0 for none, not {self.skip_spikes}")
        by_clock = ends_by_clock(self.schedule, self.budget)
        if self.warmup_epochs > self.epochs and not by_clock:
            raise UserError(
                f"--warmup-epochs {self.warmup_epochs} is longer than --epochs {self.epochs}; "
                "lower the first or raise the second"
            )
        if self.freeze_epochs >= self.epochs and not by_clock:
            raise UserError(
                f"--freeze-epochs {self.freeze_epochs} leaves none of the {self.epochs} epochs for the backbone; "
                "lower it, or raise --epochs"
            )
        if is_vit(self.arch) and self.image_size % self.patch_size:
            lower = max(self.image_size // self.patch_size, 1) * self.patch_size
            raise UserError(
                f"--image-size {self.image_size} does not divide into patches of {self.patch_size} px; "
                f"nearest: {lower} or {lower + self.patch_size} (or another --patch-size)"
            )
        if self.arch in CONV_VITS and self.patch_size not in STEM_PARTS:
            raise UserError(
                f"--patch-size {self.patch_size}: the convolutional stem of {self.arch} makes patches of 4, 8 or 16"
            )
        stages(self)
        local_views_of(self)
        if self.small_stem and not is_resnet(self.arch):
            raise UserError(f"--small-stem is for ResNets; {self.arch} has no such stem")
        if self.grad_checkpoint and not (is_vit(self.arch) or self.arch.startswith("timm/")):
            raise UserError(
                f"--grad-checkpoint would update the batch statistics of {self.arch} twice; it is for ViTs only"
            )
        if self.views == "pillow" and self.views_on == "device":
            raise UserError("--views pillow runs on the CPU only; leave out --views-on device, or --views pillow")
        if self.dist_backend not in ("nccl", "gloo"):
            raise UserError(f"--dist-backend {self.dist_backend!r} is not known; use nccl or gloo")
