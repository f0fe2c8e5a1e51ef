"""From torch functions, methods and operators to functional ATen operations, without knowing a single shape.

A walk over a symbolic trace that gives every node a value: a node of the new graph (a tensor, a size, or a list of
tensors), a Python container of those, or a fact about a tensor (its shape or dtype) that only its reader can use.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import fx, nn

from fxcompress.capture import operators, tensor_methods, torch_functions
from fxcompress.capture.facts import Unknown
from fxcompress.capture.traced_graph import TracedGraph
from fxcompress.capture.tracer import REMEDY, WRITES
from fxcompress.errors import CaptureError
from fxcompress.graph.shapes import where

__all__ = ["Normalizer"]

aten = torch.ops.aten

_ASSERTS = {"_assert", "_assert_is_none", "_assert_scalar", "_check", "_check_is_size"}


class Normalizer(TracedGraph):
    """Writes a trace into a functional graph; one object per trace.

    Args:
        tensors: what ``get_attr`` nodes read.
        layers: what ``call_module`` nodes call.
        device: where the model's tensors are.

    Attributes:
        called: paths of the layers that the new graph calls.
    """

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], layers: Mapping[str, nn.Module], device: torch.device
    ) -> None:
        super().__init__(tensors, device)
        self.called: set[str] = set()
        self._layers = layers
        self._values: dict[fx.Node, Any] = {}

    def run(self, trace: fx.Graph) -> Any:
        """Write the trace into :attr:`graph`; returns what the model returns, with nodes as its leaves.

        Raises:
            CaptureError: a function has no ATen form, or needs facts that only example inputs tell.
        """
        for node in trace.nodes:
            self.origin = node
            try:
                if node.op == "output":
                    return self._resolve(node.args[0])
                self._values[node] = self._visit(node)
            except Unknown as error:
                raise CaptureError(f"without example inputs {error}", where=where(node), remedy=REMEDY) from error
            except (TypeError, ValueError, LookupError, AttributeError) as error:  # arguments that no table foresees
                name = getattr(node.target, "__name__", node.target)
                raise CaptureError(
                    f"without example inputs {name} cannot be brought to an ATen operation: {error}",
                    where=where(node),
                    remedy=REMEDY,
                ) from error
        raise AssertionError("a trace ends with its output")

    def _resolve(self, value: Any) -> Any:
        """An argument of the trace with nodes of the new graph in place of the old ones."""
        if isinstance(value, fx.Node):
            return self.current(self._values[value])
        if isinstance(value, slice):
            return slice(self._resolve(value.start), self._resolve(value.stop), self._resolve(value.step))
        if isinstance(value, dict):
            return {key: self._resolve(item) for key, item in value.items()}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self._resolve(item) for item in value))
        if isinstance(value, (tuple, list)):
            return (tuple if isinstance(value, tuple) else list)(self._resolve(item) for item in value)
        return value

    def _visit(self, node: fx.Node) -> Any:
        if node.op in ("placeholder", "get_attr"):
            return self.read(node.op, str(node.target))
        args, kwargs = self._resolve(node.args), self._resolve(node.kwargs)
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
            return self.write(args[0], operators.operate(self, WRITES[target], args))
        if getattr(operator, name, None) is target:
            return operators.operate(self, target, args)
        if target in torch_functions.FUNCTIONS:
            return torch_functions.FUNCTIONS[target](self, *args, **kwargs)
        if isinstance(target, type) and (hasattr(target, "_fields") or is_dataclass(target)):
            return target(*args, **kwargs)  # what the model returns
        if name in _ASSERTS:
            return None
        if name == "stochastic_depth" and False in (args[-1], kwargs.get("training")):
            return args[0]  # of torchvision, which keeps tracers out of it
        return self._by_name(name, args, kwargs)

    def _method(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in tensor_methods.METHODS:
            return tensor_methods.METHODS[name](self, *args, **kwargs)
        return self._by_name(name, args, kwargs)

    def _by_name(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not name.endswith("_") or name.endswith("__"):
            return self.call(name, *args, **kwargs)
        functional = name[:-1]
        if functional == "zero":
            return self.write(args[0], self.call("zeros_like", args[0]))
        return self.write(args[0], self._method(functional, args, kwargs))

    def _layer(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer = self._layers[path]
        held = [*layer.parameters(), *layer.buffers()]
        if isinstance(layer, nn.modules.batchnorm._NormBase) and not held:  # no layer in an export either
            options = (True, layer.momentum, layer.eps, torch.backends.cudnn.enabled)
            norm = aten.batch_norm if isinstance(layer, nn.modules.batchnorm._BatchNorm) else aten.instance_norm
            return self.emit(norm.default, (args[0], None, None, None, None, *options))
        inputs = tuple(item for item in (*args, *kwargs.values()) if item is not None)
        if not inputs or not all(self.is_tensor(item) or isinstance(item, tuple) for item in inputs):
            raise Unknown(f"the layer {path!r} is called with something else than tensors")
        node = self.create("call_module", path, inputs, {}, path.replace(".", "_"), "tensor")
        self.called.add(path)
        if any(isinstance(tensor, nn.Parameter) for tensor in held):
            self.train(node)
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
            self.join(node, inputs[0])
            return self.write(inputs[0], node) if layer.inplace else node
        return node
