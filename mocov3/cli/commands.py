"""The commands: what each one's command line means, and the task that it starts.

Nothing here imports torch before a task starts, so help and errors are immediate.
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable
from typing import Any

from mocov3.config import PretrainConfig
from mocov3.config.command_lines import (
    merged,
    parse_convert,
    parse_embed,
    parse_finetune,
    parse_knn,
    parse_lincls,
    parse_pretrain,
    prolonged,
    read_pretrain,
)
from mocov3.config.fields import Layers, Parser, path
from mocov3.errors import UserError, printable


def chosen(layers: Layers, began: float | None = None) -> PretrainConfig:
    """The configuration of pre-training, with what is left to be chosen or measured on images and machine; ``began``:
    when the command was called, by ``time.time``.
    """
    config = _by_recipe(layers, began)
    if config.mean_std == "auto":
        from mocov3.planning.choose import measured_normalisation

        return measured_normalisation(config)
    return config


def _by_recipe(layers: Layers, began: float | None) -> PretrainConfig:
    if folder := layers.given.get("prolong"):
        if not {"budget", "epochs"} & set(layers.given):
            raise UserError(f"--prolong {folder}: for how long? Give --budget, or --epochs of the whole run")
        layers = Layers({**prolonged(folder), **layers.given}, {}, layers.defaults)
        return merged(layers)
    if layers.merged().get("recipe") in ("auto", "adapt"):
        from mocov3.planning.choose import choose

        return choose(layers, began)
    return merged(layers)


def _pretrain(argv: list[str]) -> int:
    began = time.time()
    layers = read_pretrain(argv, "mocov3 pretrain", {"output_dir": "", "recipe": "auto"})
    values = layers.merged()
    if values.get("resume") == "auto" and not values["output_dir"]:
        raise UserError("--resume auto: name the run to resume with --output-dir")
    config = _once(lambda: _in_a_folder(chosen(layers, began)))
    from mocov3.pretraining.task import main

    return main(config, script_door=False, began=began)


def _in_a_folder(config: PretrainConfig) -> PretrainConfig:
    if config.output_dir:
        return config
    folder = f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{config.arch.replace('/', '-')}"
    return dataclasses.replace(config, output_dir=folder)


def _once(decide: Callable[[], PretrainConfig]) -> PretrainConfig:
    """The configuration that ``decide`` says; the first process's, where torchrun started several."""
    if int(os.environ.get("WORLD_SIZE") or 1) < 2:
        return decide()
    from mocov3.distributed.launch import decided_once

    values: dict[str, Any] = json.loads(decided_once(lambda: json.dumps(dataclasses.asdict(decide())), "plan"))
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return PretrainConfig(**values)


def _check(argv: list[str]) -> int:
    from mocov3.planning.check import main, parse

    args, rest = parse(argv)
    return main(args, read_pretrain(rest, "mocov3 check", {"recipe": "auto"}))


def _plan(argv: list[str]) -> int:
    from mocov3.planning.plan import main, parse

    args, rest = parse(argv)
    config = parse_pretrain(rest, prog="mocov3 plan", defaults={"recipe": "defaults"})
    if config.recipe in ("auto", "adapt"):
        raise UserError(f"--recipe {config.recipe} looks at images and machine; name another to plan for others")
    return main(args, config)


def _inspect(argv: list[str]) -> int:
    from mocov3.weights.inspect import main

    return main(argv)


def _compare(argv: list[str]) -> int:
    from mocov3.evaluation.compare import main

    return main(argv)


def _finetune(argv: list[str]) -> int:
    config = parse_finetune(argv, prog="mocov3 finetune")
    from mocov3.finetuning.task import main

    return main(config, script_door=False)


def _lincls(argv: list[str]) -> int:
    from mocov3.evaluation.linear.inputs import SWEEP
    from mocov3.evaluation.linear.task import main

    config = parse_lincls(argv, prog="mocov3 lincls", defaults={"arch": "", "lr": SWEEP, "output_dir": ""})
    if not config.output_dir:
        if config.resume == "auto":
            raise UserError("--resume auto: name the run to resume with --output-dir")
        folder = "." if config.evaluate else f"runs/{time.strftime('%Y%m%d-%H%M%S')}-lincls"
        config = dataclasses.replace(config, output_dir=folder)
    return main(config, script_door=False)


def _knn(argv: list[str]) -> int:
    from mocov3.evaluation.knn import main

    return main(parse_knn(argv, prog="mocov3 knn"))


def _embed(argv: list[str]) -> int:
    from mocov3.evaluation.embed import main

    return main(parse_embed(argv, prog="mocov3 embed"))


def _verify(argv: list[str]) -> int:
    parser = Parser(
        prog="mocov3 verify",
        description="The accuracy of a published linear file of the reference on "
        "ImageNet's validation set, beside the published figure.",
    )
    parser.add_argument("file", type=path, help="linear file, for example linear-vit-s-300ep.pth.tar")
    parser.add_argument(
        "folder", type=path, help="validation folder with 1,000 class folders, or the folder that holds it as val"
    )
    parser.add_argument("-j", "--workers", type=int, default=32, help="data loading processes (default 32)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="device")
    args = parser.parse_args(argv)
    from mocov3.evaluation.linear.task import verify

    return verify(args.file, args.folder, workers=args.workers, device=args.device)


def convert(argv: list[str], prog: str = "mocov3 convert") -> int:
    """Convert a checkpoint to DeiT's format."""
    args = parse_convert(argv, prog=prog)
    from pathlib import Path

    from mocov3.weights import checkpoint
    from mocov3.weights.convert import to_deit

    output = Path(args.output)
    if output.exists() and output.resolve() == Path(args.input).resolve():
        raise UserError(f"--output {output}: is the checkpoint itself; name another file")
    if output.exists() and not output.is_file():  # a device would be replaced
        raise UserError(f"--output {output}: is no plain file; name one")
    converted = to_deit(checkpoint.read(args.input), args.input)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write(output, converted)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror or error})") from None
    print(f"{printable(str(output))}: {len(converted['model'])} keys of the encoder, without its head")
    return 0


def _export(argv: list[str]) -> int:
    from mocov3.export.task import main

    return main(argv)


def _demo(argv: list[str]) -> int:
    from mocov3.demo import main

    return main(argv)


def _report(argv: list[str]) -> int:
    from mocov3.report.command import main

    return main(argv)


def _pack(argv: list[str]) -> int:
    from mocov3.pack import main

    return main(argv)


def _tiles(argv: list[str]) -> int:
    from mocov3.tiles import main

    return main(argv)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "pretrain": _pretrain,
    "check": _check,
    "plan": _plan,
    "inspect": _inspect,
    "compare": _compare,
    "finetune": _finetune,
    "lincls": _lincls,
    "knn": _knn,
    "embed": _embed,
    "verify": _verify,
    "convert": convert,
    "export": _export,
    "report": _report,
    "demo": _demo,
    "pack": _pack,
    "tiles": _tiles,
}
"""Name of a command → what runs it; returns the exit code."""
