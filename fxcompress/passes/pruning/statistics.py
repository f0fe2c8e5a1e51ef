"""Statistics over channels, kept as they were: a mean goes on dividing by the number of channels that there were.

With ``N`` channels of which ``k`` stay and the others are zero,

    mean = mean_k · k/N        var = (Σ_k (x−m)² + (N−k)·m²) / (N−c),   m = Σ_k x / N

and an RMS norm is itself with ``eps·N/k``, times ``√(N/k)``. The maximum of what stays and of the zeros that were
there is ``max(max_k, 0)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxcompress.analysis.dependency.layout import blocks, size_of
from fxcompress.analysis.dependency.norms import of_batch, over
from fxcompress.analysis.dependency.overloads import overloads
from fxcompress.analysis.dependency.reductions import reduced_dims
from fxcompress.analysis.dependency.removal import Removal
from fxcompress.capture.raising import call_arguments
from fxcompress.graph.edit import GraphEditor

__all__ = ["RULES"]

aten = torch.ops.aten


def _source(node: fx.Node) -> fx.Node:
    a = call_arguments(node)
    source = a.get("self", a.get("input"))
    assert isinstance(source, fx.Node)
    return source


def _share(node: fx.Node, removal: Removal) -> float:
    """Which part of what is reduced stays."""
    layout = removal.builder.values[_source(node)]
    share = 1.0
    for place in reduced_dims(node, len(layout)):
        for block in blocks(layout[place]):
            gone = removal.removed[block.labels]
            share *= float((~gone).sum()) / gone.size
    return share


def _scaled(node: fx.Node, factor: float, removal: Removal, editor: GraphEditor) -> None:
    made = editor.insert_call(aten.mul.Tensor, (node, factor), after=node, like=node)
    removal.builder.values[made] = removal.builder.values[node]
    editor.replace(node, made)


def _mean(node: fx.Node, removal: Removal, editor: GraphEditor) -> None:
    share = _share(node, removal)
    if share != 1:
        _scaled(node, share, removal, editor)


def _variance(node: fx.Node, removal: Removal, editor: GraphEditor) -> None:
    """var, std and their like with means, spelled out."""
    share = _share(node, removal)
    if share == 1:
        return
    a = call_arguments(node)
    source = _source(node)
    layout = removal.builder.values[source]
    dims = reduced_dims(node, len(layout))
    total = math.prod(int(size_of(layout[place])) for place in dims)
    left = round(total * share)
    kind = str(node.target._opname)  # type: ignore[union-attr]
    keep = bool(a.get("keepdim", False))

    call = _calls(node, editor)
    mean, _, made = _moments(call, source, dims, (total, left), _correction(a))
    if "std" in kind:
        made = call(aten.sqrt.default, made)
    results = [made, mean] if kind.endswith("_mean") else [made]
    if not keep:
        results = [call(aten.squeeze.dims, item, dims) for item in results]
    if len(results) == 1:
        editor.replace(node, results[0])
        return
    for user in list(node.users):
        editor.replace(user, results[int(user.args[1])])  # type: ignore[arg-type]


def _calls(node: fx.Node, editor: GraphEditor) -> Callable[..., fx.Node]:
    """Inserts calls before ``node``."""

    def call(target: Any, *args: Any) -> fx.Node:
        made = editor.insert_call(target, args, before=node, like=node)
        editor.set_args(made, made.args)  # what it reads is about to shrink
        return made

    return call


def _moments(
    call: Callable[..., fx.Node], source: fx.Node, dims: list[int], counts: tuple[int, int], correction: float
) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Mean, deviations and variance over ``dims``, kept, of which ``counts`` are how many there were and are left."""
    total, left = counts
    mean = call(aten.mul.Tensor, call(aten.sum.dim_IntList, source, dims, True), 1.0 / total)
    centred = call(aten.sub.Tensor, source, mean)
    squares = call(aten.sum.dim_IntList, call(aten.mul.Tensor, centred, centred), dims, True)
    missing = call(aten.mul.Tensor, call(aten.mul.Tensor, mean, mean), float(total - left))
    variance = call(aten.mul.Tensor, call(aten.add.Tensor, squares, missing), 1.0 / (total - correction))
    return mean, centred, variance


def _standardized(node: fx.Node, removal: Removal, editor: GraphEditor) -> None:
    """batch_norm and instance_norm by the statistics of what they are given (standardised weights), spelled out."""
    layout = removal.builder.values[_source(node)]
    dims = list(over(node)) if of_batch(node) else []
    if not any(removal.touches(layout[place]) for place in dims):
        return
    a, call = call_arguments(node), _calls(node, editor)
    total = math.prod(int(size_of(layout[place])) for place in dims)
    left = math.prod(int(removal.kept(layout[place])) for place in dims)
    _, centred, variance = _moments(call, _source(node), dims, (total, left), 0.0)
    made = call(aten.mul.Tensor, centred, call(aten.rsqrt.default, call(aten.add.Tensor, variance, float(a["eps"]))))
    for name, target in (("weight", aten.mul.Tensor), ("bias", aten.add.Tensor)):
        if isinstance(a.get(name), fx.Node):
            shape = [1, -1, *[1] * (len(layout) - 2)]
            made = call(target, made, call(aten.reshape.default, a[name], shape))
    editor.replace(node, made)


def _extreme(node: fx.Node, removal: Removal, editor: GraphEditor) -> None:
    """max, min and their like; removed channels were zeros among the others."""
    if _share(node, removal) == 1:
        return
    kind = str(node.target._opname)  # type: ignore[union-attr]
    results = [("min" in kind, node)]
    if isinstance(node.meta["val"], (tuple, list)):
        both = kind == "aminmax"
        results = [(bool(user.args[1] == 0) if both else "min" in kind, user) for user in node.users]
    for least, result in results:
        clamp = aten.clamp_max.default if least else aten.clamp_min.default
        made = editor.insert_call(clamp, (result, 0), after=result, like=result)
        removal.builder.values[made] = removal.builder.values[result]
        editor.replace(result, made)


def _correction(arguments: dict[str, Any]) -> float:
    if arguments.get("correction") is not None:
        return float(arguments["correction"])
    return 1.0 if arguments.get("unbiased", True) else 0.0


def _normalized(node: fx.Node, removal: Removal, editor: GraphEditor) -> None:
    """layer_norm and rms_norm without a layer: the shape is an argument; an RMS norm can be put right."""
    a = call_arguments(node)
    layout = removal.builder.values[_source(node)]
    count = len(a["normalized_shape"])
    if not any(removal.touches(dim) for dim in layout[-count:]):
        return
    a["normalized_shape"] = [int(removal.kept(dim)) for dim in layout[-count:]]
    if node.target is aten.rms_norm.default:
        total = int(size_of(layout[-1]))
        share = a["normalized_shape"][-1] / total
        eps = a["eps"] if a["eps"] is not None else torch.finfo(node.meta["val"].dtype).eps
        a["eps"] = eps / share
        editor.set_args(node, list(a.values()), {})
        _scaled(node, math.sqrt(1 / share), removal, editor)
        return
    editor.set_args(node, list(a.values()), {})


RULES: dict[Any, Any] = {
    **dict.fromkeys(overloads("mean"), _mean),
    **dict.fromkeys(overloads("var std var_mean std_mean"), _variance),
    **dict.fromkeys(
        (o for o in overloads("amax amin max min aminmax") if "other" not in {x.name for x in o._schema.arguments}),
        _extreme,
    ),
    aten.batch_norm.default: _standardized,
    aten.instance_norm.default: _standardized,
    aten.layer_norm.default: _normalized,
    aten.rms_norm.default: _normalized,
}
