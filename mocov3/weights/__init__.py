"""Files of weights: ours, read and written; others', recognised and converted. Nothing in a file is run."""

from typing import Any

Contents = dict[str, Any]
"""What a file of weights or a checkpoint holds, by entry: read from anywhere, so every reader checks what it takes."""
