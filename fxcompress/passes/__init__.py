"""The passes: one file each, named for what it does. ``base`` is what a pass is, ``manager`` runs them."""

from fxcompress.passes.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from fxcompress.passes.fuse_modules import FuseModules
from fxcompress.passes.manager import PassManager, PassRecord
from fxcompress.passes.prune_channels import PruneChannels

__all__ = [
    "FuseModules",
    "Numerics",
    "Pass",
    "PassContext",
    "PassManager",
    "PassRecord",
    "PassResult",
    "PruneChannels",
    "Rewrite",
    "Skip",
]
