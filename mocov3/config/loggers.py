"""The flag that says where a run's numbers go besides its folder."""

from importlib.util import find_spec

from mocov3.errors import UserError, nearest

LOGGERS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
"""Name → module that it needs."""
HELP = "comma list of loggers for numbers and images: tensorboard, wandb, mlflow, or none"


def logger_names(given: str) -> tuple[str, ...]:
    """The loggers that ``--logger`` names.

    Raises:
        UserError: if one is not known or not installed.
    """
    if given in ("", "none"):
        return ()
    names = tuple(dict.fromkeys(given.split(",")))
    if "none" in names:
        raise UserError(f"--logger {given}: none cannot be combined with others")
    for name in names:
        if name not in LOGGERS:
            raise UserError(f"--logger {name!r} is not known; {nearest(name, [*LOGGERS, 'none'])}")
        if find_spec(LOGGERS[name]) is None:
            raise UserError(f"--logger {name}: is not installed; run pip install 'mocov3[{name}]'")
    return names
