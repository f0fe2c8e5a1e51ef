"""The only way to mutate a graph.

::

    with GraphEditor(graph_module) as editor:
        fused = editor.add_module("conv1", new_conv)
        node = editor.insert_module(fused, (x,), before=old, like=old)
        editor.replace(old, node)

What the editor guarantees, so that no pass has to: a new node carries fake values and the source line of the node it
stands for; a replacement that would change shape or dtype is refused unless announced; nothing is overwritten by a
name clash; and on leaving the block dead nodes, unused layers and orphan tensors go, shapes are propagated from what
changed, and the graph is linted and recompiled. All of it once, whatever the number of edits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import fx, nn

from fxcompress.errors import GraphError
from fxcompress.graph import shapes
from fxcompress.graph.copying import copy_graph
from fxcompress.graph.info import info

__all__ = ["GraphEditor", "copy_graph"]

_KEPT_META = ("stack_trace", "nn_module_stack")


class GraphEditor:
    """Edits one graph inside a ``with`` block; see the module's text for what it guarantees.

    Raises (on leaving the block):
        GraphError: the edited graph is not sound; the message names the node and its source line.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.graph = graph_module.graph
        self._touched = False
        self._reshaped: set[fx.Node] = set()
        self._known: set[fx.Node] = set()
        self._rewritten: set[str] = set()  # paths of layers and tensors that were put in the place of others

    def __enter__(self) -> GraphEditor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None and self._touched:
            self.clean_up()

    # --- tensors and layers ------------------------------------------------------------------------------------

    def add_module(self, hint: str, module: nn.Module) -> str:
        """Register ``module`` under ``hint``, or ``hint_1``, ``hint_2`` … if that is taken; returns the path."""
        path = self._free_path(hint)
        module.train(self.graph_module.training)
        self._owner(path).add_module(path.rpartition(".")[2], module)
        self._touched = True
        return path

    def set_module(self, path: str, module: nn.Module, *, reshaped: bool = True) -> None:
        """Put ``module`` in the place of the layer at ``path``, for every node that calls it.

        ``reshaped=False`` promises that what it produces keeps shape and dtype, as a layer with other weights does:
        then nothing is propagated again.
        """
        previous = self.graph_module.get_submodule(path)
        module.train(previous.training)
        self._owner(path)._modules[path.rpartition(".")[2]] = module
        if reshaped:
            self._rewritten.add(path)
        self._touched = True

    def add_tensor(self, hint: str, tensor: torch.Tensor, *, parameter: bool = False, persistent: bool = True) -> str:
        """Register a parameter or buffer under ``hint`` (made unique); returns the path for :meth:`insert_get`."""
        path = self._free_path(hint)
        owner, name = self._owner(path), path.rpartition(".")[2]
        if parameter:
            owner.register_parameter(name, tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor))
        else:
            owner.register_buffer(name, tensor.detach(), persistent=persistent)
        self._touched = True
        return path

    def set_tensor(self, path: str, tensor: torch.Tensor) -> None:
        """Put a new tensor in the place of the parameter or buffer at ``path``; the old tensor is not written to.

        A parameter keeps its ``requires_grad``. Tied weights are several paths: set each of them to the same object.
        """
        owner, name = self._owner(path), path.rpartition(".")[2]
        old = getattr(owner, name)
        if isinstance(old, nn.Parameter):
            if not isinstance(tensor, nn.Parameter):
                tensor = nn.Parameter(tensor.detach(), requires_grad=old.requires_grad)
            setattr(owner, name, tensor)  # a recurrent layer keeps a second list of its weights up to date by this
        else:
            owner.register_buffer(name, tensor.detach(), persistent=name not in owner._non_persistent_buffers_set)
        self._rewritten.add(path)
        self._touched = True

    # --- nodes -------------------------------------------------------------------------------------------------

    def insert_call(
        self,
        target: Callable[..., Any],
        args: Sequence[Any],
        kwargs: dict[str, Any] | None = None,
        *,
        before: fx.Node | None = None,
        after: fx.Node | None = None,
        like: fx.Node | None = None,
        name: str | None = None,
    ) -> fx.Node:
        """A ``call_function`` node next to ``before`` or ``after``, with metadata of ``like`` and fresh shapes."""
        return self._insert("call_function", target, args, kwargs, before, after, like, name)

    def insert_module(
        self,
        path: str,
        args: Sequence[Any],
        *,
        before: fx.Node | None = None,
        after: fx.Node | None = None,
        like: fx.Node | None = None,
    ) -> fx.Node:
        """A ``call_module`` node of the layer registered at ``path``."""
        return self._insert("call_module", path, args, None, before, after, like, path.replace(".", "_"))

    def insert_get(
        self, path: str, *, before: fx.Node | None = None, after: fx.Node | None = None, like: fx.Node | None = None
    ) -> fx.Node:
        """A ``get_attr`` node of the tensor registered at ``path``."""
        return self._insert("get_attr", path, (), None, before, after, like, path.replace(".", "_"))

    def set_args(self, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any] | None = None) -> None:
        """Give ``node`` other arguments; its shape, and those of its users, are propagated again."""
        node.args = tuple(args)
        if kwargs is not None:
            node.kwargs = kwargs
        self._reshaped.add(node)
        self._touched = True

    def set_values(self, values: Mapping[fx.Node, Any]) -> None:
        """Say what nodes produce where the pass knows it, so that it need not be inferred node by node."""
        for node, value in values.items():
            node.meta["val"] = value
        self._known.update(values)
        self._touched = True

    def retarget(self, node: fx.Node, target: Callable[..., Any], args: Sequence[Any]) -> None:
        """Let ``node`` call another operation; its shape is propagated again when the block is left."""
        node.target = target
        self.set_args(node, args, {})

    def replace(self, old: fx.Node, new: fx.Node, *, reshaped: bool = False) -> None:
        """Let every user of ``old`` read ``new`` instead (except ``new`` itself, which may be built on ``old``).

        Raises:
            GraphError: shape or dtype differ and ``reshaped`` was not given.
        """
        if not reshaped and not shapes.same_value(old.meta.get("val"), new.meta.get("val")):
            raise GraphError(
                f"replacing {old.name!r} by {new.name!r} would change its shape or dtype "
                f"from {_short(old)} to {_short(new)}",
                where=shapes.where(old),
                remedy="pass reshaped=True if that is meant",
            )
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        if reshaped:
            self._reshaped.update(new.users)
        self._touched = True

    def erase(self, node: fx.Node) -> None:
        """Remove a node that has no users left.

        Raises:
            GraphError: something reads it, or it is an input or the output.
        """
        if node.op in ("placeholder", "output"):
            raise GraphError(f"{node.name!r} is part of how the graph is called", where=shapes.where(node))
        if node.users:
            readers = ", ".join(repr(user.name) for user in node.users)
            raise GraphError(
                f"{node.name!r} is still read by {readers}", where=shapes.where(node), remedy="replace() it first"
            )
        self._reshaped.discard(node)
        self.graph.erase_node(node)
        self._touched = True

    # --- the end -----------------------------------------------------------------------------------------------

    def clean_up(self) -> None:
        """Drop what is unused, propagate shapes from what changed, lint and recompile. Runs on leaving the block."""
        graph_module = self.graph_module
        for node in reversed(self.graph.nodes):
            if not node.users and node.op in ("call_function", "call_module", "get_attr") and not is_effect(node):
                self._reshaped.discard(node)
                self.graph.erase_node(node)
        drop_unused_state(graph_module)
        shapes.propagate(graph_module, (self._reshaped | self._readers()) - self._known)
        self._reshaped.clear()
        self._rewritten.clear()
        self._known.clear()
        self._touched = False
        try:
            self.graph.lint()
        except RuntimeError as error:
            raise GraphError(
                f"the edited graph is not sound: {error}", remedy="insert nodes before the ones that read them"
            ) from error
        graph_module.recompile()

    # --- private -----------------------------------------------------------------------------------------------

    def _readers(self) -> set[fx.Node]:
        """Nodes that call or read something that was replaced; one scan, however much was."""
        if not self._rewritten:
            return set()
        layers = self._rewritten | {path.rpartition(".")[0] for path in self._rewritten}
        return {
            node
            for node in self.graph.nodes
            if (node.op == "call_module" and node.target in layers)
            or (node.op == "get_attr" and node.target in self._rewritten)
        }

    def _insert(
        self,
        op: str,
        target: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any] | None,
        before: fx.Node | None,
        after: fx.Node | None,
        like: fx.Node | None,
        name: str | None,
    ) -> fx.Node:
        if (before is None) == (after is None):
            raise ValueError("give exactly one of before= and after=")
        point = self.graph.inserting_before(before) if before is not None else self.graph.inserting_after(after)
        with point:
            node = self.graph.create_node(op, target, tuple(args), kwargs or {}, name=name)
        source = like or before or after
        assert source is not None
        node.meta = {key: source.meta[key] for key in _KEPT_META if key in source.meta}
        node.meta["val"] = shapes.infer(self.graph_module, node)
        self._touched = True
        return node

    def _free_path(self, hint: str) -> str:
        if self._under_no_module(hint):
            hint = hint.replace(".", "_")
        path, count = hint, 0
        while self._taken(path):
            count += 1
            path = f"{hint}_{count}"
        return path

    def _taken(self, path: str) -> bool:
        owner: Any = self.graph_module
        for part in path.split("."):
            if not hasattr(owner, part):
                return False
            owner = getattr(owner, part)
        return True

    def _under_no_module(self, path: str) -> bool:
        """Whether the way to ``path`` leads through a tensor or an attribute: ``gain.inner``, ``graph.inner``."""
        owner: nn.Module = self.graph_module
        for part in path.split(".")[:-1]:
            child = owner._modules.get(part)
            if child is None:
                return hasattr(owner, part)
            owner = child
        return False

    def _owner(self, path: str) -> nn.Module:
        owner: nn.Module = self.graph_module
        for part in path.split(".")[:-1]:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            child = owner._modules[part]
            assert child is not None
            owner = child
        return owner


def is_effect(node: fx.Node) -> bool:
    """Whether a node must stay although nobody reads it. Between passes graphs are functional: none must."""
    return node.op in ("placeholder", "output")


def drop_unused_state(graph_module: fx.GraphModule) -> None:
    """Remove layers, parameters and buffers that no node refers to, and containers left empty. One walk."""
    called = {str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"}
    read = {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}

    def prune(module: nn.Module, prefix: str) -> bool:
        for name, child in list(module._modules.items()):
            path = f"{prefix}{name}"
            if path in called:
                continue
            if child is None or not prune(child, path + "."):
                del module._modules[name]
        for store in (module._parameters, module._buffers):
            for name in [name for name in store if f"{prefix}{name}" not in read]:
                del store[name]
                module._non_persistent_buffers_set.discard(name)
        return bool(module._modules or module._parameters or module._buffers)

    prune(graph_module, "")
    facts = info(graph_module)
    if facts.original_names:
        alive = set(_tensor_paths(graph_module))
        facts.original_names = {own: theirs for own, theirs in facts.original_names.items() if own in alive}


def _tensor_paths(graph_module: fx.GraphModule) -> Iterable[str]:
    for name, _ in graph_module.named_parameters(remove_duplicate=False):
        yield name
    for name, _ in graph_module.named_buffers(remove_duplicate=False):
        yield name


def _short(node: fx.Node) -> str:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return repr(value)
