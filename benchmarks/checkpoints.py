"""How long the step stalls for a checkpoint: written in the background, against written in the step.

    python benchmarks/checkpoints.py

Trains a network on random images with a checkpoint after every ``--every`` steps. Per kind, in turn: the time that
``save`` keeps the step waiting, and how much longer the steps are while a file is being written, both as a share of
the time between checkpoints. Medians over rounds.
"""

import argparse
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

from mocov3 import models
from mocov3.distributed import World
from mocov3.models.precision import Precision
from mocov3.optim import build_optimizer
from mocov3.pretraining.step import Step
from mocov3.running.writer import Writer
from mocov3.weights import checkpoint, tensorfiles
from mocov3.weights.checkpoint import Position


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-a", "--arch", default="resnet10_w32")
    parser.add_argument("--image-size", type=int, default=28)
    parser.add_argument("-b", "--batch-size", type=int, default=128)
    parser.add_argument("--every", type=int, default=62, help="steps between checkpoints (62: an epoch of the demo)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="where to write (default: a temporary folder)")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world = World(0, 1, device)
    torch.manual_seed(0)
    model = models.build(args.arch, image_size=args.image_size, dim=128, mlp_dim=512, temperature=0.2)
    model.to(device=device, memory_format=torch.channels_last).train()
    optimizer = build_optimizer(model.parameters(), "adamw", weight_decay=0.05, momentum=0.9)
    step = Step(model, optimizer, world=world, precision=Precision("fp32", device))
    views = [torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=device) for _ in "12"]

    def contents() -> dict:
        return checkpoint.pack(
            arch=args.arch, model=model, optimizer=optimizer, scaler={}, position=Position(0, 1, 1), extra={}
        )

    def period(save) -> tuple[float, float]:  # type: ignore[no-untyped-def]
        """Seconds of one period of steps that begins with a checkpoint, and those of ``save`` alone."""
        began = time.perf_counter()
        save()
        saved = time.perf_counter() - began
        for _ in range(args.every):
            step(*views, lr=1e-3, m=0.99)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began, saved

    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        writer = Writer(folder, before=lambda: None, after=lambda _: None, warn=print)
        kinds = {
            "none": lambda: None,
            "in the step": lambda: tensorfiles.write(folder / "a.pth", contents()),
            "in the background": lambda: writer.save({"b.pth": contents()}),
        }
        for save in kinds.values():
            period(save)
        writer.flush()
        measured: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
        for _ in range(args.rounds):
            for kind, save in kinds.items():
                measured[kind].append(period(save))
                writer.flush()
        size = (folder / "a.pth").stat().st_size / 1e6
        writer.close()
    print(
        f"{args.arch}, {args.image_size} px, batch {args.batch_size}, {device}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, Python {platform.python_version()}; {size:.1f} MB every {args.every} steps, "
        f"{args.rounds} rounds"
    )
    bare = statistics.median(total for total, _ in measured["none"])
    print(f"{'checkpoint':<20}{'period s':>10}{'longer by':>11}{'save() waits':>14}")
    for kind, values in measured.items():
        total, saved = (statistics.median(column) for column in zip(*values, strict=True))
        print(f"{kind:<20}{total:>10.3f}{total / bare - 1:>11.2%}{saved / bare:>14.3%}")


if __name__ == "__main__":
    main()
