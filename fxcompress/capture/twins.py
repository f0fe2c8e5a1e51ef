"""The functional twin of an in-place operation: ``relu_`` → ``relu``, ``add(…, out=y)`` → ``add``."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx.node import map_arg

from fxcompress.capture import views
from fxcompress.graph.info import tensors_of
from fxcompress.graph.shapes import no_guards

__all__ = ["Twin", "functional_twin", "result_of"]

aten = torch.ops.aten


class Twin(NamedTuple):
    """The tensor that is written, and the operation that gives the new value.

    Attributes:
        may_reshape: what is written may take another shape: ``out=`` resizes.
    """

    written: fx.Node
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    may_reshape: bool = False


# Operations that torch writes as operators of their own: ``mask &= other`` is ``__iand__``.
_OPERATORS = re.compile(r"__i(and|or|xor|lshift|rshift)__")


def functional_twin(node: fx.Node) -> Twin | None:
    """What computes the value that ``node`` writes; None where there is no such operation."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    written = [argument for argument in target._schema.arguments if argument.is_write]
    if len(written) != 1 or torch.Tag.inplace_view in target.tags:
        return None
    if written[0].is_out:
        return _of_out_variant(node, target, written[0].name)
    old = node.args[0] if node.args else None
    if not isinstance(old, fx.Node) or not target._schema.arguments[0].is_write:
        return None
    if target is aten.zero_.default:
        return Twin(old, aten.zeros_like.default, (old,), {})
    if target is aten.copy_.default and isinstance(node.args[1], fx.Node):  # ``aten.copy`` has no derivative
        source = node.args[1]
        if views.same_sizes(source.meta["val"], old.meta["val"]):
            return Twin(old, aten.clone.default, (source,), {})
        return Twin(old, aten.expand_as.default, (source, old), {})
    name = target._schema.name.partition("::")[2]
    if _OPERATORS.fullmatch(name):
        name = name.replace("__i", "__")
    elif name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    else:
        return None
    packet = getattr(getattr(torch.ops, target.namespace), name, None)
    overload = getattr(packet, target._overloadname, None)
    return None if overload is None else Twin(old, overload, node.args, dict(node.kwargs))


def _of_out_variant(node: fx.Node, target: torch._ops.OpOverload, out: str) -> Twin | None:
    kwargs = dict(node.kwargs)
    old = kwargs.pop(out, None)
    expected = [(argument.name, str(argument.type)) for argument in target._schema.arguments if not argument.is_out]
    packet = getattr(getattr(torch.ops, target.namespace), target._schema.name.partition("::")[2])
    for name in packet.overloads():
        overload = getattr(packet, name)
        found = [(argument.name, str(argument.type)) for argument in overload._schema.arguments]
        if found == expected and not overload._schema.is_mutable and isinstance(old, fx.Node):
            return Twin(old, overload, node.args, kwargs, may_reshape=True)
    return None


def result_of(target: Any, args: Any, kwargs: Any, like: torch.Tensor, *, may_reshape: bool = False) -> Any:
    """The fake value of the functional operation that stands for a write into ``like``.

    Where no other dtype takes part, and the shape cannot differ, it is like what was written: nothing is computed.
    """
    values: list[torch.Tensor] = []
    map_arg((args, kwargs), lambda node: values.extend(tensors_of(node.meta.get("val"))))
    if not may_reshape and all(value.dtype == like.dtype for value in values):
        return like
    mode = like.fake_mode  # type: ignore[attr-defined]
    args, kwargs = map_arg((args, kwargs), lambda node: node.meta["val"])
    with mode, torch.no_grad(), no_guards(mode):
        return target(*args, **kwargs)
