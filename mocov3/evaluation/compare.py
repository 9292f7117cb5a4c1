"""Judge networks side by side, without labels or with few: ``mocov3 compare CKPT… DIR``.

Every checkpoint is shown beside the same network untrained, the weights it started from where they are available, and
plain pixels. Measures: ``mocov3.evaluation.quality``; which to trust: ``docs/own-images.md``.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from mocov3.config.archs import check_arch, check_heads
from mocov3.config.evaluation import MEASURES_HELP
from mocov3.config.fields import Parser, path
from mocov3.config.own import GROUP_HELP
from mocov3.data import Source, open_source
from mocov3.data.loading.loader import usable_cores
from mocov3.data.sources.findings import known_findings, names_findings
from mocov3.data.sources.labels import Labelled, Labels, own_labels, read_labels
from mocov3.data.sources.opening import has_unseen
from mocov3.errors import UserError, printable
from mocov3.evaluation.intervals import rank_correlation
from mocov3.evaluation.measures import described, require
from mocov3.evaluation.paired import Paired, against_start, findings_against_start
from mocov3.metrics import JsonLine, plain
from mocov3.output.log import warn_left_out

_CORRELATE_FROM = 8


def main(argv: Sequence[str]) -> int:
    """Judge every network, print the table; returns the exit code."""
    args = _parse(argv)
    if len(args.things) < 2:
        raise UserError("compare takes checkpoints and then the folder of images: mocov3 compare CKPT… DIR")
    *files, data = args.things
    for file in files:
        if not Path(file).is_file():
            raise UserError(f"{file}: there is no such checkpoint file")
    whole, separate = _images(data)
    labels = _labels(args.labels, whole)
    if args.measures or (labels is not None and labels.numbers.ndim == 2):
        require("--measures" if args.measures else "--labels: AUROC of findings")
    from mocov3.evaluation.label_free import IMAGES
    from mocov3.evaluation.network_scores import judge_all, kept_back, read_all

    networks = read_all(files)
    unseen = None if separate else kept_back(networks, data, whole)
    images = whole if unseen is None else unseen
    if len(images) < 10:
        raise UserError(f"data {data}: {len(images)} images are too few to judge by; 10 or more are needed")
    warn_left_out(whole, labels and Labelled(whole, labels))
    rows = judge_all(
        networks,
        images,
        whole,
        labels,
        device=args.device,
        workers=args.workers,
        arch=args.arch or None,
        heads=args.heads,
        blend=args.blend,
        group_by=args.group_by,
        measures=args.measures,
    )
    if args.json:
        for row in rows:
            print(json.dumps(plain(row)))
        return 0
    left_out = min(len(images), IMAGES) - rows[0]["pictures"]
    _print(rows, labels, args.labels, held_out=unseen is not None, left_out=left_out)
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="mocov3 compare", description=__doc__)
    parser.add_argument(
        "things",
        type=path,
        nargs="*",
        metavar="CKPT… DIR",
        help="weights files, then images to judge by; "
        "best images that were not trained on (DIR/val is used where it exists)",
    )
    parser.add_argument("-a", "--arch", default="", help="backbone of files that do not name it")
    parser.add_argument("--heads", type=int, metavar="N", help="attention heads of a ViT, of files that do not tell")
    parser.add_argument(
        "--labels",
        type=path,
        default="",
        metavar="CSV",
        help="path,label of some images (10–100 will do), or a column of 1, 0 or nothing a finding",
    )
    parser.add_argument(
        "--group-by", default="", metavar="GROUPS", help=f"{GROUP_HELP}; no image is judged by others of its group"
    )
    parser.add_argument(
        "--blend",
        type=_fractions,
        default=(),
        metavar="F,…",
        help="judge blends too, of weights this far from each run's start (0) to its end (1), as in 0,.25,.5,.75,1",
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="device")
    parser.add_argument("--workers", "-j", type=int, default=usable_cores(), help="loading processes (0: none)")
    parser.add_argument("--measures", action="store_true", help=f"{MEASURES_HELP}, of labelled images")
    parser.add_argument("--json", action="store_true", help="print a JSON line a network instead of the table")
    args = parser.parse_args(list(argv))
    if args.arch:
        check_arch(args.arch)
    check_heads(args.heads, args.arch)
    if args.workers < 0:
        raise UserError(f"--workers must be 0 or more, not {args.workers}")
    return args


def _fractions(text: str) -> tuple[float, ...]:
    fractions = tuple(float(part) for part in text.split(","))
    if not all(0 <= f <= 1 for f in fractions):
        raise argparse.ArgumentTypeError(f"{text!r}: fractions lie from 0 (the start) to 1 (the file)")
    return fractions


def _images(data: str) -> tuple[Source, bool]:
    """Images to judge on, and whether they are a part of their own (DIR/val)."""
    return (open_source(data, "val"), True) if has_unseen(data) else (open_source(data), False)


def _labels(name: str, whole: Source) -> Labels | None:
    """Known classes or findings: of the file, else the images' own."""
    if not name:
        return own_labels(whole)
    if names_findings(name, [whole], "--labels"):
        return known_findings(name, [whole])[0]
    return read_labels(Path(name), whole)


_COLUMNS = {
    "retrieval": ("found %", ".1f"),
    "rankme": ("RankMe", ".1f"),
    "alpha": ("α-ReQ", ".2f"),
    "lidar": ("LiDAR", ".1f"),
    "alignment": ("align.", ".2f"),
    "uniformity": ("unif.", ".2f"),
    "dimension": ("IdEst", ".1f"),
}
_NAME = 34


def _print(rows: list[JsonLine], labels: Labels | None, file: str, *, held_out: bool, left_out: int) -> None:
    trained = [row for row in rows if row["kind"] == "checkpoint"]
    best = max(row["retrieval"] for row in rows if row["kind"] in ("checkpoint", "blend"))
    which = " that these runs kept back (--hold-out)" if held_out else ""
    which += f" ({left_out} unreadable left out)" if left_out else ""
    print(f"{rows[0]['pictures']} images{which}, by views of kinds not trained on; *: finds most again\n")
    what = "auroc" if labels is not None and labels.numbers.ndim == 2 else "knn"
    heads = [f"{title:>7}" for title, _ in _COLUMNS.values()]
    heads += [f"{'AUROC' if what == 'auroc' else 'k-NN'} % (95 %)"] if labels is not None else []
    print(f"  {'network':<{_NAME}}" + " ".join(heads))
    for row in rows:
        cells = [f"{row[name]:>7{form}}" for name, (_, form) in _COLUMNS.items()]
        if labels is not None:
            cells.append(f"{row[what]:.1f} ({row[f'{what}_low']:.1f}–{row[f'{what}_high']:.1f})")
        name = printable(row["name"])
        name = name if len(name) < _NAME else "…" + name[2 - _NAME :]
        mark = "*" if row["kind"] in ("checkpoint", "blend") and row["retrieval"] == best else " "
        print(f"{mark} {name:<{_NAME}}" + " ".join(cells))
    print("\nBetter: more found, higher RankMe and LiDAR, lower alignment, uniformity and IdEst. The share found")
    print("again goes along with k-NN best (docs/own-images.md). Compare on the same images only.")
    if labels is not None:
        kind = "findings" if what == "auroc" else "classes"
        counted = f"{rows[0]['labelled']} labelled images of {len(labels.classes)} {kind}"
        groups = rows[0].get("labelled_groups")
        others = f"those of other groups ({groups} in all, resampled whole)" if groups else "the others"
        print(
            f"k-NN: each of {counted} judged by {others} (k 20, τ .07){' of ' + file if file else ''}; "
            "where intervals overlap, the labels can't tell networks apart."
        )
        for row in rows:
            if change := row.get("against_start"):
                name = printable(row["name"])
                if "auroc" in change:
                    print(findings_against_start(name, change))
                else:
                    print(against_start(name, Paired.from_dict(change)))
        for row in rows:
            if found := row.get("measures"):
                print("\n" + "\n".join([printable(row["name"]), *described(found, labels.classes)]))
        if len(trained) >= _CORRELATE_FROM:
            parts = []
            for name, (title, _) in _COLUMNS.items():
                value = rank_correlation([row[name] for row in trained], [row[what] for row in trained])
                parts.append(f"{title} {value:+.2f}")
            print(f"Rank correlation with k-NN over {len(trained)} checkpoints: {', '.join(parts)}")
