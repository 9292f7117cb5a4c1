"""Before training: ``mocov3 check DIR`` looks at images and machine, and writes a sheet of what a network would see.

Takes the flags of ``mocov3 pretrain`` too, so that what is shown is what that command would do.
"""

import argparse
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from mocov3.config.fields import Fields, Layers, Parser, path
from mocov3.config.views import preset_of
from mocov3.data import Source, open_source
from mocov3.data.loading.loader import usable_cores
from mocov3.data.sources.groups import groups_in, suggested
from mocov3.data.sources.opening import SEPARATOR, field_groups
from mocov3.data.sources.survey import Survey, sample, survey
from mocov3.errors import UserError, printable
from mocov3.output.sheet import write_sheet
from mocov3.planning.auto import GIB
from mocov3.planning.choices import block
from mocov3.planning.choose import Proposal, propose_settings

_SAMPLE = 5000
_LISTED = 10
_NAMES = 200_000  # looked at for groups
_GROUP_FROM = 0.01


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Own flags, and the rest, which are those of pre-training."""
    parser = Parser(prog="mocov3 check", description=__doc__, add_help=False, allow_abbrev=False)
    parser.add_argument("--sample", type=int, default=_SAMPLE, help="images to examine")
    parser.add_argument("--all", action="store_true", help="examine every image")
    parser.add_argument("--sheet", type=path, default="check.png", help="where to write the sheet of views")
    if "-h" in argv or "--help" in argv:
        parser.add_argument("-h", "--help", action="help", help="this; flags of mocov3 pretrain are taken too")
    args, rest = parser.parse_known_args(list(argv))
    if args.sample < 1:
        raise UserError(f"--sample must be 1 or more, not {args.sample}")
    return args, rest


def main(args: argparse.Namespace, layers: Layers) -> int:
    """Examine, measure, print; returns the exit code."""
    values = layers.merged()
    data = values.get("data") or ""
    for name in data.split(SEPARATOR):
        folder = name if os.path.isdir(name) else name.rpartition(":")[0]
        if os.path.isdir(folder) and Path(args.sheet).resolve().is_relative_to(Path(folder).resolve()):
            raise UserError(
                f"--sheet {args.sheet}: lies in {folder}, where it would be taken for an image; name a file outside"
            )
    source = open_source(data)
    n, grouped = len(source), _groups(source, values)
    indices = np.arange(n) if args.all else sample(n, args.sample)
    facts = survey(source, indices, workers=max(usable_cores(), 1), reading=preset_of(values).reading, detail=True)
    as_json = bool(values.get("json"))
    if not as_json:
        print("\n".join(_facts(source, facts, values)), flush=True)
    proposal = propose_settings(layers, facts)
    rows = write_sheet(Path(args.sheet), source, proposal.config)
    if as_json:
        print(
            json.dumps(
                {
                    "survey": {"pictures" if k == "images" else k: v for k, v in asdict(facts).items()},
                    "settings": asdict(proposal.config),
                    "sheet": args.sheet,
                    "left_out": getattr(source, "skipped", []),
                    "group_by": found[0] if (found := _suggested(source, values)) else None,
                    "training_seconds": proposal.training,
                    "loading_seconds": proposal.loading,
                }
            )
        )
        return 0
    print(f"\nSettings that mocov3 pretrain would take ({proposal.machine.name}):")
    print(block(proposal.choices, layers.recipe, layers.given))
    print("\n" + "\n".join(_speed(proposal)))
    print("\n".join(_near_in_batches(facts, proposal.config.batch_size, bool(proposal.config.group_by))))
    if grouped:
        print(grouped)
    print(f"\n{args.sheet}: {rows} images with their views under --view-preset {proposal.config.view_preset}")
    return 0


def _facts(source: Source, survey: Survey, values: Fields) -> list[str]:
    low, middle, high = survey.short_side
    lines = [
        f"{survey.images} images"
        + ("" if survey.examined == survey.images else f", of which {survey.examined} were examined (--all: every one)")
    ]
    left_out = getattr(source, "skipped", [])
    lines += [f"  {printable(line)}" for line in left_out[:_LISTED]]
    lines += [f"  {len(left_out) - _LISTED} more such lines"] if len(left_out) > _LISTED else []
    if source.classes:
        lines.append(printable(f"  classes          {len(source.classes)}: {', '.join(source.classes[:_LISTED])}"))
    if survey.readable:
        formats = ", ".join(f"{kind} {count}" for kind, count in list(survey.formats.items())[:6])
        lines += [
            f"  formats          {formats}",
            f"  shorter side     {middle} px (5 % up to {low}, 5 % above {high}); longer {survey.long_side[1]} px",
            *_detail(survey),
            f"  grey             {100 * survey.gray_share:.0f} %",
            *_deep(survey, values),
            f"  turned by EXIF   {100 * survey.turned_share:.0f} %",
            f"  mean, std        {survey.mean_std}",
            f"  copies           {survey.copies} equal to an earlier one, {survey.near_copies} nearly"
            + _examples(source, survey),
            f"  similarity       mean correlation {survey.alike:.2f}; mean image against its rotations "
            f"{survey.upright:.1f} × chance",
        ]
    if survey.remarked:
        index, remark = survey.remarked[0]
        name = printable(source.name(index))
        lines.append(f"  remarks          {len(survey.remarked)} images, first: {name}: {remark}")
    if survey.unreadable:
        share = 100 * len(survey.unreadable) / survey.examined
        lines.append(
            f"  unreadable       {len(survey.unreadable)} ({share:.1f} %; --max-corrupt stops a run above 1 %)"
        )
        reasons = Counter(reason for _, reason in survey.unreadable)
        for reason, count in reasons.most_common(_LISTED):
            index = next(i for i, r in survey.unreadable if r == reason)
            lines.append(f"    {count} × {reason}, as {printable(source.name(index))}")
    return lines


def _detail(survey: Survey) -> list[str]:
    """What smaller sizes keep; nothing where the images are as small."""
    kept = [f"{100 * share:.0f} % at {side} px" for side, share in survey.detail.items() if side < survey.short_side[1]]
    return [f"  detail           of the edges' energy {', '.join(kept)}"] if kept else []


def _deep(survey: Survey, values: Fields) -> list[str]:
    count, low, high = survey.deep
    if not count:
        return []
    line = f"  over 8 bits      {count} images, values {low:g} to {high:g}"
    if values.get("bit_window"):
        return [f"{line}; --bit-window {values['bit_window']}"]
    bits = next((b for b in (10, 12, 14) if high < 2**b), 16)
    hint = f"; their upper 8 bits are used: give --bit-window 0,{2**bits - 1}" if 1 < high < 2**14 else ""
    return [line + hint]


def _examples(source: Source, survey: Survey) -> str:
    if not survey.near_examples:
        return ""
    first, second = survey.near_examples[0]
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
    from mocov3.pretraining.assemble import count_memory

    need = count_memory(c, sixteen_bits=proposal.machine.trains_in_16_bits(c.precision)).peak(c.batch_size) / GIB
    lines.append(f"  memory           about {need:.1f} GB of {proposal.machine.memory / GIB:.1f} GB (counted)")
    return lines


def _suggested(source: Source, values: Fields) -> tuple[str, int] | None:
    """What names say of groups, where nothing else does."""
    if values.get("group_by") or field_groups(source, "") is not None:
        return None
    names = [source.name(i) for i in sample(len(source), _NAMES).tolist()]
    return suggested(names, in_classes=bool(source.classes))


def _groups(source: Source, values: Fields) -> str:
    """A line on groups: those that count, or those that names suggest."""
    groups = groups_in(source, str(values.get("group_by") or ""))
    if groups is not None:
        return f"  groups           {int(groups.max()) + 1} of {len(source)} images"
    if (found := _suggested(source, values)) is None:
        return ""
    pattern, count = found
    first = printable(source.name(0))
    return (
        f"  groups           names look like {count} groups of images that belong together, first {first}: "
        f"give --group-by '{pattern}', to knn, lincls, finetune and compare too, or images of one group are judged by "
        "each other; --group-by none, if they do not"
    )


def _near_in_batches(survey: Survey, batch: int, grouped: bool) -> list[str]:
    share = min(survey.partners * (batch - 1) / max(survey.images - 1, 1), 1.0)
    line = f"  false negatives  {100 * share:.2f} % of images would meet a near-copy in their batch of {batch}"
    if share > _GROUP_FROM and not grouped:
        line += "; keep them apart by --group-by, of which they may be one group, or remove copies"
    return [line]
