"""``capture()``: any model the user has, to the one form of graph that every pass and backend works on."""

from __future__ import annotations

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from fxcompress.capture.dynamic import marks_of
from fxcompress.capture.export import export_program
from fxcompress.capture.flatten import flatten_program, name_dims
from fxcompress.capture.inputs import argument_names, distinct, example_inputs, in_call_order
from fxcompress.capture.raising import raise_graph
from fxcompress.capture.symbolic import trace_symbolically
from fxcompress.errors import PreconditionError
from fxcompress.graph.copying import copy_graph
from fxcompress.graph.info import GraphInfo, info
from fxcompress.graph.shapes import settle_sizes

__all__ = ["capture", "check_model"]

# Layers that do something else in training.
_BEHAVES_OTHERWISE = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd, nn.RNNBase, nn.RReLU)


def capture(
    model: nn.Module | ExportedProgram,
    example_inputs_: object = None,
    *,
    dynamic_shapes: object = "batch",
) -> fx.GraphModule:
    """Bring ``model`` to one functional, raised graph. The model is left exactly as it was.

    Args:
        model: an ``nn.Module`` in eval mode (a ``GraphModule`` too), or an ``ExportedProgram``.
        example_inputs_: positional arguments as a tuple, or keyword arguments as a dict. Without them the model is
            traced symbolically, and passes that need shapes refuse the graph.
        dynamic_shapes: ``"batch"`` keeps dim 0 symbolic; None fixes all sizes; or per argument and dim, as
            ``{"x": {0: "batch", 2: "height"}}``.

    Returns:
        A ``GraphModule`` in eval mode, called as the model is, whose weights share memory with the model's.

    Raises:
        PreconditionError: not a model, in training mode, NaN or infinite weights, inputs that do not fit.
        CaptureError: the model has no functional graph; says which line is in the way.
    """
    # The caller's no_grad() is not the model's: it would hide where the model itself turns gradients off.
    with torch.inference_mode(False), torch.enable_grad():
        return _capture(model, example_inputs_, dynamic_shapes)


def _capture(model: nn.Module | ExportedProgram, example_inputs_: object, dynamic_shapes: object) -> fx.GraphModule:
    if isinstance(model, ExportedProgram):
        graph_module = raise_graph(flatten_program(model), None)
        _check_weights(graph_module)
        settle_sizes(graph_module)
        return graph_module
    check_model(model)
    if type(model).__name__ == "OptimizedModule":  # what torch.compile() made
        model = model.get_submodule("_orig_mod")
    if isinstance(model, fx.GraphModule) and isinstance(model.meta.get("fxcompress"), GraphInfo):
        # A graph without shapes is captured again where there are inputs to give it shapes.
        if info(model).has_shapes or example_inputs_ is None:
            return copy_graph(model)
    if example_inputs_ is None:
        return trace_symbolically(model)
    inputs = distinct(model, in_call_order(model, example_inputs(example_inputs_)))
    names = argument_names(model, inputs)
    marks = marks_of(inputs, dynamic_shapes, names)
    program = export_program(model, inputs, marks, dynamic_shapes)
    flat = flatten_program(program, tuple(names))
    flat.dim_names = name_dims(flat.graph, marks, one_batch=dynamic_shapes == "batch")
    graph_module = raise_graph(flat, model)
    settle_sizes(graph_module)
    return graph_module


def check_model(model: object) -> None:
    """Refuse what cannot be captured before any work is done.

    Raises:
        PreconditionError: not a module, or one that cannot be called; training mode; a weight that is NaN or infinite.
    """
    if not isinstance(model, nn.Module):
        raise PreconditionError(
            f"the model is a {type(model).__name__}, not a torch.nn.Module",
            remedy="hand in an nn.Module, an ExportedProgram or a GraphModule",
        )
    if isinstance(model, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        raise PreconditionError(
            "the model is TorchScript, which has no FX graph", remedy="hand in the nn.Module it was scripted from"
        )
    if type(model).forward is nn.Module.forward and "forward" not in vars(model):
        raise PreconditionError(
            f"a {type(model).__name__} has no forward(), so it cannot be called",
            remedy="hand in the module that calls it, or give it a forward()",
        )
    # Of a traced module only the layers count: an exported one says it trains, and cannot be told otherwise.
    counts = _BEHAVES_OTHERWISE if isinstance(model, fx.GraphModule) else nn.Module
    modules = dict(model.named_modules())
    training = [name or "the model itself" for name, m in modules.items() if m.training and isinstance(m, counts)]
    if training:
        raise PreconditionError(
            f"the model is in training mode ({', '.join(training[:3])}{' …' if len(training) > 3 else ''})",
            remedy="call model.eval() first; the compiled module trains after compiled.module.train()",
        )
    _check_weights(model)


def _check_weights(model: nn.Module) -> None:
    statistics = [
        (f"{name}.{own}".lstrip("."), buffer)
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        for own, buffer in module.named_buffers(recurse=False)
    ]
    for name, tensor in [*model.named_parameters(), *statistics]:
        if tensor.is_floating_point() and tensor.device.type != "meta" and not _is_finite(tensor):
            raise PreconditionError(
                f"{name!r} holds NaN or infinite values",
                where=name,
                remedy="load a sound checkpoint; fxcompress will not compress a broken model",
            )


def _is_finite(tensor: torch.Tensor) -> bool:
    # One NaN or infinity makes the sum so: a single pass that writes nothing. Only a sum that overflows on its own
    # has to be looked at element by element.
    return bool(torch.isfinite(tensor.detach().sum())) or bool(torch.isfinite(tensor).all())
