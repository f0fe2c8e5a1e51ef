"""In-place operations made functional while an exported graph is copied node by node.

An exported graph may still write into tensors: ``relu_``, ``add_``, ``mask[:, 0:4] = 1``. Passes want values. So every
write becomes a new value, and whoever reads the written tensor *afterwards*, directly or through a view, reads that:

* a write into a fresh tensor is its functional twin, ``relu_(x)`` → ``relu(x)``;
* a write through a view (slice, select, reshape, transpose …) is scattered back into the tensor it views, and the
  other views of that tensor are taken again from the new value when they are read next.

What is never read again is dead code that the caller removes. Writes that cannot be followed exactly (through a view
that has no inverse, into a parameter or buffer) are refused with :class:`~fxcompress.errors.CaptureError`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from fxcompress.capture import views
from fxcompress.errors import CaptureError
from fxcompress.graph.shapes import where

__all__ = ["Functionalizer"]

aten = torch.ops.aten

# In-place operations whose functional twin has another name or other arguments.
_RENAMED: dict[Any, Any] = {aten.zero_.default: aten.zeros_like.default}
_NO_OPS = {aten.requires_grad_.default, aten.detach_.default}


class Functionalizer:
    """Copies nodes of ``old`` graphs into ``graph``, turning writes into values.

    ``current`` maps each old node to the new node that holds its value now.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.current: dict[fx.Node, Any] = {}
        self.written_inputs: list[fx.Node] = []
        self._parent: dict[fx.Node, fx.Node] = {}  # a view → the old node it views
        self._root: dict[fx.Node, fx.Node] = {}
        self._version: dict[fx.Node, int] = {}  # of roots: how often written; of views: which version they show
        self._unreadable: dict[fx.Node, str] = {}
        self._written: set[fx.Node] = set()  # results of in-place operations: their first argument itself
        self._protected: set[fx.Node] = set()  # parameters, buffers, constants

    def bind(self, old: fx.Node, new: Any, *, protected: bool = False) -> None:
        """Say that ``new`` holds the value of ``old`` (an input, a weight, a constant)."""
        self.current[old] = new
        if protected:
            self._protected.add(old)

    def alias(self, old: fx.Node, source: fx.Node) -> None:
        """Say that ``old`` is the same tensor as ``source`` (arguments and results of an inlined subgraph)."""
        self._link(old, source)
        self.current[old] = self.read(source)

    def read(self, old: fx.Node) -> Any:
        """The new node that holds ``old``'s value at this point of the program."""
        root = self._root.get(old, old)
        if old in self._unreadable:
            raise CaptureError(
                f"a tensor is read after a write through {self._unreadable[old]}, which cannot be followed exactly",
                where=where(old),
                remedy="write the model without that in-place operation",
            )
        if old in self._parent and self._version.get(old, 0) != self._version.get(root, 0):
            parent = self.read(self._parent[old])
            if self._is_identity(old):
                self.current[old] = parent
            else:
                source = self._parent[old]
                self.current[old] = self._copy(old, {source: parent})
            self._version[old] = self._version.get(root, 0)
        return self.current[old]

    def run(self, node: fx.Node) -> None:
        """Copy one ``call_function`` node."""
        schema = getattr(node.target, "_schema", None)
        if node.target in _NO_OPS or _is_noop_view(node):
            self.alias(node, node.all_input_nodes[0])
        elif schema is not None and schema.is_mutable:
            self._write(node)
        else:
            self.current[node] = self._copy(node)
            source = views.viewed(node)
            if source is not None:
                self._link(node, source)

    # --- private -----------------------------------------------------------------------------------------------

    def _link(self, old: fx.Node, source: fx.Node) -> None:
        self._parent[old] = source
        self._root[old] = self._root.get(source, source)
        self._version[old] = self._version.get(self._root[old], 0)

    def _is_identity(self, old: fx.Node) -> bool:
        if old.op != "call_function" or old.target in _NO_OPS or _is_noop_view(old):
            return True
        return old in self._written or views.viewed(old) is None

    def _copy(self, node: fx.Node, known: dict[fx.Node, Any] | None = None) -> fx.Node:
        known = known or {}

        def value(n: fx.Node) -> Any:
            return known[n] if n in known else self.read(n)

        new = self.graph.create_node(
            node.op, node.target, map_arg(node.args, value), map_arg(node.kwargs, value), name=node.name
        )
        new.meta = dict(node.meta)
        return new

    def _emit(self, like: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], val: Any) -> fx.Node:
        new = self.graph.create_node("call_function", target, args, kwargs)
        new.meta = {key: like.meta[key] for key in ("stack_trace", "nn_module_stack") if key in like.meta}
        new.meta["val"] = val
        return new

    def _write(self, node: fx.Node) -> None:
        target = node.args[0] if node.args else None
        twin = _functional_twin(node)
        if twin is None or not isinstance(target, fx.Node):
            raise CaptureError(
                f"the in-place operation {node.target} has no functional form here",
                where=where(node),
                remedy="write the model without it",
            )
        root = self._root.get(target, target)
        if root in self._protected:
            raise CaptureError(
                f"the forward pass writes into {root.name!r}, a parameter, buffer or constant of the model",
                where=where(node),
                remedy="keep state out of forward(), or return the new value as an output",
            )
        if root.op == "placeholder":
            self.written_inputs.append(root)
        args, kwargs = map_arg(node.args, self.read), map_arg(node.kwargs, self.read)
        before = target.meta["val"]
        if node.target in _RENAMED:
            args, kwargs = args[:1], {}
        value = self._emit(node, twin, args, kwargs, before)
        if _promotes(node, before):
            # The functional form would promote; the in-place one keeps the dtype of what it writes into.
            value = self._emit(node, aten.to.dtype, (value, before.dtype), {}, before)
        self._store(target, value)
        self._link(node, target)
        self._written.add(node)
        self.current[node] = self.current[target]
        self._version[node] = self._version.get(root, 0)

    def _store(self, old: fx.Node, value: fx.Node) -> None:
        """Let ``old`` hold ``value``, and every tensor that ``old`` is a view of show it."""
        self.current[old] = value
        parent = self._parent.get(old)
        if parent is None:
            self._version[old] = self._version.get(old, 0) + 1
            return
        if self._is_identity(old):
            self._store(parent, value)
        else:
            written = views.write_back(old, value, self)
            if written is None:
                self._poison(parent, str(old.target))
            else:
                self._store(*written)
        root = self._root[old]
        self._version[old] = self._version.get(root, 0)

    def _poison(self, old: fx.Node, op: str) -> None:
        root = self._root.get(old, old)
        self._version[root] = self._version.get(root, 0) + 1
        for node in (old, root):
            self._unreadable[node] = op


def _functional_twin(node: fx.Node) -> Any:
    """``aten.add_.Tensor`` → ``aten.add.Tensor``; None where there is no such operation."""
    if node.target in _RENAMED:
        return _RENAMED[node.target]
    schema = node.target._schema  # type: ignore[union-attr]
    written = [index for index, argument in enumerate(schema.arguments) if argument.is_write]
    name = schema.name.partition("::")[2]
    tags = getattr(node.target, "tags", ())
    if written != [0] or not name.endswith("_") or name.endswith("__") or torch.Tag.inplace_view in tags:
        return None
    packet = getattr(getattr(torch.ops, node.target.namespace), name[:-1], None)  # type: ignore[union-attr]
    return getattr(packet, node.target._overloadname, None) if packet is not None else None  # type: ignore[union-attr]


def _promotes(node: fx.Node, before: torch.Tensor) -> bool:
    others = [n.meta["val"] for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    return any(other.dtype != before.dtype for other in others) and node.target is not aten.copy_.default


def _is_noop_view(node: fx.Node) -> bool:
    """A call that returns its own argument: ``contiguous`` of a contiguous tensor, ``to`` of the same dtype."""
    if node.target not in views.MAY_RETURN_SELF:
        return False
    source = node.args[0]
    return (
        isinstance(source, fx.Node)
        and views.share_storage(node, source)
        and source.meta["val"].stride() == node.meta["val"].stride()
    )


