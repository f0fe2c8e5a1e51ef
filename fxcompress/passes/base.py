"""What a pass is: options, a numerics class, and ``run``, which says what it changed and what it left, and why."""

from __future__ import annotations

import dataclasses
import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxcompress.options import Options, check_types

__all__ = ["Numerics", "Pass", "PassContext", "PassResult", "Rewrite", "Skip"]


class Numerics(enum.Enum):
    """How far outputs may move; the manager proves the first two on the example inputs and measures the third."""

    EXACT = "exact"
    """The same arithmetic in the same order: outputs are equal."""
    REASSOCIATED = "reassociated"
    """Equal in real arithmetic; rounding differs (folding a norm into a convolution)."""
    LOSSY = "lossy"
    """An approximation: the error is measured and reported."""


@dataclass(frozen=True)
class Rewrite:
    """One site that a pass changed.

    Attributes:
        site: the layer or node, by the name it had before.
        result: what became of it, in a few words: ``"folded into conv1"``.
        detail: figures and facts for the report; JSON-able.
    """

    site: str
    result: str
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Skip:
    """One site that a pass looked at and left.

    Attributes:
        site: the layer or node.
        code: a stable, greppable reason: ``"shared_value"``.
        reason: one sentence for people.
        blocking: names of the nodes that stand in the way.
    """

    site: str
    code: str
    reason: str
    blocking: tuple[str, ...] = ()


@dataclass(frozen=True)
class PassResult:
    """What a pass returns: the graph and the account of it, with one sentence more in ``note`` if there is need.

    A pass that runs other passes hands on the ``records`` that its manager kept of them.
    """

    graph_module: fx.GraphModule
    rewrites: tuple[Rewrite, ...] = ()
    skipped: tuple[Skip, ...] = ()
    note: str = ""
    records: tuple[Any, ...] = ()

    @property
    def changed(self) -> bool:
        """Whether anything was rewritten."""
        return bool(self.rewrites)


@dataclass
class PassContext:
    """What a pass may know beside the graph.

    Attributes:
        example_inputs: flat leaves in placeholder order, or None when the user gave none.
        original: the graph as captured, before any pass: the default teacher and reference.
        seed: for passes that draw random numbers.
        progress: called with (done, total, what) by long passes.
        hooks: act on every run of training inside (:class:`fxcompress.training.hooks.Hook`).
        prove: whether passes that hold passes compare outputs before and after each.
        check_backend: raises where no backend has that name, or its library is missing; None where nothing is checked.
        measured: milliseconds by what was measured, for passes that meet the same layers again.
        latency: median milliseconds of a graph on the backend of that name, measured now, with flat inputs as a third
            argument where they are not the example inputs; None where nothing can be measured.
    """

    example_inputs: Sequence[Any] | None = None
    original: fx.GraphModule | None = None
    seed: int = 0
    progress: Callable[[int, int, str], None] | None = None
    latency: Callable[..., float] | None = None
    check_backend: Callable[[str], object] | None = None
    measured: dict[Hashable, float] = field(default_factory=dict)
    hooks: Sequence[Any] = ()
    prove: bool = True


@dataclass(frozen=True)
class Pass(Options, ABC):
    """Base of all passes: a frozen dataclass whose fields are its options, validated in ``__post_init__``.

    ``run`` gets a working copy of the graph that it may edit (only through
    :class:`~fxcompress.graph.edit.GraphEditor`) and returns it in a :class:`PassResult`. It never writes into a
    tensor: weights are shared with the user's model. Every site it looks at and leaves is a :class:`Skip`.
    """

    name: ClassVar[str]
    numerics: ClassVar[Numerics]
    needs_inputs: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the options' types; a pass with further conditions calls this first.

        Raises:
            OptionError: an option has the wrong type.
        """
        check_types(self)

    @abstractmethod
    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """Rewrite ``graph_module`` and say what was done."""

    @property
    def options(self) -> dict[str, Any]:
        """The options as plain values for manifests and reports."""
        return {item.name: _plain(getattr(self, item.name)) for item in dataclasses.fields(self)}

    def __str__(self) -> str:
        changed = [
            f"{item.name}={_text(getattr(self, item.name))}"
            for item in dataclasses.fields(self)
            if not _is_default(item, getattr(self, item.name))
        ]
        return f"{self.name}({', '.join(changed)})" if changed else self.name


def _is_default(item: dataclasses.Field[Any], value: Any) -> bool:
    if item.default_factory is not dataclasses.MISSING:
        return bool(value == item.default_factory())
    return value is item.default or (isinstance(value, (str, int, float, tuple)) and value == item.default)


def _text(value: Any) -> str:
    """A value as it is written; of data only what it is."""
    if isinstance(value, Pass):
        return str(value)
    if (count := _batches(value)) is not None:
        return f"<{count}>"
    if isinstance(value, tuple):
        return f"({', '.join(map(_text, value))}{',' if len(value) == 1 else ''})"
    literal = value is None or isinstance(value, (bool, int, float, str))
    literal = literal or (isinstance(value, Mapping) and not _holds_numbers(value))
    return repr(value) if literal else f"<{getattr(value, '__qualname__', type(value).__qualname__)}>"


def _batches(value: Any) -> str | None:
    """How many batches a list of them has; None for what is no such list."""
    if not isinstance(value, (list, tuple)) or not value:
        return None
    if not _holds_numbers(value[0]):
        return None
    return f"{len(value)} batch{'es' if len(value) > 1 else ''}"


def _holds_numbers(value: Any) -> bool:
    """Whether it is, or holds, tensors or arrays."""
    return any(hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in pytree.tree_leaves(value))


def _plain(value: Any) -> Any:
    if isinstance(value, Pass):
        return {value.name: value.options}
    if (count := _batches(value)) is not None:
        return count
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return getattr(value, "__qualname__", type(value).__qualname__)
