"""From a node of the ONNX file back to the PyTorch layer and the user's line that made it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import fx

from fxcompress.backends.tensorrt_graph import layer_of
from fxcompress.graph.shapes import source_line

__all__ = ["Origins"]


class Origins:
    """Layers by the names that ONNX nodes got from them.

    Args:
        graph_module: the captured graph that was lowered; None where only the names are known.
        node_names: of the ONNX nodes, in order.
    """

    def __init__(self, graph_module: fx.GraphModule | None, node_names: Sequence[str] = ()) -> None:
        self._graph_module = graph_module
        self._names = list(node_names)
        self._nodes: dict[str, list[fx.Node]] = {}
        for node in graph_module.graph.nodes if graph_module is not None else ():
            if node.op == "call_module":
                self._nodes.setdefault(str(node.target), []).append(node)
            elif node.op == "call_function":
                self._nodes.setdefault(_scope(node), []).append(node)

    def name_at(self, index: int, op: str) -> str:
        """The name of the ONNX node at ``index``; empty if there is none, or one of another operator.

        Of a node inside a loop or a branch the parser tells the index there.
        """
        name = self._names[index] if 0 <= index < len(self._names) else ""
        return name if _op_of(name) == op else ""

    def named_after(self, op: str) -> list[str]:
        """The names of all ONNX nodes of an operator."""
        return [name for name in self._names if op and _op_of(name) == op]

    def named_in(self, text: str) -> str:
        """The longest name of an ONNX node that ``text`` has in it; empty if it has none."""
        found = [name for name in self._names if name and name in text]
        whole = [name for name in found if re.search(rf"(?<![\w./]){re.escape(name)}(?![\w/])", text)]
        return max(whole or found, key=len, default="")

    def tell(self, node_name: str, op: str = "") -> str:
        """Where an ONNX node came from: ``"layer 'layer1.0.conv1' (Conv2d), model.py:12 in forward: …"``."""
        layer = layer_of(node_name)
        nodes = self._nodes.get(layer, [])
        if not layer:  # what a decomposition made carries no module's name
            nodes = [node for under in self._nodes.values() for node in under if _alike(node, op)]
        elif len(nodes) > 1:
            nodes = [node for node in nodes if _alike(node, op)] or nodes
        line = source_line(nodes[0]) if len({source_line(node) for node in nodes}) == 1 else None
        kind = self._kind(layer) if layer else ""
        told = f"layer {layer!r}{f' ({kind})' if kind else ''}" if layer else "no layer of its own"
        return f"{told}, {line}" if line else told

    def tell_all(self, node_names: Iterable[str]) -> str:
        """Several nodes' origins, each once."""
        return "; ".join(dict.fromkeys(self.tell(name) for name in node_names))

    def _kind(self, layer: str) -> str:
        if self._graph_module is None:
            return ""
        try:
            return type(self._graph_module.get_submodule(layer)).__name__
        except AttributeError:
            return ""  # a module that only held others, or a function under its name


def _op_of(name: str) -> str:
    """The operator in a node's name: ``layer1/Conv_2``."""
    return re.sub(r"_\d+$", "", name.rpartition("/")[2])


def _scope(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    scope = str(next(reversed(stack.values()), ("", None))[0]).partition("@")[0] if stack else ""
    return "" if scope.startswith("_empty_nn_module_stack") else scope


def _alike(node: fx.Node, op: str) -> bool:
    """Whether an ATen operator and one of ONNX are called alike: ``aten.linalg_det`` and ``Det``."""
    name = str(getattr(node.target, "__name__", node.target)).partition(".")[0].lower().replace("_", "")
    return bool(op) and (op.lower() in name or name in op.lower())
