"""Python's operators on tensors, on sizes, and on shapes."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from fxcompress.capture.facts import Sizes
from fxcompress.capture.traced_graph import TracedGraph

__all__ = ["operate"]

_NAMES: dict[Any, str] = {
    operator.truediv: "div",
    operator.floordiv: "floor_divide",
    operator.mod: "remainder",
    operator.and_: "__and__",
    operator.or_: "__or__",
    operator.xor: "__xor__",
    operator.lshift: "__lshift__",
    operator.rshift: "__rshift__",
    operator.invert: "bitwise_not",
    operator.pos: "positive",
}
_MIRRORED: dict[Any, Any] = {
    operator.add: operator.add,
    operator.mul: operator.mul,
    operator.and_: operator.and_,
    operator.or_: operator.or_,
    operator.xor: operator.xor,
    operator.eq: operator.eq,
    operator.ne: operator.ne,
    operator.lt: operator.gt,
    operator.gt: operator.lt,
    operator.le: operator.ge,
    operator.ge: operator.le,
}


def operate(n: TracedGraph, function: Any, args: tuple[Any, ...]) -> Any:
    """An operator on tensors, on sizes, or on lists of sizes.

    Raises:
        Unknown: its arguments are neither.
    """
    if not any(n.is_tensor(item) for item in args):
        if not any(isinstance(item, (fx.Node, Sizes)) for item in args):
            if all(isinstance(item, (list, tuple)) for item in args):
                args = tuple(list(item) for item in args)  # shapes that are put together
            return function(*args)
        return n.emit(function, args)
    name = _NAMES.get(function, function.__name__.strip("_"))
    if len(args) == 2 and not n.is_tensor(args[0]):
        number, tensor = args
        if function in _MIRRORED:
            return operate(n, _MIRRORED[function], (tensor, number))
        if function is operator.sub:
            return n.call("rsub", tensor, number)
        if function is operator.truediv:
            return n.call("mul", n.call("reciprocal", tensor), number)
    return n.call(name, *args)
