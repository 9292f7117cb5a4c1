"""Choices of a plan, and the plan as text."""

from collections.abc import Sequence
from dataclasses import dataclass

from mocov3.config.fields import Fields

_NO_SETTINGS = ("data", "recipe", "output_dir", "config", "resume", "quiet", "json")


@dataclass(frozen=True)
class Choice:
    """One setting and why."""

    name: str
    value: object
    reason: str


def duration(seconds: float) -> str:
    """A time in one number and its unit."""
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"


def block(choices: Sequence[Choice], recipe: Fields, given: Fields) -> str:
    """The plan as text: a setting a line, with its value and reason."""
    rows = [(c.name.replace("_", "-"), _shown(c.value), c.reason) for c in choices]
    rest = [(name, value, "of the recipe") for name, value in recipe.items() if name not in given]
    rest += [(name, value, "given by you") for name, value in given.items() if name not in _NO_SETTINGS]
    rows += [(name.replace("_", "-"), _shown(value), reason) for name, value, reason in rest]
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    return "\n".join(f"  {name:<{widths[0]}}  {value:<{widths[1]}}  {reason}" for name, value, reason in rows)


def _shown(value: object) -> str:
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)
