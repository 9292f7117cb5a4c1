"""A race at equal processor time: ours against SimCLR, BYOL and DINO as the library lightly has them.

    pip install 'lightly>=1.5'                # MIT; its transforms, heads and losses, nothing of it is ours
    python benchmarks/race.py --train DIR/train.parquet --test DIR/test.parquet            # everything that is missing
    python benchmarks/race.py --tables        # of what is there
    python benchmarks/race.py --rehearse      # a few steps of everything, on the embedded images

(a) The same network (resnet10_w16, views of 32 px) for all: four settings each are tried for ``--trial-minutes`` on the
training images less 5,000, and judged on those; the best of each then trains on all of them, for ``--minutes``, three
seeds, and is judged on the test images.
(b) Each with its own choice: ours is ``mocov3 pretrain --budget`` with nothing else said; lightly's are its documented
examples (ResNet-18, views of 32 px, SGD at 0.06, batch 256; DINO: Adam at 0.001, batch 64), for the processor seconds
that ours took.

One thread each, loading included, but for (b) ours, a command of its own with whatever processes it starts; their
processor seconds are added up. Measures: k-NN (k 20, τ 0.07) and ridge. Results are kept in ``--results`` as they come:
what was stopped goes on. Once ours is there, two processes can share the rest, each with its ``--methods``.
"""

import argparse
import copy
import io
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import torchvision
from equal_time import BESIDE_LOCAL, FREE, NO_BLUR, RESNET, Measurement, extractor_of, score, spread
from PIL import Image
from torch import Tensor, nn

from mocov3.data import CentreView, Source, open_source
from mocov3.data.sources.opening import Subset
from mocov3.evaluation.features import Extractor
from mocov3.evaluation.frozen import open_frozen
from mocov3.models import build_backbone

Settings = dict[str, Any]
Result = dict[str, Any]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDE, LOCAL = 32, 16
LOOK = 5000
"""Training images that settings are chosen on."""
_EXPECTED = 10
"""Epochs; the clock decides."""
OURS = f"{FREE} {NO_BLUR}"
TRIALS: dict[str, list[Settings]] = {
    "ours": [
        {"flags": OURS},
        {"flags": f"{OURS} --lr 1.6e-2"},
        {"flags": BESIDE_LOCAL},
        {"flags": f"{BESIDE_LOCAL} --moco-m .97"},
    ],
    "SimCLR": [
        {"lr": 4e-3, "temperature": 0.5},
        {"lr": 2e-3, "temperature": 0.5},
        {"lr": 8e-3, "temperature": 0.5},
        {"lr": 4e-3, "temperature": 0.2},
    ],
    "BYOL": [
        {"lr": 2e-3, "momentum": 0.99},
        {"lr": 1e-3, "momentum": 0.99},
        {"lr": 4e-3, "momentum": 0.99},
        {"lr": 2e-3, "momentum": 0.996},
    ],
    "DINO": [
        {"lr": 1e-3, "momentum": 0.99},
        {"lr": 5e-4, "momentum": 0.99},
        {"lr": 2e-3, "momentum": 0.99},
        {"lr": 1e-3, "momentum": 0.996},
    ],
}
DOCUMENTED: dict[str, Settings] = {
    "SimCLR": {"lr": 0.06, "temperature": 0.5, "optimizer": "sgd", "batch": 256, "constant": True},
    "BYOL": {"lr": 0.06, "momentum": 0.99, "optimizer": "sgd", "batch": 256, "constant": True},
    "DINO": {"lr": 1e-3, "momentum": 0.99, "optimizer": "adam", "batch": 64, "constant": True},
}
"""Of lightly's examples."""


class Method(nn.Module):
    """One of lightly's: student (backbone and head), teacher where there is one, loss of a batch of views.

    Args:
        name: SimCLR, BYOL or DINO.
        backbone: a network with ``features`` of ``width`` numbers.
        width: of the features.
        settings: of a trial.
    """

    def __init__(self, name: str, backbone: nn.Module, width: int, settings: Settings) -> None:
        super().__init__()
        from lightly.loss import DINOLoss, NegativeCosineSimilarity, NTXentLoss
        from lightly.models.modules import heads

        self.name, self.momentum = name, settings.get("momentum", 0.0)
        self.backbone: Any = backbone
        head = {
            "SimCLR": lambda: heads.SimCLRProjectionHead(width, width, 128),
            "BYOL": lambda: heads.BYOLProjectionHead(width, 1024, 256),
            "DINO": lambda: heads.DINOProjectionHead(width, 512, 64, 2048),
        }[name]
        self.head, slow_head = head(), head()
        slow_head.load_state_dict(self.head.state_dict())  # weight norm cannot be copied
        self.predictor = heads.BYOLPredictionHead(256, 1024, 256) if name == "BYOL" else nn.Identity()
        self.criterion: Any = {
            "SimCLR": lambda: NTXentLoss(temperature=settings["temperature"]),
            "BYOL": NegativeCosineSimilarity,
            "DINO": lambda: DINOLoss(output_dim=2048, warmup_teacher_temp_epochs=5),
        }[name]()
        self.teacher = nn.ModuleList([copy.deepcopy(self.backbone), slow_head]).requires_grad_(False)

    def loss(self, views: list[Tensor], epoch: int) -> Tensor:
        """Of a batch."""
        outs = [self.head(self.backbone.features(view)) for view in views]
        if self.name == "SimCLR":
            return self.criterion(*outs)
        backbone, head = self.teacher  # type: Any, Any
        with torch.no_grad():
            targets = [head(backbone.features(view)) for view in views[:2]]
        if self.name == "DINO":
            return self.criterion(targets, outs, epoch=epoch)
        one, two = map(self.predictor, outs)
        return 0.5 * (self.criterion(one, targets[1]) + self.criterion(two, targets[0]))

    @torch.no_grad()
    def follow(self) -> None:
        """Move the teacher."""
        for theirs, ours in zip(self.teacher, (self.backbone, self.head), strict=True):
            for slow, fast in zip(theirs.parameters(), ours.parameters(), strict=True):
                slow.lerp_(fast, 1 - self.momentum)


class Resnet18(nn.Module):
    """torchvision's, its pooled output as features."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torchvision.models.resnet18()
        self.net.fc = nn.Identity()

    def features(self, x: Tensor) -> Tensor:
        """(batch, 3, side, side) → (batch, 512)."""
        out: Tensor = self.net(x)
        return out


def transform_of(name: str) -> Callable[[Image.Image], list[Tensor]]:
    """lightly's views for small images, without blur as its documents advise."""
    from lightly import transforms as T

    if name == "SimCLR":
        return T.SimCLRTransform(input_size=SIDE, gaussian_blur=0.0)
    if name == "BYOL":
        views = (T.BYOLView1Transform, T.BYOLView2Transform)
        one, two = (view(input_size=SIDE, gaussian_blur=0.0) for view in views)
        return T.BYOLTransform(view_1_transform=one, view_2_transform=two)
    return T.DINOTransform(global_crop_size=SIDE, local_crop_size=LOCAL, n_local_views=4, gaussian_blur=(0.0, 0.0, 0.0))


def image_of(source: Source, index: int) -> Image.Image:
    """As Pillow has it."""
    data = source.read(index)
    return (Image.open(io.BytesIO(data)) if isinstance(data, bytes) else Image.fromarray(data)).convert("RGB")


def batches(source: Source, name: str, size: int, seed: int) -> Iterator[tuple[list[Tensor], int]]:
    """Views of shuffled images, for ever, and the epoch."""
    transform = transform_of(name)
    for epoch in itertools.count():
        order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(len(source))
        for begin in range(0, len(order) - size + 1, size):
            views = [transform(image_of(source, i)) for i in order[begin : begin + size].tolist()]
            yield (
                [torch.stack(view).contiguous(memory_format=torch.channels_last) for view in zip(*views, strict=True)],
                epoch,
            )


@dataclass
class Race:
    """What is raced on, and for how long."""

    train: str
    test: str
    part: str
    rehearse: bool

    def sources(self, *, look: bool) -> tuple[Source, Source]:
        """Images to train on and, with labels, to judge on."""
        whole = open_source(self.train, "train")
        if self.rehearse:
            return Subset(whole, np.arange(600)), Subset(open_source(self.test, self.part), np.arange(200))
        if not look:
            return whole, open_source(self.test, self.part)
        order = np.random.Generator(np.random.PCG64(0)).permutation(len(whole))
        return Subset(whole, np.sort(order[LOOK:])), Subset(whole, np.sort(order[:LOOK]))

    def lightly(self, name: str, settings: Settings, seconds: float, seed: int, *, look: bool) -> Result:
        """Train one of lightly's for so many processor seconds, and judge it."""
        torch.manual_seed(seed)
        train, judge = self.sources(look=look)
        documented = settings.get("optimizer") is not None
        backbone: Any = Resnet18() if documented else build_backbone("resnet10_w16")
        width = 512 if documented else backbone.num_features
        method = Method(name, backbone.to(memory_format=torch.channels_last), width, settings).train()
        kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}.get(settings.get("optimizer", ""), torch.optim.AdamW)
        trained = [p for p in method.parameters() if p.requires_grad]
        optimizer: Any = kind(trained, lr=settings["lr"], **({} if documented else {"weight_decay": 0.05}))
        size = 16 if self.rehearse else settings.get("batch", 256)
        began, steps = time.process_time(), 0
        for views, epoch in batches(train, name, size, seed):
            done = min((time.process_time() - began) / seconds, 1.0)
            if not settings.get("constant"):  # a twentieth of warm-up, then the cosine, by the clock
                optimizer.param_groups[0]["lr"] = settings["lr"] * min(done / 0.05, 0.5 + 0.5 * np.cos(np.pi * done))
            method.follow()
            optimizer.zero_grad()
            method.loss(views, epoch).backward()
            optimizer.step()
            steps += 1
            if done >= 1 or (self.rehearse and steps >= 3):
                break
        took = time.process_time() - began
        extractor = Extractor(backbone.eval(), backbone.features, CentreView(SIDE), MEAN, STD)
        return {"seconds": took, "images": steps * size, **score(extractor, train, judge)}

    def ours(self, settings: Settings, seconds: float, seed: int, *, look: bool) -> Result:
        """Train ours by its own loop for so many processor seconds, and judge it."""
        train, judge = self.sources(look=look)
        with tempfile.TemporaryDirectory() as folder:
            place = write(train, Path(folder, "train")) if look or self.rehearse else self.train
            measurement = Measurement(argparse.Namespace(train=place, rehearse=self.rehearse))
            result, run, config = measurement.trained(settings["flags"], _EXPECTED, seed, budget=seconds)
        return {**result, **score(extractor_of(run, config), train, judge)}

    def command(self, minutes: float, seed: int) -> Result:
        """``mocov3 pretrain --budget`` as a user calls it, and judge its result."""
        train, judge = self.sources(look=False)
        with tempfile.TemporaryDirectory() as folder:
            data = write(train, Path(folder, "train")) if self.rehearse else self.train
            words = f"--budget {minutes:g}m --device cpu --quiet --seed {seed} --output-dir {folder}/run"
            command = [sys.executable, "-m", "mocov3", "pretrain", data, *words.split()]
            environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
            before = _children_seconds()
            subprocess.run([*command, *(["--max-steps", "4"] if self.rehearse else [])], check=True, env=environment)
            took = _children_seconds() - before
            last = max(Path(folder, "run").glob("checkpoint_*.pth.tar"), key=lambda file: file.stat().st_mtime)
            return {"seconds": took, **score(open_frozen(str(last), flag="--model").extractor, train, judge)}


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def write(source: Source, folder: Path) -> str:
    """A source's images as files."""
    folder.mkdir(parents=True)
    for index in range(len(source)):
        image_of(source, index).save(folder / f"{index:06d}.png", compress_level=1)
    return str(folder)


def run_all(race: Race, args: argparse.Namespace, results: dict[str, Result]) -> None:
    """Whatever is missing, kept as it comes."""

    def once(key: str, measure: Callable[[], Result]) -> None:
        if key not in results:
            measured = measure()
            results.update(kept(args.results))  # of another process, with other --methods
            results[key] = measured
            args.results.write_text(json.dumps(results, indent=1) + "\n")
            print(f"{key}: k-NN {results[key]['knn']:.1f} %, {results[key]['seconds']:.0f} s", flush=True)

    def train(name: str, settings: Settings, seconds: float, seed: int, *, look: bool) -> Result:
        if name == "ours":
            return race.ours(settings, seconds, seed, look=look)
        return race.lightly(name, settings, seconds, seed, look=look)

    mine = {name: trials for name, trials in TRIALS.items() if name in args.methods}
    if "b" in args.parts:
        for seed in range(args.seeds):
            once(f"b/ours/{seed}", partial(race.command, args.minutes, seed))  # it says how long the others have
            for name, settings in DOCUMENTED.items():
                if name not in args.methods:
                    continue
                seconds = results[f"b/ours/{seed}"]["seconds"]
                once(f"b/{name}/{seed}", partial(train, name, settings, seconds, seed, look=False))
    if "a" in args.parts:
        for name, trials in mine.items():
            for number, settings in enumerate(trials):
                once(f"look/{name}/{number}", partial(train, name, settings, 60 * args.trial_minutes, 0, look=True))
        for seed in range(args.seeds):
            for name, trials in mine.items():
                settings = trials[best_of(name, results)]
                once(f"a/{name}/{seed}", partial(train, name, settings, 60 * args.minutes, seed, look=False))


def kept(file: Path) -> dict[str, Result]:
    """What was measured so far."""
    results: dict[str, Result] = json.loads(file.read_text()) if file.exists() else {}
    return results


def best_of(name: str, results: dict[str, Result]) -> int:
    """The trial with the highest k-NN accuracy on the images to choose by."""
    return max(range(len(TRIALS[name])), key=lambda number: results[f"look/{name}/{number}"]["knn"])


def tables(results: dict[str, Result]) -> str:
    """What is there, in Markdown."""
    lines = []
    for part, title in (("b", "each with its own choice"), ("a", "the same network, four trials each")):
        lines += [f"| ({part}) {title} | k-NN, % | ridge, % | images seen | CPU minutes |", "|---|---:|---:|---:|---:|"]
        for name in TRIALS:
            runs = [value for key, value in sorted(results.items()) if key.startswith(f"{part}/{name}/")]
            if runs:
                cells = [spread([run[measure] for run in runs]) for measure in ("knn", "ridge")]
                seen = [run["images"] for run in runs if "images" in run]
                minutes = mean(run["seconds"] for run in runs) / 60
                cells += [f"{mean(seen):,.0f}" if seen else "–", f"{minutes:.1f}"]
                lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    lines += ["| trial | settings | k-NN on the images to choose by, % |", "|---|---|---:|"]
    for key, value in results.items():
        if key.startswith("look/"):
            _, name, number = key.split("/")
            settings = {
                k: v.removeprefix(RESNET).strip() or "as they are"
                for k, v in TRIALS[name][int(number)].items()
                if k == "flags"
            }
            settings = settings or TRIALS[name][int(number)]
            lines.append(f"| {name} | {', '.join(f'{k} {v}' for k, v in settings.items())} | {value['knn']:.1f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", default="fashion-mnist", help="labelled training images")
    parser.add_argument("--test", default="", help="labelled test images (default: the val part of --train)")
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="of the clock for --budget, of one processor in (a)"
    )
    parser.add_argument("--trial-minutes", type=float, default=4.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parts", default="ba")
    parser.add_argument("--methods", nargs="+", default=list(TRIALS), choices=list(TRIALS), help="only these")
    parser.add_argument("--results", type=Path, default=Path("race.json"))
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    if args.rehearse:
        args.minutes, args.trial_minutes, args.seeds = 1.0, 0.1, 1
        args.results = Path(tempfile.mkdtemp()) / "rehearsal.json"
    torch.set_num_threads(1)
    results = kept(args.results)
    if not args.tables:
        part = "train" if args.test else "val"
        run_all(Race(args.train, args.test or args.train, part, args.rehearse), args, results)
    print("\n" + tables(results))


if __name__ == "__main__":
    main()
