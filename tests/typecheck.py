"""The type checker of the tests: beartype, for which an int will do where a float is asked for.

jaxtyping adds the shapes. It wraps every function it is given, which takes 50 µs a call: here it gets those whose
annotations hold a shape, and beartype alone checks the others.
"""

import inspect
from functools import partial
from typing import Any, get_args

import jaxtyping
from beartype import BeartypeConf, beartype

typechecked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def install() -> None:
    """Check every annotated type and shape of the package, at every call."""
    jaxtyping.install_import_hook("mocov3", "typecheck.typechecked")
    by_jaxtyping = jaxtyping.jaxtyped

    def jaxtyped(fn: Any = None, *, typechecker: Any) -> Any:
        if fn is None:
            return partial(jaxtyped, typechecker=typechecker)
        if inspect.isfunction(fn) and not any(map(_has_shape, fn.__annotations__.values())):
            return typechecker(fn)
        return by_jaxtyping(fn, typechecker=typechecker)

    jaxtyping.jaxtyped = jaxtyped


def _has_shape(annotation: Any) -> bool:
    if isinstance(annotation, str):  # of what is defined later
        return any(name in annotation for name in ("Float[", "Int[", "UInt8[", "Bool[", "Shaped[", "Num["))
    is_shape = inspect.isclass(annotation) and issubclass(annotation, jaxtyping.AbstractArray)
    return is_shape or any(map(_has_shape, get_args(annotation)))
