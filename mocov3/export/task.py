"""Export a backbone: ``mocov3 export CKPT --to FORMAT --output PATH``.

Reads a checkpoint (ours, the reference's, a fine-tuned one), writes the backbone in a format of
``mocov3.export.formats`` with a model card, loads it back by the target's own library, and compares features from file
bytes on unusual images before it reports success.
"""

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from mocov3.config.fields import Parser, path
from mocov3.errors import UserError, no_file
from mocov3.export.places import FORMATS


def main(argv: Sequence[str]) -> int:
    """Export; returns 0 only after the features agreed."""
    args = _parse(argv)
    _check(args)
    if args.adapter:
        from mocov3.weights.adapters import write_adapter

        print(write_adapter(Path(args.checkpoint), Path(args.output)))
        return 0
    from mocov3.export.write import export

    report = export(
        Path(args.checkpoint),
        args.to,
        Path(args.output),
        arch=args.arch or None,
        image_size=args.image_size,
        momentum=args.momentum,
        classifier=args.classifier,
        licence=args.licence,
        heads=args.heads,
    )
    print(report)
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    listing = "\n".join(f"  {name:<14}{place.text}" for name, place in FORMATS.items())

    parser = Parser(
        prog="mocov3 export",
        description="Write the backbone of a checkpoint for another library, verified.",
        epilog=f"formats:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoint", type=path, help="ours, the reference's, DeiT's or a fine-tuned one", metavar="CKPT"
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--to", choices=tuple(FORMATS), help="format", metavar="FORMAT")
    target.add_argument("--adapter", action="store_true", help="only what --lora trained, as safetensors")
    parser.add_argument("--output", type=path, required=True, help="file, or folder for timm and transformers")
    parser.add_argument("-a", "--arch", default="", help="arch of a file that does not say it")
    parser.add_argument(
        "--heads", type=int, default=None, help="attention heads of a ViT, of a file that does not tell"
    )
    parser.add_argument("--image-size", type=int, default=None, help="side of the images (default: of training)")
    parser.add_argument("--momentum", action="store_true", help="the momentum encoder, or the average of tuned weights")
    parser.add_argument("--classifier", action="store_true", help="with the classifier of a fine-tuned file")
    parser.add_argument("--licence", default="", help="licence to state in the card (default: what the file says)")
    return parser.parse_args(list(argv))


def _check(args: argparse.Namespace) -> None:
    """Refuse what cannot work, before torch is imported."""
    if not Path(args.checkpoint).is_file():
        raise UserError(f"{args.checkpoint}: {no_file(args.checkpoint)}")
    from mocov3.config.archs import check_arch, check_heads

    if args.arch:
        check_arch(args.arch)
    check_heads(args.heads, args.arch)
    if args.image_size is not None and args.image_size < 1:
        raise UserError(f"--image-size must be at least 1, not {args.image_size}")
    missing = [name for name in (FORMATS[args.to].needs if args.to else ()) if find_spec(name) is None]
    if missing:
        raise UserError(f"--to {args.to} needs {', '.join(missing)}: pip install 'mocov3[{args.to}]'")
    output = Path(args.output)
    if output.exists() and output.resolve() == Path(args.checkpoint).resolve():
        raise UserError(f"--output {output}: is the checkpoint itself; name another file")
    if args.to and FORMATS[args.to].is_folder:
        if output.exists() and not output.is_dir():
            raise UserError(f"--output {output}: is a file; {args.to} needs a folder")
        if output.is_dir() and any(output.iterdir()):
            raise UserError(f"--output {output}: is not empty; name a new folder")
    elif output.is_dir():
        raise UserError(f"--output {output}: is a folder; {args.to} needs the name of a file")
