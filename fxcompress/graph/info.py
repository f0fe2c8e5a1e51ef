"""The facts about a graph's inputs and outputs that every later stage needs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import TreeSpec

from fxcompress.errors import GraphError
from fxcompress.graph.calling import CallCodeGen
from fxcompress.graph.names import keep_original_names

__all__ = ["GraphInfo", "assemble", "info", "set_calling_convention"]

_KEY = "fxcompress"


@dataclass
class GraphInfo:
    """Facts that capture learned and passes keep.

    Attributes:
        parameter_names: the names of ``forward``'s parameters, in order, as the user calls them.
        in_spec: pytree of ``((args...), {kwargs...})``; its leaves are the placeholders, in order.
        out_spec: pytree of what the user's model returns; its leaves are the output node's tuple.
        fake_mode: the mode that made every ``meta["val"]`` of the graph.
        dim_names: readable name of each symbolic size, by symbol: ``{"s77": "batch"}``.
        original_names: the user's name of each tensor that the graph holds under another path.
        notes: sentences for the report about what capture could not carry over.
        sparse: paths of weights whose zeros are meant to stay, with their pattern: ``unstructured``, or ``2:4``. The
            zeros themselves are the mask; see :mod:`fxcompress.analysis.sparsity`.
        has_shapes: whether nodes have ``meta["val"]``; False where the model was traced without example inputs.
    """

    parameter_names: tuple[str, ...]
    in_spec: TreeSpec
    out_spec: TreeSpec
    fake_mode: FakeTensorMode
    dim_names: dict[str, str] = field(default_factory=dict)
    original_names: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    sparse: dict[str, str] = field(default_factory=dict)
    has_shapes: bool = True

    def __deepcopy__(self, memo: dict[int, object]) -> GraphInfo:
        # The fake mode and the specs are shared: metas of a copied graph still belong to that mode.
        return replace(
            self,
            dim_names=dict(self.dim_names),
            original_names=dict(self.original_names),
            notes=list(self.notes),
            sparse=dict(self.sparse),
        )


def info(graph_module: fx.GraphModule) -> GraphInfo:
    """The :class:`GraphInfo` of a captured graph.

    Raises:
        GraphError: the graph was not made by :func:`fxcompress.capture.capture`.
    """
    found = graph_module.meta.get(_KEY)
    if not isinstance(found, GraphInfo):
        raise GraphError(
            "this GraphModule was not captured by fxcompress",
            remedy="hand it to fxcompress.capture.capture() or fxcompress.compile() first",
        )
    return found


def assemble(root: nn.Module, graph: fx.Graph, facts: GraphInfo) -> fx.GraphModule:
    """A ``GraphModule`` of ``graph`` that takes over the module tree of ``root`` as it is, and carries ``facts``."""
    graph_module = fx.GraphModule(root, graph, "Graph")
    # The constructor takes only what the graph refers to, under containers of its own: put the tree itself in.
    for kind in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
        graph_module.__dict__[kind] = root.__dict__[kind]
    set_calling_convention(graph_module, facts)
    return graph_module


def set_calling_convention(graph_module: fx.GraphModule, facts: GraphInfo) -> None:
    """Make ``graph_module(*args, **kwargs)`` accept and return what the user's model did, and attach ``facts``."""
    graph_module.meta[_KEY] = facts
    keep_original_names(graph_module)
    graph_module.graph.set_codegen(CallCodeGen(facts.parameter_names, facts.in_spec, facts.out_spec))
    graph_module.recompile()


def tensors_of(value: object) -> list[torch.Tensor]:
    """All tensors in a node's ``meta["val"]`` (a tensor, or nested tuples and lists of them)."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in tensors_of(item)]
    return []
