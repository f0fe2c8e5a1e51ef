"""Weights as inputs of a graph: the form that ``torch.export`` calls *lifted*."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export.graph_signature import (
    ConstantArgument,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    SymIntArgument,
    TensorArgument,
)

from fxcompress.graph.names import original_name

__all__ = ["Lifted", "output_spec"]

_PREFIXES = {InputKind.PARAMETER: "p_", InputKind.BUFFER: "b_", InputKind.CONSTANT_TENSOR: "c_"}
_ORDER = [*_PREFIXES, InputKind.USER_INPUT]


class Lifted:
    """Placeholders of a flat graph: parameters, then buffers, constants, and the user's inputs, which come first.

    Attributes:
        state: parameters and buffers by the user's names, as in ``state_dict()``.
        constants: buffers that a ``state_dict`` leaves out, and tensors that have no name in the model.
    """

    def __init__(self, source: fx.GraphModule, graph: fx.Graph, mode: FakeTensorMode) -> None:
        self.state: dict[str, torch.Tensor] = {}
        self.constants: dict[str, Any] = {}
        self._source = source
        self._graph = graph
        self._mode = mode
        self._kinds = _tensor_kinds(source)
        self._nodes: dict[Any, fx.Node] = {}
        self._first: dict[InputKind, fx.Node] = {}  # placeholder of each kind
        self._specs: dict[InputKind, list[InputSpec]] = {kind: [] for kind in _ORDER}

    @property
    def specs(self) -> list[InputSpec]:
        """One per placeholder, in their order."""
        return [spec for kind in _ORDER for spec in self._specs[kind]]

    def user_input(self, node: fx.Node) -> fx.Node:
        """The placeholder that ``node``, a placeholder of the source, becomes. All of them before any weight."""
        new = self._graph.placeholder(str(node.target))
        new.meta = dict(node.meta)
        self._first.setdefault(InputKind.USER_INPUT, new)
        self._specs[InputKind.USER_INPUT].append(InputSpec(InputKind.USER_INPUT, _argument(new), None))
        return new

    def tensor(self, path: str) -> fx.Node:
        """The placeholder of the parameter or buffer at ``path`` of the source. Tied tensors have one."""
        owner, _, name = path.rpartition(".")
        tensor = getattr(self._source.get_submodule(owner), name)
        key = _identity(tensor)
        if key not in self._nodes:
            kind, persistent = self._kinds[path]
            held = original_name(self._source, path)
            if held in self.state or held in self.constants:
                held = path
            (self.constants if persistent is False else self.state)[held] = tensor
            self._nodes[key] = self._placeholder(kind, held, tensor, persistent)
        return self._nodes[key]

    def constant(self, tensor: torch.Tensor) -> fx.Node:
        """The placeholder of a tensor that the source does not have."""
        key = _identity(tensor)
        if key not in self._nodes:
            number = len(self.constants)
            while (held := f"lifted_tensor_{number}") in self.constants or held in self.state:
                number += 1
            self.constants[held] = tensor
            self._nodes[key] = self._placeholder(InputKind.CONSTANT_TENSOR, held, tensor, None)
        return self._nodes[key]

    def _placeholder(self, kind: InputKind, held: str, tensor: torch.Tensor, persistent: bool | None) -> fx.Node:
        later = next(self._first[k] for k in _ORDER[_ORDER.index(kind) + 1 :] if k in self._first)
        with self._graph.inserting_before(later):
            node = self._graph.placeholder(_PREFIXES[kind] + re.sub(r"\W", "_", held))
        self._first.setdefault(kind, node)
        node.target = node.name
        node.meta["val"] = self._mode.from_tensor(tensor, static_shapes=True)
        self._specs[kind].append(InputSpec(kind, TensorArgument(node.name), held, persistent))
        return node


def output_spec(result: Any) -> OutputSpec:
    """What ``torch.export`` says about a user's output: a node, or a constant."""
    return OutputSpec(OutputKind.USER_OUTPUT, _argument(result), None)


def _argument(node: Any) -> Any:
    value = node.meta.get("val") if isinstance(node, fx.Node) else node
    if isinstance(value, torch.Tensor):
        return TensorArgument(node.name)
    if isinstance(value, torch.SymInt):
        return SymIntArgument(node.name)
    return ConstantArgument(node.name if isinstance(node, fx.Node) else "", value)


def _identity(tensor: torch.Tensor) -> Any:
    """Equal for tensors that are the same memory seen the same way: tied weights are one, however they are held."""
    if type(tensor) not in (torch.Tensor, nn.Parameter):
        return id(tensor)
    storage = tensor.untyped_storage()
    return storage._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _tensor_kinds(graph_module: fx.GraphModule) -> dict[str, tuple[InputKind, bool | None]]:
    """What each tensor of the graph is by its path; of buffers also whether they belong to the ``state_dict``."""
    kinds: dict[str, tuple[InputKind, bool | None]] = {}
    for path, module in graph_module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        kinds |= {prefix + name: (InputKind.PARAMETER, None) for name in module._parameters}
        transient = module._non_persistent_buffers_set
        kinds |= {prefix + name: (InputKind.BUFFER, name not in transient) for name in module._buffers}
    return kinds
