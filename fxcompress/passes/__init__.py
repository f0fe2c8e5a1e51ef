"""The passes: one file each, named for what it does. ``base`` is what a pass is, ``manager`` runs them."""

from fxcompress.passes.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip

__all__ = [
    "Numerics",
    "Pass",
    "PassContext",
    "PassResult",
    "Rewrite",
    "Skip",
]
