"""docs/flags.md: every flag of the tasks that a configuration describes, made from its fields.

python tools/flags.py          write the page
python tools/flags.py --check  exit code 1 if it is stale
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from mocov3.config import EmbedConfig, FinetuneConfig, KnnConfig, LinclsConfig, PretrainConfig
from mocov3.config.fields import flag_names

PAGE = Path(__file__).parent.parent / "docs" / "flags.md"
TASKS = {
    "Pre-training": ("`mocov3 pretrain`, `main_moco.py`", PretrainConfig),
    "Linear evaluation": ("`mocov3 lincls`, `main_lincls.py`", LinclsConfig),
    "Fine-tuning and transfer": ("`mocov3 finetune`, `transfer/main.py`", FinetuneConfig),
    "k-NN": ("`mocov3 knn`", KnnConfig),
    "Embedding": ("`mocov3 embed`", EmbedConfig),
}
HEAD = """# Flags

<!-- Made by tools/flags.py from mocov3/config; do not edit. -->

Every flag of the tasks that have a configuration; each is also a field of the YAML file that `--config` takes. A flag
marked ● changes the result: a resume refuses another value of it. Defaults are those of the reference's scripts where
there is one; `mocov3 pretrain` chooses what is not given (`--recipe auto`), `mocov3 lincls` tries seven learning rates.
The other commands (`check`, `inspect`, `compare`, `export`, `demo`, `pack` …) list theirs by `--help`.
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, (doors, config) in TASKS.items():
        parts.append(f"\n## {title}\n\n{doors}\n")
        groups: dict[str, list[str]] = {}
        for field in dataclasses.fields(config):
            group = "input" if field.metadata["positional"] else field.metadata["group"]
            groups.setdefault(group, []).append(row(field))
        for group, rows in groups.items():
            parts.append(f"\n### {title}: {group}\n\n| flag | meaning | default | |\n|---|---|---|---|\n")
            parts += rows
    return "".join(parts)


def row(field: "dataclasses.Field[Any]") -> str:
    """A line of the table."""
    meta = field.metadata
    names = flag_names(field)
    shown = meta["metavar"] or field.name.upper() if meta["positional"] else ", ".join(f"`{name}`" for name in names)
    if meta["kind"] is bool:
        shown += " / " + ", ".join(f"`--no-{name[2:]}`" for name in names if name.startswith("--"))
    text = meta["help"]
    if meta["choices"]:
        text += ": " + ", ".join(f"`{choice}`" for choice in meta["choices"] if choice)
    if bounds := str(meta["bounds"]):
        text += f" ({bounds})"
    default = "" if field.default in (None, "", False) else f"`{_plain(field.default)}`"
    default = "on" if field.default is True else default
    cells = (shown, text, default, "●" if meta["result"] else "")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _plain(value: Any) -> str:
    return ",".join(map(_plain, value)) if isinstance(value, tuple) else str(value)


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        sys.exit(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
