"""What must not change between a run and its resume."""

from collections.abc import Iterable

from mocov3.config import RunConfig, changed_fields
from mocov3.errors import UserError
from mocov3.weights import Contents, trained_with


def refuse_changes(
    where: str, config: RunConfig, contents: Contents, *, left_out: Iterable[str] = (), more: Iterable[str] = ()
) -> None:
    """Refuse to resume with other result-changing flags, unless the configuration allows it.

    Args:
        where: the checkpoint, for the message.
        config: of the resumed run.
        contents: of the checkpoint.
        left_out: fields that are compared elsewhere.
        more: changes of what is no flag, in words.

    Raises:
        UserError: naming what differs.
    """
    saved = trained_with(contents)
    left_out = {"heads", *left_out}  # heads are compared with the weights
    saved = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items() if k not in left_out}
    changed = [*changed_fields(config, saved), *more]
    if changed and not config.allow_config_change:
        raise UserError(
            f"{where}: these fields differ from the checkpoint's: {', '.join(changed)}; give them as they were, or "
            "--allow-config-change"
        )
