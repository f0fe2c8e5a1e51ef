"""From a flat ATen graph to the form that passes work on: layers are layers again, under the user's names.

``aten.conv2d(x, w, b)`` whose weight is a parameter becomes ``call_module layer1.0.conv1``, an ``nn.Conv2d`` that
holds that parameter. So the graph trains, prints like the user's model and keeps its ``state_dict`` names; passes see
one kind of convolution, however the user wrote it.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fxcompress.capture.flatten import Flat
from fxcompress.capture.layers import RULES, Layer
from fxcompress.capture.naming import Namer
from fxcompress.capture.weights import Weights, module_tree
from fxcompress.errors import CaptureError, PreconditionError
from fxcompress.graph.edit import drop_unused_state
from fxcompress.graph.info import GraphInfo, assemble, tensors_of
from fxcompress.graph.shapes import where

__all__ = ["call_arguments", "raise_graph"]

# Layers whose input has the dtype of their weight.
_PRODUCTS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.RNNBase)


def call_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an ATen call by their schema names, defaults filled in."""
    schema = node.target._schema  # type: ignore[union-attr]
    values: dict[str, Any] = {}
    for index, argument in enumerate(schema.arguments):
        if index < len(node.args):
            values[argument.name] = node.args[index]
        else:
            values[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return values


def raise_graph(flat: Flat, model: nn.Module | None) -> fx.GraphModule:
    """The raised graph; ``model`` (when there is one) gives the names and momenta that the flat graph lost.

    Raises:
        CaptureError: the graph has no fake values to work with.
    """
    _check_names(flat)
    namer = Namer(flat, model)
    weights = Weights(flat)
    modules = {path: weights.layer(theirs) for path, theirs in flat.layers.items()}
    known: dict[tuple[Any, ...], str] = {}
    original_names: dict[str, str] = {}
    for node in list(flat.graph.nodes):
        rule = RULES.get(node.target) if node.op == "call_function" else None
        layer = rule(call_arguments(node)) if rule and _is_parameterised(node, flat) else None
        if layer is None:
            continue
        _check_dtypes(node, layer)
        key = (layer.key, tuple((own, str(n.target)) for own, n in sorted(layer.tensors.items())), namer.scope(node))
        path = known.get(key)
        if path is None:
            path = namer.path(node, layer, modules)
            known[key] = path
            modules[path] = _fill(layer, path, weights, namer, original_names)
        _replace(flat.graph, node, layer, path)
    flat.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    return _assemble(flat, module_tree(flat, modules, weights), original_names)


def _check_names(flat: Flat) -> None:
    for path in (*flat.tensors, *flat.layers):
        first = path.partition(".")[0]
        if isinstance(vars(fx.GraphModule).get(first), property):
            raise CaptureError(
                f"the model has a part called {first!r}, which is a name that every torch.fx.GraphModule needs itself",
                where=path,
                remedy="rename the attribute; a state-dict hook can keep the old name in checkpoints",
            )


def _check_dtypes(node: fx.Node, layer: Layer) -> None:
    """Fake tensors let products of different dtypes pass; the model itself does not."""
    if not isinstance(layer.module, _PRODUCTS):
        return
    weight = next(iter(layer.tensors.values())).meta["val"]
    for item in layer.inputs:
        value = item.meta.get("val") if isinstance(item, fx.Node) else None
        if isinstance(value, torch.Tensor) and value.dtype != weight.dtype:
            raise PreconditionError(
                f"the model does not take these example inputs: a layer of {weight.dtype} is given {value.dtype}",
                where=where(node),
                remedy="give inputs of the dtypes that the model takes",
            )


def _is_parameterised(node: fx.Node, flat: Flat) -> bool:
    """Whether every tensor beside the data is a parameter, or a buffer, that the graph reads directly."""
    arguments = call_arguments(node)
    if "weight" not in arguments and "params" not in arguments:
        return True  # dropout and the like
    held = arguments.get("params") or [
        arguments[name] for name in ("weight", "bias", "running_mean", "running_var") if name in arguments
    ]
    tensors = [item for item in held if isinstance(item, fx.Node)]
    if any(item.op != "get_attr" for item in tensors):
        return False
    running = arguments.get("running_mean") is not None
    return bool(tensors) and (running or any(str(item.target) in flat.parameters for item in tensors))


def _fill(layer: Layer, path: str, weights: Weights, namer: Namer, original_names: dict[str, str]) -> nn.Module:
    module = layer.module
    theirs = namer.module(path)
    if isinstance(module, nn.modules.batchnorm._NormBase):
        counted = namer.state.get(f"{path}.num_batches_tracked")
        if module.track_running_stats:
            mean = weights.own(weights.theirs(str(layer.tensors["running_mean"].target)))
            weights.own(weights.theirs(str(layer.tensors["running_var"].target)))
            zero = torch.zeros((), dtype=torch.long, device=mean.device)
            module.num_batches_tracked = zero if counted is None else weights.own(counted)
        if isinstance(theirs, nn.modules.batchnorm._NormBase):
            module.momentum = theirs.momentum  # momentum=None reaches the exported call as 0.0
    for own, held in layer.tensors.items():
        tensor = weights.get(str(held.target))
        if own in module._buffers:
            module._buffers[own] = tensor
        else:
            setattr(module, own, tensor if isinstance(tensor, nn.Parameter) else _frozen(tensor))
        mine = f"{path}.{own}"
        if mine != held.target and mine not in namer.state:
            original_names[mine] = str(held.target)
    return module.eval()


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _replace(graph: fx.Graph, node: fx.Node, layer: Layer, path: str) -> None:
    with graph.inserting_before(node):
        new = graph.call_module(path, layer.inputs)
        new.meta = dict(node.meta)
        if layer.nested_state:
            first, *state = node.meta["val"]
            new.meta["val"] = (first, tuple(state))
            _nest(graph, node, new)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _nest(graph: fx.Graph, node: fx.Node, new: fx.Node) -> None:
    """``lstm[1]`` of the flat call is ``layer[1][0]`` of the layer."""
    state: fx.Node | None = None
    for item in list(node.users):
        if item.target is not operator.getitem or item.args[1] == 0:
            continue
        if state is None:
            state = graph.call_function(operator.getitem, (new, 1))
            state.meta = dict(new.meta)
            state.meta["val"] = new.meta["val"][1]
        item.args = (state, int(item.args[1]) - 1)  # type: ignore[arg-type]


def _assemble(flat: Flat, root: nn.Module, original_names: dict[str, str]) -> fx.GraphModule:
    facts = GraphInfo(
        flat.parameter_names,
        flat.in_spec,
        flat.out_spec,
        _fake_mode(flat),
        dim_names=flat.dim_names,
        original_names=original_names,
        notes=flat.notes,
        has_shapes=flat.has_shapes,
    )
    graph_module = assemble(root, flat.graph, facts)
    if not flat.has_shapes:
        for node in flat.graph.nodes:
            node.meta.pop("val", None)
    drop_unused_state(graph_module)
    graph_module.graph.lint()
    return graph_module.eval()


def _fake_mode(flat: Flat) -> FakeTensorMode:
    if not flat.has_shapes:
        return FakeTensorMode()
    for node in flat.graph.nodes:
        for value in tensors_of(node.meta.get("val")):
            mode = getattr(value, "fake_mode", None)
            if isinstance(mode, FakeTensorMode):
                return mode
    raise CaptureError("the graph has no tensor inputs", remedy="give at least one tensor as example input")
