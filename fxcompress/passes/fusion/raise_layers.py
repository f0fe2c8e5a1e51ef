"""Operations whose weights have become constants are layers again.

conv2d(x, weight, bias)  ⇒  layer(x)

After constants are folded, a convolution with standardised weights reads plain parameters, as one that the model called
by ``F.conv2d`` does; capture made a layer of that, and the same rules make one of this. The layer goes where the
user's model has it, when nothing else lives there any more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from fxcompress.capture.layers import RULES, Layer
from fxcompress.capture.raising import call_arguments
from fxcompress.graph.edit import GraphEditor
from fxcompress.passes.base import Rewrite, Skip
from fxcompress.passes.fusion.base import Rule, Site
from fxcompress.passes.fusion.facts import Facts

__all__ = ["RaiseLayers"]


@dataclass(frozen=True)
class LayerSite(Site):
    """A call that becomes a layer, the layer's tensors, and its path; ``vacant`` when a container there gives way."""

    tensors: dict[str, torch.Tensor]
    path: str
    vacant: bool


class RaiseLayers(Rule[LayerSite]):
    """See the module's text."""

    name: ClassVar[str] = "raise_layers"

    def match(self, facts: Facts) -> Iterator[LayerSite | Skip]:
        claimed: set[str] = set()
        for node in facts.nodes:
            if node.op == "call_function" and node.target in RULES:
                found = self._match(facts, node, claimed)
                if found is not None:
                    claimed.add(found.path)
                    yield found

    def _match(self, facts: Facts, node: fx.Node, claimed: set[str]) -> LayerSite | None:
        arguments = call_arguments(node)
        held = [arguments.get(name) for name in ("weight", "bias", "running_mean", "running_var")]
        read = [facts.constant(item) for item in held if item is not None]
        if arguments.get("weight") is None or any(tensor is None for tensor in read):
            return None  # its weights are computed from the input
        if not any(isinstance(tensor, nn.Parameter) for tensor in read):
            return None  # a fixed kernel: nothing to learn
        layer = RULES[node.target](arguments)
        if layer is None or layer.nested_state:
            return None  # capture found no layer for such a call either
        tensors = {own: facts.constant(item) for own, item in layer.tensors.items()}
        path, vacant = _place(facts, node, layer)
        given = {own: tensor for own, tensor in tensors.items() if tensor is not None}
        return LayerSite(node.name, (node,), given, path, vacant and path not in claimed)

    def rewrite(self, editor: GraphEditor, site: LayerSite) -> Rewrite:
        (node,) = site.nodes
        rule: Any = RULES[node.target]
        layer = rule(call_arguments(node))  # afresh, for its input may have become a layer too
        module = layer.module
        for own, tensor in site.tensors.items():
            if own in module._buffers:
                module._buffers[own] = tensor
            else:
                learned = isinstance(tensor, nn.Parameter)
                module._parameters[own] = tensor if learned else nn.Parameter(tensor, requires_grad=False)
        if getattr(module, "num_batches_tracked", None) is not None:
            module.num_batches_tracked = torch.zeros((), dtype=torch.long)
        path = site.path
        if site.vacant:
            editor.set_module(path, module)
        else:
            path = editor.add_module(path, module)
        editor.replace(node, editor.insert_module(path, layer.inputs, before=node, like=node))
        detail = {"rule": self.name, "layers": [path], "kind": type(module).__name__}
        return Rewrite(site.name, f"became the layer {path}", detail)


def _place(facts: Facts, node: fx.Node, layer: Layer) -> tuple[str, bool]:
    """Where the layer goes: where the user's model calls it, else beside its weight; and whether that is vacant."""
    stack: Any = node.meta.get("nn_module_stack") or {}
    scope = str(next(reversed(list(stack.values())), ("",))[0]).split("@")[0]
    if scope and _vacant(facts, scope, node):
        return scope, True
    own, held = next(iter(layer.tensors.items()))
    owner, _, last = str(held.target).rpartition(".")
    if last == own:
        return (owner, _vacant(facts, owner, node)) if owner else (layer.kind, False)
    name = last.removesuffix(f"_{own}") if last.endswith(f"_{own}") else f"{last}_{layer.kind}"
    return f"{owner}.{name}".lstrip("."), False


def _vacant(facts: Facts, path: str, node: fx.Node) -> bool:
    """Whether ``path`` is a container of nothing but tensors that ``node`` alone reads."""
    try:
        container = facts.graph_module.get_submodule(path)
    except AttributeError:
        return False
    for name, module in container.named_modules(prefix=path):
        if name in facts.calls or type(module) is not nn.Module:
            return False
    for store in (container.named_parameters(path), container.named_buffers(path)):
        for name, _ in store:
            if any(set(reader.users) != {node} for reader in facts.readers(name)):
                return False
    return True
