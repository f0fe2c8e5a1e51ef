"""What a symbolic trace knows of a tensor without a shape, and what it does not."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

__all__ = ["DtypeOf", "Sizes", "Unknown"]


class Unknown(Exception):
    """A fact is needed that only example inputs tell. The text completes "without example inputs …"."""


@dataclass(frozen=True)
class Sizes:
    """``tensor.shape[start:]``, whose length is not known."""

    tensor: fx.Node
    start: int = 0


@dataclass(frozen=True)
class DtypeOf:
    """``tensor.dtype``."""

    tensor: fx.Node
