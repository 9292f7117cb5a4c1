"""Entry points: the program ``mocov3`` with its subcommands, and the scripts of the reference's names.

Nothing here imports torch before a task starts, so help and errors are immediate.
"""

import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from mocov3.cli.commands import COMMANDS, chosen, convert
from mocov3.config.command_lines import (
    parse_convert,
    parse_embed,
    parse_finetune,
    parse_knn,
    parse_lincls,
    parse_pretrain,
    read_pretrain,
)
from mocov3.errors import RankLost, UserError, lenient_output, lost_output, nearest, printable, stopped_by
from mocov3.version import __version__

__all__ = [
    "convert_to_deit",
    "guarded",
    "main",
    "main_lincls",
    "main_moco",
    "parse_convert",
    "parse_embed",
    "parse_finetune",
    "parse_knn",
    "parse_lincls",
    "parse_pretrain",
    "parse_script",
    "transfer_main",
]

_PRINTS = ("-h", "--help", "--version", "check", "plan", "inspect", "compare", "knn", "verify")
"""Commands whose result is what they print."""
_SURROUNDINGS = (errno.ENAMETOOLONG, errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM)
"""What is never our fault, wherever it is met."""
_HELP = f"""mocov3 {__version__}: self-supervised pre-training of ResNet and ViT (MoCo v3, arXiv 2104.02057)

usage: mocov3 COMMAND … (mocov3 COMMAND --help lists its flags)

  pretrain   learn features from a folder of images without labels
  check      examine images and machine before training: facts, faults, speed, a sheet of views
  plan       micro-batch, memory and time on GPUs that need not be present
  inspect    what a weights file is, what it can be used for, its origin and licence
  compare    compare networks, without labels or with few
  finetune   train a classifier end to end from pre-trained weights (DeiT's recipe), and transfer
  pack       a folder of images into tar archives
  tiles      where the tiles of slides and satellite images lie, to train on them without cutting any out
  lincls     linear evaluation of frozen features, many learning rates in one pass
  knn        k-NN accuracy and retrieval of frozen features
  embed      features of every image of a folder, as .parquet or .npy
  verify     the accuracy of a published linear file beside the published figure
  convert    a pre-training checkpoint to DeiT's format
  export     a backbone for timm, torchvision, transformers, ONNX …, verified
  report     one page of a run, or of several: diagnosis, curves, views, neighbours, a map
  demo       train on 8,000 embedded images (5 to 8 minutes on 2 cores) and show what was learned

The reference's commands work too: python main_moco.py …, python main_lincls.py …, python convert_to_deit.py …
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The program ``mocov3``; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)

    def run() -> int:
        if not argv or argv[0] in ("-h", "--help"):
            print(_HELP)
            return 0 if argv else 2
        if argv[0] == "--version":
            print(f"mocov3 {__version__}")
            return 0
        if argv[0] not in COMMANDS:
            raise UserError(f"command {argv[0]!r} is not known; {nearest(argv[0], list(COMMANDS))}")
        return COMMANDS[argv[0]](argv[1:])

    return guarded(run, prints=bool(argv) and argv[0] in _PRINTS)


def guarded(run: Callable[[], int], *, prints: bool = False) -> int:
    """Run a task; bad input becomes one line on standard error and exit code 2.

    Where what it ``prints`` is its result, a success that nobody could read is none: of 141 where the reader went (as
    by SIGPIPE), of 2 where it could not be written. A task that writes files goes on whatever becomes of its output.
    """
    # before torch is loaded: its threads (GNU OpenMP) spin for milliseconds while they wait for each other, and starve
    # loader processes, and each other, wherever cores are shared. A short spin costs nothing on a quiet machine
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    lenient_output()
    try:
        _check_current_folder()
        code = run()
    except (UserError, RankLost) as error:
        print(f"mocov3: error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.errno not in _SURROUNDINGS or error.filename is None:
            raise
        print(f"mocov3: error: {printable(os.fsdecode(error.filename))}: {error.strerror}", file=sys.stderr)
        return UserError.exit_code
    except KeyboardInterrupt:
        print("mocov3: interrupted", file=sys.stderr)
        return stopped_by(signal.SIGINT)
    if code or not prints or (lost := lost_output()) is None:
        return code
    if lost.errno == errno.EPIPE:
        return stopped_by(13)  # SIGPIPE, which not every system has
    print(f"mocov3: error: standard output: cannot be written ({lost.strerror})", file=sys.stderr)
    return UserError.exit_code


def _check_current_folder() -> None:
    try:
        os.getcwd()
    except FileNotFoundError:  # which torch's libraries do not survive
        raise UserError("the current folder was removed; change to one that exists") from None


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


def main_moco() -> int:
    """``main_moco.py``: the reference's script for pre-training."""

    def run() -> int:
        began = time.time()
        config = chosen(read_pretrain(sys.argv[1:], "main_moco.py", None))
        from mocov3.pretraining.task import main

        return main(config, script_door=True, began=began)

    return guarded(run)


def main_lincls() -> int:
    """``main_lincls.py``: the reference's script for linear evaluation."""

    def run() -> int:
        config = parse_script("main_lincls.py", sys.argv[1:])
        from mocov3.evaluation.linear.task import main

        return main(config, script_door=True)

    return guarded(run)


def transfer_main() -> int:
    """``transfer/main.py``: the reference's script for fine-tuning and transfer."""

    def run() -> int:
        config = parse_script("transfer/main.py", sys.argv[1:])
        from mocov3.finetuning.task import main

        return main(config, script_door=True)

    return guarded(run)


def convert_to_deit() -> int:
    """``convert_to_deit.py``: the reference's script for the conversion."""
    return guarded(lambda: convert(sys.argv[1:], "convert_to_deit.py"))
