"""A graph as text that is the same in every run: for people, for error dumps and for golden tests.

::

    graph(x: f32[batch, 3, 224, 224]):
      conv1: f32[batch, 64, 112, 112] = Conv2d(3, 64, kernel_size=(7, 7), bias=False) @conv1 (x)
      relu: f32[batch, 64, 112, 112] = aten.relu(conv1)
      position: f32[1, 64, 1, 1] = parameter encoder.position
      return {'logits': fc}

Symbols are printed by the readable names of their dims, an operator without its overload where that is ``default``,
and ``return`` shows what the caller gets. ``constant`` is a buffer that is not in ``state_dict()``. Weights that are
one tensor under several names are told at the end: ``# tied: decoder.weight = embedding.weight``; and so are weights
whose zeros are meant to stay: ``# sparse: fc.weight 2:4``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx, nn

from fxcompress.errors import FxCompressError
from fxcompress.graph.info import GraphInfo, info
from fxcompress.graph.queries import storage_users
from fxcompress.graph.structure import Structure

__all__ = ["describe_layer", "describe_target", "format_graph", "format_value"]

_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.complex64: "c64",
    torch.complex128: "c128",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.uint16: "u16",
    torch.uint32: "u32",
    torch.uint64: "u64",
    torch.bool: "bool",
}


def format_graph(graph_module: fx.GraphModule, *, values: bool = True) -> str:
    """The graph as stable text, one line per node; see the module's text for the form.

    Args:
        graph_module: a captured graph.
        values: also print dtype and shape of what each node makes.
    """
    names = _Symbols(info(graph_module).dim_names)
    inputs: list[str] = []
    lines: list[str] = []
    for node in graph_module.graph.nodes:
        kind = f": {_value(node.meta['val'], names)}" if values and node.meta.get("val") is not None else ""
        if node.op == "placeholder":
            inputs.append(f"{node.name}{kind}")
        elif node.op == "output":
            lines.append(f"  return {_returned(info(graph_module), node)}")
        else:
            lines.append(f"  {node.name}{kind} = {_made_by(graph_module, node)}")
    lines += [f"  # tied: {' = '.join(paths)}" for paths in _tied(graph_module)]
    lines += [f"  # sparse: {path} {pattern}" for path, pattern in info(graph_module).sparse.items()]
    return "\n".join([f"graph({', '.join(inputs)}):", *lines])


def format_value(value: Any, dim_names: Mapping[str, str] | None = None) -> str:
    """One ``meta["val"]``: ``f32[batch, 3]``, ``int[2*batch]``, or a tuple of those.

    Args:
        value: a fake tensor, a symbolic number, or nested tuples and lists of them.
        dim_names: readable names by symbol, as :class:`~fxcompress.graph.info.GraphInfo` keeps them.
    """
    return _value(value, _Symbols(dim_names or {}))


def describe_target(node: fx.Node) -> str:
    """What a ``call_function`` node calls, in short: ``aten.relu``, ``aten.add.Tensor``, ``getitem``."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    return str(target) if isinstance(target, str) else getattr(target, "__name__", type(target).__name__)


def describe_layer(module: nn.Module) -> str:
    """A layer with its options and without its children, on one line: ``Linear(in_features=4, out_features=2)``."""
    options = " ".join(module.extra_repr().split())
    return f"{type(module).__name__}({re.sub(r' at 0x[0-9a-fA-F]+', '', options)})"


class _Symbols:
    """Readable names of symbols; those without one are numbered in the order in which they are met."""

    def __init__(self, dim_names: Mapping[str, str]) -> None:
        self._names = dict(dim_names)
        self._texts: dict[sympy.Basic, str] = {}

    def text(self, size: Any) -> str:
        if not isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return repr(size)
        expression = size.node.expr
        if expression not in self._texts:
            symbols = sorted(expression.free_symbols, key=str)
            readable = {symbol: sympy.Symbol(self._name(str(symbol)), **symbol.assumptions0) for symbol in symbols}
            self._texts[expression] = str(expression.xreplace(readable))
        return self._texts[expression]

    def _name(self, symbol: str) -> str:
        if symbol not in self._names:
            taken = set(self._names.values())
            self._names[symbol] = next(name for n in range(len(taken) + 1) if (name := f"dim{n}") not in taken)
        return self._names[symbol]


def _value(value: Any, names: _Symbols) -> str:
    if isinstance(value, torch.Tensor):
        dtype = _DTYPES.get(value.dtype) or str(value.dtype).removeprefix("torch.")
        return f"{dtype}[{', '.join(map(names.text, value.shape))}]"
    if isinstance(value, (tuple, list)):
        parts = [_value(item, names) for item in value]
        return f"({', '.join(parts)}{',' * (len(parts) == 1)})"
    for kind, symbolic in (("int", torch.SymInt), ("float", torch.SymFloat), ("bool", torch.SymBool)):
        if isinstance(value, symbolic):
            return f"{kind}[{names.text(value)}]"
    return "None" if value is None else f"{type(value).__name__}[{value}]"


def _made_by(graph_module: fx.GraphModule, node: fx.Node) -> str:
    if node.op == "get_attr":
        return _held(graph_module, str(node.target))
    arguments = ", ".join([*map(_argument, node.args), *(f"{k}={_argument(v)}" for k, v in node.kwargs.items())])
    if node.op == "call_module":
        return f"{describe_layer(graph_module.get_submodule(str(node.target)))} @{node.target} ({arguments})"
    return f"{'.' * (node.op == 'call_method')}{describe_target(node)}({arguments})"


def _held(graph_module: fx.GraphModule, path: str) -> str:
    owner, _, name = path.rpartition(".")
    module = graph_module.get_submodule(owner)
    if name in module._parameters:
        return f"parameter {path}"
    persistent = name in module._buffers and name not in module._non_persistent_buffers_set
    return f"{'buffer' if persistent else 'constant'} {path}"


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, list):
        return f"[{', '.join(map(_argument, value))}]"
    if isinstance(value, tuple):
        return f"({', '.join(map(_argument, value))}{',' * (len(value) == 1)})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_argument(item)}" for key, item in value.items()) + "}"
    if isinstance(value, slice):
        return f"slice({_argument(value.start)}, {_argument(value.stop)}, {_argument(value.step)})"
    if isinstance(value, torch.device):
        return repr(str(value))
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _returned(facts: GraphInfo, output: fx.Node) -> str:
    leaves = output.args[0]
    if not isinstance(leaves, (tuple, list)):
        return _argument(leaves)
    try:
        structure = Structure.from_spec(facts.out_spec)
    except FxCompressError:  # a type that tells no names for its parts
        return _argument(tuple(leaves))
    if structure.leaf_count != len(leaves):
        return _argument(tuple(leaves))
    remaining = iter(leaves)

    def build(part: Structure) -> str:
        if part.kind == "leaf":
            return _argument(next(remaining))
        parts = [build(child) for child in part.children]
        if part.kind == "list":
            return f"[{', '.join(parts)}]"
        if part.kind == "tuple":
            return f"({', '.join(parts)}{',' * (len(parts) == 1)})"
        if part.kind == "dict":
            return "{" + ", ".join(f"{key!r}: {text}" for key, text in zip(part.keys, parts, strict=True)) + "}"
        name = (part.type_name or "record").rpartition(".")[2]
        return f"{name}({', '.join(f'{key}={text}' for key, text in zip(part.keys, parts, strict=True))})"

    return build(structure)


def _tied(graph_module: fx.GraphModule) -> list[list[str]]:
    groups = storage_users(graph_module).values()
    return sorted(sorted(user.path for user in group) for group in groups if len(group) > 1)
