"""Rules of operations that act on each element, and of reductions."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxcompress.analysis.dependency.builder import Builder, Rule
from fxcompress.analysis.dependency.layout import Dim, Layout, inert, is_live, size_of
from fxcompress.capture.raising import call_arguments

__all__ = ["RULES"]

aten = torch.ops.aten


def pointwise(b: Builder, node: fx.Node) -> Layout:
    """Every tensor argument is broadcast against the others; equal dimensions lose equal indices."""
    layouts = [b.layout(source) for source in node.all_input_nodes if isinstance(source.meta.get("val"), torch.Tensor)]
    return broadcast(b, node, layouts, len(node.meta["val"].shape))


def broadcast(b: Builder, node: fx.Node, layouts: list[Layout], rank: int) -> Layout:
    """The layout of a broadcast of ``layouts`` to ``rank`` dimensions."""
    result: list[Dim] = []
    padded = [(inert(1),) * (rank - len(layout)) + tuple(layout) for layout in layouts]
    for dims in zip(*padded, strict=True):
        full = [dim for dim in dims if size_of(dim) != 1]
        if not full:
            result.append(next((dim for dim in dims if is_live(dim)), dims[0]))
            continue
        for other in full[1:]:
            b.align(full[0], other, node.name)
        result.append(next((dim for dim in full if is_live(dim)), full[0]))
    return tuple(result)


def _like(b: Builder, node: fx.Node) -> Layout:
    return b.layout(node.args[0])


def _reduction(b: Builder, node: fx.Node) -> Any:
    """Sums and means over what stays whole; over what could shrink they are barriers."""
    a = call_arguments(node)
    source = a.get("self", a.get("input"))
    layout = b.layout(source)
    given = a.get("dim")
    dims = (
        range(len(layout)) if given is None or given == [] else given if isinstance(given, (list, tuple)) else [given]
    )
    reduced = {int(d) % len(layout) for d in dims} if layout else set()
    live = [layout[d] for d in reduced if is_live(layout[d])]
    if live:
        b.barrier(node, f"{_name(node)} over removable channels would change with their number", live)
    keep = bool(a.get("keepdim", False))
    shape = tuple(
        inert(1) if index in reduced else dim for index, dim in enumerate(layout) if keep or index not in reduced
    )
    value = node.meta["val"]
    return [shape] * len(value) if isinstance(value, (tuple, list)) else shape


def _along(b: Builder, node: fx.Node) -> Layout:
    """softmax, cumsum, sort …: the result at an index depends on the others along the dimension."""
    a = call_arguments(node)
    layout = b.layout(a.get("self", a.get("input")))
    dim = layout[int(a["dim"]) % len(layout)]
    if is_live(dim):
        b.barrier(node, f"{_name(node)} over channels depends on all of them", [dim])
    return layout


def _glu(b: Builder, node: fx.Node) -> Layout:
    a = call_arguments(node)
    layout = list(b.layout(a["self"]))
    dim = int(a["dim"]) % len(layout)
    if is_live(layout[dim]):
        found = b.vector_or_pinned(layout[dim], node)
        assert found is not None
        half = len(found) // 2
        b.labels.unify(found[:half], found[half:])
        from fxcompress.analysis.dependency.layout import labelled

        layout[dim] = labelled(found[:half])
    else:
        layout[dim] = inert(node.meta["val"].shape[dim])
    return tuple(layout)


def spatial(count: int) -> Rule:
    """Pooling and resizing: the last ``count`` dimensions change size and must stay whole, the others pass."""

    def rule(b: Builder, node: fx.Node) -> Any:
        layout = b.layout(node.args[0])
        live = [dim for dim in layout[-count:] if is_live(dim)]
        if live:
            b.barrier(node, f"{_name(node)} works across these dimensions", live)

        def made(value: torch.Tensor) -> Layout:
            return (*layout[:-count], *(inert(size) for size in value.shape[-count:]))

        value = node.meta["val"]
        return [made(item) for item in value] if isinstance(value, (tuple, list)) else made(value)

    return rule


def _fresh_constant(b: Builder, node: fx.Node) -> Any:
    value = node.meta["val"]
    return tuple(inert(size) for size in value.shape) if isinstance(value, torch.Tensor) else None


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "_opname", node.target))


_POINTWISE = """
    abs neg exp expm1 log log1p log2 sqrt rsqrt reciprocal sin cos tan tanh sinh cosh atan erf erfc floor ceil round
    trunc sign sigmoid relu relu6 gelu silu mish elu selu celu softplus softsign hardtanh hardswish hardsigmoid
    hardshrink softshrink tanhshrink leaky_relu threshold log_sigmoid logical_not bitwise_not isnan isinf isfinite
    clone detach contiguous to _to_copy alias positive dropout type_as lift_fresh nan_to_num square logit frac
    add sub rsub mul div true_divide floor_divide remainder fmod pow maximum minimum max min clamp clamp_min clamp_max
    eq ne lt le gt ge logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor where masked_fill lerp
    addcmul addcdiv atan2 float_power copysign hypot xlogy special_expit special_erf fill zeros_like ones_like full_like
    rand_like randn_like empty_like __and__ __or__ __xor__
"""
_ALONG = "softmax log_softmax _softmax cumsum cumprod logcumsumexp"
_REDUCTIONS = (
    "sum mean var std amax amin prod logsumexp any all argmax argmin norm linalg_vector_norm var_mean std_mean"
)


def _overloads(names: str) -> list[Any]:
    found = []
    for name in names.split():
        packet = getattr(aten, name, None)
        if packet is not None:
            found += [getattr(packet, overload) for overload in packet.overloads()]
    return [overload for overload in found if not overload._schema.is_mutable and "out" not in overload._overloadname]


def _is_reduction_overload(overload: Any) -> bool:
    names = {argument.name for argument in overload._schema.arguments}
    return not names & {"other"}


RULES: dict[Any, Rule] = {
    **dict.fromkeys(_overloads(_POINTWISE), pointwise),
    **dict.fromkeys(_overloads(_ALONG), _along),
    **dict.fromkeys([o for o in _overloads(_REDUCTIONS) if _is_reduction_overload(o)], _reduction),
    # max.dim and min.dim are reductions; max.other and min.other are not.
    aten.max.dim: _reduction,
    aten.min.dim: _reduction,
    aten.max.default: _reduction,
    aten.min.default: _reduction,
    aten.glu.default: _glu,
    **dict.fromkeys(
        _overloads(
            "max_pool1d avg_pool1d adaptive_avg_pool1d upsample_nearest1d upsample_linear1d max_pool1d_with_indices "
            "_upsample_nearest_exact1d"
        ),
        spatial(1),
    ),
    **dict.fromkeys(
        _overloads(
            "max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d max_pool2d_with_indices upsample_nearest2d "
            "upsample_bilinear2d upsample_bicubic2d _upsample_nearest_exact2d reflection_pad2d replication_pad2d "
            "_upsample_bilinear2d_aa _upsample_bicubic2d_aa lp_pool2d"
        ),
        spatial(2),
    ),
    **dict.fromkeys(
        _overloads(
            "max_pool3d avg_pool3d adaptive_avg_pool3d adaptive_max_pool3d upsample_nearest3d upsample_trilinear3d"
        ),
        spatial(3),
    ),
    **dict.fromkeys(
        _overloads("zeros ones full arange empty linspace scalar_tensor eye new_zeros new_ones new_full new_empty"),
        _fresh_constant,
    ),
}
