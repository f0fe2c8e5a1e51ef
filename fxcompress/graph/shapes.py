"""Fake-tensor propagation: what every node produces, without computing it.

``meta["val"]`` of a node is a fake tensor with the symbolic batch kept, a ``SymInt``, or a tuple of those.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.node import map_arg

from fxcompress.errors import GraphError, PreconditionError
from fxcompress.graph.info import info
from fxcompress.graph.recurrent import KnownShapes

__all__ = [
    "infer",
    "no_guards",
    "propagate",
    "require_shapes",
    "same_value",
    "settle_sizes",
    "source_frame",
    "source_line",
    "where",
]


# Where torch itself is: its frames are not the user's lines.
_TORCH = os.path.dirname(torch.__file__) + os.sep


def source_frame(node: fx.Node) -> str | None:
    """The innermost frame of ``meta["stack_trace"]`` outside of torch, in Python's own form, if it is known."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    frames = [index for index, line in enumerate(lines) if line.startswith("File ")]
    theirs = [index for index in frames if _TORCH not in lines[index]] or frames
    return "\n".join(lines[theirs[-1] : theirs[-1] + 2]) if theirs else None


def source_line(node: fx.Node) -> str | None:
    """The user's line that made ``node``: ``"model.py:12 in forward: x = self.conv(x)"``, if it is known."""
    frame, _, code = (source_frame(node) or "").partition("\n")
    path, _, rest = frame.removeprefix('File "').partition('", line ')
    number, _, function = rest.partition(", in ")
    return f"{path}:{number} in {function}: {code}" if frame else None


def where(node: fx.Node) -> str:
    """The node and, where it is known, the user's source line: for error messages and reports."""
    line = source_line(node)
    return f"node {node.name!r}" + (f" ({line})" if line else "")


def require_shapes(graph_module: fx.GraphModule, what: str) -> None:
    """Refuse a graph that was traced without example inputs.

    Args:
        graph_module: a captured graph.
        what: needs shapes; the subject of the error's sentence: ``"prune_channels"``.

    Raises:
        PreconditionError: the graph has no shapes.
    """
    if not info(graph_module).has_shapes:
        raise PreconditionError(
            f"{what} needs shapes, and the model was captured without example inputs",
            remedy="give example_inputs, such as (torch.randn(2, 3, 224, 224),)",
        )


def infer(graph_module: fx.GraphModule, node: fx.Node) -> Any:
    """What ``node`` produces, computed on the fake values of its inputs; None in a graph without shapes.

    Raises:
        GraphError: the operation does not accept those inputs; names the node and its source line.
    """
    facts = info(graph_module)
    if not facts.has_shapes:
        return None
    mode = facts.fake_mode
    args = map_arg(node.args, lambda n: n.meta["val"])
    kwargs = map_arg(node.kwargs, lambda n: n.meta["val"])
    try:
        # Some composites (recurrent layers) take symbolic sizes only through their Python decomposition. What torch
        # warns of, it warns of when the graph runs.
        with (
            warnings.catch_warnings(action="ignore"),
            mode,
            torch.no_grad(),
            no_guards(mode),
            enable_python_dispatcher(),
        ):
            if node.op == "call_function":
                assert callable(node.target)
                return node.target(*args, **kwargs)
            if node.op == "call_module":
                return _infer_module(mode, graph_module.get_submodule(str(node.target)), args, kwargs)
            if node.op == "get_attr":
                return _fake(mode, _attribute(graph_module, str(node.target)))
            return node.meta.get("val")
    except Exception as error:
        raise GraphError(
            f"{node.target} does not accept its inputs: {str(error).splitlines()[0] if str(error) else error!r}",
            where=where(node),
            remedy="a rewrite changed a shape or dtype without adapting this node",
        ) from error


def no_guards(mode: FakeTensorMode) -> AbstractContextManager[None]:
    """Inside the block no answer about a size becomes a fact about its symbol."""
    # Choosing a kernel may ask whether the batch is below 16. The answer for the example must not become a fact about
    # the symbol: its range would narrow with every propagation, until it is no symbol any more.
    return nullcontext() if mode.shape_env is None else mode.shape_env.suppress_guards()


def _infer_module(mode: FakeTensorMode, module: nn.Module, args: Any, kwargs: Any) -> Any:
    if (known := _of_linear(module, args)) is not None:
        return known
    # The module's own tensors are replaced by fakes for this one call, so that a batch norm in train mode
    # updates a fake running mean and never the real one.
    state = {name: _fake(mode, tensor) for name, tensor in module.named_parameters(remove_duplicate=False)}
    state |= {name: _fake(mode, tensor) for name, tensor in module.named_buffers(remove_duplicate=False)}
    with KnownShapes() if isinstance(module, nn.RNNBase) else nullcontext():
        return torch.func.functional_call(module, state, args, kwargs)


def _of_linear(module: nn.Module, args: Any) -> torch.Tensor | None:
    """What a linear layer makes of inputs that fit it: a frequent layer, and slow by its decomposition."""
    if type(module) is not nn.Linear or len(args) != 1 or not isinstance(x := args[0], torch.Tensor):
        return None
    weight = module.weight
    fits = x.dim() > 1 and type(x.shape[-1]) is int and x.shape[-1] == weight.shape[1]
    if not fits or (x.dtype, x.device) != (weight.dtype, weight.device):
        return None
    return x.new_empty((*x.shape[:-1], len(weight)))


def _fake(mode: FakeTensorMode, value: Any) -> Any:
    return mode.from_tensor(value, static_shapes=True) if isinstance(value, torch.Tensor) else value


def _attribute(graph_module: fx.GraphModule, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(graph_module.get_submodule(owner), name)


def propagate(graph_module: fx.GraphModule, dirty: Iterable[fx.Node] | None = None) -> None:
    """Refresh ``meta["val"]`` of the ``dirty`` nodes and of everything whose inputs changed because of them.

    With ``dirty=None`` the whole graph is refreshed. One pass over the graph in either case; nodes whose inputs
    kept shape and dtype are not computed again. A graph without shapes is left as it is.
    """
    if not info(graph_module).has_shapes:
        return
    pending = None if dirty is None else set(dirty)
    changed: set[fx.Node] = set()
    for node in graph_module.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if pending is not None and node not in pending and changed.isdisjoint(node.all_input_nodes):
            continue
        before = node.meta.get("val")
        node.meta["val"] = infer(graph_module, node)
        if not same_value(before, node.meta["val"]):
            changed.add(node)


def settle_sizes(graph_module: fx.GraphModule) -> None:
    """Where the model turned out to fix a size that was asked to be dynamic, make it the number that it is."""
    mode = info(graph_module).fake_mode
    settled = False
    for node in graph_module.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and any(map(_is_settled, value.shape)):
            shape, stride = ([_settled(size) for size in sizes] for sizes in (value.shape, value.stride()))
            with mode:
                node.meta["val"] = torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)
            settled = True
    if settled:
        propagate(graph_module)


def _is_settled(size: Any) -> bool:
    return isinstance(size, torch.SymInt) and bool(size.node.expr.is_number)


def _settled(size: Any) -> Any:
    return int(size.node.expr) if _is_settled(size) else size


def same_value(left: Any, right: Any) -> bool:
    """Whether two ``meta["val"]`` agree in structure, shape and dtype."""
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return left.dtype == right.dtype and _same_sizes(left.shape, right.shape)
    if isinstance(left, (tuple, list)) and isinstance(right, (tuple, list)):
        return len(left) == len(right) and all(map(same_value, left, right))
    if isinstance(left, torch.Tensor) or isinstance(right, torch.Tensor):
        return False
    return _same_size(left, right)


def _same_sizes(left: Iterable[Any], right: Iterable[Any]) -> bool:
    left, right = tuple(left), tuple(right)
    return len(left) == len(right) and all(map(_same_size, left, right))


def _same_size(left: Any, right: Any) -> bool:
    # Compared as expressions: comparing SymInts would add a guard, and with it a constraint on the batch.
    if isinstance(left, torch.SymInt) or isinstance(right, torch.SymInt):
        if type(left) is not type(right):
            return False
        # A size that depends on data gets a new symbol each time it is inferred.
        unknown = [bool(free_unbacked_symbols(size)) for size in (left, right)]
        return all(unknown) or bool(left.node.expr == right.node.expr)
    return bool(left == right)
