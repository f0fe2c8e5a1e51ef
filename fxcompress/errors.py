"""Every error that fxcompress raises on purpose.

An error says three things: what is wrong, where (a node and its source line, a file, an option), and what
to do about it. ``str(error)`` shows all three; the parts stay available as attributes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BackendError",
    "BundleError",
    "CaptureError",
    "FxCompressError",
    "GraphError",
    "OptionError",
    "PassError",
    "PreconditionError",
    "TrainingError",
    "VerificationError",
    "nearest",
]


class FxCompressError(Exception):
    """Base of all errors of this package.

    Args:
        problem: one sentence that says what is wrong.
        where: the node with its source line, the file, or the option that the problem is about.
        remedy: one sentence that says what to do about it.
    """

    def __init__(self, problem: str, *, where: str | None = None, remedy: str | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.where = where
        self.remedy = remedy

    def __str__(self) -> str:
        lines = [self.problem]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.remedy:
            lines.append(f"  to do: {self.remedy}")
        return "\n".join(lines)


class PreconditionError(FxCompressError):
    """What the caller handed in cannot be worked on: not a module, wrong inputs, NaN weights, train mode."""


class OptionError(PreconditionError):
    """A name or an option is unknown or outside its range."""


class CaptureError(FxCompressError):
    """The model cannot be brought to one functional graph."""


class GraphError(FxCompressError):
    """A graph breaks an invariant that every pass relies on (see ``graph/verify.py``)."""


class PassError(FxCompressError):
    """A pass failed; the graph it was given is discarded and the user's model is as before."""


class TrainingError(FxCompressError):
    """Training went wrong: the loss or a weight is not finite. Names the step and the last good checkpoint."""


class VerificationError(FxCompressError):
    """Outputs moved further than the numerics class of a pass, or the precision of an engine, allows."""


class BackendError(FxCompressError):
    """A backend cannot build or run an engine for this graph."""


class BundleError(FxCompressError):
    """A bundle on disk is missing, damaged, altered, too new, or cannot be written."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A remedy for an unknown ``name``: the closest of the ``known`` names, or the list of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}? known: {', '.join(names)}"
    return f"known: {', '.join(names)}" if names else "none is known"
