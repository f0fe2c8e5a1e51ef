"""A graph as JSON and a dict of tensors, and back: without the model's code, without pickle.

``graph_to_json(graph_module)`` tells nodes, layers, sizes and structure; ``weights(graph_module)`` gives the tensors
for ``safetensors``; ``load_graph(document, tensors)`` makes an equal graph: it runs, trains, and is compiled further.

What comes back differently: a dataclass or a ``transformers`` ``ModelOutput`` among the outputs becomes a
:class:`~fxcompress.graph.record.Record` (a dict whose fields are attributes too), because its class may not exist where
the graph is loaded; symbols of dynamic sizes have new names; of a node's source only the innermost line and the module
path are kept.

Reading trusts nothing. Operations and layers come from lists (:func:`allow_operators` and :func:`register_layer` add to
them), names that end up in generated code must be identifiers, and whatever does not fit is a ``BundleError``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from fxcompress.errors import BundleError, FxCompressError
from fxcompress.graph import shapes
from fxcompress.graph.info import GraphInfo, assemble, info
from fxcompress.graph.serialize_layers import build_layer, layer_config, register_layer
from fxcompress.graph.serialize_shapes import decode_value, encode_value, make_symbols, symbols_of
from fxcompress.graph.serialize_tensors import put_tensors, stored_tensors, tensor_table
from fxcompress.graph.serialize_values import (
    allow_operators,
    check_identifier,
    check_path,
    decode,
    encode,
    operation,
    operation_name,
    unserializable,
)
from fxcompress.graph.structure import Structure
from fxcompress.graph.verify import verify

__all__ = ["FORMAT_VERSION", "allow_operators", "graph_to_json", "load_graph", "register_layer", "weights"]

FORMAT_VERSION = 1


def graph_to_json(graph_module: fx.GraphModule) -> dict[str, Any]:
    """The graph as values that the ``json`` module writes strictly; the tensors' values are in :func:`weights`.

    Raises:
        BundleError: a layer, operation, argument, tensor or structure has no serial form; says which, and why.
    """
    facts = info(graph_module)
    called = {str(node.target) for node in graph_module.graph.find_nodes(op="call_module")}
    modules = [
        check_path(path, path)
        for path, _ in graph_module.named_modules(remove_duplicate=False)
        if path and not any(path.startswith(layer + ".") for layer in called)
    ]
    try:
        structures = [Structure.from_spec(spec).to_json() for spec in (facts.in_spec, facts.out_spec)]
    except FxCompressError as error:
        raise unserializable(error.problem, "inputs and outputs", error.remedy) from error
    return {
        "format_version": FORMAT_VERSION,
        "training": graph_module.training,
        "modules": modules,
        "layers": {path: layer_config(graph_module.get_submodule(path), path) for path in modules if path in called},
        "tensors": tensor_table(graph_module),
        "symbols": symbols_of(graph_module.graph),
        "nodes": [_node_to_json(node, facts.has_shapes) for node in graph_module.graph.nodes],
        "parameter_names": list(facts.parameter_names),
        "inputs": structures[0],
        "outputs": structures[1],
        "has_shapes": facts.has_shapes,
        "dim_names": dict(facts.dim_names),
        "original_names": dict(facts.original_names),
        "notes": list(facts.notes),
        "sparse": dict(facts.sparse),
    }


def weights(graph_module: fx.GraphModule) -> dict[str, torch.Tensor]:
    """The tensors to store beside the JSON: contiguous, no two in one storage, as ``safetensors`` asks.

    Raises:
        BundleError: a tensor has no serial form.
    """
    return stored_tensors(graph_module)


def load_graph(
    document: Any, tensors: Mapping[str, torch.Tensor], *, map_location: str | torch.device = "cpu"
) -> fx.GraphModule:
    """The graph that :func:`graph_to_json` and :func:`weights` told.

    Args:
        document: what ``json.load`` read.
        tensors: what ``safetensors`` read.
        map_location: the device for weights, and for tensors that the graph makes.

    Raises:
        BundleError: the document is damaged, of a newer format, or names what is unknown here; or the tensors do not
            fit it.
    """
    if not isinstance(document, dict):
        raise _damaged(f"it is a {type(document).__name__}, not an object")
    version = document.get("format_version")
    if type(version) is not int or version < 1:
        raise _damaged("it does not tell its format")
    if version > FORMAT_VERSION:
        raise BundleError(
            f"this graph has format {version}; this fxcompress reads up to {FORMAT_VERSION}", remedy="update fxcompress"
        )
    try:
        return _load(document, tensors, torch.device(map_location))
    except BundleError:
        raise
    except FxCompressError as error:
        raise BundleError(error.problem, where=error.where, remedy="do not use this file: it was altered") from error
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, RecursionError) as error:
        raise _damaged(f"{type(error).__name__}: {error}") from error


def _load(document: dict[str, Any], tensors: Mapping[str, torch.Tensor], device: torch.device) -> fx.GraphModule:
    root = nn.Module()
    layers = document["layers"]
    for path in document["modules"]:
        owner, _, name = check_path(path, "modules").rpartition(".")
        made = build_layer(layers[path], path) if path in layers else nn.Module().train(document["training"])
        root.get_submodule(owner).add_module(name, made)
    for path in document["tensors"]:
        check_path(path, "tensors")
    put_tensors(root, document["tensors"], tensors, device)

    mode, sizes = make_symbols(document["symbols"])
    graph = _graph_from_json(document, mode, sizes, device)
    names = tuple(check_identifier(name, "parameter_names") for name in document["parameter_names"])
    facts = GraphInfo(
        names,
        _spec(document["inputs"], sum(node.op == "placeholder" for node in graph.nodes)),
        _spec(document["outputs"], len(graph.output_node().args[0])),  # type: ignore[arg-type]
        mode,
        has_shapes=document["has_shapes"] is True,
        dim_names={
            str(sizes[symbol].node.expr): str(name) for symbol, name in document["dim_names"].items() if symbol in sizes
        },
        original_names={check_path(own, "names"): check_path(n, own) for own, n in document["original_names"].items()},
        notes=[str(note) for note in document["notes"]],
        sparse={check_path(path, "sparse"): str(kind) for path, kind in document.get("sparse", {}).items()},
    )
    _check_call(facts)
    graph_module = assemble(root, graph, facts)
    graph_module.training = document["training"] is True
    shapes.propagate(graph_module)
    verify(graph_module)
    return graph_module


# --- nodes -----------------------------------------------------------------------------------------------------


def _node_to_json(node: fx.Node, has_shapes: bool) -> dict[str, Any]:
    told: dict[str, Any] = {"op": node.op, "name": node.name}
    if node.op == "call_function":
        told["target"] = operation_name(node.target, shapes.where(node))
    elif node.op != "output":
        told["target"] = str(node.target)
    if node.args:
        told["args"] = [encode(argument, shapes.where(node)) for argument in node.args]
    if node.kwargs:
        told["kwargs"] = {key: encode(value, shapes.where(node)) for key, value in node.kwargs.items()}
    if node.op == "placeholder" and has_shapes:
        told["value"] = encode_value(node.meta["val"], node.name)
    line, stack = shapes.source_frame(node), node.meta.get("nn_module_stack")
    if line:
        told["line"] = line
    if stack:
        told["module"] = str(list(stack.values())[-1][0])
    return told


def _graph_from_json(
    document: dict[str, Any], mode: FakeTensorMode, sizes: Mapping[str, Any], device: torch.device
) -> fx.Graph:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for told in document["nodes"]:
        name, op = check_identifier(told["name"], "nodes"), told["op"]
        target = told.get("target")
        if op == "call_function":
            target = operation(target, name)
        elif op in ("call_module", "get_attr"):
            check_path(target, name)
        elif op == "placeholder":
            check_identifier(target, name)
        elif op == "output":
            target = "output"
        else:
            raise _damaged(f"a node is {op!r}", name)
        args = tuple(decode(argument, nodes, device, name) for argument in told.get("args", ()))
        kwargs = {
            check_identifier(key, name): decode(value, nodes, device, name)
            for key, value in told.get("kwargs", {}).items()
        }
        if name in nodes or (op == "placeholder" and args):
            raise _damaged("the node is told twice, or is an input with arguments", name)
        node = nodes[name] = graph.create_node(op, target, args, kwargs, name=name)
        if "value" in told:
            node.meta["val"] = decode_value(told["value"], mode, sizes, device, name)
        if "line" in told:
            node.meta["stack_trace"] = str(told["line"])
        if "module" in told:
            node.meta["nn_module_stack"] = {str(told["module"]): (str(told["module"]), "")}
    return graph


# --- structure -------------------------------------------------------------------------------------------------


def _spec(told: Any, leaves: int) -> pytree.TreeSpec:
    structure = Structure.from_json(told)
    if structure.leaf_count != leaves:
        raise _damaged(f"its structure holds {structure.leaf_count} values, the graph {leaves}")
    return pytree.tree_structure(structure.unflatten([0] * leaves))


def _check_call(facts: GraphInfo) -> None:
    """The structure of the inputs becomes code, too: names of arguments are identifiers, and one for each."""
    positional, keywords = facts.in_spec.children()
    if positional.type is not tuple or keywords.type is not dict:
        raise _damaged("its inputs are not positional and keyword arguments")
    for name in keywords.context:
        check_identifier(name, "inputs")
    count = positional.num_children + keywords.num_children
    if len(facts.parameter_names) != count or len(set(facts.parameter_names)) != count:
        raise _damaged(f"it tells {len(facts.parameter_names)} names for {count} arguments")


def _damaged(problem: str, where: str | None = None) -> BundleError:
    return BundleError(
        f"the saved graph is damaged: {problem}", where=where, remedy="copy the bundle again, or save the model again"
    )
