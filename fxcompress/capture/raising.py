"""From a flat ATen graph to the form that passes work on: layers are layers again, under the user's names.

``aten.conv2d(x, w, b)`` whose weight is a parameter becomes ``call_module layer1.0.conv1``, an ``nn.Conv2d`` that
holds that parameter. So the graph trains, prints like the user's model and keeps its ``state_dict`` names; passes see
one kind of convolution, however the user wrote it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fxcompress.capture.flatten import Flat
from fxcompress.capture.layers import RULES, Layer
from fxcompress.errors import CaptureError, PreconditionError
from fxcompress.graph.edit import drop_unused_state
from fxcompress.graph.info import GraphInfo, assemble, tensors_of
from fxcompress.graph.serialize_layers import build_layer, layer_config
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
    namer = _Namer(flat, model)
    weights = _Weights(flat)
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
    return _assemble(flat, modules, weights, original_names)


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


class _Weights:
    """The graph's own parameters: new objects that share memory with the user's, one per user's tensor.

    Only the statistics of norms are copies: a forward pass in training writes into them.
    """

    def __init__(self, flat: Flat) -> None:
        self._flat = flat
        self._made: dict[int, torch.Tensor] = {}

    def theirs(self, name: str) -> torch.Tensor:
        """The user's tensor."""
        return self._flat.tensors[name]

    def get(self, name: str) -> torch.Tensor:
        """The graph's tensor for the user's of this name."""
        return self.of(self.theirs(name))

    def of(self, theirs: torch.Tensor) -> torch.Tensor:
        """The graph's tensor for one of the user's."""
        if id(theirs) not in self._made:
            if isinstance(theirs, nn.Parameter):
                self._made[id(theirs)] = nn.Parameter(theirs.detach(), requires_grad=theirs.requires_grad)
            else:
                self._made[id(theirs)] = theirs.detach()
        return self._made[id(theirs)]

    def own(self, theirs: torch.Tensor) -> torch.Tensor:
        """A copy of a buffer, one per user's tensor."""
        if id(theirs) not in self._made:
            self._made[id(theirs)] = theirs.detach().clone()
        return self._made[id(theirs)]

    def layer(self, theirs: nn.Module) -> nn.Module:
        """The graph's own layer like one of the user's."""
        config = layer_config(theirs, type(theirs).__name__)
        made = build_layer(config, type(theirs).__name__)
        for name, parameter in theirs.named_parameters(recurse=False):
            setattr(made, name, self.of(parameter))
        for name, buffer in theirs.named_buffers(recurse=False):
            made._buffers[name] = self.own(buffer)
        if hasattr(made, "inplace"):
            made.inplace = False
        return made.eval()


class _Namer:
    """Finds the path a layer goes by: where the user's model calls it, else where its weight lives."""

    def __init__(self, flat: Flat, model: nn.Module | None) -> None:
        self._modules = dict(model.named_modules(remove_duplicate=False)) if model is not None else {}
        self._tensor_names = set(flat.tensors)
        self._flat = flat
        self.state: Mapping[str, torch.Tensor] = {}
        if model is not None:
            self.state = {
                **dict(model.named_parameters(remove_duplicate=False)),
                **dict(model.named_buffers(remove_duplicate=False)),
            }

    def module(self, path: str) -> nn.Module | None:
        """The user's module at ``path``."""
        return self._modules.get(path)

    def scope(self, node: fx.Node) -> str:
        """Path of the innermost user's module that made ``node``; dropouts without weights are told apart by it."""
        stack = node.meta.get("nn_module_stack") or {}
        last = next(reversed(list(stack.values())), ("", None))[0]
        return str(last).split("@")[0]

    def path(self, node: fx.Node, layer: Layer, taken: Mapping[str, nn.Module]) -> str:
        """A free path for a new layer."""
        scope = self.scope(node)
        weights = list(layer.tensors.items())
        if not weights:
            theirs = self.module(scope)
            leaf = theirs is not None and scope and not list(theirs.children())
            hint = scope if leaf else f"{scope}.{layer.kind}".lstrip(".")
        else:
            own, held = weights[0]
            name = str(held.target)
            mine = self.state.get(f"{scope}.{own}" if scope else own)
            owner, _, last = name.rpartition(".")
            if scope and mine is not None and mine is self._flat.tensors[name]:
                hint = scope
            elif last == own and owner:
                hint = owner
            elif last.endswith(f"_{own}"):
                hint = f"{owner}.{last[: -len(own) - 1]}".lstrip(".")
            else:
                hint = f"{owner}.{last}_{layer.kind}".lstrip(".") if last != own else layer.kind
        return self._free(hint, taken)

    def _free(self, hint: str, taken: Mapping[str, nn.Module]) -> str:
        path, count = hint, 0
        while path in taken or path in self._tensor_names:
            count += 1
            path = f"{hint}_{count}"
        return path


def _fill(layer: Layer, path: str, weights: _Weights, namer: _Namer, original_names: dict[str, str]) -> nn.Module:
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


def _assemble(
    flat: Flat, modules: dict[str, nn.Module], weights: _Weights, original_names: dict[str, str]
) -> fx.GraphModule:
    root = nn.Module()
    for path in sorted(modules):
        _put(root, path, lambda owner, name, path=path: owner.add_module(name, modules[path]))  # type: ignore[misc]
    for node in flat.graph.nodes:
        if node.op == "get_attr":
            name = str(node.target)
            tensor = weights.get(name)
            if isinstance(tensor, nn.Parameter):
                _put(root, name, lambda owner, last, t=tensor: owner.register_parameter(last, t))  # type: ignore[misc]
            else:
                keep = name not in flat.transient
                _put(
                    root,
                    name,
                    lambda owner, last, t=tensor, k=keep: owner.register_buffer(last, t, persistent=k),  # type: ignore[misc]
                )
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


def _put(root: nn.Module, path: str, register: Callable[[nn.Module, str], None]) -> None:
    owner = root
    *parents, name = path.split(".")
    for part in parents:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner._modules[part]  # type: ignore[assignment]
    # A tensor that a layer holds and the graph also reads directly is there already, and the same object.
    if name not in owner._parameters and name not in owner._buffers:
        register(owner, name)


def _fake_mode(flat: Flat) -> FakeTensorMode:
    if not flat.has_shapes:
        return FakeTensorMode()
    for node in flat.graph.nodes:
        for value in tensors_of(node.meta.get("val")):
            mode = getattr(value, "fake_mode", None)
            if isinstance(mode, FakeTensorMode):
                return mode
    raise CaptureError("the graph has no tensor inputs", remedy="give at least one tensor as example input")
