"""Which layers a quantizing pass may touch, as its options say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from torch import fx

from fxcompress.errors import OptionError, nearest
from fxcompress.quantization.layers import QUANTIZED

__all__ = ["ignored_by"]

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
