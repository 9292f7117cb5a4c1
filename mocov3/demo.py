"""``mocov3 demo``: pre-train on the embedded Fashion-MNIST images and show what was learned, without a GPU.

Images 0–7,999 are for pre-training (labels unused) and are the bank; 8,000–9,999 are the test. The table compares
raw pixels, HOG (Dalal & Triggs 2005, by scikit-image), the untrained network and the trained one, on the test
images as they are and moved: shifted, scaled and brightened, the bank unchanged.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mocov3.config import PretrainConfig
from mocov3.config.fields import Parser, path
from mocov3.config.recipes import RECIPES
from mocov3.data import CentreView, FashionMnist
from mocov3.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = object  # torch takes seconds to import

RECIPE = "fashion_mnist"
LABELS_PER_CLASS, LABEL_DRAWS = 10, 20
SHIFT, SCALE, BRIGHTNESS = 4.0, (0.8, 1.2), (0.7, 1.3)
_MOVE_SEED = 2104
_EPOCHS = RECIPES[RECIPE].settings["epochs"]
_QUICK = 10  # epochs
_LONGEST = 450.0  # seconds of training: with start and end within 8 minutes
_SHEET_QUERIES, _SHEET_NEIGHBOURS, _SHEET_SIDE = 10, 8, 48

Rows = dict[str, dict[str, float]]
"""Features → measure → accuracy in %."""
COLUMNS = {"knn": "k-NN", "few": "10 labels", "knn_moved": "moved: k-NN", "few_moved": "moved: 10 labels"}


def main(argv: Sequence[str]) -> int:
    """Train, measure, print the table; writes ``demo.json`` and ``neighbours.png`` into the run's folder."""
    args = _parse(argv)
    folder = Path(args.output_dir or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-demo")
    began = time.monotonic()
    print(f"Pre-training on 8,000 images without labels, then comparing features; files in {folder}", flush=True)
    from mocov3.config.command_lines import parse_pretrain
    from mocov3.pretraining.task import main as pretrain

    flags = ["fashion-mnist", "--recipe", RECIPE, "--output-dir", str(folder), "--seed", str(args.seed), "-p", "20"]
    if args.epochs:
        flags += ["--epochs", str(args.epochs)]
        flags += ["--warmup-epochs", "0"] if args.epochs <= _QUICK else []  # no time to warm up
    if args.resume:
        flags += ["--resume", "auto"]
    config = parse_pretrain(flags, prog="mocov3 demo")
    # beside steps that fill all cores a loader process costs more time than it saves (docs/demo.md)
    config = dataclasses.replace(config, workers=0, checkpoint_every=20)
    if not args.epochs:
        config = dataclasses.replace(config, epochs=_epochs_in_time(config))
    code = pretrain(config, script_door=False)
    if code:
        return code
    trained = time.monotonic() - began
    bank, test = FashionMnist("train"), FashionMnist("val")
    rows, nearest = compare(bank, test, folder, config)
    _print_table(rows)
    print(
        f"\n{trained:.0f} s of training, {time.monotonic() - began - trained:.0f} s of comparing. "
        f"k-NN: k 20, τ .07, features before the projector; 10 labels: nearest centroid, 10 a class, mean of "
        f"{LABEL_DRAWS} draws. Moved: shifted by up to {SHIFT:.0f} px, scaled by {SCALE[0]}–{SCALE[1]}, brightened by "
        f"{BRIGHTNESS[0]}–{BRIGHTNESS[1]}. Standard error of a k-NN accuracy here: 0.9."
    )
    _write_sheet(folder / "neighbours.png", bank, test, nearest)
    result = {"seed": args.seed, "epochs": config.epochs, "training_seconds": round(trained, 1), "accuracy": rows}
    (folder / "demo.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"Images with their nearest neighbours: {folder / 'neighbours.png'}")
    _write_page(folder)
    print(f"Use the features: mocov3.load_backbone('{folder}/checkpoint_{config.epochs - 1:04d}.pth.tar')")
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="mocov3 demo", description=__doc__, add_help=True)
    parser.add_argument("--output-dir", type=path, default="", help="folder of the run (default runs/TIME-demo)")
    parser.add_argument("--seed", type=int, default=0, help="seed (default 0)")
    parser.add_argument("--epochs", type=int, default=0, help=f"epochs (default {_EPOCHS}, or what 8 minutes hold)")
    parser.add_argument("--resume", action="store_true", help="resume the run in --output-dir")
    args = parser.parse_args(list(argv))
    if args.epochs < 0:
        raise UserError(f"--epochs must be 1 or more, not {args.epochs}")
    if args.resume and not args.output_dir:
        raise UserError("--resume: name the run to resume with --output-dir")
    return args


def _epochs_in_time(config: PretrainConfig) -> int:
    """The recipe's epochs, or as many as 8 minutes hold on this machine; a resumed run keeps its own."""
    from mocov3.planning.choose import saved_fields
    from mocov3.planning.speed import epoch_seconds

    if saved := saved_fields(dataclasses.asdict(config)):
        return int(saved.get("epochs", config.epochs))
    images = FashionMnist("train")
    seconds = sum(epoch_seconds(config, images, len(images), best=True)[:2])
    epochs = max(min(config.epochs, int(_LONGEST / seconds)), config.warmup_epochs + 1)
    if epochs < config.epochs:
        print(
            f"This machine trains about {len(images) / seconds:.0f} images a second: {epochs} epochs instead of "
            f"{config.epochs}, to end within 8 minutes (--epochs {config.epochs} for all)",
            flush=True,
        )
    return epochs


def compare(
    bank: FashionMnist, test: FashionMnist, folder: Path, config: PretrainConfig
) -> tuple[Rows, dict[str, np.ndarray]]:
    """Accuracies of all features, and the nearest bank images of the sheet's queries by network."""
    import torch

    from mocov3.distributed import World
    from mocov3.evaluation.features import Extractor, extract
    from mocov3.evaluation.neighbours import knn_accuracy
    from mocov3.pretraining.assemble import build_model
    from mocov3.weights import checkpoint, convert

    world = World(0, 1, torch.device("cpu"))
    assert bank.labels is not None
    assert test.labels is not None
    moved = move(test.images, _MOVE_SEED)
    torch.manual_seed(config.seed)
    untrained = build_model(config, world).base_encoder
    newest = checkpoint.newest(folder)
    assert newest is not None
    trained = convert.load_backbone(newest[0])

    view = CentreView(config.image_size, config.preset.evaluation_zoom)
    mean, std = config.preset.mean, config.preset.std
    before, after = (Extractor(encoder, encoder.features, view, mean, std) for encoder in (untrained, trained))
    described = {
        "raw pixels": lambda source: torch.from_numpy(source.images.reshape(len(source), -1) / 255.0).float(),
        "HOG": lambda source: torch.from_numpy(hog(source.images)),
        "untrained network": lambda source: extract(before, source, world),
        "MoCo v3 (this run)": lambda source: extract(after, source, world),
    }
    rows: Rows = {}
    nearest = {}
    labels = torch.from_numpy(bank.labels).long()
    for name, describe in described.items():
        features = describe(bank)
        rows[name] = {}
        for suffix, images in (("", test), ("_moved", _Moved(moved))):
            queries, answers = describe(images), torch.from_numpy(test.labels).long()
            rows[name]["knn" + suffix] = knn_accuracy(features, labels, queries, answers)
            rows[name]["few" + suffix] = few_labels(features, labels, queries, answers)
            if suffix == "":
                nearest[name] = _nearest(features, queries[_sheet_queries(test.labels)])
    return rows, nearest


class _Moved:
    """Test images after ``move``, as a source."""

    labels = None
    classes: list[str] = []  # noqa: RUF012 (never changed)
    digest = ""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> np.ndarray:
        return self.images[index]

    def name(self, index: int) -> str:
        return f"moved/{index}"


def move(images: np.ndarray, seed: int) -> np.ndarray:
    """Images shifted, scaled about their centre and brightened by draws of ``seed``; black comes in from outside.

    Args:
        images: uint8, (images, height, width).
        seed: of numpy's PCG64; the draws depend on nothing else.
    """
    import cv2

    u = np.random.Generator(np.random.PCG64(seed)).random((len(images), 4))
    centre = (images.shape[1] - 1) / 2
    out = np.empty_like(images)
    for i, (image, (across, down, size, light)) in enumerate(zip(images, u, strict=True)):
        scale = SCALE[0] + size * (SCALE[1] - SCALE[0])
        shift = SHIFT * (2 * np.array([across, down]) - 1)
        across, down = centre - scale * centre + shift
        matrix = np.array([[scale, 0, across], [0, scale, down]])
        warped = cv2.warpAffine(image, matrix, image.shape[::-1], flags=cv2.INTER_LINEAR)
        bright = BRIGHTNESS[0] + light * (BRIGHTNESS[1] - BRIGHTNESS[0])
        out[i] = np.clip(np.rint(warped * bright), 0, 255)
    return out


def hog(images: np.ndarray) -> np.ndarray:
    """Histograms of oriented gradients of grey images, as float32 (images, width)."""
    from skimage.feature import hog as describe

    return np.stack(
        [describe(image, orientations=9, pixels_per_cell=(4, 4), cells_per_block=(2, 2)) for image in images]
    ).astype(np.float32)


def few_labels(bank: Tensor, labels: Tensor, queries: Tensor, answers: Tensor) -> float:
    """Accuracy in % of the nearest centroid with ten labelled bank images a class, over twenty draws."""
    import torch

    from mocov3.evaluation.neighbours import centroid_predict

    centre, y = bank.mean(0), labels.numpy()
    hits = 0
    for draw in range(LABEL_DRAWS):
        rng = np.random.Generator(np.random.PCG64(draw))
        chosen = np.concatenate(
            [rng.choice(np.flatnonzero(y == c), LABELS_PER_CLASS, replace=False) for c in range(y.max() + 1)]
        )
        predicted = centroid_predict(bank[chosen], torch.from_numpy(y[chosen]), queries, centre=centre)
        hits += int((predicted == answers).sum())
    return 100 * hits / (LABEL_DRAWS * len(answers))


def _nearest(bank: Tensor, queries: Tensor) -> np.ndarray:
    from torch.nn.functional import normalize

    return (normalize(queries, dim=1) @ normalize(bank, dim=1).T).topk(_SHEET_NEIGHBOURS, dim=1).indices.numpy()


def _sheet_queries(labels: np.ndarray) -> np.ndarray:
    return np.array([np.flatnonzero(labels == c)[0] for c in range(_SHEET_QUERIES)])


def _write_sheet(path: Path, bank: FashionMnist, test: FashionMnist, nearest: dict[str, np.ndarray]) -> None:
    """An image: one query a class, its nearest bank images by the untrained and the trained network."""
    from PIL import Image, ImageDraw

    assert bank.labels is not None
    assert test.labels is not None
    side, gap, margin = _SHEET_SIDE, 4, 22
    cell = side + gap
    names = ["untrained network", "MoCo v3 (this run)"]
    width = cell * (1 + 2 * _SHEET_NEIGHBOURS) + 4 * gap
    sheet = Image.new("RGB", (width, margin + _SHEET_QUERIES * cell), "white")
    pen = ImageDraw.Draw(sheet)
    left = [cell + 2 * gap, cell + 4 * gap + _SHEET_NEIGHBOURS * cell]
    pen.text((gap, 5), "query", fill="black")
    for x, name in zip(left, names, strict=True):
        pen.text((x, 5), f"nearest by {name} (red: another class)", fill="black")
    for row, query in enumerate(_sheet_queries(test.labels)):
        y = margin + row * cell
        sheet.paste(Image.fromarray(test.images[query]).resize((side, side)), (gap, y))
        for x, name in zip(left, names, strict=True):
            for column, index in enumerate(nearest[name][row]):
                place = (x + column * cell, y)
                sheet.paste(Image.fromarray(bank.images[index]).resize((side, side)), place)
                if bank.labels[index] != test.labels[query]:
                    box = (place[0], y, place[0] + side - 1, y + side - 1)
                    pen.rectangle(box, outline=(214, 39, 40), width=3)
    sheet.save(path)


def _write_page(folder: Path) -> None:
    """The run's page, where plotly is installed; a failure does not take the demo's results away."""
    from mocov3.report.command import PAGE, write_page
    from mocov3.report.runs import read_run

    try:
        write_page([read_run(folder)], folder / PAGE, device="cpu")
    except UserError as error:
        print(f"No page of this run: {error}")
    else:
        print(f"All about this run on one page: {folder / PAGE}")


def _print_table(rows: Rows) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="accuracy in % on 2,000 test images")
    table.add_column("features")
    for title in COLUMNS.values():
        table.add_column(title, justify="right")
    best = {column: max(row[column] for row in rows.values()) for column in COLUMNS}
    for name, row in rows.items():
        cells = [f"[bold]{row[c]:.1f}[/bold]" if row[c] == best[c] else f"{row[c]:.1f}" for c in COLUMNS]
        table.add_row(name, *cells)
    Console(width=None).print(table)
