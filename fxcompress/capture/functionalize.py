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
from fxcompress.capture.twins import functional_twin, result_of
from fxcompress.errors import CaptureError
from fxcompress.graph.shapes import where
from fxcompress.graph.trace import OF_ANY_LAYOUT

__all__ = ["Functionalizer"]

aten = torch.ops.aten

_NO_OPS = {aten.requires_grad_.default}
_END = torch.iinfo(torch.int64).max
_DETACH = {aten.detach.default, aten.detach_.default}


class Functionalizer:
    """Copies nodes of ``old`` graphs into ``graph``, turning writes into values.

    Attributes:
        current: maps each old node to the new node that holds its value now.
        written_inputs: names of the inputs that the model writes into.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.current: dict[fx.Node, Any] = {}
        self.written_inputs: set[str] = set()
        self._parent: dict[fx.Node, fx.Node] = {}  # a view → the old node it views
        self._root: dict[fx.Node, fx.Node] = {}
        self._version: dict[fx.Node, int] = {}  # of roots: how often written; of views: which version they show
        self._unreadable: dict[fx.Node, str] = {}
        self._same: set[fx.Node] = set()  # not views but their parent itself: results of writes, of inlined blocks
        self._detached: set[fx.Node] = set()  # of those, the ones that gradients do not flow through
        self._protected: set[fx.Node] = set()  # parameters, buffers, constants
        self._trained: set[fx.Node] = set()  # of the new graph: what depends on parameters

    def bind(self, old: fx.Node, new: Any, *, protected: bool = False, trained: bool = False) -> None:
        """Say that ``new`` holds the value of ``old`` (an input, a weight, a constant).

        Args:
            old: node of the old graph.
            new: node of the new graph, or a plain value.
            protected: it may not be written.
            trained: gradients flow to it in training.
        """
        self.current[old] = new
        if protected:
            self._protected.add(old)
        if trained:
            self._trained.add(new)

    def alias(self, old: fx.Node, source: fx.Node, *, detached: bool = False) -> None:
        """Say that ``old`` is the same tensor as ``source`` (arguments and results of an inlined subgraph).

        ``detached`` keeps gradients from flowing back through it in training.
        """
        self._link(old, source)
        self._same.add(old)
        value = old.meta.get("val")
        if detached and isinstance(value, torch.Tensor) and value.is_floating_point():
            self._detached.add(old)
        self.current[old] = self._same_as(old, self.read(source))

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
            source = self._parent[old]
            parent = self.read(source)
            self.current[old] = self._same_as(old, parent) if old in self._same else self._copy(old, {source: parent})
            self._version[old] = self._version.get(root, 0)
        return self.current[old]

    def run(self, node: fx.Node) -> None:
        """Copy one ``call_function`` node."""
        schema = getattr(node.target, "_schema", None)
        if node.target in _DETACH:
            self.alias(node, node.all_input_nodes[0], detached=True)
        elif node.target in _NO_OPS or _is_noop_view(node):
            self.alias(node, node.all_input_nodes[0])
        elif node.target is aten.lift_fresh_copy.default:  # a constant made in forward(): it may be written, as a value
            self.current[node] = self.read(node.all_input_nodes[0])
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

    def _same_as(self, old: fx.Node, value: Any) -> Any:
        if old not in self._detached or value not in self._trained:
            return value
        detached = self.emit(old, aten.detach.default, (value,), {}, old.meta["val"])
        self._trained.discard(detached)
        return detached

    def _copy(self, node: fx.Node, known: dict[fx.Node, Any] | None = None) -> fx.Node:
        known = known or {}

        def value(n: fx.Node) -> Any:
            return known[n] if n in known else self.read(n)

        args, kwargs = map_arg((node.args, node.kwargs), value)
        return self._create(OF_ANY_LAYOUT.get(node.target, node.target), args, kwargs, node.name, dict(node.meta))

    def emit(self, like: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], val: Any) -> fx.Node:
        """A new node that computes ``val``, with the source line of ``like``, named for what it does."""
        name = target._schema.name.partition("::")[2].strip("_")
        meta: dict[str, Any] = {key: like.meta[key] for key in ("stack_trace", "nn_module_stack") if key in like.meta}
        return self._create(target, args, kwargs, name, {**meta, "val": val})

    def _create(self, target: Any, args: Any, kwargs: Any, name: str, meta: dict[str, Any]) -> fx.Node:
        new = self.graph.create_node("call_function", target, args, kwargs, name=name)
        new.meta = meta
        if not self._trained.isdisjoint(new.all_input_nodes):
            self._trained.add(new)
        return new

    def _write(self, node: fx.Node) -> None:
        twin = functional_twin(node)
        if twin is None:
            raise CaptureError(
                f"the in-place operation {node.target} has no functional form here",
                where=where(node),
                remedy="write the model without it",
            )
        target, op = twin.written, twin.target
        root = self._root.get(target, target)
        if root in self._protected:
            raise CaptureError(
                f"the forward pass writes into {self.current[root].target!r}, a parameter, buffer or constant",
                where=where(node),
                remedy="keep state out of forward(), or return the new value as an output",
            )
        if root.op == "placeholder":
            self.written_inputs.add(root.name)
        before = target.meta["val"]
        args, kwargs = map_arg((twin.args, twin.kwargs), self.read)
        made = result_of(op, args, kwargs, before, may_reshape=twin.may_reshape)
        if not views.same_sizes(made, before):
            raise CaptureError(
                f"{node.target} writes a result of another shape into its argument",
                where=where(node),
                remedy="write the model without it",
            )
        value = self.emit(node, op, args, kwargs, made)
        if made.dtype != before.dtype:
            # The functional form promotes; the in-place one keeps the dtype of what it writes into.
            value = self.emit(node, aten.to.dtype, (value, before.dtype), {}, before)
        self._store(target, value)
        self._link(node, target)
        self._same.add(node)
        self.current[node] = self.current[target]
        self._version[node] = self._version.get(root, 0)

    def _store(self, old: fx.Node, value: fx.Node) -> None:
        """Let ``old`` hold ``value``, and every tensor that ``old`` is a view of show it."""
        self.current[old] = value
        parent = self._parent.get(old)
        if parent is None:
            self._version[old] = self._version.get(old, 0) + 1
            return
        if old in self._same:
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


def _is_noop_view(node: fx.Node) -> bool:
    """A call that returns its argument itself: ``contiguous`` of a contiguous tensor, ``to`` its own dtype, ``[:]``."""
    whole = node.target is aten.slice.Tensor and node.args[2:] in ((), (0, _END), (None, _END))
    if not whole and node.target not in views.MAY_RETURN_SELF:
        return False
    source = node.args[0]
    return isinstance(source, fx.Node) and views.share_storage(node, source) and views.is_same_tensor(node, source)
