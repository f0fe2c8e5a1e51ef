"""Which layers a quantizing pass may touch, as its options say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import fx, nn

from fxcompress.errors import OptionError, PreconditionError, nearest
from fxcompress.quantization.layers import QUANTIZED

__all__ = ["ignored_by", "linear_sites"]

_KINDS = {cls.__name__: cls for cls in QUANTIZED}


def ignored_by(
    graph_module: fx.GraphModule, ignore: Sequence[str], kinds: Sequence[str], ends: str
) -> Callable[[str], str | None]:
    """A function that says why the layer at a path stays in floating point, or None.

    Args:
        graph_module: with the layers.
        ignore: name patterns.
        kinds: class names: ``"Linear"``.
        ends: ``"quantize"``, or ``"float"`` for the first and the last layer.

    Raises:
        OptionError: a pattern matches no layer, or a kind is none that can be quantized.
    """
    candidates = {**_KINDS, **{cls.__name__: cls for cls in QUANTIZED.values()}}
    names = {cls: name for name, cls in candidates.items()}
    paths = [
        path
        for path in dict.fromkeys(str(node.target) for node in graph_module.graph.find_nodes(op="call_module"))
        if type(graph_module.get_submodule(path)) in names
    ]
    for pattern in ignore:
        if not any(fnmatchcase(path, pattern) for path in paths):
            raise OptionError(
                f"no layer that could be quantized matches {pattern!r}", where="ignore", remedy=nearest(pattern, paths)
            )
    for kind in kinds:
        if kind not in _KINDS:
            raise OptionError(f"{kind!r} is no kind of layer", where="ignore_kinds", remedy=nearest(kind, _KINDS))
    edge = {paths[0], paths[-1]} if ends == "float" and paths else set()

    def reason(path: str) -> str | None:
        if any(fnmatchcase(path, pattern) for pattern in ignore):
            return "it matches a pattern of ignore"
        if any(type(graph_module.get_submodule(path)) is _KINDS[kind] for kind in kinds):
            return "its kind is in ignore_kinds"
        return "it is the first or last layer" if path in edge else None

    return reason


def linear_sites(
    graph_module: fx.GraphModule, ignore: Sequence[str], others: Sequence[str] = ()
) -> tuple[dict[str, list[str]], dict[str, tuple[str, str]]]:
    """Linear layers whose weight may be stored as integers.

    Args:
        graph_module: with the layers.
        ignore: name patterns of those that stay.
        others: paths of layers of other kinds that the patterns may be meant for.

    Returns:
        path → names of the nodes that call it; and of what is left, path → code and reason.

    Raises:
        OptionError: a pattern matches no linear layer.
        PreconditionError: a weight is not finite.
    """
    calls: dict[str, list[str]] = {}
    held: dict[int, int] = {}
    for _, parameter in graph_module.named_parameters(remove_duplicate=False):
        held[id(parameter)] = held.get(id(parameter), 0) + 1
    for node in graph_module.graph.find_nodes(op="call_module"):
        if type(graph_module.get_submodule(str(node.target))) is nn.Linear:
            calls.setdefault(str(node.target), []).append(node.name)
    for pattern in ignore:
        if not any(fnmatchcase(path, pattern) for path in (*calls, *others)):
            raise OptionError(f"no linear layer matches {pattern!r}", where="ignore", remedy=nearest(pattern, calls))
    left: dict[str, tuple[str, str]] = {}
    for path in calls:
        weight: Any = graph_module.get_submodule(path).weight
        if any(fnmatchcase(path, pattern) for pattern in ignore):
            left[path] = ("ignored", "it matches a pattern of ignore")
        elif held[id(weight)] > 1:
            left[path] = ("tied_weight", "its weight is tied to another layer's")
        elif weight.dtype != torch.float32:
            left[path] = ("dtype", "it does not compute in float32")
        elif not bool(torch.isfinite(weight).all()):
            raise PreconditionError("the weight is not finite", where=path, remedy="repair the checkpoint")
    return {path: names for path, names in calls.items() if path not in left}, left
