"""Rules of operations that act on each element, or along a dimension that keeps its size."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxcompress.analysis.dependency.builder import Builder, Rule
from fxcompress.analysis.dependency.layout import Dim, Layout, dirtied, inert, is_live, labelled
from fxcompress.analysis.dependency.overloads import overloads
from fxcompress.analysis.dependency.zeros import Rule as ZeroRule
from fxcompress.analysis.dependency.zeros import combine, every, name, operands, require_zero, run_on_zeros
from fxcompress.capture.raising import call_arguments

__all__ = ["RULES", "broadcast", "spatial"]

aten = torch.ops.aten


def pointwise(b: Builder, node: fx.Node) -> Layout:
    """Every tensor argument is broadcast against the others; equal dimensions lose equal indices."""
    layouts = [b.layout(source) for source in operands(node)]
    return broadcast(b, node, layouts, len(node.meta["val"].shape), run_on_zeros(b, node))


def broadcast(b: Builder, node: fx.Node, layouts: list[Layout], rank: int, rule: ZeroRule = every) -> Layout:
    """The layout of a broadcast of ``layouts`` to ``rank`` dimensions."""
    padded = [(inert(1),) * (rank - len(layout)) + tuple(layout) for layout in layouts]
    return tuple(combine(b, node, dims, rule) for dims in zip(*padded, strict=True))


def _like(b: Builder, node: fx.Node) -> Layout:
    """The first argument with the type or device of another."""
    return b.layout(node.args[0])


_LEAVES_ZERO = {"cumsum", "cumprod", "triu", "tril"}


def _along(b: Builder, node: fx.Node) -> Layout:
    """softmax, cumprod, sort …: the result at an index depends on the others along the dimension."""
    a = call_arguments(node)
    layout = list(b.layout(a.get("self", a.get("input"))))
    place = int(a["dim"]) % len(layout) if layout else 0
    if name(node) == "cumsum" and is_live(layout[place]):
        require_zero(b, node, [layout[place]], "cumsum runs over channels that would not be zero if they were removed")
        layout[place] = dirtied(layout[place])
    elif layout and is_live(layout[place]):
        b.barrier(node, f"{name(node)} over channels depends on all of them", [layout[place]])
    if name(node) not in _LEAVES_ZERO:
        layout = [dirtied(dim) for dim in layout]
    return tuple(layout)


def _triangle(b: Builder, node: fx.Node) -> Layout:
    layout = b.layout(node.args[0])
    live = [dim for dim in layout[-2:] if is_live(dim)]
    if live:
        b.barrier(node, f"{name(node)} cuts by the position of a channel", live)
    return layout


def _glu(b: Builder, node: fx.Node) -> Layout:
    a = call_arguments(node)
    layout = list(b.layout(a["self"]))
    dim = int(a["dim"]) % len(layout)
    size = node.meta["val"].shape[dim]
    found = b.spread_or_pinned(layout[dim], node) if is_live(layout[dim]) else None
    if found is None:
        layout[dim] = inert(size)
        return tuple(layout)
    labels, dirt = found
    half = len(labels) // 2
    b.labels.unify(labels[:half], labels[half:])
    layout[dim] = labelled(labels[:half], dirt[:half])
    return tuple(layout)


def spatial(count: int) -> Rule:
    """Pooling and resizing: the last ``count`` dimensions change size and must stay whole, the others pass."""

    def rule(b: Builder, node: fx.Node) -> Any:
        layout = b.layout(node.args[0])
        live = [dim for dim in layout[-count:] if is_live(dim)]
        if live:
            b.barrier(node, f"{name(node)} works across these dimensions", live)

        def made(value: torch.Tensor) -> Layout:
            return (*layout[:-count], *(inert(size) for size in value.shape[-count:]))

        value = node.meta["val"]
        return [made(item) for item in value] if isinstance(value, (tuple, list)) else made(value)

    return rule


def _uniform(b: Builder, node: fx.Node) -> Any:
    """A tensor of one number: it can be made in any size."""
    dirty = "zeros" not in name(node)

    def soft(size: Any) -> Dim:
        if not isinstance(size, int) or size == 1:
            return inert(size)
        return labelled(b.labels.fresh((size,)), dirty, soft=True)

    return tuple(soft(size) for size in node.meta["val"].shape)


def _fixed(b: Builder, node: fx.Node) -> Any:
    return tuple(inert(size) for size in node.meta["val"].shape)


def _topk(b: Builder, node: fx.Node) -> Any:
    """Topk, sort, kthvalue, cummax: of the dimension, every index matters; what is picked has another size."""
    a = call_arguments(node)
    layout = list(b.layout(a["self"]))
    place = int(a["dim"]) % len(layout) if layout else 0
    if layout and is_live(layout[place]):
        b.barrier(node, f"{name(node)} compares channels with each other", [layout[place]])
    values = node.meta["val"]
    if name(node) == "kthvalue" and not a["keepdim"]:
        return [tuple(map(dirtied, [*layout[:place], *layout[place + 1 :]]))] * len(values)
    layout = [
        inert(values[0].shape[place]) if index == place and not is_live(dim) else dirtied(dim)
        for index, dim in enumerate(layout)
    ]
    if layout and is_live(layout[place]):
        layout[place] = inert(values[0].shape[place])
    return [tuple(layout)] * len(values)


_POINTWISE = """
    abs neg negative exp exp2 expm1 log log10 log1p log2 sqrt rsqrt reciprocal sin cos tan tanh sinh cosh asin acos
    atan arctan asinh acosh atanh erf erfc erfinv floor ceil round trunc fix sign sgn sigmoid relu relu6 gelu silu mish
    elu selu celu softplus softsign hardtanh hardswish hardsigmoid hardshrink softshrink tanhshrink leaky_relu threshold
    log_sigmoid logical_not bitwise_not isnan isinf isfinite clone detach contiguous to _to_copy alias positive dropout
    lift_fresh nan_to_num square logit frac sinc lgamma digamma absolute deg2rad rad2deg signbit
    add sub subtract rsub mul multiply div divide true_divide floor_divide remainder fmod pow maximum minimum fmax fmin
    max min clamp clip clamp_min clamp_max eq ne lt le gt ge less less_equal greater greater_equal not_equal
    logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor where masked_fill lerp
    addcmul addcdiv atan2 arctan2 float_power copysign hypot xlogy special_expit special_erf special_logit fill
    zeros_like ones_like full_like rand_like randn_like heaviside ldexp logaddexp logaddexp2 rrelu
    __and__ __or__ __xor__ bitwise_left_shift bitwise_right_shift isclose
    real imag conj _conj conj_physical _conj_physical resolve_conj resolve_neg angle complex polar
    fake_quantize_per_tensor_affine bucketize
"""
_ALONG = "argsort softmax log_softmax _softmax softmin cumsum cumprod logcumsumexp"


RULES: dict[Any, Rule] = {
    **dict.fromkeys(overloads(_POINTWISE), pointwise),
    **dict.fromkeys(overloads("type_as"), _like),
    aten.to.other: _like,
    **dict.fromkeys(overloads(_ALONG), _along),
    **dict.fromkeys(overloads("triu tril"), _triangle),
    **dict.fromkeys(overloads("topk sort kthvalue cummax cummin"), _topk),
    aten.glu.default: _glu,
    **dict.fromkeys(
        overloads(
            "max_pool1d avg_pool1d adaptive_avg_pool1d adaptive_max_pool1d upsample_nearest1d upsample_linear1d "
            "max_pool1d_with_indices _upsample_nearest_exact1d reflection_pad1d replication_pad1d"
        ),
        spatial(1),
    ),
    **dict.fromkeys(
        overloads(
            "max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d max_pool2d_with_indices upsample_nearest2d "
            "upsample_bilinear2d upsample_bicubic2d _upsample_nearest_exact2d reflection_pad2d replication_pad2d "
            "_upsample_bilinear2d_aa _upsample_bicubic2d_aa"
        ),
        spatial(2),
    ),
    **dict.fromkeys(
        overloads(
            "max_pool3d avg_pool3d adaptive_avg_pool3d adaptive_max_pool3d upsample_nearest3d upsample_trilinear3d "
            "max_pool3d_with_indices _upsample_nearest_exact3d reflection_pad3d replication_pad3d"
        ),
        spatial(3),
    ),
    **dict.fromkeys(overloads("zeros ones full new_zeros new_ones new_full"), _uniform),
    **dict.fromkeys(overloads("arange empty linspace scalar_tensor eye new_empty"), _fixed),
}
# Some overloads of these names reduce: reductions.py has them.
for _overload in overloads("max min"):
    if not {argument.name for argument in _overload._schema.arguments} & {"other"}:
        del RULES[_overload]
