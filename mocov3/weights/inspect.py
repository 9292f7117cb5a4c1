"""What a weights file is and is good for: ``mocov3 inspect FILE``. Nothing in it is run."""

import contextlib
import dataclasses
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mocov3.config.fields import Parser, path
from mocov3.errors import UserError, no_file, printable
from mocov3.metrics import JsonLine
from mocov3.weights import Contents, our_entry, trained_with

if TYPE_CHECKING:
    from mocov3.weights.find import BackboneWeights
else:
    BackboneWeights = object  # with torch, which takes seconds to import


def main(argv: Sequence[str]) -> int:
    """Print what is known; returns the exit code."""
    parser = Parser(prog="mocov3 inspect", description=__doc__)
    parser.add_argument(
        "file", type=path, metavar="FILE", help="weights: ours, the reference's, DeiT's, timm's, torchvision's"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(list(argv))
    if not Path(args.file).is_file():
        raise UserError(f"{args.file}: {no_file(args.file)}")
    facts = describe(args.file)
    if args.json:
        print(json.dumps(facts))
        return 0
    width = max(map(len, facts))
    for name, value in facts.items():
        title = name.replace("_", " ")
        for line in value if isinstance(value, list) else [value]:
            print(f"{title:<{width}}  {printable(str(line))}")
            title = ""
    return 0


def describe(path: str) -> JsonLine:
    """Facts of a weights file, in the order they are shown.

    Raises:
        UserError: if it cannot be read or holds no weights.
    """
    from mocov3.weights import checkpoint
    from mocov3.weights.find import find_backbone
    from mocov3.weights.locate import guess_arch
    from mocov3.weights.origin import origin_of

    contents = checkpoint.read(path)
    weights = find_backbone(contents, path)
    entry = our_entry(contents) or None
    config = trained_with(contents)
    arch = weights.arch or guess_arch(weights.state)
    parameters = sum(v.numel() for v in weights.state.values() if v.is_floating_point())
    facts: JsonLine = {"file": path, "kind": _kind(path, weights.kind, contents, entry)}
    facts["arch"] = arch or "not one of ours by its keys and shapes"
    if arch and not weights.arch:
        facts["arch"] += " (by its keys and shapes)"
    heads, asked = _heads(weights, arch)
    if heads:
        facts["attention_heads"] = heads
    facts["backbone"] = f"{parameters / 1e6:.2f} million numbers in {len(weights.state)} tensors"
    if where := weights.found or weights.near:
        facts["place"] = where.removeprefix("weights: ")
    if "epoch" in contents:
        facts["trained"] = f"{contents['epoch']} epochs" + (
            f", {entry['step']} steps" if entry and "step" in entry else ""
        )
    if config:
        count = f"{entry['pictures']} of " if entry and "pictures" in entry else ""
        size, preset = config.get("image_size"), config.get("view_preset")
        facts["pictures"] = f"{count}{config.get('data')}, views of {size} px, preset {preset}"
        facts["recipe"] = config.get("recipe") or "flags"
    if entry and isinstance(entry.get("quality"), dict):
        quality = entry["quality"]
        facts["quality"] = f"{quality.get('retrieval')} % of {quality.get('pictures')} unseen images retrieved"
    facts |= origin_of(contents)
    facts["good_for"], missing = _uses(path, contents, weights, arch, asked)
    if missing:
        facts["not_for"] = missing
    return facts


def _heads(weights: BackboneWeights, arch: str | None) -> tuple[str, bool]:
    """Attention heads and what tells them; whether the user must."""
    from mocov3.weights.attention_heads import choices, to_build, width_of

    width = width_of(weights.state)
    if width is None or arch is None or arch.startswith("timm/"):
        return "", False
    if weights.heads.number is not None:
        return f"{weights.heads.number} ({weights.heads.by})", False
    if asked := choices(width):
        return f"the file does not tell; give {asked}", True
    return f"{to_build(weights.heads, arch, weights.state, '')} (as all ViTs of width {width})", False


def _kind(path: str, kind: str, contents: Contents, entry: Contents | None) -> str:
    if kind.startswith("pre-training"):
        return "pre-training checkpoint of " + ("mocov3" if entry else "the reference, or a program of its layout")
    if kind == "linear evaluation" and "best_acc1" in contents:
        with contextlib.suppress(TypeError, ValueError, RuntimeError, OverflowError):  # whatever a damaged file says
            measure = "mean AUROC" if our_entry(contents).get("findings") else "top-1"
            return f"linear evaluation (best {measure} {float(contents['best_acc1']):.2f} %)"
    deit = "model" in contents and not path.endswith(".safetensors")
    return f"{kind} weights" + (" in DeiT's format" if deit else "")


def _uses(
    path: str, contents: Contents, weights: BackboneWeights, arch: str | None, asked: bool
) -> tuple[list[str], list[str]]:
    """What the file can be used for, with the command, and what it cannot: each tried on shapes."""
    file, uses, missing = shlex.quote(path), [], []
    if reason := _not_resumable(path, contents, weights):
        missing.append(f"resuming: {reason}")
    else:
        config = Path(path).with_name("config.yaml")
        flags = f"--config {shlex.quote(str(config))}" if config.is_file() else "DIR … (the flags of its run)"
        uses.append(f"resuming: mocov3 pretrain {flags} --resume {file}")
    if arch is None:
        missing.append("use by name: build its arch and call mocov3.weights.convert.load_into")
        return uses, missing
    reason, channels = _refusal(contents, weights, path, arch)
    if reason:
        missing.append(f"features, and as a start: {reason}")
        return uses, missing
    named = weights.arch is not None
    flags = ("" if named else f" -a {arch}") + " --heads N" * asked
    start = (f" --channels {channels}" if channels != 3 else "") + " --heads N" * asked
    uses.append(f"starting: mocov3 pretrain DIR --recipe adapt --init {file}{start}")
    uses.append(
        f"features: mocov3.load_backbone({path!r}{'' if named else f', arch={arch!r}'}{', heads=N' * asked}); "
        f"judging: mocov3 compare {file} DIR{flags}"
    )
    if weights.kind.startswith("pre-training"):
        uses.append(f"DeiT's format: mocov3 convert --input {file} --output OUT.pth")
    return uses, missing


def _not_resumable(path: str, contents: Contents, weights: BackboneWeights) -> str:
    """Why no run can go on from the file; empty where it has all that one needs."""
    from mocov3.weights.checkpoint import check_entries
    from mocov3.weights.find import find_backbone

    if not weights.kind.startswith("pre-training"):
        return f"is a {weights.kind} file"
    if weights.found:
        return "its keys are not those of a run"
    try:
        check_entries(contents, Path(path))
        average = find_backbone(contents, path, momentum=True).state
    except UserError as error:
        return str(error).removeprefix(f"{path}: ")
    shapes = [{key: value.shape for key, value in state.items()} for state in (weights.state, average)]
    return "" if shapes[0] == shapes[1] else "its two encoders are not alike"


def _refusal(contents: Contents, weights: BackboneWeights, path: str, arch: str) -> tuple[str, int]:
    """Why the network cannot be built and filled, empty where it can, and its channels; only shapes are built."""
    from mocov3.config.archs import HEADS
    from mocov3.models import build_backbone, shapes_only
    from mocov3.weights.attention_heads import Known, width_of
    from mocov3.weights.convert import fitted, settings_to_build

    width = width_of(weights.state)
    if weights.heads.number is None and width in HEADS and not arch.startswith("timm/"):
        weights = dataclasses.replace(weights, heads=Known(HEADS[width], "any will do on shapes"))
    try:
        settings = settings_to_build(contents, weights, path, arch=arch)
        with shapes_only():
            encoder = build_backbone(**settings)
        fitted(encoder, weights, path)
    except (UserError, RuntimeError) as error:
        return str(error).removeprefix(f"{path}: "), 0
    return "", settings["in_chans"]
