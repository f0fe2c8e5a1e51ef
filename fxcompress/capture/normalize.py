"""From torch functions, methods and operators to functional ATen operations, without knowing a single shape.

A walk over a symbolic trace that gives every node a value: a node of the new graph (a tensor, a size, or a list of
tensors), a Python container of those, or a fact about a tensor (its shape or dtype) that only its reader can use.

A write into a tensor makes a new value, which every later reader of the tensor gets. Without shapes it is not known
what shares memory: whatever *may* be a view of a written tensor must not be read again, or the model is refused.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import fx, nn

from fxcompress.capture import tensor_methods, torch_functions
from fxcompress.capture.facts import DtypeOf, Sizes, Unknown
from fxcompress.capture.overloads import Kind, match, result_kind
from fxcompress.capture.tracer import REMEDY, WRITES
from fxcompress.errors import CaptureError
from fxcompress.graph.shapes import where

__all__ = ["Normalizer"]

aten = torch.ops.aten

# In eval mode these return their argument itself; their schemas do not say so.
_MAY_RETURN_SELF = {aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default}
_ASSERTS = {"_assert", "_assert_is_none", "_assert_scalar", "check", "_check", "_check_is_size"}


class Normalizer:
    """Builds the new graph; one object per trace. The tables of functions write with :meth:`call` and :meth:`emit`.

    Args:
        tensors: what ``get_attr`` nodes read.
        layers: what ``call_module`` nodes call.
        device: where the model's tensors are.

    Attributes:
        graph: the new graph, without its output.
        called: paths of the layers that it calls.
        notes: what the trace could not carry over.
    """

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], layers: Mapping[str, nn.Module], device: torch.device
    ) -> None:
        self.graph = fx.Graph()
        self.device = device
        self.called: set[str] = set()
        self.notes: list[str] = []
        self.ranks: dict[fx.Node, int] = {}
        self._tensors = tensors
        self._layers = layers
        self._values: dict[fx.Node, Any] = {}
        self._kinds: dict[fx.Node, Kind] = {}
        self._node: fx.Node | None = None  # of the trace, at work
        self._sizes: dict[tuple[fx.Node, int], fx.Node] = {}
        self._memory: dict[fx.Node, set[fx.Node]] = {}  # what may share memory with a tensor, itself included
        self._written: dict[fx.Node, fx.Node] = {}  # a tensor that was written → its value since
        self._stale: set[fx.Node] = set()  # what may have been written through another name
        self._trained: set[fx.Node] = set()  # what depends on parameters
        self._without_gradients: set[fx.Node] = set()
        self._detached: dict[fx.Node, fx.Node] = {}

    def run(self, trace: fx.Graph) -> Any:
        """Write the trace into :attr:`graph`; returns what the model returns, with nodes as its leaves.

        Raises:
            CaptureError: a function has no ATen form, or needs facts that only example inputs tell.
        """
        for node in trace.nodes:
            self._node = node
            try:
                if node.op == "output":
                    return self.resolve(node.args[0])
                self._values[node] = self._visit(node)
            except Unknown as error:
                raise CaptureError(f"without example inputs {error}", where=where(node), remedy=REMEDY) from error
        raise AssertionError("a trace ends with its output")

    # --- what the tables use -----------------------------------------------------------------------------------

    def kind(self, node: fx.Node) -> Kind:
        """What a node of the new graph is."""
        return self._kinds[node]

    def is_tensor(self, value: Any) -> bool:
        """Whether a value is a tensor of the new graph."""
        return isinstance(value, fx.Node) and self._kinds[value] == "tensor"

    def tensor(self, node: fx.Node) -> torch.Tensor | None:
        """The parameter, buffer or constant that a node reads; None for what is computed."""
        return self._tensors[str(node.target)] if node.op == "get_attr" else None

    def size(self, tensor: fx.Node, dim: int) -> Any:
        """``tensor.shape[dim]``: a number for weights, else a node."""
        held = self.tensor(tensor)
        if held is not None:
            return held.shape[dim]
        key = (tensor, dim)
        if key not in self._sizes:
            self._sizes[key] = self.emit(aten.sym_size.int, (tensor, dim))
        return self._sizes[key]

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call the overload of ``aten.<name>`` that takes these arguments.

        Raises:
            Unknown: none does.
        """
        found = match(name, args, kwargs, self.kind)
        if found is None:
            raise Unknown(f"{name}{_told(args, kwargs)} cannot be brought to an ATen operation")
        return self.emit(*found)

    def emit(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> Any:
        """A call of an overload, or of an operator on sizes; several results come as a tuple.

        Raises:
            Unknown: an argument may be out of date, or the result is a plain number.
        """
        overload = isinstance(target, torch._ops.OpOverload)
        kind = result_kind(target) if overload else "size"
        if kind is None:
            raise Unknown(f"the value of {target} is not known")
        name = target._schema.name.partition("::")[2].strip("_") if overload else target.__name__.strip("_")
        node = self._create("call_function", target, args, dict(kwargs or {}), name, kind)
        if overload:
            self._share(node, target, args)
            self._keep_rank(node, target)
            count = len(target._schema.returns)
            if count > 1:
                items = [self.item(node, index) for index in range(count)]
                type_ = getattr(torch.return_types, name, None)
                return tuple(items) if type_ is None else type_(items)
        return node

    def item(self, node: fx.Node, index: int) -> fx.Node:
        """One of several tensors that a node makes."""
        made = self._create("call_function", operator.getitem, (node, index), {}, "getitem", "tensor")
        self._join(made, node)
        return made

    def write(self, tensor: Any, value: Any) -> Any:
        """Let every later reader of ``tensor`` get ``value``.

        Raises:
            Unknown: a weight would be written, or what is written is no tensor.
        """
        if not self.is_tensor(tensor):
            return value
        shared = self._memory.setdefault(tensor, {tensor})
        for other in shared:
            if other.op == "get_attr":
                raise Unknown(f"a write into {other.target!r}, a parameter, buffer or constant, cannot be followed")
            if other.op == "placeholder":
                note = f"the model writes into its input {other.name!r}; the captured graph leaves it alone"
                self.notes += [note] if note not in self.notes else []
        self._stale |= shared - {tensor, value}
        self._memory[value] = {value}
        self._written[tensor] = value
        return value

    def resolve(self, value: Any) -> Any:
        """An argument of the trace with nodes of the new graph in place of the old ones.

        Raises:
            Unknown: it reads what may be out of date.
        """
        if isinstance(value, fx.Node):
            return self._current(self._values[value])
        if isinstance(value, slice):
            return slice(self.resolve(value.start), self.resolve(value.stop), self.resolve(value.step))
        if isinstance(value, dict):
            return {key: self.resolve(item) for key, item in value.items()}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self.resolve(item) for item in value))
        if isinstance(value, (tuple, list)):
            return (tuple if isinstance(value, tuple) else list)(self.resolve(item) for item in value)
        return value

    # --- nodes of the trace ------------------------------------------------------------------------------------

    def _visit(self, node: fx.Node) -> Any:
        if node.op in ("placeholder", "get_attr"):
            new = self.graph.create_node(node.op, node.target, name=str(node.target).replace(".", "_"))  # type: ignore[arg-type]
            self._kinds[new] = "tensor"
            held = self.tensor(new)
            if held is not None:
                new.meta["val"] = held
                self.ranks[new] = held.dim()
                if isinstance(held, nn.Parameter):
                    self._trained.add(new)
            return new
        args, kwargs = self.resolve(node.args), self.resolve(node.kwargs)
        if node.op == "call_module":
            return self._layer(str(node.target), args, kwargs)
        if node.op == "call_method":
            return self._method(str(node.target), args, kwargs)
        return self._function(node.target, args, kwargs)

    def _function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = getattr(target, "__name__", str(target))
        if target is getattr:
            return tensor_methods.attribute(self, *args)
        if target is operator.getitem:
            return tensor_methods.getitem(self, *args)
        if target in WRITES:
            return self.write(args[0], torch_functions.operate(self, WRITES[target], args))
        if getattr(operator, name, None) is target:
            return torch_functions.operate(self, target, args)
        if target in torch_functions.FUNCTIONS:
            return torch_functions.FUNCTIONS[target](self, *args, **kwargs)
        if isinstance(target, type) and (hasattr(target, "_fields") or is_dataclass(target)):
            return target(*args, **kwargs)
        if name in _ASSERTS:
            return None
        if name == "stochastic_depth" and not (kwargs.get("training", True) and args[-1] is not False):
            return args[0]  # of torchvision, which keeps tracers out of it
        return self._by_name(name, args, kwargs)

    def _method(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in tensor_methods.METHODS:
            return tensor_methods.METHODS[name](self, *args, **kwargs)
        return self._by_name(name, args, kwargs)

    def _by_name(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name.endswith("_") and not name.endswith("__"):
            functional = name[:-1]
            if functional in tensor_methods.METHODS:
                return self.write(args[0], tensor_methods.METHODS[functional](self, *args, **kwargs))
            if functional == "zero":
                return self.write(args[0], self.call("zeros_like", args[0]))
            return self.write(args[0], self.call(functional, *args, **kwargs))
        return self.call(name, *args, **kwargs)

    def _layer(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer = self._layers[path]
        held = list(layer.parameters()) + list(layer.buffers())
        if isinstance(layer, nn.modules.batchnorm._NormBase) and not held:  # no layer in an export either
            options = (True, layer.momentum, layer.eps, torch.backends.cudnn.enabled)
            norm = aten.batch_norm if isinstance(layer, nn.modules.batchnorm._BatchNorm) else aten.instance_norm
            return self.emit(norm.default, (args[0], None, None, None, None, *options))
        values = [*args, *kwargs.values()]
        if not values or not all(
            self.is_tensor(item) or isinstance(item, tuple) for item in values if item is not None
        ):
            raise Unknown(f"the layer {path!r} is called with something else than tensors")
        inputs = tuple(item for item in values if item is not None)
        node = self._create("call_module", path, inputs, {}, path.replace(".", "_"), "tensor")
        self.called.add(path)
        if any(isinstance(tensor, nn.Parameter) for tensor in held):
            self._trained.add(node)
        rank = type(layer).__name__[-2:]
        if rank in ("1d", "2d", "3d") and not isinstance(layer, nn.BatchNorm1d):
            self.ranks[node] = int(rank[0]) + 2
        elif inputs[0] in self.ranks:
            self.ranks[node] = self.ranks[inputs[0]]
        if isinstance(layer, nn.RNNBase):
            self._kinds[node] = "tensors"
            output, state = self.item(node, 0), self.item(node, 1)
            if not isinstance(layer, nn.LSTM):
                return output, state
            self._kinds[state] = "tensors"
            return output, (self.item(state, 0), self.item(state, 1))
        if isinstance(layer, nn.modules.dropout._DropoutNd):
            self._join(node, inputs[0])
            return self.write(inputs[0], node) if layer.inplace else node
        return node

    # --- nodes of the new graph --------------------------------------------------------------------------------

    def _create(self, op: str, target: Any, args: Any, kwargs: dict[str, Any], name: str, kind: Kind) -> fx.Node:
        assert self._node is not None
        gradients = self._node.meta.get("gradients", True)
        args, kwargs = fx.node.map_aggregate((args, kwargs), lambda item: self._readable(item, gradients))  # type: ignore[misc]
        node = self.graph.create_node(op, target, args, kwargs, name=name)
        node.meta = {key: self._node.meta[key] for key in ("stack_trace", "nn_module_stack") if key in self._node.meta}
        self._kinds[node] = kind
        if not self._trained.isdisjoint(node.all_input_nodes) and target is not aten.detach.default:
            self._trained.add(node)
        if not gradients:
            self._without_gradients.add(node)
        return node

    def _readable(self, value: Any, gradients: bool) -> Any:
        if isinstance(value, Sizes):
            raise Unknown("the number of dims of a tensor, whose whole shape is read, is not known")
        if isinstance(value, DtypeOf):
            raise Unknown("the dtype of a tensor is not known")
        if not isinstance(value, fx.Node) or not gradients:
            return value
        if value not in self._without_gradients or value not in self._trained:
            return value
        if value not in self._detached:  # computed where gradients were off, read where they are on
            self._detached[value] = self.graph.call_function(aten.detach.default, (value,))
            self._kinds[self._detached[value]] = self._kinds[value]
        return self._detached[value]

    def _current(self, value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            items = [self._current(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if isinstance(value, (Sizes, DtypeOf)):
            return value
        if not isinstance(value, fx.Node):
            return value
        while value in self._written:
            value = self._written[value]
        if value in self._stale:
            raise Unknown("it cannot be told whether a tensor that is read shares memory with one written in place")
        return value

    def _share(self, node: fx.Node, target: Any, args: tuple[Any, ...]) -> None:
        for argument, value in zip(target._schema.arguments, args, strict=False):
            aliased = argument.alias_info is not None or target in _MAY_RETURN_SELF
            if aliased and isinstance(value, fx.Node):
                self._join(node, value)

    def _join(self, node: fx.Node, source: fx.Node) -> None:
        shared = self._memory.setdefault(source, {source})
        shared.add(node)
        self._memory[node] = shared

    def _keep_rank(self, node: fx.Node, target: Any) -> None:
        if torch.Tag.pointwise in target.tags or target in torch_functions.KEEP_RANK:
            ranks = [self.ranks.get(item) for item in node.all_input_nodes if self._kinds[item] == "tensor"]
            if ranks and all(rank is not None for rank in ranks):
                self.ranks[node] = max(rank for rank in ranks if rank is not None)


def _told(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    told = ["…" if isinstance(item, (fx.Node, list, tuple)) else repr(item) for item in args]
    return f"({', '.join(told + [f'{key}=…' for key in kwargs])})"
