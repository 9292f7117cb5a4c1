"""The quick part of the suite on the oldest, two middle and the newest versions, each in an environment of its own.

    python tools/versions.py                  # all; environments in build/versions, kept for the next time
    python tools/versions.py 2.8 2.11         # some

The middle ones take the other packages of constraints.txt, the oldest those of constraints-oldest.txt, the newest what
pip finds. Prints the table of docs/releases.md, a row as soon as it is known.
"""

import argparse
import os
import re
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
PLACE = ROOT / "build" / "versions"
VISION = {"2.8": "0.23", "2.11": "0.26"}
"""torch → the torchvision that goes with it."""
SETS = ("oldest", *VISION, "newest")


def install(name: str) -> Path:
    """The interpreter of an environment with a set of versions and the package."""
    folder = PLACE / name
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        venv.create(folder, with_pip=True)
    wanted, limits = [".[oldest]" if name == "oldest" else ".[test]"], []
    if name == "oldest":
        limits = ["--constraint", "constraints-oldest.txt"]
    elif name in VISION:
        rest = PLACE / f"constraints-{name}.txt"
        lines = (ROOT / "constraints.txt").read_text().splitlines()
        rest.write_text("\n".join(line for line in lines if not re.match(r"(torch|torchvision)==", line)) + "\n")
        limits = ["--constraint", str(rest)]
        wanted += [f"torch=={name}.*", f"torchvision=={VISION[name]}.*"]
    wanted += ["pytest-xdist>=3.7"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *limits, "--editable", *wanted], cwd=ROOT, check=True)
    return python


def run(name: str) -> str:
    """A row of the table."""
    try:
        python = install(name)
    except subprocess.CalledProcessError as error:
        return f"| {name} | – | could not be installed (pip ended with {error.returncode}) | – |"
    code = "import torch, torchvision, timm; print(torch.__version__, torchvision.__version__, timm.__version__)"
    versions = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    began = time.monotonic()
    log = PLACE / f"{name}.txt"
    with log.open("w") as out:
        command = [python, "-m", "pytest", "-q", "-m", "not slow", "--numprocesses", "2"]
        subprocess.run(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, check=False)
    lines = log.read_text(encoding="utf-8").splitlines()
    counted = next((line for line in reversed(lines) if re.search(r"\d+ passed", line)), "did not run").strip("= ")
    failed = sorted({line.split()[1].split("[")[0] for line in lines if line.startswith(("FAILED", "ERROR"))})
    said = f" ({', '.join(failed)})" if failed else ""
    return f"| {name} | {' · '.join(versions)} | {counted}{said} | {time.monotonic() - began:.0f} s |"


def main() -> int:
    """Run the sets that the command line asks for; 0 if nothing failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", default=SETS, metavar="SET", help=", ".join(SETS))
    names = parser.parse_args().sets
    if unknown := [name for name in names if name not in SETS]:
        parser.error(f"no set {unknown[0]!r}; there are {', '.join(SETS)}")
    PLACE.mkdir(parents=True, exist_ok=True)
    print("| set | torch · torchvision · timm | quick part of the suite | time |\n|---|---|---|---|", flush=True)
    rows = []
    for name in names:
        rows.append(run(name))
        print(rows[-1], flush=True)
    return 1 if any("failed" in row or "error" in row or "could not" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
