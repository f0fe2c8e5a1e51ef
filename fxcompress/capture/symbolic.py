"""The front end for models without example inputs: symbolic tracing, brought to the form of an export.

The model runs on proxies (:mod:`fxcompress.capture.tracer`). Layers with weights stay layers; everything else is traced
through to torch functions, which :mod:`fxcompress.capture.normalize` turns into ATen operations. What an export finds
out by running (ranks, dtypes, Python branches on sizes) is not known here: a model that depends on it is refused, and
asked for example inputs. Each parameter of ``forward`` is taken for a tensor, or keeps its default.
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import Node
from torch.utils import _pytree as pytree

from fxcompress.capture.explain import first_line, user_line
from fxcompress.capture.flatten import Flat
from fxcompress.capture.inputs import register_dataclasses
from fxcompress.capture.normalize import Normalizer
from fxcompress.capture.preserve import preserved
from fxcompress.capture.raising import raise_graph
from fxcompress.capture.tracer import REMEDY, NothingRandom, Tracer
from fxcompress.errors import CaptureError, FxCompressError

__all__ = ["trace_symbolically"]


def trace_symbolically(model: nn.Module) -> fx.GraphModule:
    """The raised graph of a model, without shapes. The model is left as it was.

    Raises:
        CaptureError: the model depends on facts that only example inputs tell; names the line.
    """
    inputs = _inputs(model)
    with preserved(model), warnings.catch_warnings(action="ignore"), torch.enable_grad():
        graph, tensors = _trace(model, inputs)
    calls = {str(node.target) for node in graph.find_nodes(op="call_module")}
    layers = {path: model.get_submodule(path) for path in calls}
    normalizer = Normalizer(tensors, layers, _device(model))
    result = _plain(normalizer.run(graph))
    register_dataclasses(result)
    leaves, out_spec = pytree.tree_flatten(result)
    normalizer.graph.output(tuple(leaves))
    flat = Flat(
        normalizer.graph,
        tensors,
        {name for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter)},
        set(tensors) - set(model.state_dict(keep_vars=True)),
        pytree.tree_structure(((0,) * len(inputs), {})),
        out_spec,
        tuple(inputs),
        notes=normalizer.notes,
        order=list(model.state_dict(keep_vars=True)),
        layers={path: layer for path, layer in layers.items() if path in normalizer.called},
        has_shapes=False,
    )
    return raise_graph(flat, model)


def _inputs(model: nn.Module) -> list[str]:
    """The parameters of ``forward`` that have no default. Only tensors can be traced."""
    names: list[str] = []
    signature = inspect.signature(model.forward)
    for parameter in signature.parameters.values():
        if parameter.default is not inspect.Parameter.empty or parameter.kind is inspect.Parameter.VAR_KEYWORD:
            continue
        told = parameter.annotation
        told = told if isinstance(told, str) else getattr(told, "__name__", str(told))
        is_tensor = told in ("_empty", "Any") or told.split(".")[-1] in ("Tensor", "T")
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL or not is_tensor:
            raise CaptureError(
                f"forward() takes '{parameter}', whose parts only example inputs tell",
                where=f"forward{signature}",
                remedy=REMEDY,
            )
        names.append(parameter.name)
    return names


def _trace(model: nn.Module, inputs: list[str]) -> tuple[fx.Graph, dict[str, torch.Tensor]]:
    """The graph of torch functions, and every tensor that it reads by its name."""
    if model._forward_hooks or model._forward_pre_hooks:
        raise CaptureError("the model has forward hooks", where=type(model).__name__, remedy=REMEDY)
    try:
        with NothingRandom():
            graph = Tracer(model, inputs).trace(model)
    except FxCompressError:
        raise
    except Exception as error:
        raise CaptureError(
            f"the model cannot be traced without example inputs: {type(error).__name__}: {first_line(error)}",
            where=user_line(error),
            remedy=REMEDY,
        ) from error
    tensors: dict[str, torch.Tensor] = {}
    for node in graph.find_nodes(op="get_attr"):
        owner, _, name = str(node.target).rpartition(".")
        tensors[str(node.target)] = getattr(model.get_submodule(owner), name)
    return graph, tensors


def _plain(value: Any) -> Any:
    """The model's result in Python's own containers; the tracer made immutable ones of them."""
    if isinstance(value, Node):
        return value
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        items = [_plain(item) for item in value]
        named = hasattr(value, "_fields")
        return type(value)(*items) if named else type(value)(items)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{name: _plain(item) for name, item in vars(value).items()})
    return value


def _device(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
