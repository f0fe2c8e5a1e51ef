"""The front end: ``torch.export`` (non-strict, pre-dispatch ATen), then one functional graph with the user's names."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.utils import _pytree as pytree

from fxcompress.capture.functionalize import Functionalizer
from fxcompress.capture.inputs import ExampleInputs, at_least_two, bind, dynamic_spec
from fxcompress.capture.preserve import preserved
from fxcompress.errors import CaptureError
from fxcompress.graph.recurrent import KnownShapes, original
from fxcompress.graph.shapes import where

__all__ = ["Flat", "export_program", "flatten_program"]

aten = torch.ops.aten

# Checks that export writes into the graph about facts that the example inputs already established.
_CHECKS = {
    "aten._assert_tensor_metadata",
    "aten._assert_scalar",
    "aten._assert_async",
    "aten.sym_constrain_range",
    "aten.sym_constrain_range_for_size",
}


@dataclass
class Flat:
    """A functional ATen graph before raising.

    Attributes:
        graph: placeholders are the user's inputs; weights are ``get_attr`` nodes by the user's names.
        tensors: the tensors those names stand for, shared with the user's model.
        parameters: which of them are parameters; the rest are buffers and constants.
        transient: buffers that the user's ``state_dict`` does not have.
    """

    graph: fx.Graph
    tensors: dict[str, torch.Tensor]
    parameters: set[str]
    transient: set[str]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    parameter_names: tuple[str, ...]
    dim_names: dict[str, str]
    notes: list[str]


def export_program(model: nn.Module, inputs: ExampleInputs, dynamic_shapes: object) -> ExportedProgram:
    """``torch.export`` of the user's model, which is left as it was.

    Raises:
        CaptureError: data-dependent control flow, a batch size that the model bakes in, an unsupported operation.
    """
    names = bind(model, inputs)
    spec, _ = dynamic_spec(inputs, dynamic_shapes, names)
    inputs = at_least_two(inputs, spec)
    signature = inspect.signature(model.forward)
    shapes = dict(signature.bind(*spec[0], **spec[1]).arguments)
    with preserved(model), warnings.catch_warnings(), KnownShapes():
        warnings.simplefilter("ignore")
        model.register_forward_hook(_register_dataclasses)
        _register_dataclasses(model, (), (inputs.args, inputs.kwargs))
        try:
            return torch.export.export(model, inputs.args, inputs.kwargs, dynamic_shapes=shapes, strict=False)
        except Exception as error:
            first = error
        # Only the first tensor's batch is certain: an input that merely is as long may be baked in.
        if dynamic_shapes == "batch" and _count_dynamic(shapes) > 1:
            relaxed = pytree.tree_map(lambda mark: Dim.AUTO if mark is Dim.DYNAMIC else mark, shapes)
            try:
                program = torch.export.export(
                    model, inputs.args, inputs.kwargs, dynamic_shapes=relaxed, strict=False
                )
            except Exception as error:
                raise _explain(error) from error
            if _first_batch_is_dynamic(program):
                return program
    raise _explain(first) from first


def _register_dataclasses(module: nn.Module, args: object, output: Any) -> None:
    """Make pytree nodes of dataclasses that the model takes or returns, so that export keeps their structure."""
    from dataclasses import is_dataclass

    for leaf in pytree.tree_leaves(output):
        if is_dataclass(leaf) and not isinstance(leaf, type):
            torch.export.register_dataclass(type(leaf))
            _register_dataclasses(module, args, leaf)


def _count_dynamic(shapes: Any) -> int:
    return sum(1 for leaf in pytree.tree_leaves(shapes) if leaf is Dim.DYNAMIC)


def _first_batch_is_dynamic(program: ExportedProgram) -> bool:
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in program.graph_signature.user_inputs:
            value = node.meta["val"]
            if isinstance(value, torch.Tensor) and value.dim() > 0:
                return isinstance(value.shape[0], torch.SymInt)
    return False


def _explain(error: Exception) -> CaptureError:
    text = str(error).strip() or repr(error)
    kind = type(error).__name__
    line = next((part.strip() for part in text.splitlines() if part.strip()), kind)
    if "onstraint" in kind or "Constraints violated" in text or "specialized" in text:
        detail = next((part.strip() for part in text.splitlines() if "specialized" in part or "- " in part), line)
        return CaptureError(
            f"the model fixes a size that should be dynamic: {detail}",
            where=_user_line(text),
            remedy="mark fewer dims in dynamic_shapes, or dynamic_shapes=None for fixed sizes",
        )
    if "DataDependent" in kind or "data-dependent" in text or "data dependent" in text:
        return CaptureError(
            f"the model's control flow or shapes depend on the values of tensors: {line}",
            where=_user_line(text),
            remedy="replace the Python 'if' or 'while' on a tensor by torch.where or torch.cond",
        )
    return CaptureError(
        f"torch.export cannot capture the model: {kind}: {line}",
        where=_user_line(text),
        remedy="see the error above this one for the operation; simplify or replace it",
    )


def _user_line(text: str) -> str | None:
    for part in text.splitlines():
        part = part.strip()
        if ("(" in part and ".py:" in part) or part.startswith("File "):
            if "/torch/" not in part:
                return part
    return None


def flatten_program(program: ExportedProgram, parameter_names: tuple[str, ...] | None = None) -> Flat:
    """A functional graph of an exported program: weights by name, no in-place operation, no nested subgraph.

    Raises:
        CaptureError: a write that cannot be followed, a training-mode export, or an unsupported subgraph.
    """
    graph = fx.Graph()
    functional = Functionalizer(graph)
    tensors: dict[str, torch.Tensor] = {}
    parameters: set[str] = set()
    signature = program.graph_signature
    specs = {spec.arg.name: spec for spec in signature.input_specs if hasattr(spec.arg, "name")}
    user_names = _input_names(program)
    state = {**program.constants, **program.state_dict}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            spec = specs.get(node.name)
            if spec is None or spec.kind is InputKind.USER_INPUT:
                new = graph.placeholder(user_names.pop(0))
                new.meta = {"val": node.meta.get("val")}
                functional.bind(node, new)
            elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
                name = str(spec.target)
                tensors[name] = state[name]
                if spec.kind is InputKind.PARAMETER:
                    parameters.add(name)
                new = graph.create_node("get_attr", name, name=name.replace(".", "_"))
                new.meta = {"val": node.meta["val"]}
                functional.bind(node, new, protected=True)
            else:
                raise CaptureError(
                    f"the model takes a {spec.kind.name.lower()} input, which has no graph form", where=where(node)
                )
    _copy_body(program.graph_module, functional, parameters)
    mutated = [s for s in signature.output_specs if s.kind is not OutputKind.USER_OUTPUT]
    if mutated:
        raise CaptureError(
            f"the forward pass writes into {mutated[0].target!r}",
            remedy="keep state out of forward(), and export the model in eval mode",
        )
    last = next(iter(reversed(program.graph.nodes)))
    outputs = tuple(functional.read(item) if isinstance(item, fx.Node) else item for item in last.args[0])
    outputs = tuple(
        spec.arg.value if isinstance(spec.arg, ConstantArgument) else value
        for spec, value in zip(signature.output_specs, outputs, strict=True)
    )
    graph.output(outputs).meta = {}
    in_spec, out_spec = program.call_spec.in_spec, program.call_spec.out_spec
    notes = [
        f"the model writes into its input {name!r}; the captured graph returns the same values and leaves it alone"
        for name in sorted({str(functional.current[node].target) for node in functional.written_inputs if 0} or ())
    ]
    transient = set(tensors) - set(program.state_dict) | set(signature.non_persistent_buffers)
    names = parameter_names or tuple(_argument_names(program))
    return Flat(graph, tensors, parameters, transient, in_spec, out_spec, names, _dim_names(graph), notes)


def _copy_body(module: fx.GraphModule, functional: Functionalizer, parameters: set[str]) -> None:
    for node in module.graph.nodes:
        if node.op == "call_function":
            if str(node.target).rsplit(".", 1)[0] in _CHECKS:
                continue
            if isinstance(node.target, torch._ops.HigherOrderOperator):
                _inline(module, node, functional, parameters)
            elif node in functional.current:
                continue
            else:
                if original(node.target) is not node.target:
                    node.target = original(node.target)
                _refuse_training_norm(node)
                functional.run(node)


def _inline(module: fx.GraphModule, node: fx.Node, functional: Functionalizer, parameters: set[str]) -> None:
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
    placeholders = [n for n in inner.graph.nodes if n.op == "placeholder"]
    trained = detach and any(_depends_on_weights(functional, a) for a in arguments if isinstance(a, fx.Node))
    for placeholder, argument in zip(placeholders, arguments, strict=True):
        if isinstance(argument, fx.Node):
            functional.alias(placeholder, argument)
        else:
            functional.bind(placeholder, argument)
    _copy_body(inner, functional, parameters)
    results = next(iter(reversed(inner.graph.nodes))).args[0]
    for item in list(node.users):
        result = results[item.args[1]]
        functional.alias(item, result)
        if trained and isinstance(item.meta["val"], torch.Tensor) and item.meta["val"].is_floating_point():
            # In training no gradient may flow back through the block.
            functional.current[item] = functional._emit(
                item, aten.detach.default, (functional.current[item],), {}, item.meta["val"]
            )


def _depends_on_weights(functional: Functionalizer, old: fx.Node) -> bool:
    seen: set[fx.Node] = set()
    stack = [functional.read(old)]
    while stack:
        node = stack.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        if node.op == "get_attr":
            return True
        stack += node.all_input_nodes
    return False


def _refuse_training_norm(node: fx.Node) -> None:
    if node.target is aten.batch_norm.default and node.args[5] and node.args[3] is not None:
        raise CaptureError(
            "a batch norm normalises by the statistics of the batch: the model was exported in training mode",
            where=where(node),
            remedy="call model.eval() before capture or export; compiled.module.train() trains it afterwards",
        )


def _input_names(program: ExportedProgram) -> list[str]:
    return [name for name in program.graph_signature.user_inputs] if False else _leaf_names(program)


def _leaf_names(program: ExportedProgram) -> list[str]:
    """One valid, unique name per user input, as export derived them from the signature."""
    specs = program.graph_signature.input_specs
    return [spec.arg.name for spec in specs if spec.kind is InputKind.USER_INPUT]


def _argument_names(program: ExportedProgram) -> list[str]:
    in_spec = program.call_spec.in_spec
    args, kwargs = in_spec.child(0), in_spec.child(1)
    try:
        names = list(program.module_call_graph[0].signature.forward_arg_names or [])  # type: ignore[union-attr]
    except (AttributeError, IndexError):
        names = []
    if len(names) < args.num_children:
        names = [f"arg{index}" for index in range(args.num_children)]
    return names[: args.num_children] + list(kwargs.context)


def _dim_names(graph: fx.Graph) -> dict[str, str]:
    """``{"s77": "batch"}``: the symbol of the first input's dim 0 is the batch; others are named by input and dim."""
    names: dict[str, str] = {}
    for node in graph.nodes:
        if node.op != "placeholder" or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        for dim, size in enumerate(node.meta["val"].shape):
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                default = "batch" if dim == 0 and "batch" not in names.values() else f"{node.name}_dim{dim}"
                names.setdefault(str(size.node.expr), default)
    return names
