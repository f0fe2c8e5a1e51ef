"""The path that a raised layer goes by: where the user's model calls it, else where its weight lives."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx, nn

from fxcompress.capture.flatten import Flat
from fxcompress.capture.layers import Layer

__all__ = ["Namer"]


class Namer:
    """Finds the path a layer goes by: where the user's model calls it, else where its weight lives."""

    def __init__(self, flat: Flat, model: nn.Module | None) -> None:
        self._modules = dict(model.named_modules(remove_duplicate=False)) if model is not None else {}
        self._tensor_names = set(flat.tensors)
        self._flat = flat
        self.state: Mapping[str, torch.Tensor] = {}
        if model is not None:
            self.state = {
                **dict(model.named_parameters(remove_duplicate=False)),
                **dict(model.named_buffers(remove_duplicate=False)),
            }

    def module(self, path: str) -> nn.Module | None:
        """The user's module at ``path``."""
        return self._modules.get(path)

    def scope(self, node: fx.Node) -> str:
        """Path of the innermost user's module that made ``node``; dropouts without weights are told apart by it."""
        stack = node.meta.get("nn_module_stack") or {}
        last = next(reversed(list(stack.values())), ("", None))[0]
        return str(last).split("@")[0]

    def path(self, node: fx.Node, layer: Layer, taken: Mapping[str, nn.Module]) -> str:
        """A free path for a new layer."""
        scope = self.scope(node)
        weights = list(layer.tensors.items())
        if not weights:
            theirs = self.module(scope)
            leaf = theirs is not None and scope and not list(theirs.children())
            hint = scope if leaf else f"{scope}.{layer.kind}".lstrip(".")
        else:
            own, held = weights[0]
            name = str(held.target)
            mine = self.state.get(f"{scope}.{own}" if scope else own)
            owner, _, last = name.rpartition(".")
            if scope and mine is not None and mine is self._flat.tensors[name]:
                hint = scope
            elif last == own and owner:
                hint = owner
            elif last.endswith(f"_{own}"):
                hint = f"{owner}.{last[: -len(own) - 1]}".lstrip(".")
            else:
                hint = f"{owner}.{last}_{layer.kind}".lstrip(".") if last != own else layer.kind
        return self._free(hint, taken)

    def _free(self, hint: str, taken: Mapping[str, nn.Module]) -> str:
        path, count = hint, 0
        while path in taken or path in self._tensor_names:
            count += 1
            path = f"{hint}_{count}"
        return path
