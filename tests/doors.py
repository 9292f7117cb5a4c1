"""What tests of the command line share: command lines in a text, and refusals of the program."""

import contextlib
import io
import re
import shlex
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from mocov3.cli import main

COMMANDS = Path(__file__).parent / "recorded" / "commands.txt"


def commands(text):
    """(script, arguments) of every command line of the scripts in a text."""
    joined = text.replace("\\\n", " ")
    for line in joined.splitlines():
        found = re.search(
            r"(main_moco\.py|main_lincls\.py|convert_to_deit\.py|transfer/main\.py|mocov3 \w+)\s+(.*)", line
        )
        if found and line.startswith(("python", "mocov3", "torchrun")) and " -c " not in line:
            yield found[1], shlex.split(found[2], comments=True)


def refused(*argv):
    """The one line that a refusal prints."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main(list(map(str, argv)))
        except SystemExit as stop:
            code = stop.code
    assert code == 2, (argv, out.getvalue(), err.getvalue())
    assert err.getvalue().count("\n") == 1, err.getvalue()
    assert "Traceback" not in err.getvalue()
    return err.getvalue()


@contextlib.contextmanager
def no_file_above(size):
    """No file grows beyond so many bytes, as on a full disk (another number of the error)."""
    import resource  # which Windows lacks

    before, compiles = resource.getrlimit(resource.RLIMIT_FSIZE), sys.dont_write_bytecode
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    sys.dont_write_bytecode = True  # Python would leave half of a compiled module that is first imported here
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        sys.dont_write_bytecode = compiles
