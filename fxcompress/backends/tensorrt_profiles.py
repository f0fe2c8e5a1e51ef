"""Optimization profiles: the sizes that an engine with dynamic dims takes, and is tuned for."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxcompress.backends.signature import TensorSpec
from fxcompress.errors import BackendError, OptionError, nearest
from fxcompress.graph.info import info

__all__ = ["Bounds", "Profile", "cover_examples", "ranges_of", "settle_profiles", "symbols_of"]

Bounds = tuple[int, int, int]
"""Least, most usual and greatest size."""

_TIMES = 4  # the default range goes up to this many times the example's size


@dataclass(frozen=True)
class Profile:
    """One range of sizes.

    Attributes:
        sizes: least, usual and greatest size of each symbol: ``{"batch": (1, 8, 32)}``.
        shapes: the same of each input with a dynamic dim, by name.
    """

    sizes: dict[str, Bounds]
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {"sizes": self.sizes, "shapes": self.shapes}

    def __str__(self) -> str:
        told = (f"{name} {low} to {high} (tuned for {best})" for name, (low, best, high) in self.sizes.items())
        return ", ".join(told) or "fixed sizes"


def settle_profiles(
    inputs: Sequence[TensorSpec],
    told: Sequence[Mapping[str, Sequence[int]]] = (),
    ranges: Mapping[str, tuple[int, int | None]] | None = None,
) -> tuple[Profile, ...]:
    """The profiles to build.

    By default there is one: a batch goes from 1, any other symbol from half the example's size, up to four times the
    example, tuned for the example's own size, and within what the captured graph allows.

    Args:
        inputs: of the graph; ``example`` tells the usual sizes.
        told: by symbol, least, usual and greatest size; a symbol that is left out takes the default.
        ranges: sizes that the captured graph allows, by symbol.

    Returns:
        the profiles; none where no size is dynamic.

    Raises:
        OptionError: a symbol is unknown, sizes are out of order, or outside of what the graph allows.
        BackendError: a size has no default, since there is no example.
    """
    symbols = symbols_of(inputs)
    ranges = ranges or {}
    for profile in told:
        for name in profile:
            if name not in symbols:
                raise OptionError(
                    f"no input has a size called {name!r}", where="TensorRT.profiles", remedy=nearest(name, symbols)
                )
    if not symbols:
        return ()
    made = []
    for profile in told or ({},):
        sizes: dict[str, Bounds] = {}
        for symbol in symbols:
            allowed = ranges.get(symbol, (1, None))
            given = profile.get(symbol)
            sizes[symbol] = _default(symbol, inputs, allowed) if given is None else _checked(symbol, given, allowed)
        made.append(Profile(sizes, _shapes(inputs, sizes)))
    return tuple(made)


def cover_examples(profiles: Sequence[Profile], inputs: Sequence[TensorSpec]) -> bool:
    """Whether the sizes at which ``compile()`` verifies, the examples' and another, lie inside the profiles."""
    sizes: dict[str, int] = {}
    for spec in inputs:
        for size, example in zip(spec.shape, spec.example or (), strict=False):
            if isinstance(size, str) and size.isidentifier():
                sizes[size] = example
    other = {name: (2 if size == 1 else 1) if name == "batch" else size + 1 for name, size in sizes.items()}

    def fit(at: Mapping[str, int]) -> bool:
        return any(all(p.sizes[n][0] <= at.get(n, 0) <= p.sizes[n][2] for n in p.sizes) for p in profiles)

    return not profiles or (fit(sizes) and fit(other))


def symbols_of(inputs: Sequence[TensorSpec]) -> list[str]:
    """The symbols that inputs' sizes are made of, in order."""
    found: dict[str, None] = {}
    for spec in inputs:
        for size in spec.shape:
            if isinstance(size, str):
                tree = ast.walk(ast.parse(size, mode="eval"))
                found |= dict.fromkeys(node.id for node in tree if isinstance(node, ast.Name))
    return list(found)


def ranges_of(graph_module: fx.GraphModule) -> dict[str, tuple[int, int | None]]:
    """What capture found each dynamic size to be allowed, by the symbol's readable name; None is no limit."""
    facts = info(graph_module)
    environment = facts.fake_mode.shape_env if facts.has_shapes else None
    found: dict[str, tuple[int, int | None]] = {}
    for symbol, span in environment.var_to_range.items() if environment is not None else ():
        name = facts.dim_names.get(str(symbol), str(symbol))
        low = max(int(span.lower), 1) if span.lower.is_number and abs(span.lower) < 1 << 31 else 1
        high = int(span.upper) if span.upper.is_number and abs(span.upper) < 1 << 31 else None
        before = found.get(name, (1, None))
        highs = [limit for limit in (before[1], high) if limit is not None]
        found[name] = (max(before[0], low), min(highs) if highs else None)
    return found


def _default(symbol: str, inputs: Sequence[TensorSpec], allowed: tuple[int, int | None]) -> Bounds:
    places = [(s, axis) for s in inputs for axis, size in enumerate(s.shape) if size == symbol]
    examples = [spec.example[axis] for spec, axis in places if spec.example]
    if not examples:
        raise BackendError(
            f"no size is known that {symbol!r} should be tuned for",
            where=", ".join(str(spec) for spec in inputs),
            remedy=f"give example_inputs, or TensorRT(profiles=({{{symbol!r}: (1, 8, 32)}},))",
        )
    usual = max(examples)
    # Capture does not tell 0 and 1 from 2: it says of every batch that it is at least 2, and 1 works.
    is_batch = all(axis == 0 for _, axis in places)
    low = 1 if is_batch else min(usual, max(allowed[0], usual // 2, 1))
    high = max(usual, _TIMES * usual if allowed[1] is None else min(_TIMES * usual, allowed[1]))
    return low, usual, high


def _checked(symbol: str, given: Sequence[int], allowed: tuple[int, int | None]) -> Bounds:
    low, usual, high = given
    if allowed[1] is not None and high > allowed[1]:
        raise OptionError(
            f"the model was captured with {symbol!r} up to {allowed[1]}, and the profile goes to {high}",
            where="TensorRT.profiles",
            remedy="capture it with a wider dynamic_shapes, or keep the profile inside",
        )
    return low, usual, high


def _shapes(inputs: Sequence[TensorSpec], sizes: Mapping[str, Bounds]) -> dict[str, Any]:
    shapes = {}
    for spec in inputs:
        if any(isinstance(size, str) for size in spec.shape):
            each = [{name: bounds[index] for name, bounds in sizes.items()} for index in range(3)]
            shapes[spec.name] = tuple(tuple(_evaluate(size, at) for size in spec.shape) for at in each)
            if any(a > b for a, b in zip(*shapes[spec.name][::2], strict=True)):
                raise BackendError(
                    f"the sizes of {spec} shrink as its symbols grow", remedy="fix those sizes, or capture with others"
                )
    return shapes


_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


def _evaluate(size: int | str, sizes: Mapping[str, int]) -> int:
    """The value of an expression of symbols, as shapes have them: ``2*batch``, ``(height//2)+1``."""

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.Name) and node.id in sizes:
            return sizes[node.id]
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](value(node.left), value(node.right))
        raise BackendError(f"the size {size!r} of an input cannot be computed from its symbols")

    return size if isinstance(size, int) else value(ast.parse(size, mode="eval").body)
