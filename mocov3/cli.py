"""The doors: the program ``mocov3`` with its subcommands, and the scripts of the reference's names.

Nothing here imports torch before a task starts, so help and refusals come at once.
"""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from mocov3 import recipes
from mocov3.config import EmbedConfig, FinetuneConfig, KnnConfig, LinclsConfig, PretrainConfig, parse
from mocov3.config.fields import Parser
from mocov3.errors import RankLost, UserError, nearest, printable
from mocov3.version import __version__

_HELP = f"""mocov3 {__version__}: self-supervised pre-training of ResNet and ViT (MoCo v3, arXiv 2104.02057)

usage: mocov3 COMMAND … (mocov3 COMMAND --help lists its flags)

  pretrain   learn features from a folder of pictures without labels
  finetune   train a classifier end to end from pre-trained weights (DeiT's recipe), and transfer
  pack       a folder of pictures into tar archives
  lincls     linear evaluation of frozen features, many learning rates in one pass
  knn        k-NN accuracy and retrieval of frozen features
  embed      features of every picture of a folder, as .parquet or .npy
  verify     the accuracy of a published linear file beside the published figure
  convert    a pre-training checkpoint to DeiT's format
  export     a backbone for timm, torchvision, transformers, ONNX …, verified
  demo       train on 8,000 embedded pictures (8 minutes on 2 cores) and show what was learned

The reference's commands work too: python main_moco.py …, python main_lincls.py …, python convert_to_deit.py …
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The program ``mocov3``; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_HELP)
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"mocov3 {__version__}")
        return 0
    commands: dict[str, Callable[[list[str]], int]] = {
        "pretrain": _pretrain,
        "finetune": _finetune,
        "lincls": _lincls,
        "knn": _knn,
        "embed": _embed,
        "verify": _verify,
        "convert": _convert,
        "export": _export,
        "demo": _demo,
        "pack": _pack,
    }

    def run() -> int:
        if argv[0] not in commands:
            raise UserError(f"command {argv[0]!r} is not known; {nearest(argv[0], list(commands))}")
        return commands[argv[0]](argv[1:])

    return guarded(run)


def guarded(run: Callable[[], int]) -> int:
    """Run a task; bad input becomes one line on standard error and exit code 2."""
    try:
        return run()
    except UserError as error:
        print(f"mocov3: error: {error}", file=sys.stderr)
        return 2
    except RankLost as error:
        print(f"mocov3: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mocov3: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 141


def parse_script(name: str, argv: Sequence[str]) -> Any:
    """The configuration that a command line of one of the reference's scripts means.

    Args:
        name: ``main_moco.py``, ``main_lincls.py``, ``convert_to_deit.py`` or ``transfer/main.py``.
        argv: its arguments.
    """
    if name == "main_moco.py":
        return parse_pretrain(argv, prog=name)
    if name == "main_lincls.py":
        return parse_lincls(argv, prog=name)
    if name == "transfer/main.py":
        return parse_finetune(argv, prog=name)
    return parse_convert(argv, prog=name)


def parse_pretrain(argv: Sequence[str], *, prog: str, defaults: dict[str, Any] | None = None) -> PretrainConfig:
    """Command line of pre-training; both doors share it, only defaults differ."""
    return parse(
        PretrainConfig,
        argv,
        prog=prog,
        description="Self-supervised pre-training by MoCo v3.",
        defaults=defaults,
        recipes=recipes.settings(),
        epilog=recipes.listing(),
    )


def _pretrain(argv: list[str]) -> int:
    config = parse_pretrain(argv, prog="mocov3 pretrain", defaults={"output_dir": ""})
    if not config.output_dir:
        import dataclasses

        if config.resume == "auto":
            raise UserError("--resume auto: name the run to go on with by --output-dir")
        folder = f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{config.arch.replace('/', '-')}"
        config = dataclasses.replace(config, output_dir=folder)
    from mocov3.pretrain import main

    return main(config, script_door=False)


def main_moco() -> int:
    """``main_moco.py``: the script door of pre-training."""

    def run() -> int:
        config = parse_script("main_moco.py", sys.argv[1:])
        from mocov3.pretrain import main

        return main(config, script_door=True)

    return guarded(run)


def parse_finetune(argv: Sequence[str], *, prog: str) -> FinetuneConfig:
    """Command line of fine-tuning and transfer; both doors share it."""
    return parse(
        FinetuneConfig,
        argv,
        prog=prog,
        description="Train a classifier end to end from pre-trained weights (DeiT's recipe).",
        recipes=recipes.finetune_settings(),
        epilog=recipes.listing(recipes.FINETUNE_RECIPES, "accuracy"),
    )


def _finetune(argv: list[str]) -> int:
    config = parse_finetune(argv, prog="mocov3 finetune")
    from mocov3.finetune import main

    return main(config, script_door=False)


def transfer_main() -> int:
    """``transfer/main.py``: the script door of fine-tuning and transfer."""

    def run() -> int:
        config = parse_script("transfer/main.py", sys.argv[1:])
        from mocov3.finetune import main

        return main(config, script_door=True)

    return guarded(run)


def parse_lincls(argv: Sequence[str], *, prog: str, defaults: dict[str, Any] | None = None) -> LinclsConfig:
    """Command line of linear evaluation; both doors share it, only defaults differ."""
    return parse(
        LinclsConfig,
        argv,
        prog=prog,
        description=LinclsConfig.__doc__ or "",
        defaults=defaults,
        recipes=recipes.settings(recipes.LINCLS_RECIPES),
        epilog=recipes.listing(recipes.LINCLS_RECIPES),
    )


def _lincls(argv: list[str]) -> int:
    from mocov3.lincls import SWEEP, main

    config = parse_lincls(argv, prog="mocov3 lincls", defaults={"arch": "", "lr": SWEEP, "output_dir": ""})
    if not config.output_dir:
        if config.resume == "auto":
            raise UserError("--resume auto: name the run to go on with by --output-dir")
        import dataclasses

        folder = "." if config.evaluate else f"runs/{time.strftime('%Y%m%d-%H%M%S')}-lincls"
        config = dataclasses.replace(config, output_dir=folder)
    return main(config, script_door=False)


def main_lincls() -> int:
    """``main_lincls.py``: the script door of linear evaluation."""

    def run() -> int:
        config = parse_script("main_lincls.py", sys.argv[1:])
        from mocov3.lincls import main

        return main(config, script_door=True)

    return guarded(run)


def parse_knn(argv: Sequence[str], *, prog: str) -> KnnConfig:
    """Command line of the k-NN evaluation."""
    return parse(KnnConfig, argv, prog=prog, description=KnnConfig.__doc__ or "")


def _knn(argv: list[str]) -> int:
    from mocov3.knn import main

    return main(parse_knn(argv, prog="mocov3 knn"))


def parse_embed(argv: Sequence[str], *, prog: str) -> EmbedConfig:
    """Command line of embedding."""
    return parse(EmbedConfig, argv, prog=prog, description=EmbedConfig.__doc__ or "")


def _embed(argv: list[str]) -> int:
    from mocov3.embed import main

    return main(parse_embed(argv, prog="mocov3 embed"))


def _verify(argv: list[str]) -> int:
    parser = Parser(prog="mocov3 verify", description="The accuracy of a published linear file of the reference on "
                    "ImageNet's validation set, beside the published figure.")  # fmt: skip
    parser.add_argument("file", help="linear file, for example linear-vit-s-300ep.pth.tar")
    parser.add_argument("folder", help="validation folder with 1,000 class folders, or the folder that holds it as val")
    parser.add_argument("-j", "--workers", type=int, default=32, help="data loading processes (default 32)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="device")
    args = parser.parse_args(argv)
    from mocov3.lincls import verify

    return verify(args.file, args.folder, workers=args.workers, device=args.device)


def parse_convert(argv: Sequence[str], *, prog: str) -> Any:
    """Command line of the conversion."""
    parser = Parser(prog=prog, description="Convert a pre-training checkpoint to DeiT's format.")
    parser.add_argument("--input", required=True, help="pre-training checkpoint, ours or the reference's")
    parser.add_argument("--output", required=True, help="file to write; its folder is made if missing")
    return parser.parse_args(list(argv))


def _convert(argv: list[str], prog: str = "mocov3 convert") -> int:
    args = parse_convert(argv, prog=prog)
    from pathlib import Path

    from mocov3 import checkpoint
    from mocov3.convert import to_deit

    output = Path(args.output)
    if output.exists() and output.resolve() == Path(args.input).resolve():
        raise UserError(f"--output {output}: is the checkpoint itself; name another file")
    if output.is_dir():
        raise UserError(f"--output {output}: is a folder; name a file")
    converted = to_deit(checkpoint.read(args.input), args.input)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write(output, converted)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror or error})") from None
    print(f"{printable(str(output))}: {len(converted['model'])} keys of the encoder, without its head")
    return 0


def convert_to_deit() -> int:
    """``convert_to_deit.py``: the script door of the conversion."""
    return guarded(lambda: _convert(sys.argv[1:], "convert_to_deit.py"))


def _export(argv: list[str]) -> int:
    from mocov3.export import main

    return main(argv)


def _demo(argv: list[str]) -> int:
    from mocov3.demo import main

    return main(argv)


def _pack(argv: list[str]) -> int:
    from mocov3.pack import main

    return main(argv)
