"""``mocov3 report RUN…``: one self-contained page of a run, or of several side by side."""

import argparse
import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mocov3.config.fields import Parser, path
from mocov3.errors import UserError, printable
from mocov3.report.page import Shown, packed_plotly, render
from mocov3.report.panels import learned, unlike, views
from mocov3.report.runs import Run, read_run

PAGE = "report.html"
IMAGES = 1000


def main(argv: Sequence[str]) -> int:
    """Write the page; returns the exit code."""
    args = _parse(argv)
    packed_plotly()  # refused before anything is read
    names = unlike([Path(folder).resolve().name for folder in args.runs])
    runs = [read_run(Path(folder), name) for folder, name in zip(args.runs, names, strict=True)]
    output = Path(args.output) if args.output else runs[0].folder / PAGE
    shown = write_page(runs, output, images=args.pictures, device=args.device)
    if not args.quiet:
        for s in shown:
            print(f"{printable(s.run.name)}: {s.diagnosis.title}. {s.diagnosis.findings[0].reason}")
            for remark in s.remarks:
                print(f"  {printable(remark)}")
        print(f"{printable(str(output))} ({output.stat().st_size / 1e6:.1f} MB, open it in any browser)")
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="mocov3 report",
        description="One page of a pre-training run: does it learn, is it "
        "stable, what "
        "has it learned, what does the network see. Several runs: side by side.",
    )
    parser.add_argument("runs", type=path, nargs="+", metavar="RUN", help="folder of a run (its --output-dir)")
    parser.add_argument(
        "--output", type=path, default="", help=f"page to write (default RUN/{PAGE}; needed for several runs)"
    )
    parser.add_argument(
        "--pictures",
        type=int,
        default=IMAGES,
        metavar="N",
        help=f"images to look at with the newest checkpoint (default {IMAGES}; 0: none, so no network is run)",
    )
    parser.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="device of the network"
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    args = parser.parse_args(list(argv))
    if args.pictures < 0:
        raise UserError(f"--pictures must be 0 or more, not {args.pictures}")
    if len(args.runs) > 1 and not args.output:
        raise UserError("several runs make one page: name it by --output")
    if args.output and Path(args.output).is_dir():
        raise UserError(f"--output {args.output}: is a folder; name a file")
    return args


def write_page(runs: Sequence[Run], output: Path, *, images: int = IMAGES, device: str = "auto") -> list[Shown]:
    """Make the page and put it in place atomically, so that no reader sees half of one; returns what is on it.

    Args:
        runs: to show.
        output: the page; its folder is made if missing.
        images: to look at with the newest checkpoint, at most; 0: no network is run.
        device: of the network.

    Raises:
        UserError: if plotly is not installed or the page cannot be written.
    """
    with np.errstate(all="ignore"):  # whatever a file says, it is shown or left out
        shown = [_show(run, f"r{i}", images, device) for i, run in enumerate(runs)]
        page = render(shown)
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, output)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UserError(f"--output {output}: cannot be written ({error.strerror or error})") from None
    return shown


def _show(run: Run, key: str, images: int, device: str) -> Shown:
    if not images:
        return Shown(run, remarks=["no network was run (--pictures 0)"])
    from mocov3.report.learned import look

    contents = look(run, images=images, device=device)
    shown = Shown(run, facts=contents.facts, remarks=contents.remarks)
    if contents.source is not None and run.config is not None:
        shown.views = views(contents.source, run.config)
    else:
        shown.views = '<p class="note">The images are not available, so their views cannot be shown.</p>'
    if contents.learned is not None:
        shown.panel = learned(contents.learned, key)
        shown.spectra = [(network.title, network.spectrum) for network in contents.learned.networks]
    return shown
