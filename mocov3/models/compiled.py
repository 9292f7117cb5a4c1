"""Compiled backbones: of fixed shapes, while they train; eager where nothing can be compiled.

Measured on an H200 (docs/gpu.md): a compiled ViT-S step takes 0.74 of the eager one, a ResNet-50's in bf16 0.65. What
is around the backbones stays eager: heads are three matrix products, the momentum changes at every step, calls among
ranks end a graph; and so does evaluation, whose batches have other sizes.
"""

import itertools
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch

SMALL_PASS = 2**20
"""Pixels of a pass (images × height × width) below which compiling does not pay: launching its kernels takes longer
than running them. ResNet-18 on 512 images of 32 px: 20,100 images/s eager, 12,500 compiled (H200)."""

VARIANTS = 64
"""Compiled variants of a backbone that are kept: with and without gradient, by size of a micro-batch, by stage."""


class CompiledFeatures:
    """A method of an encoder, compiled while the encoder trains.

    Args:
        encoder: its method is replaced by this object.
        method: its name.
        backend: of ``torch.compile``.
        say: told when nothing can be compiled here.
    """

    def __init__(
        self, encoder: Any, method: str, backend: str | Callable[..., object], say: Callable[[str], None]
    ) -> None:
        self._encoder, self._say = encoder, say
        self._eager: Callable[..., Any] = getattr(encoder, method)
        # symbolic sizes would be slower: a run has few, and they are known from its start
        self._compiled: Callable[..., Any] | None = torch.compile(self._eager, backend=backend, dynamic=False)

    @property
    def works(self) -> bool:
        """Whether it has been possible to compile so far."""
        return self._compiled is not None

    def __call__(self, *args: object) -> Any:
        """Features of images, as the encoder's own method."""
        if not self._encoder.training or self._compiled is None:
            return self._eager(*args)
        try:
            return self._compiled(*args)
        except torch._dynamo.exc.TorchDynamoException as error:
            self._compiled = None
            self._say(f"--compile: nothing can be compiled here, so the backbone runs eagerly ({_reason(error)})")
            return self._eager(*args)


def compile_features(
    encoders: Iterable[Any],
    backend: str | Callable[..., object] = "inductor",
    *,
    method: str = "features",
    say: Callable[[str], None] = warnings.warn,
) -> None:
    """Compile what makes features in ``encoders``; parameters and their names stay.

    Args:
        encoders: each with a method ``features``.
        backend: of ``torch.compile``.
        method: what makes them.
        say: told when nothing can be compiled here.
    """
    settings = torch._dynamo.config
    name = "recompile_limit" if hasattr(settings, "recompile_limit") else "cache_size_limit"  # torch before 2.7
    setattr(settings, name, max(getattr(settings, name), VARIANTS))
    for encoder in encoders:
        setattr(encoder, method, CompiledFeatures(encoder, method, backend, say))


def pays(images: int, side: int) -> bool:
    """Whether compiling pays for passes over ``images`` of ``side`` pixels on a GPU."""
    return images * side * side >= SMALL_PASS


def _reason(error: BaseException) -> str:
    """The first line of what lies at the bottom of an error of torch.compile."""
    while cause := getattr(error, "inner_exception", None) or error.__cause__:
        error = cause
    lines: Iterable[str] = itertools.chain(str(error).strip().splitlines(), [type(error).__name__])
    return next(line.strip() for line in lines if line.strip())[:200]
