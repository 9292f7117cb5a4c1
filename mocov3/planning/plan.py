"""Before renting machines: ``mocov3 plan --recipe vit_base_300ep --gpus 64 --gpu-memory 32``.

Micro-batch, memory, and time of a pre-training run on GPUs that need not be present. Memory is counted on the network
itself (``mocov3.pretraining.footprint``); time needs a speed, which is stated (``--images-per-second``) or measured on
a GPU here. Takes the flags of ``mocov3 pretrain`` too. Formulas and sources: docs/scaling.md.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from mocov3.config import PretrainConfig
from mocov3.config.archs import CONV_VITS, is_resnet
from mocov3.config.fields import Parser
from mocov3.errors import UserError
from mocov3.metrics import JsonLine
from mocov3.pretraining.inputs import check_divides

GIB = 1 << 30
IMAGENET = 1_281_167
LIBRARIES = 1.5e9
"""Bytes of a GPU that CUDA, cuDNN and NCCL take for themselves."""
SECOND_PASS = 0.25
"""What micro-batches add to a step's time: 5 passes of each view instead of 4 (a backward pass counts as two)."""
PRESERVE = 0.125
"""What ``--preserve`` adds: the starting network's pass over one view, 9 passes instead of 8."""
BACKWARD = 0.5
"""Share of a step in which gradients become ready one after the other, so that sending them costs nothing."""


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Own flags, and the rest, which are those of pre-training."""
    parser = Parser(prog="mocov3 plan", description=__doc__, add_help=False, allow_abbrev=False)
    parser.add_argument("--gpus", type=int, default=1, help="GPUs in all")
    parser.add_argument("--gpu-memory", type=float, default=24.0, help="GB of one (GiB, as sold)", metavar="GB")
    parser.add_argument("--pictures", type=int, default=IMAGENET, help="images of the set (default ImageNet-1k)")
    parser.add_argument(
        "--images-per-second",
        type=float,
        default=0.0,
        metavar="N",
        help="speed of one GPU in one pass; unless given, measured where a GPU is here",
    )
    parser.add_argument(
        "--gigabytes-per-second",
        type=float,
        default=25.0,
        metavar="N",
        help="what a GPU sends to others (default 25: a 200 Gbit/s link)",
    )
    if "-h" in argv or "--help" in argv:
        parser.add_argument("-h", "--help", action="help", help="this; flags of mocov3 pretrain are taken too")
    args, rest = parser.parse_known_args(list(argv))
    for name in ("gpus", "pictures", "gpu_memory", "gigabytes_per_second"):
        if not 0 < getattr(args, name) < 1e12:
            raise UserError(f"--{name.replace('_', '-')} must be above 0, not {getattr(args, name)}")
    if not 0 <= args.images_per_second < 1e9:
        raise UserError(f"--images-per-second must be above 0, not {args.images_per_second}")
    return args, rest


@dataclass(frozen=True)
class Traffic:
    """Bytes that one process sends in a step (docs/scaling.md)."""

    gradients: float
    keys: float
    statistics: float
    """Of batch norm that is synchronised."""
    weights: float
    """``--fsdp`` only: weights gathered for the passes."""

    @property
    def all(self) -> float:
        """Together."""
        return self.gradients + self.keys + self.statistics + self.weights


def traffic(
    gpus: int,
    batch: int,
    *,
    trained: float,
    dim: int,
    norm_channels: int,
    passes: int,
    fsdp: bool,
    local_passes: int = 0,
) -> Traffic:
    """What a step sends.

    Args:
        gpus: processes.
        batch: images of all.
        trained: bytes of trained parameters (a gradient each).
        dim: width of the embedding.
        norm_channels: channels of all batch norms that are run, over both encoders.
        passes: passes of an encoder's blocks in a step and view: 3 (query forward and backward, key forward), and with
            micro-batches a fourth, times their number.
        fsdp: whether weights are sharded.
        local_passes: passes of the query encoder's blocks that local views take in a step.
    """
    ring = (gpus - 1) / gpus  # of a reduce-scatter or an all-gather; an all-reduce is both
    return Traffic(
        gradients=(1 if fsdp else 2) * ring * trained,
        keys=2 * ring * batch * dim * 4,
        # each view of both encoders, local ones of one
        statistics=2 * ring * gpus * 4 * norm_channels * (2 + 0.5 * bool(local_passes)),
        weights=(2 * passes + local_passes) * ring * trained if fsdp else 0.0,
    )


def step_seconds(
    images: int,
    images_per_second: float,
    sent: Traffic,
    bytes_per_second: float,
    *,
    micro: bool,
    fsdp: bool,
    preserve: bool = False,
) -> tuple[float, float]:
    """(computing, waiting for the network) of a step of one process. Gradients of one pass are sent while it runs
    backwards, gathered weights while other blocks compute; what does not fit there is waited for."""
    computing = images / images_per_second * (1 + SECOND_PASS * micro + PRESERVE * preserve)
    hidden = computing if fsdp else 0.0 if micro else BACKWARD * computing
    overlapping = (sent.gradients + sent.weights) / bytes_per_second
    return computing, max(overlapping - hidden, 0.0) + (sent.keys + sent.statistics) / bytes_per_second


def main(args: argparse.Namespace, config: PretrainConfig) -> int:
    """Count, print; returns the exit code."""
    config.check()
    check_divides(config.batch_size, args.gpus)
    figures = plan_run(args, config)
    if config.json:
        print(json.dumps(figures))
        return 0
    print("\n".join(_lines(figures, args, config)))
    return 0


def plan_run(args: argparse.Namespace, config: PretrainConfig) -> JsonLine:
    """Everything that is printed, as values.

    Raises:
        UserError: if it does not fit the memory.
    """
    from mocov3.pretraining.assemble import count_memory, count_norms

    local = config.batch_size // args.gpus
    sixteen_bits = config.precision != "fp32"
    figures = count_memory(config, sixteen_bits=sixteen_bits)
    shards = args.gpus if config.fsdp else 1
    asked = config.micro_batch if isinstance(config.micro_batch, int) else 0
    size = min(asked, local) if asked else figures.fitting(local, args.gpu_memory * GIB - LIBRARIES, shards)
    if not size:
        raise _too_little_memory(args, config, figures.peak(local, 1, shards) + LIBRARIES)
    micro = size if size < local else 0
    parts = -(-local // size)
    sent = traffic(
        args.gpus,
        config.batch_size,
        trained=figures.trained,
        dim=config.moco_dim,
        norm_channels=count_norms(config),
        passes=3 if parts == 1 else 3 * parts + parts,
        fsdp=config.fsdp,
        local_passes=_local_passes(config, local, size),
    )
    speed = args.images_per_second or _measured(config, size)
    steps = args.pictures // config.batch_size * config.epochs
    result: JsonLine = {
        "arch": config.arch,
        "batch_size": config.batch_size,
        "pictures_per_gpu": local,
        "micro_batch": micro,
        "passes": parts,
        "memory": figures.peak(local, micro, shards) + LIBRARIES,
        "steps": steps,
        "bytes_per_step": asdict(sent),
        "images_per_second": speed,
        "memory_parts": asdict(figures),
    }
    if speed:
        computing, waiting = step_seconds(
            local,
            speed,
            sent,
            args.gigabytes_per_second * 1e9,
            micro=bool(micro),
            fsdp=config.fsdp,
            preserve=config.preserve > 0,
        )
        result |= _times(steps, args.gpus, computing, waiting)
    return result


def _too_little_memory(args: argparse.Namespace, config: PretrainConfig, need: float) -> UserError:
    local = config.batch_size // args.gpus
    cure = "more GPUs, a smaller --batch-size" + ("" if config.fsdp or args.gpus == 1 else ", or --fsdp")
    return UserError(
        f"--gpu-memory {args.gpu_memory:g}: weights, optimizer and heads of {local} images a GPU "
        f"need {need / GIB:.1f} GB even an image at a time; take {cure}"
    )


def _local_passes(config: PretrainConfig, images: int, size: int) -> int:
    """Passes of the query encoder's blocks over local views: forward and backward, in parts once more forward."""
    if config.local is None:
        return 0
    parts = -(-images * config.local.count // size)
    return 2 if size >= images else 3 * parts


def _times(steps: int, gpus: int, computing: float, waiting: float) -> dict[str, float]:
    """Hours of a run whose steps compute and wait for so many seconds."""
    step = computing + waiting
    hours = steps * step / 3600
    return {"step_seconds": step, "efficiency": computing / step, "hours": hours, "gpu_hours": gpus * hours}


def _measured(config: PretrainConfig, images: int) -> float:
    """Images a second of a GPU here, in one pass; 0 where there is none."""
    import torch

    if not torch.cuda.is_available():
        return 0.0
    from mocov3.planning.speed import images_per_second

    return images_per_second(replace(config, preserve=0.0), min(images, 256))


def _lines(figures: JsonLine, args: argparse.Namespace, config: PretrainConfig) -> list[str]:
    parts, sent = figures["memory_parts"], figures["bytes_per_step"]
    shared = f" / {args.gpus}" if config.fsdp else ""
    in_passes = f"{figures['passes']} passes of {figures['micro_batch']}" if figures["micro_batch"] else "one pass"
    lines = [
        f"{config.arch} at {config.image_size} px, batch {config.batch_size} on {args.gpus} GPU(s) of "
        f"{args.gpu_memory:g} GB: {figures['pictures_per_gpu']} images a GPU in {in_passes}",
        f"  memory        {figures['memory'] / GIB:.1f} GB of a GPU, counted: weights {parts['weights'] / 1e9:.2f} GB"
        f"{shared}, optimizer {parts['states'] * parts['trained'] / 1e9:.2f} GB{shared}, gradients "
        f"{parts['trained'] / 1e9:.2f} GB, {(parts['backbone'] + parts['heads']) / 1e6:.1f} MB an image and view, "
        f"libraries {LIBRARIES / 1e9:.1f} GB",
        f"  network       {sum(sent.values()) / 1e9:.2f} GB sent by a GPU in a step: gradients "
        f"{sent['gradients'] / 1e9:.2f}, keys {sent['keys'] / 1e9:.3f}, batch norm {sent['statistics'] / 1e9:.3f}"
        + (f", weights {sent['weights'] / 1e9:.2f}" if config.fsdp else ""),
    ]
    if "hours" in figures:
        source = "stated" if args.images_per_second else "measured here"
        lines.append(
            f"  time          {figures['hours']:.1f} h ({figures['gpu_hours']:.0f} GPU-hours): {figures['steps']} "
            f"steps of {figures['step_seconds']:.2f} s, {100 * figures['efficiency']:.0f} % of them computing, by "
            f"{figures['images_per_second']:g} images/s a GPU ({source})"
        )
    else:
        lines.append(
            f"  time          {figures['steps']} steps; not known without a speed: give --images-per-second of "
            "one GPU, or run this where one is"
        )
    start = ["torchrun", "--nproc-per-node", str(min(args.gpus, 8)), "main_moco.py"]
    start += ["--recipe", config.recipe] if config.recipe else ["-a", config.arch, "-b", str(config.batch_size)]
    start += ["--micro-batch", "auto"] * bool(figures["micro_batch"]) + ["--fsdp"] * config.fsdp + ["IMAGES"]
    lines.append(f"  start         {' '.join(start)}")
    if config.preserve:
        lines.append("  note          --preserve runs the starting network over one view: 9 passes instead of 8")
    if figures["micro_batch"] and (is_resnet(config.arch) or config.arch in CONV_VITS):
        lines.append("  note          batch norm of the backbone sees a micro-batch at a time, not the whole batch")
    return lines
