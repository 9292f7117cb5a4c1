"""Files of weights: ours, read and written; others', recognised and converted. Nothing in a file is run."""

from typing import Any

Contents = dict[str, Any]
"""What a file of weights or a checkpoint holds, by entry: read from anywhere, so every reader checks what it takes."""


def our_entry(contents: Contents | None) -> Contents:
    """What mocov3 keeps of its own in a file of weights: its entry ``mocov3``; empty in files of others."""
    entry = (contents or {}).get("mocov3")
    return entry if isinstance(entry, dict) else {}


def trained_with(contents: Contents | None) -> Contents:
    """The configuration that a file of ours was trained with; empty for others' files."""
    config = our_entry(contents).get("config")
    return config if isinstance(config, dict) else {}
