"""What a model spec leads to, and the hints for one that leads nowhere."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from torch.export import ExportedProgram

from fxcompress.capture.inputs import ExampleInputs
from fxcompress.compiled import Compiled
from fxcompress.errors import OptionError

__all__ = ["RANDOM", "ModelSource", "examples_for", "first_line", "similar_file", "suggestion"]

RANDOM = "random weights"


@dataclass(frozen=True)
class ModelSource:
    """A model and what is known about it.

    Attributes:
        spec: as typed.
        name: short, fit for a file name.
        model: in eval mode.
        inputs: example inputs that fit it; None where nobody knows any.
        weights: where the weights come from, for people: ``"random weights"``.
    """

    spec: str
    name: str
    model: nn.Module | ExportedProgram | Compiled
    inputs: ExampleInputs | None
    weights: str

    @property
    def random(self) -> bool:
        """Whether the weights are random, so that sizes and times mean something and outputs nothing."""
        return self.weights == RANDOM


def examples_for(source: ModelSource, given: ExampleInputs | None, *, needed: bool = False) -> ExampleInputs | None:
    """The inputs that were given, or else those that are known to fit the model.

    Raises:
        OptionError: there are none, and they are ``needed``.
    """
    inputs = given if given is not None else source.inputs
    if inputs is None and needed:
        raise OptionError(
            f"an engine needs shapes, and nobody knows the inputs of {source.spec}",
            where="--input",
            remedy="give one per argument, as in --input 1x3x224x224, or return (module, inputs) from the function",
        )
    return inputs


def suggestion(name: str, known: Iterable[str], listing: str) -> str:
    """A remedy for an unknown ``name`` where the ``known`` ones may be too many to list."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"known are {', '.join(names)}" if 0 < len(names) < 8 else f"see {listing}"


def similar_file(path: Path) -> str:
    """A remedy for a file that is not there."""
    try:
        near = difflib.get_close_matches(path.name, [item.name for item in path.parent.iterdir()], n=1)
    except OSError:
        return f"the directory {path.parent} is not there either"
    return f"did you mean {path.parent / near[0]}?" if near else "check the path"


def first_line(error: BaseException) -> str:
    """The first line of an error's text that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
