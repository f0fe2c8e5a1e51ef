"""Rules for single ATen calls on their way to ONNX: what they are in simpler calls, or that they are nothing.

A size that depends on the batch becomes ``-1`` where one may stand, so that no ``Shape``/``Gather`` chain is exported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fxcompress.backends.onnx_bags import BAG_RULES
from fxcompress.backends.onnx_recurrent import RECURRENT_RULES
from fxcompress.graph.lowering import Lowering

__all__ = ["KEEP", "ONLY_SOMETIMES", "RULES", "bound"]

aten = torch.ops.aten

# The lowering and the call's arguments by name → what stands for the call; NotImplemented if the rule does not apply.
Rule = Callable[[Lowering, dict[str, Any]], Any]
KEEP = object()  # the call as it is


def bound(target: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call by their schema names, defaults filled in."""
    values = {}
    for index, argument in enumerate(target._schema.arguments):
        if index < len(args):
            values[argument.name] = args[index]
        else:
            values[argument.name] = kwargs.get(argument.name, argument.default_value)
    return values


def _keep(lowering: Lowering, a: dict[str, Any]) -> Any:
    return KEEP


def _same(lowering: Lowering, a: dict[str, Any]) -> Any:
    return a["self"] if "self" in a else a["input"]


def _same_if_unchanged(lowering: Lowering, a: dict[str, Any]) -> Any:
    """``expand``, ``slice`` and the like that give the whole of their argument."""
    before, after = a["self"].meta["val"], lowering.value
    if after is None or a.get("step", 1) != 1:
        return NotImplemented
    return a["self"] if _sizes(before) == _sizes(after) and before.dtype == after.dtype else NotImplemented


def _scatter(lowering: Lowering, a: dict[str, Any]) -> Any:
    whole = _sizes(a["self"].meta["val"]) == _sizes(a["src"].meta["val"])
    return a["src"] if whole and a["self"].meta["val"].dtype == a["src"].meta["val"].dtype else NotImplemented


def _cast(lowering: Lowering, a: dict[str, Any]) -> Any:
    wanted = lowering.value.dtype if lowering.value is not None else a.get("dtype")
    if wanted is None or wanted == a["self"].meta["val"].dtype:
        return a["self"]
    return lowering.emit(aten._to_copy.default, (a["self"],), {"dtype": wanted}, value=lowering.value)


def _reshape(lowering: Lowering, a: dict[str, Any]) -> Any:
    """One unknown size may be ``-1``. What the arguments do not tell as a number, the result may know."""
    after = lowering.value
    if after is None:
        return NotImplemented
    before = a["self"].meta["val"]
    if _sizes(before) == _sizes(after):
        return a["self"]
    sizes = [-1 if isinstance(size, torch.SymInt) else int(size) for size in after.shape]
    given = a.get("size", [])
    sizes = [
        told if type(told) is int and told >= 0 else size for told, size in zip(given or sizes, sizes, strict=True)
    ]
    if sizes.count(-1) > 1 or (-1 in sizes and 0 in sizes):
        if not given:
            return NotImplemented
        sizes = given
    # Not a view: the exporter computes strides anew, and copies that made them fit are left out.
    return lowering.emit(aten.reshape.default, (a["self"], sizes), value=after)


def _split(lowering: Lowering, a: dict[str, Any]) -> Any:
    if lowering.value is None:
        return NotImplemented
    sizes = [part.shape[a["dim"]] for part in lowering.value]
    if len(sizes) == 1:
        return (a["self"],)
    if any(isinstance(size, torch.SymInt) for size in sizes):
        return _slices(lowering, a)
    return lowering.emit(aten.split_with_sizes.default, (a["self"], sizes, a["dim"]), value=lowering.value)


def _slices(lowering: Lowering, a: dict[str, Any]) -> Any:
    """A split whose sizes depend on the batch, where the steps are known."""
    step = a.get("split_size")
    if not isinstance(step, int):
        return NotImplemented
    return tuple(
        lowering.emit(aten.slice.Tensor, (a["self"], a["dim"], index * step, (index + 1) * step), value=part)
        for index, part in enumerate(lowering.value)
    )


def _unbind(lowering: Lowering, a: dict[str, Any]) -> Any:
    count = a["self"].meta["val"].shape[a["dim"]]
    if isinstance(count, torch.SymInt):
        return NotImplemented
    parts = lowering.value or [None] * count
    call = aten.select.int
    return tuple(lowering.emit(call, (a["self"], a["dim"], i), value=part) for i, part in enumerate(parts))


def _mean(lowering: Lowering, a: dict[str, Any]) -> Any:
    """The mean over an image is a global pooling: engines have integer kernels for that one."""
    value = a["self"].meta["val"]
    if value.dim() != 4 or a["dim"] is None or a["dtype"] not in (None, value.dtype):
        return NotImplemented
    if sorted(dim % 4 for dim in a["dim"]) != [2, 3] or isinstance(value.shape[1], torch.SymInt):
        return NotImplemented
    known = lowering.value if a["keepdim"] else None
    pooled = lowering.emit(aten.adaptive_avg_pool2d.default, (a["self"], [1, 1]), value=known)
    if a["keepdim"]:
        return pooled
    return lowering.emit(aten.reshape.default, (pooled, [-1, int(value.shape[1])]), value=lowering.value)


def _reduced_wide(target: torch._ops.OpOverload) -> Rule:
    """Reductions of 16-bit numbers in float32, as PyTorch does them: the exporter widens them, but not back."""

    def rule(lowering: Lowering, a: dict[str, Any]) -> Any:
        narrow = a["self"].meta["val"].dtype
        if narrow not in (torch.float16, torch.bfloat16) or a.get("dtype") not in (None, narrow):
            return NotImplemented
        wide = lowering.emit(aten._to_copy.default, (a["self"],), {"dtype": torch.float32})
        rest = {name: value for name, value in a.items() if name not in ("self", "dtype")}
        made = lowering.emit(target, (wide, *rest.values()))
        return lowering.emit(aten._to_copy.default, (made,), {"dtype": narrow}, value=lowering.value)

    return rule


def _batch_norm(lowering: Lowering, a: dict[str, Any]) -> Any:
    if a["training"] or a["running_mean"] is None or a["running_var"] is None:
        return NotImplemented
    return KEEP


def _adaptive_pool(lowering: Lowering, a: dict[str, Any]) -> Any:
    """Kept where it is an ordinary pooling: down to 1, or by whole factors."""
    value, wanted = a["self"].meta["val"], list(a["output_size"])
    if value.dim() != len(wanted) + 2:
        return NotImplemented
    sizes = value.shape[2:]
    fits = all(isinstance(size, int) and size % want == 0 for size, want in zip(sizes, wanted, strict=True))
    if not fits and any(want != 1 for want in wanted):
        return NotImplemented
    return KEEP


def _sizes(value: torch.Tensor) -> list[Any]:
    return [size.node.expr if isinstance(size, torch.SymInt) else size for size in value.shape]


# Operations that `onnx_translate` gives ONNX functions for some of their uses; the others are taken apart.
ONLY_SOMETIMES = {
    aten.batch_norm.default,
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default,
    *RECURRENT_RULES,
}

RULES: dict[Any, Rule] = {
    **RECURRENT_RULES,
    **BAG_RULES,
    aten.fake_quantize_per_tensor_affine.default: _keep,
    aten.fake_quantize_per_channel_affine.default: _keep,
    aten.contiguous.default: _same,
    aten.clone.default: _same,
    aten.alias.default: _same,
    aten.detach.default: _same,
    aten.lift_fresh_copy.default: _same,
    aten.resolve_conj.default: _same,
    aten.resolve_neg.default: _same,
    aten.slice.Tensor: _same_if_unchanged,
    aten.expand.default: _same_if_unchanged,
    aten.slice_scatter.default: _scatter,
    aten.to.dtype: _cast,
    aten.to.device: _cast,
    aten.to.dtype_layout: _cast,
    aten.to.other: _cast,
    aten.type_as.default: _cast,
    aten.view.default: _reshape,
    aten.reshape.default: lambda lowering, a: _reshape(lowering, {"self": a["self"], "size": a["shape"]}),
    aten._unsafe_view.default: _reshape,
    aten.view_as.default: _reshape,
    aten.reshape_as.default: _reshape,
    aten.flatten.using_ints: _reshape,
    aten.unflatten.int: _reshape,
    aten.ravel.default: _reshape,
    aten.chunk.default: _split,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.unsafe_chunk.default: _split,
    aten.unsafe_split.Tensor: _split,
    aten.unsafe_split_with_sizes.default: _split,
    aten.unbind.int: _unbind,
    aten.mean.dim: _mean,
    **{
        target: _reduced_wide(target)
        for target in (
            aten.amax.default,
            aten.amin.default,
            aten.cumsum.default,
            aten.prod.default,
            aten.prod.dim_int,
            aten.sum.default,
            aten.sum.dim_IntList,
        )
    },
    aten.batch_norm.default: _batch_norm,
    aten.adaptive_avg_pool1d.default: _adaptive_pool,
    aten.adaptive_avg_pool2d.default: _adaptive_pool,
    aten.adaptive_avg_pool3d.default: _adaptive_pool,
}
