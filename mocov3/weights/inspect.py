"""What a weights file is and is good for: ``mocov3 inspect FILE``. Nothing in it is run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mocov3.config.fields import Parser, path
from mocov3.errors import UserError, printable
from mocov3.weights import Contents, our_entry

_RESUMES = ("epoch", "arch", "state_dict", "optimizer")


def main(argv: Sequence[str]) -> int:
    """Print what is known; returns the exit code."""
    parser = Parser(prog="mocov3 inspect", description=__doc__)
    parser.add_argument(
        "file", type=path, metavar="FILE", help="weights: ours, the reference's, DeiT's, timm's, torchvision's"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(list(argv))
    if not Path(args.file).is_file():
        raise UserError(f"{args.file}: there is no such file")
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


def describe(path: str) -> dict[str, Any]:
    """Facts of a weights file, in the order they are shown.

    Raises:
        UserError: if it cannot be read or holds no weights.
    """
    from mocov3.weights import checkpoint
    from mocov3.weights.convert import find_backbone
    from mocov3.weights.origin import origin_of
    from mocov3.weights.start import guess_arch

    contents = checkpoint.read(path)
    weights = find_backbone(contents, path)
    entry = our_entry(contents) or None
    config = (entry or {}).get("config") or {}
    arch = weights.arch or guess_arch(weights.state)
    parameters = sum(v.numel() for v in weights.state.values() if v.is_floating_point())
    facts: dict[str, Any] = {"file": path, "kind": _kind(path, weights.kind, contents, entry)}
    facts["arch"] = arch or "not one of ours by its keys and shapes"
    if arch and not weights.arch:
        facts["arch"] += " (by its keys and shapes)"
    heads, asked = _heads(weights, arch)
    if heads:
        facts["attention_heads"] = heads
    facts["backbone"] = f"{parameters / 1e6:.2f} million numbers in {len(weights.state)} tensors"
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
    facts["good_for"], missing = _uses(path, contents, weights.kind, arch, asked)
    if missing:
        facts["not_for"] = missing
    return facts


def _heads(weights: Any, arch: str | None) -> tuple[str, bool]:
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


def _kind(path: str, kind: str, contents: Contents, entry: dict[str, Any] | None) -> str:
    if kind.startswith("pre-training"):
        return "pre-training checkpoint of " + ("mocov3" if entry else "the reference, or a program of its layout")
    if kind == "linear evaluation" and "best_acc1" in contents:
        return f"linear evaluation (best top-1 {float(contents['best_acc1']):.2f} %)"
    deit = "model" in contents and not path.endswith(".safetensors")
    return f"{kind} weights" + (" in DeiT's format" if deit else "")


def _uses(path: str, contents: Contents, kind: str, arch: str | None, asked: bool) -> tuple[list[str], list[str]]:
    uses, missing = [], []
    lacking = [entry for entry in _RESUMES if entry not in contents]
    if kind.startswith("pre-training") and not lacking:
        uses.append(f"resuming: mocov3 pretrain … --resume {path}")
    else:
        missing.append("resuming: " + (f"misses {', '.join(lacking)}" if lacking else f"is a {kind} file"))
    if arch is None:
        missing.append("use by name: build its arch and call mocov3.weights.convert.load_into")
        return uses, missing
    uses.append(f"starting: mocov3 pretrain DIR --recipe adapt --init {path}{' --heads N' if asked else ''}")
    if contents.get("arch"):
        uses.append(
            f"features: mocov3.load_backbone('{path}'{', heads=N' if asked else ''}); "
            f"judging: mocov3 compare {path} DIR{' --heads N' if asked else ''}"
        )
    else:
        missing.append("features by load_backbone: the file does not name its arch; give arch" + " and heads" * asked)
    if kind.startswith("pre-training"):
        uses.append(f"DeiT's format: mocov3 convert --input {path} --output OUT.pth")
    return uses, missing
