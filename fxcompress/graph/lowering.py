"""The raised graph back to one flat, functional ATen graph: what exporters and engines take.

Each layer becomes its ATen call (:mod:`fxcompress.graph.lower_layers`), its weights become placeholders, everything
else is copied. One walk over the nodes, nothing is traced again except a layer that has no rule, and that one alone.
Fake values, source lines and module paths stay on the nodes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import ExportGraphSignature
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from fxcompress.errors import FxCompressError, GraphError
from fxcompress.graph.info import info
from fxcompress.graph.lifting import Lifted, output_spec
from fxcompress.graph.lower_layers import LOWERINGS
from fxcompress.graph.shapes import no_guards, require_shapes, where
from fxcompress.graph.trace import trace

__all__ = ["Lowering", "Rewrite", "to_exported_program"]

# Asked before each call is written: the call's target, arguments and keyword arguments (nodes of the new graph).
# Gives what the call is to be replaced by, written with the Lowering, or NotImplemented to have it as it is.
Rewrite = Callable[["Lowering", Any, tuple[Any, ...], dict[str, Any]], Any]


def to_exported_program(
    graph_module: fx.GraphModule,
    *,
    rewrite: Rewrite | None = None,
    program_type: type[ExportedProgram] = ExportedProgram,
) -> ExportedProgram:
    """Lower a captured graph, as in eval mode. Its weights are shared, tied ones are one placeholder.

    Args:
        graph_module: a captured graph in eval mode; it is not changed.
        rewrite: replaces single operations by what the consumer takes.
        program_type: the class to build.

    Raises:
        GraphError: a layer is in training mode, or one that has no rule cannot be traced.
        PreconditionError: the graph has no shapes.
    """
    require_shapes(graph_module, "lowering")
    return Lowering(graph_module, rewrite).run(program_type)


class Lowering:
    """Writes the flat graph; one object per program. Rules write with :meth:`call`, :meth:`emit` and :meth:`inline`."""

    def __init__(self, graph_module: fx.GraphModule, rewrite: Rewrite | None = None) -> None:
        self.graph = fx.Graph()
        self.mode = info(graph_module).fake_mode
        self.source: fx.Node | None = None  # the raised node that is being lowered, for error messages
        self._graph_module = graph_module
        self._rewrite = rewrite
        self._values: dict[fx.Node, Any] = {}  # node of the raised graph → its new node, or nested tuple of nodes
        self._lifted = Lifted(graph_module, self.graph, self.mode)
        self._meta: dict[str, Any] = {}  # of the raised node that is being lowered
        self.value: Any = None  # fake value of what is being lowered, None where it is not known yet
        self._name: str | None = None
        self._layer = ""

    def run(self, program_type: type[ExportedProgram]) -> ExportedProgram:
        """Walk the raised graph once."""
        for node in self._graph_module.graph.find_nodes(op="placeholder"):
            self._values[node] = self._lifted.user_input(node)
        results: tuple[Any, ...] = ()
        for node in self._graph_module.graph.nodes:
            self.source = node
            self._meta = {key: value for key, value in node.meta.items() if key != "val"} | {"source": node.name}
            if node.op == "output":
                results = tuple(self._read(node.args[0]))
                self.graph.output(results)
            elif node.op == "get_attr":
                self._values[node] = self._lifted.tensor(str(node.target))
            elif node.op == "call_module":
                self._values[node] = self._call_layer(node)
            elif node.op == "call_function":
                args, kwargs = self._read((node.args, dict(node.kwargs)))
                self._values[node] = self._write(node.target, args, kwargs, node.meta["val"], node.name)
        self.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
        signature = ExportGraphSignature(self._lifted.specs, [output_spec(result) for result in results])
        return program_type(
            nn.Module(),
            self.graph,
            signature,
            self._lifted.state,
            self._ranges(),
            [ModuleCallEntry("", self._call_signature())],
            None,
            self._lifted.constants,
        )

    # --- what rules write with ---------------------------------------------------------------------------------

    def call(
        self, target: Any, args: Sequence[Any], kwargs: dict[str, Any] | None = None, *, result: bool = False
    ) -> Any:
        """Append an operation, or what it is rewritten to.

        Args:
            target: an ATen overload or ``operator.getitem``.
            args: of the operation; nodes are nodes of the new graph.
            kwargs: of the operation.
            result: the operation gives what the layer that is being lowered gives; its fake value is known.
        """
        known = (self.value, self._name) if result else (None, None)
        return self._write(target, tuple(args), kwargs or {}, *known)

    def emit(
        self, target: Any, args: Sequence[Any], kwargs: dict[str, Any] | None = None, *, value: Any = None
    ) -> fx.Node:
        """Append an operation as it is; ``value`` is its fake value where that is known."""
        return self._append(target, args, kwargs or {}, value, None if value is not self.value else self._name)

    def tensor(self, name: str) -> fx.Node | None:
        """The parameter or buffer ``name`` (``weight``, ``quantizer.scale``) of the layer that is being lowered."""
        inner, _, last = name.rpartition(".")
        owner = self._graph_module.get_submodule(f"{self._layer}.{inner}" if inner else self._layer)
        return None if getattr(owner, last, None) is None else self._lifted.tensor(f"{self._layer}.{name}")

    def inline(
        self, recorded: fx.GraphModule, operands: list[Any], *, rewrite: bool = False, origin: str | None = None
    ) -> Any:
        """Append the operations of a traced graph on ``operands``; gives its result.

        Args:
            recorded: as :func:`fxcompress.graph.trace.trace` gives it.
            operands: one per placeholder.
            rewrite: rewrite the operations too.
            origin: what they were before they were taken apart, for error messages: ``meta["origin"]`` of the nodes.
        """
        write = self._write if rewrite else self._append
        if origin is not None:
            self._meta["origin"] = origin
        values: dict[fx.Node, Any] = {}
        given = iter(operands)
        for node in recorded.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(given)
            elif node.op == "get_attr":
                values[node] = self._lifted.constant(getattr(recorded, str(node.target)))
            elif node.op == "output":
                self._meta.pop("origin", None)
                return map_arg(node.args[0], values.__getitem__)
            else:
                args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = write(node.target, args, kwargs, node.meta.get("val"), None)
        raise GraphError("a traced graph has no output")

    # --- private -----------------------------------------------------------------------------------------------

    def _read(self, argument: Any) -> Any:
        return map_arg(argument, self._values.__getitem__)

    def _write(self, target: Any, args: Any, kwargs: dict[str, Any], value: Any, name: str | None) -> Any:
        if target is operator.getitem and isinstance(args[0], (tuple, list)):
            return args[0][args[1]]
        written: Any = NotImplemented
        if self._rewrite is not None and target is not operator.getitem:
            outer = self.value, self._name
            self.value, self._name = value, name
            written = self._rewrite(self, target, tuple(args), kwargs)
            self.value, self._name = outer
        return self._append(target, args, kwargs, value, name) if written is NotImplemented else written

    def _append(self, target: Any, args: Any, kwargs: dict[str, Any], value: Any, name: str | None) -> fx.Node:
        node = self.graph.create_node("call_function", target, tuple(args), kwargs, name=name)
        node.meta = dict(self._meta)
        node.meta["val"] = self._infer(node) if value is None else value
        return node

    def _infer(self, node: fx.Node) -> Any:
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        with self.mode, torch.no_grad(), no_guards(self.mode), enable_python_dispatcher():
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def _call_layer(self, node: fx.Node) -> Any:
        self._layer = path = str(node.target)
        layer = self._graph_module.get_submodule(path)
        if layer.training:
            raise GraphError(
                f"the layer {path!r} is in training mode", where=where(node), remedy="call .eval() on the graph first"
            )
        self._meta["nn_module_stack"] = _with_scope(self._meta.get("nn_module_stack"), path, layer)
        args, kwargs = self._read(node.args), {key: self._read(value) for key, value in node.kwargs.items()}
        self.value, self._name = _flat(node.meta["val"]), node.name
        rule = LOWERINGS.get(type(layer))
        hooked = bool(layer._forward_hooks or layer._forward_pre_hooks)
        result = rule(self, layer, args) if rule and not kwargs and not hooked else NotImplemented
        if result is NotImplemented:
            result = self._trace_layer(node, layer, args, kwargs)
        return result

    def _trace_layer(self, node: fx.Node, layer: nn.Module, args: Any, kwargs: Any) -> Any:
        tensors = [*layer.named_parameters(), *layer.named_buffers()]
        weights = [self._lifted.tensor(f"{self._layer}.{name}") for name, _ in tensors]
        leaves, spec = pytree.tree_flatten((args, kwargs))
        operands = [leaf for leaf in leaves if isinstance(leaf, fx.Node)]

        def function(*values: Any) -> Any:
            state = {name: value for (name, _), value in zip(tensors, values, strict=False)}
            given = iter(values[len(tensors) :])
            filled = [next(given) if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
            own_args, own_kwargs = pytree.tree_unflatten(filled, spec)
            return torch.func.functional_call(layer, state, own_args, own_kwargs)

        try:
            recorded = trace(function, [n.meta["val"] for n in [*weights, *operands]], self.mode)
        except FxCompressError:
            raise
        except Exception as error:
            raise GraphError(
                f"the layer {self._layer!r}, a {type(layer).__name__}, cannot be traced: {error}",
                where=where(node),
                remedy="write its forward with tensor operations whose shapes do not depend on values",
            ) from error
        return self.inline(recorded, [*weights, *operands], rewrite=True)

    def _ranges(self) -> dict[Any, Any]:
        env = self.mode.shape_env
        ranges: dict[Any, Any] = {}
        for node in self.graph.find_nodes(op="placeholder"):
            for size in getattr(node.meta.get("val"), "shape", ()):
                if isinstance(size, torch.SymInt) and env is not None:
                    ranges[size.node.expr] = env.bound_sympy(size.node.expr)
                    ranges.update((symbol, env.var_to_range[symbol]) for symbol in size.node.expr.free_symbols)
        return ranges

    def _call_signature(self) -> ModuleCallSignature:
        facts = info(self._graph_module)
        return ModuleCallSignature([], [], facts.in_spec, facts.out_spec, list(facts.parameter_names))


def _flat(value: Any) -> Any:
    """``(y, (h, c))`` of ``nn.LSTM`` is ``(y, h, c)`` of the operation."""
    return tuple(pytree.tree_leaves(value)) if isinstance(value, tuple) else value


def _with_scope(stack: Mapping[str, Any] | None, path: str, layer: nn.Module) -> dict[str, Any]:
    stack = dict(stack or {})
    last = next(reversed(stack.values()), ("", None))[0]
    if last != path:
        stack[path] = (path, f"{type(layer).__module__}.{type(layer).__qualname__}")
    return stack
