"""An exported program as one functional ATen graph with the user's names: what raising starts from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.utils import _pytree as pytree

from fxcompress.capture.functionalize import Functionalizer
from fxcompress.errors import CaptureError
from fxcompress.graph.recurrent import original
from fxcompress.graph.shapes import where

__all__ = ["Flat", "flatten_program", "name_dims"]

aten = torch.ops.aten

# Checks that export writes into the graph about facts that the example inputs already established.
_CHECKS = {
    "aten._assert_tensor_metadata",
    "aten._assert_scalar",
    "aten._assert_async",
    "aten.sym_constrain_range",
    "aten.sym_constrain_range_for_size",
}
# (input, probability, train)
_DROPOUTS = {
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
}
# (input, state, weights, biases, layers, probability, train, …)
_RECURRENT = {aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input}


@dataclass
class Flat:
    """A functional ATen graph before raising.

    Attributes:
        graph: placeholders are the user's inputs; weights are ``get_attr`` nodes by the user's names.
        tensors: the tensors those names stand for, shared with the user's model.
        parameters: which of them are parameters; the rest are buffers and constants.
        transient: buffers that the user's ``state_dict`` does not have.
        order: names of the tensors, in the order of the user's ``state_dict``.
        layers: layers that the graph calls already, by path; their tensors are the user's.
        has_shapes: whether nodes have ``meta["val"]``.
    """

    graph: fx.Graph
    tensors: dict[str, torch.Tensor]
    parameters: set[str]
    transient: set[str]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    parameter_names: tuple[str, ...]
    dim_names: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    layers: dict[str, nn.Module] = field(default_factory=dict)
    has_shapes: bool = True


def flatten_program(program: ExportedProgram, parameter_names: tuple[str, ...] | None = None) -> Flat:
    """A functional graph of an exported program: weights by name, no in-place operation, no nested subgraph.

    Args:
        program: from the user, or of the user's model in eval mode.
        parameter_names: of the call. None where the program is the user's own; then operations in training mode are
            refused, because nothing else tells whether the model was in eval mode.

    Raises:
        CaptureError: a write that cannot be followed, a training-mode export, or an unsupported subgraph.
    """
    written = [spec for spec in program.graph_signature.output_specs if spec.kind is not OutputKind.USER_OUTPUT]
    if written:
        raise CaptureError(
            f"the forward pass writes into {written[0].target!r}",
            remedy="keep state out of forward(), and export the model in eval mode",
        )
    graph = fx.Graph()
    functional = Functionalizer(graph)
    tensors: dict[str, torch.Tensor] = {}
    parameters: set[str] = set()
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs if hasattr(spec.arg, "name")}
    state: Mapping[str, Any] = {**program.constants, **program.state_dict}
    for node in program.graph.find_nodes(op="placeholder"):
        spec = specs.get(node.name)
        if spec is None or spec.kind is InputKind.USER_INPUT:
            new = graph.placeholder(node.name)
            functional.bind(node, new)
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            name = str(spec.target)
            tensors[name] = state[name]
            trained = spec.kind is InputKind.PARAMETER
            if trained:
                parameters.add(name)
            new = graph.create_node("get_attr", name, name=name.replace(".", "_"))
            functional.bind(node, new, protected=True, trained=trained)
        else:
            raise CaptureError(
                f"the model takes a {spec.kind.name.lower()} input, which has no graph form", where=where(node)
            )
        new.meta = {"val": node.meta.get("val")}
    for node in program.graph.nodes:
        _check_training(node, parameter_names is None)
    _copy_body(program.graph_module, functional, refuse_training=parameter_names is None)
    graph.output(_outputs(program, functional)).meta = {}
    notes = [
        f"the model writes into its input {name!r}; the captured graph returns the same values and leaves it alone"
        for name in sorted(functional.written_inputs)
    ]
    return Flat(
        graph,
        tensors,
        parameters,
        set(tensors) - set(program.state_dict) | set(program.graph_signature.non_persistent_buffers),
        program.call_spec.in_spec,
        program.call_spec.out_spec,
        parameter_names or tuple(_argument_names(program)),
        name_dims(graph),
        notes,
        list(program.state_dict),
    )


def name_dims(
    graph: fx.Graph, names: Sequence[Mapping[int, Any] | None] = (), *, one_batch: bool = False
) -> dict[str, str]:
    """Readable names of symbols: ``{"s77": "batch"}``.

    Args:
        graph: with fake values.
        names: per placeholder, what the user calls its dims. What has no name there is ``batch``, if it is the first
            dim of the first such input, else named by input and dim.
        one_batch: the user asked for a free batch: dim 0 of every input that has a name's place in ``names`` is the
            one batch, also where the model never compares the inputs' sizes and each has a symbol of its own.
    """
    found: dict[str, str] = {}
    nodes = graph.find_nodes(op="placeholder")
    theirs = [*names, *[None] * (len(nodes) - len(names))]
    for node, given in zip(nodes, theirs, strict=True):
        if not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        for dim, size in enumerate(node.meta["val"].shape):
            if not isinstance(size, torch.SymInt) or not size.node.expr.is_symbol or str(size.node.expr) in found:
                continue
            asked = (given or {}).get(dim)
            name = asked if isinstance(asked, str) else getattr(asked, "__name__", None)
            if name is None:
                name = "batch" if dim == 0 else f"{node.name}_dim{dim}"
            taken = set(found.values()) - ({"batch"} if one_batch and dim == 0 and dim in (given or {}) else set())
            found[str(size.node.expr)] = name if name not in taken else f"{node.name}_dim{dim}"
    return found


def _outputs(program: ExportedProgram, functional: Functionalizer) -> tuple[Any, ...]:
    results = program.graph.output_node().args[0]
    specs = program.graph_signature.output_specs
    assert isinstance(results, (tuple, list))
    return tuple(
        spec.arg.value
        if isinstance(spec.arg, ConstantArgument)
        else functional.read(item)
        if isinstance(item, fx.Node)
        else item
        for spec, item in zip(specs, results, strict=True)
    )


def _copy_body(module: fx.GraphModule, functional: Functionalizer, *, refuse_training: bool) -> None:
    for node in module.graph.nodes:
        if node.op != "call_function" or str(node.target).rsplit(".", 1)[0] in _CHECKS or node in functional.current:
            continue
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            _inline(module, node, functional, refuse_training=refuse_training)
            continue
        if original(node.target) is not node.target:
            node.target = original(node.target)
        _check_training(node, refuse_training)
        functional.run(node)


def _inline(module: fx.GraphModule, node: fx.Node, functional: Functionalizer, *, refuse_training: bool) -> None:
    """``torch.no_grad()`` and disabled ``autocast`` blocks are subgraphs of their own in an exported program."""
    name = str(node.target)
    if name == "wrap_with_set_grad_enabled":
        detach, (body, *arguments) = not node.args[0], node.args[1:]
    elif name == "wrap_with_autocast" and not node.args[2]:
        detach, (body, *arguments) = False, node.args[4:]
    else:
        raise CaptureError(
            f"the model uses {name}, which the graph cannot hold",
            where=where(node),
            remedy="disable autocast around the model (see ConvertPrecision), or rewrite the branch with torch.where",
        )
    assert isinstance(body, fx.Node)
    inner = getattr(module, str(body.target))
    for placeholder, argument in zip(inner.graph.find_nodes(op="placeholder"), arguments, strict=True):
        if isinstance(argument, fx.Node):
            functional.alias(placeholder, argument)
        else:
            functional.bind(placeholder, argument)
    _copy_body(inner, functional, refuse_training=refuse_training)
    results = inner.graph.output_node().args[0]
    for item in list(node.users):
        functional.alias(item, results[item.args[1]], detached=detach)


def _check_training(node: fx.Node, refuse: bool) -> None:
    if node.target is aten.batch_norm.default and node.args[5] and node.args[3] is not None:
        what = "a batch norm normalises by the statistics of the batch"
    elif refuse and node.target in _DROPOUTS and node.args[1] and node.args[2]:
        what = "a dropout drops"
    elif refuse and node.target in _RECURRENT and node.args[5] and node.args[6]:
        what = "a recurrent layer drops"
    else:
        return
    raise CaptureError(
        f"{what}: the model was exported in training mode",
        where=where(node),
        remedy="call model.eval() before capture or export; compiled.module.train() trains it afterwards",
    )


def _argument_names(program: ExportedProgram) -> list[str]:
    positional, keywords = program.call_spec.in_spec.children()
    entries = program.module_call_graph
    signature = entries[0].signature if entries else None
    names = list(signature.forward_arg_names or []) if signature is not None else []
    if len(names) < positional.num_children:
        names = [f"arg{index}" for index in range(positional.num_children)]
    return names[: positional.num_children] + list(keywords.context)
