"""Before training: ``mocov3 check DIR`` looks at images and machine, and writes a sheet of what a network would see.

Takes the flags of ``mocov3 pretrain`` too, so that what is shown is what that command would do.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mocov3.config.fields import Layers, Parser
from mocov3.config.views import preset_of
from mocov3.data import Source, open_source
from mocov3.data.loading.loader import usable_cores
from mocov3.data.sources.scan import unreadable_folders
from mocov3.data.sources.survey import Survey, sample, survey
from mocov3.errors import UserError, printable
from mocov3.output.sheet import write_sheet
from mocov3.planning.auto import GIB, block, memory_of
from mocov3.planning.choose import Proposal, propose_settings

_SAMPLE = 5000
_LISTED = 10
_GROUP_FROM = 0.01


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Own flags, and the rest, which are those of pre-training."""
    parser = Parser(prog="mocov3 check", description=__doc__, add_help=False, allow_abbrev=False)
    parser.add_argument("--sample", type=int, default=_SAMPLE, help="images to examine")
    parser.add_argument("--all", action="store_true", help="examine every image")
    parser.add_argument("--sheet", default="check.png", help="where to write the sheet of views")
    if "-h" in argv or "--help" in argv:
        parser.add_argument("-h", "--help", action="help", help="this; flags of mocov3 pretrain are taken too")
    args, rest = parser.parse_known_args(list(argv))
    if args.sample < 1:
        raise UserError(f"--sample must be 1 or more, not {args.sample}")
    return args, rest


def main(args: argparse.Namespace, layers: Layers) -> int:
    """Examine, measure, print; returns the exit code."""
    values = layers.merged()
    source = open_source(values.get("data") or "")
    n = len(source)
    indices = np.arange(n) if args.all else sample(n, args.sample)
    found = survey(source, indices, workers=max(usable_cores(), 1), reading=preset_of(values).reading)
    as_json = bool(values.get("json"))
    if not as_json:
        print("\n".join(_facts(source, found, values)), flush=True)
    proposal = propose_settings(layers, found)
    rows = write_sheet(Path(args.sheet), source, proposal.config)
    if as_json:
        print(
            json.dumps(
                {
                    "survey": {"pictures" if k == "images" else k: v for k, v in asdict(found).items()},
                    "settings": asdict(proposal.config),
                    "sheet": args.sheet,
                    "left_out": getattr(source, "skipped", []),
                    "training_seconds": proposal.training,
                    "loading_seconds": proposal.loading,
                }
            )
        )
        return 0
    print(f"\nSettings that mocov3 pretrain would take ({proposal.machine.name}):")
    print(block(proposal.choices, layers.recipe, layers.given))
    print("\n" + "\n".join(_speed(proposal)))
    print("\n".join(_near_in_batches(found, proposal.config.batch_size, bool(proposal.config.group_by))))
    print(f"\n{args.sheet}: {rows} images with their views under --view-preset {proposal.config.view_preset}")
    return 0


def _facts(source: Source, found: Survey, values: dict[str, Any]) -> list[str]:
    low, middle, high = found.short_side
    lines = [
        f"{found.images} images"
        + ("" if found.examined == found.images else f", of which {found.examined} were examined (--all: every one)")
    ]
    for folder in str(values.get("data")).split("\n"):
        if Path(folder).is_dir():
            lines += [
                f"  folder that cannot be read: {printable(name)} ({why})"
                for name, why in unreadable_folders(Path(folder))[:_LISTED]
            ]
    left_out = getattr(source, "skipped", [])
    lines += [f"  {printable(line)}" for line in left_out[:_LISTED]]
    lines += [f"  {len(left_out) - _LISTED} more such lines"] if len(left_out) > _LISTED else []
    if source.classes:
        lines.append(f"  class folders    {len(source.classes)}")
    if found.readable:
        formats = ", ".join(f"{kind} {count}" for kind, count in list(found.formats.items())[:6])
        lines += [
            f"  formats          {formats}",
            f"  shorter side     {middle} px (5 % up to {low}, 5 % above {high}); longer {found.long_side[1]} px",
            f"  grey             {100 * found.gray_share:.0f} %",
            *_deep(found, values),
            f"  turned by EXIF   {100 * found.turned_share:.0f} %",
            f"  mean, std        {found.mean_std}",
            f"  copies           {found.copies} equal to an earlier one, {found.near_copies} nearly"
            + _examples(source, found),
            f"  alike, upright   mean correlation {found.alike:.2f}; mean image against its turns "
            f"{found.upright:.1f} × chance",
        ]
    if found.unreadable:
        share = 100 * len(found.unreadable) / found.examined
        lines.append(f"  unreadable       {len(found.unreadable)} ({share:.1f} %; --max-corrupt stops a run above 1 %)")
        reasons = Counter(reason for _, reason in found.unreadable)
        for reason, count in reasons.most_common(_LISTED):
            index = next(i for i, r in found.unreadable if r == reason)
            lines.append(f"    {count} × {reason}, as {printable(source.name(index))}")
    return lines


def _deep(found: Survey, values: dict[str, Any]) -> list[str]:
    count, low, high = found.deep
    if not count:
        return []
    line = f"  over 8 bits      {count} images, values {low:g} to {high:g}"
    if values.get("bit_window"):
        return [f"{line}; --bit-window {values['bit_window']}"]
    bits = next((b for b in (10, 12, 14) if high < 2**b), 16)
    hint = f"; their upper 8 bits are used: give --bit-window 0,{2**bits - 1}" if 1 < high < 2**14 else ""
    return [line + hint]


def _examples(source: Source, found: Survey) -> str:
    if not found.near_examples:
        return ""
    first, second = found.near_examples[0]
    return f", as {printable(source.name(first))} and {printable(source.name(second))}"


def _speed(proposal: Proposal) -> list[str]:
    c, n = proposal.config, proposal.images.count
    lines = []
    if proposal.training and proposal.loading:
        model, loader = n / proposal.training, n / proposal.loading
        bound = "reading images" if loader < model else "computing"
        cure = "; more --workers or smaller files would help" if loader < model else ""
        lines.append(
            f"  speed            the network {model:.0f} images/s, {c.workers} loader processes "
            f"{loader:.0f}/s: bound by {bound}{cure}"
        )
    each, fixed = memory_of(c.arch, c.image_size, c.small_stem, half=proposal.machine.device == "cuda")
    need = (each * c.batch_size + fixed) / GIB
    lines.append(f"  memory           about {need:.1f} GB of {proposal.machine.memory / GIB:.1f} GB (estimated)")
    return lines


def _near_in_batches(found: Survey, batch: int, grouped: bool) -> list[str]:
    share = min(found.partners * (batch - 1) / max(found.images - 1, 1), 1.0)
    line = f"  false negatives  {100 * share:.2f} % of images would meet a near-copy in their batch of {batch}"
    if share > _GROUP_FROM and not grouped:
        line += "; keep them apart by --group-by, or remove copies"
    return [line]
