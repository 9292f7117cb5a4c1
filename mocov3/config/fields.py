"""Flags as data: a field of a frozen dataclass carries its flag's names, help, and whether it changes results.

The parser, the help text, ``config.yaml`` and the check of a resumed run are all made from these fields.
"""

import argparse
import dataclasses
import errno
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NoReturn, Protocol, TypeVar, runtime_checkable

from mocov3.errors import UserError, nearest, printable

T = TypeVar("T")
_LARGEST_CONFIG = 1 << 20  # bytes


Fields = dict[str, Any]
"""Values of a configuration by the names of their fields: some of them, or all."""


@runtime_checkable
class Flags(Protocol):
    """A configuration: a dataclass whose fields are flags."""

    __dataclass_fields__: ClassVar[dict[str, "dataclasses.Field[Any]"]]


class Bounds(NamedTuple):
    """What a number may be; all ``None``: anything."""

    low: float | None
    high: float | None
    above: float | None
    below: float | None

    def __str__(self) -> str:
        if self.low is not None and self.high is not None:
            return f"{_short(self.low)} to {_short(self.high)}"
        words = (("at least", self.low), ("above", self.above), ("at most", self.high), ("below", self.below))
        parts = [f"{word} {_short(value)}" for word, value in words if value is not None]
        return " and ".join(parts)

    def hold(self, value: object) -> bool:
        """Whether ``value`` lies within; NaN and infinities lie nowhere, words and ``None`` everywhere."""
        if self == _ANYTHING or isinstance(value, bool) or not isinstance(value, int | float):
            return True
        return (
            math.isfinite(value)
            and (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )


_ANYTHING = Bounds(None, None, None, None)


def _short(value: float) -> str:
    if value == 2**63:
        return "2**63"
    return str(int(value)) if value == int(value) else f"{value:g}"


def flag_names(field: "dataclasses.Field[Any]") -> tuple[str, ...]:
    """The flags of a field."""
    return field.metadata["names"] or (_usual(field),)


def flag_name(field: "dataclasses.Field[Any]") -> str:
    """The flag of a field; of several the one that is called as the field, else the last, which is the long one."""
    names = flag_names(field)
    return next((n for n in names if n in (_usual(field), f"--{field.name}")), names[-1])


def _usual(field: "dataclasses.Field[Any]") -> str:
    return f"--{field.name.replace('_', '-')}"


def check_bounds(config: Flags) -> None:
    """Refuse numbers outside the bounds of their flags.

    Raises:
        UserError: naming the first flag, its value and its bounds.
    """
    for field in dataclasses.fields(config):
        value, bounds = getattr(config, field.name), field.metadata["bounds"]
        if not bounds.hold(value):
            raise UserError(f"{flag_name(field)} must be {bounds}, not {value}")


def flag(
    default: object,
    help: str,
    *names: str,
    kind: Callable[..., object] | None = None,
    choices: Sequence[str] | None = None,
    result: bool = True,
    per_rank: bool = False,
    group: str = "options",
    positional: bool = False,
    metavar: str | None = None,
    many: bool = False,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field that is a command-line flag.

    ``kind`` makes a value of a word; it is the default's type unless given.
    ``result`` says whether another value makes another trained model; such fields must not change at a resume. Where
    there are several ranks they must agree on it, unless ``per_rank``: places, names, output, and what each decides
    for itself or with the others. A positional of ``many`` takes several words, kept as lines of one text. Numbers lie
    from ``low`` to ``high``, or between ``above`` and ``below`` without being equal to them; ``None`` and words (as
    auto) are not compared.
    """
    return dataclasses.field(
        default=default,
        metadata={
            "help": help,
            "names": names,
            "kind": kind or (str if default is None else type(default)),
            "choices": choices,
            "result": result,
            "per_rank": per_rank,
            "group": group,
            "positional": positional,
            "metavar": metavar,
            "many": many,
            "bounds": Bounds(low, high, above, below),
        },
    )


def path(given: object) -> str:
    """What a name of files or folders means: ``~``, ``~user`` and ``$VARIABLE`` stand for what a shell takes them for.

    A name that exists as it stands is kept. After a colon (``fashion-mnist:~/data``) ``~`` counts too. It is the
    ``kind`` of every flag and the ``type`` of every argument that names a place.

    Raises:
        ValueError: if it is no text.
        UserError: for a user or a variable that does not exist: nothing is made under such a name.
    """
    if not isinstance(given, str) or "\0" in given:
        raise ValueError
    try:
        if given and os.lstat(given) and given[0] != "~":
            return given
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(f"{given[:60]}…: {error.strerror}; give a shorter one") from None
    text = os.path.expandvars(re.sub(r"(?<![^:])~[^/\\:]*", lambda found: os.path.expanduser(found[0]), given))
    if text.startswith("~") and not os.path.lexists(text):
        raise UserError(
            f"{given}: {re.split(r'[/:]', text)[0]} is no user's folder here; write the path in full, or ./~…"
        )
    if (unset := re.search(r"\$([A-Za-z_]\w*|\{\w+\})", text)) and not os.path.lexists(text):
        raise UserError(f"{given}: the environment has no variable {unset[0]}; set it, or write the path in full")
    return text


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Print one line to standard error and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {printable(message)} (see {self.prog} --help)\n")


def add_flags(parser: argparse.ArgumentParser, config: type, defaults: Fields) -> None:
    """Add every field of ``config`` to ``parser``; a flag that is not given is absent from the result."""
    groups: dict[str, Any] = {}
    common: dict[str, Any]
    for field in dataclasses.fields(config):
        meta = field.metadata
        default = defaults.get(field.name, field.default)
        text = meta["help"].replace("%", "%%")
        facts = [str(meta["bounds"])]
        if default not in (None, "", False) and not meta["positional"]:
            facts.append(f"default {default}".replace("%", "%%"))
        text += f" ({'; '.join(filter(None, facts))})" if any(facts) else ""
        if meta["positional"]:
            nargs = "*" if meta["many"] else "?"
            common = {"default": argparse.SUPPRESS, "help": text, "metavar": meta["metavar"]}
            parser.add_argument(field.name, nargs=nargs, type=meta["kind"], **common)
            continue
        title = meta["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        names = flag_names(field)
        common = {"dest": field.name, "default": argparse.SUPPRESS, "help": text}
        if meta["kind"] is bool:
            groups[title].add_argument(*names, action=argparse.BooleanOptionalAction, **common)
        else:
            groups[title].add_argument(
                *names, type=meta["kind"], choices=meta["choices"], metavar=meta["metavar"], **common
            )


@dataclasses.dataclass(frozen=True)
class Layers:
    """Where values come from, strongest first: flags and ``--config``, the recipe, the command's defaults."""

    given: Fields
    recipe: Fields
    defaults: Fields
    flags: Fields = dataclasses.field(default_factory=dict)
    """Of ``given``, what is not of ``--config``."""

    def without(self, *names: str) -> "Layers":
        """Without what ``--config`` says of some fields."""
        given = {name: value for name, value in self.given.items() if name not in names or name in self.flags}
        return dataclasses.replace(self, given=given)

    def merged(self, between: Fields | None = None) -> Fields:
        """All values; ``between`` overrides the defaults and is overridden by the recipe."""
        return {**self.defaults, **(between or {}), **self.recipe, **self.given}


def read_layers(
    config: type,
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    defaults: Fields | None = None,
    recipes: dict[str, Fields] | None = None,
    epilog: str = "",
) -> Layers:
    """Command line → where each value comes from; the arguments and errors are those of ``parse``."""
    defaults = dict(defaults or {})
    parser = Parser(
        prog=prog, description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(parser, config, defaults)
    given = vars(parser.parse_intermixed_args(list(argv)))
    for field in dataclasses.fields(config):
        if field.metadata["many"] and isinstance(given.get(field.name), list):
            if any("\n" in word for word in given[field.name]):
                raise UserError(f"{field.name}: a name with a line break is not supported; rename it")
            given[field.name] = "\n".join(given[field.name])
    from_file = read_yaml(Path(given["config"]), config) if given.get("config") else {}
    layers = {**from_file, **given}
    recipe = layers.get("recipe", defaults.get("recipe")) or ""
    known = recipes or {}
    if recipe and recipe not in known:
        raise UserError(f"--recipe {recipe!r} is not known; {nearest(recipe, list(known))}")
    return Layers(layers, known.get(recipe, {}), defaults, given)


def parse(
    config: type[T],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    defaults: Fields | None = None,
    recipes: dict[str, Fields] | None = None,
    epilog: str = "",
) -> T:
    """Command line → frozen configuration.

    A value is taken from the first of: the flag, the file of ``--config``, the recipe, ``defaults`` (the
    door's), the field's own default.

    Raises:
        UserError: for an unknown recipe or a configuration file that cannot be read.
        SystemExit: with code 2 for a malformed command line, 0 after ``--help``.
    """
    layers = read_layers(
        config, argv, prog=prog, description=description, defaults=defaults, recipes=recipes, epilog=epilog
    )
    return config(**layers.merged())


def write_yaml(config: Flags, path: Path, header: str) -> None:
    """Write every field of ``config`` to ``path``, at once: complete, re-runnable by ``--config``."""
    import yaml

    values = dataclasses.asdict(config)
    for field in dataclasses.fields(config):
        if field.metadata["many"] and "\n" in values[field.name]:
            values[field.name] = values[field.name].split("\n")
    body = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(f"# {header}\n{body}")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_yaml(path: Path, config: type) -> Fields:
    """The fields set in a configuration file.

    Raises:
        UserError: if the file is missing, is not YAML, or names a field that does not exist.
    """
    import yaml

    try:
        with path.open("rb") as file:
            text = file.read(_LARGEST_CONFIG + 1)
        if len(text) > _LARGEST_CONFIG:
            raise UserError(f"--config {path}: is larger than {_LARGEST_CONFIG} bytes; give the config.yaml of a run")
        values = yaml.safe_load(text.decode("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: cannot be read ({error.__class__.__name__}); give a YAML file") from None
    except (yaml.YAMLError, RecursionError, ValueError):
        raise UserError(f"--config {path}: is not YAML; give the config.yaml of a run") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: holds no 'name: value' lines; give the config.yaml of a run")
    fields = {f.name: f for f in dataclasses.fields(config)}
    for name, value in values.items():
        if not isinstance(name, str) or name not in fields:
            shown = str(name)[:80] if isinstance(name, str | int | float) else type(name).__name__
            raise UserError(f"--config {path}: field {shown!r} is not known; {nearest(shown, list(fields))}")
        values[name] = _typed(value, fields[name], f"--config {path}")
    return values


def _typed(value: object, field: "dataclasses.Field[Any]", where: str) -> Any:
    kind = field.metadata["kind"]
    if field.metadata["many"] and isinstance(value, list):
        return "\n".join(_typed(v, field, where) for v in value)
    if not (value is None or isinstance(value, str | int | float)):
        # never shown: a few lines of YAML can stand for a text that fills the memory
        raise UserError(f"{where}: field {field.name!r} must be {kind.__name__}, not a {type(value).__name__}")
    if value is None and field.default is None:
        return None
    if not isinstance(kind, type):  # a parser of its own, for example of comma lists
        try:
            return kind(value)
        except (ValueError, TypeError):
            raise UserError(f"{where}: field {field.name!r} must be a {kind.__name__}, not {value!r}") from None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, str):  # YAML reads 1e-6 as a string
        try:
            return float(value)
        except ValueError:
            pass
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{where}: field {field.name!r} must be {kind.__name__}, not {value!r}")
    choices = field.metadata["choices"]
    if choices and value not in choices:
        raise UserError(f"{where}: field {field.name!r} must be one of {', '.join(choices)}, not {value!r}")
    return value


def changed_fields(config: Flags, saved: Fields) -> list[str]:
    """'name (saved → now)' for every result-changing field of ``config`` that differs from ``saved``."""
    return [
        f"{f.name} ({saved[f.name]!r} → {getattr(config, f.name)!r})"
        for f in dataclasses.fields(config)
        if f.metadata["result"] and f.name in saved and saved[f.name] != getattr(config, f.name)
    ]


def check_writable(folder: Path, flag: str) -> None:
    """Make the folder that ``flag`` names where it is missing, and refuse one that cannot be written.

    Raises:
        UserError: naming flag, folder and reason.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".mocov3-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot be written ({error.strerror})") from None
