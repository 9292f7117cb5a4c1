"""What evaluation costs beside its bare arithmetic: ``python benchmarks/evaluation.py [heads|knn|embed|views]``.

Both sides of every ratio run in this process, in turn; the best of several rounds counts.

- heads: a step of linear evaluation (backbone forward of resnet50 at 224 px, then the heads) with 20 heads and with 1;
  forward and heads are timed apart and added, so that a disturbed forward does not decide.
- knn: exact search for 200 neighbours against the bare matrix product and topk; and its memory beside the features.
- embed: ``mocov3 embed`` of JPEG files against the bare forward pass on prepared batches.
- views: JPEGs of 500×375 → the evaluation view of 224 px, resized by Pillow and by the compiled kernel.
"""

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from PIL import Image

from benchmarks import images
from mocov3.config import EmbedConfig
from mocov3.data import CentreView
from mocov3.data.views import native
from mocov3.distributed import World
from mocov3.evaluation.embed import embed as run_embed
from mocov3.evaluation.frozen import open_frozen
from mocov3.evaluation.linear.heads import Heads, HeadSpec
from mocov3.evaluation.neighbours import nearest

HERE = World(0, 1, torch.device("cpu"))


def best(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Shortest seconds of each side over rounds in which all take turns."""
    seconds = {name: float("inf") for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            began = time.perf_counter()
            side()
            seconds[name] = min(seconds[name], time.perf_counter() - began)
    return seconds


def heads(rounds: int) -> None:
    """Twenty heads against one."""
    frozen, classes, batch = open_frozen("resnet50", flag="").to(HERE.device), 1000, 64
    x = torch.randn(batch, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    y = torch.randint(classes, (batch,))
    with torch.no_grad():
        features = frozen.features(x)

    def forward() -> None:
        with torch.no_grad():
            frozen.features(x)

    sides: dict[str, Callable[[], object]] = {"forward": forward}
    for n in (1, 20):
        specs = [HeadSpec("linear", 0.01 * (i + 1), 0.0) for i in range(n)]
        classifiers = Heads(specs, width=2048, classes=classes, seed=0, momentum=0.9, world=HERE)
        sides[f"{n}"] = lambda classifiers=classifiers: classifiers.step(features, y, lr_factor=1.0)
    got = best(sides, rounds)
    one, twenty = got["forward"] + got["1"], got["forward"] + got["20"]
    print(
        f"heads: resnet50, 224 px, batch {batch}, {classes} classes: forward {got['forward']:.2f} s, 1 head "
        f"{got['1']:.3f} s, 20 heads {got['20']:.3f} s a step; 20 heads / 1 head, forward included: "
        f"{twenty / one:.3f}"
    )


def knn(rounds: int) -> None:
    """Exact search against the bare product and topk."""
    bank, queries = torch.randn(1_280_000, 256), torch.randn(2000, 256)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    nearest(bank, queries, 200)
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    print(f"knn: 1.28 M × 2,000 at 256 dims: at most {max(more, 0):.2f} GB above what was used before")
    bank, queries = torch.randn(262144, 768), torch.randn(512, 768)
    bank += torch.randn(768)

    def bare() -> None:
        (queries @ bank.T).topk(200, dim=1)

    got = best({"bare": bare, "ours": lambda: nearest(bank, queries, 200)}, rounds)
    print(
        f"knn: 262,144 × 512 at 768 dims, 200 neighbours: bare {got['bare']:.2f} s, exact {got['ours']:.2f} s; "
        f"ratio {got['ours'] / got['bare']:.3f}"
    )


def embed(rounds: int) -> None:
    """Files to features against the bare forward pass."""
    n, batch = 96, 32
    frozen = open_frozen("resnet50", flag="")
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.Generator(np.random.PCG64(0))
        (Path(folder) / "pictures").mkdir()
        for i in range(n):
            small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
            small.resize((500, 375)).save(Path(folder) / "pictures" / f"{i}.jpg", quality=90)
        x = torch.randn(batch, 3, 224, 224).contiguous(memory_format=torch.channels_last)
        config = EmbedConfig(
            data=f"{folder}/images",
            model="resnet50",
            output=f"{folder}/x.npy",
            batch_size=batch,
            workers=0,
            device="cpu",
        )
        frozen.to(HERE.device)

        def bare() -> None:
            with torch.no_grad():
                for _ in range(n // batch):
                    frozen.features(x)

        got = best({"bare": bare, "embed": lambda: run_embed(HERE, config)}, rounds)
    print(
        f"embed: resnet50, {n} JPEG of 500×375: bare forward {n / got['bare']:.1f}, embed {n / got['embed']:.1f} "
        f"images/s; ratio {got['bare'] / got['embed']:.3f}"
    )


def views(rounds: int) -> None:
    """The evaluation view by both ways."""
    files = [images.jpeg(image) for image in images.several(500, 375, 24)]
    view = CentreView(224)

    def make(compiled: bool) -> None:
        with patch.object(native, "available", lambda: compiled):
            for data in files:
                view(data)

    got = best({"Pillow": lambda: make(False), "compiled": lambda: make(True)}, 4 * rounds)
    each = {name: 1e3 * seconds / len(files) for name, seconds in got.items()}
    print(
        f"views: JPEG of 500×375 to 224 px: by Pillow {each['Pillow']:.2f} ms, compiled {each['compiled']:.2f} ms "
        f"an image, decoding included; ratio {each['Pillow'] / each['compiled']:.2f}"
    )


def main() -> int:
    """Run the named benchmarks, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", choices=["heads", "knn", "embed", "views", []], help="all unless named")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default 3)")
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s)")
    for name, task in (("heads", heads), ("knn", knn), ("embed", embed), ("views", views)):
        if not args.which or name in args.which:
            task(args.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
