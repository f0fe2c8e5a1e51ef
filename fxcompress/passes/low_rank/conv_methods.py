"""Ways to write a convolution as several thinner ones, and what each costs.

With a kernel W [out, in, k₁, k₂ …] and r the rank:

* ``channel``: k×k to r channels, then 1×1. The truncated SVD of [out, in·k²] (Zhang et al. 2016, arXiv:1505.06798).
* ``spatial``: k₁×1 to r channels, then 1×k₂. The truncated SVD of [out·k₂, in·k₁] (Jaderberg et al. 2014,
  arXiv:1405.3866).
* ``tucker2``: 1×1 to r₁ channels, k×k to r₂, then 1×1. HOSVD, improved by HOOI (Kim et al. 2016, arXiv:1511.06530).
* ``cp``: 1×1 to r channels, depthwise k×k, then 1×1. Alternating least squares (Lebedev et al. 2015, arXiv:1412.6553).

In the metric of data the truncations that end in the output are exact, and the last convolution of the others is fitted
to the output by least squares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fxcompress.passes.low_rank.cp import cp_factors
from fxcompress.passes.low_rank.kernels import pointwise, stage
from fxcompress.passes.low_rank.least_squares import Fit, Sums, fit
from fxcompress.passes.low_rank.metric import Metric, plain_metric
from fxcompress.passes.low_rank.truncate import Factors, truncate
from fxcompress.passes.low_rank.tucker import tucker2

__all__ = ["METHODS", "Convs", "Shape", "applies", "decompose", "price", "ranks_at", "steps"]

METHODS = ("channel", "spatial", "tucker2", "cp")


@dataclass(frozen=True)
class Shape:
    """Sizes that decide what a convolution costs.

    Attributes:
        groups, outputs, inputs: of the kernel ``[groups, outputs, inputs, kernel…]``.
        kernel: sizes along the spatial dims.
        before: positions of the input; all 1 where parameters are counted.
        after: positions of the output.
        transposed: whether each input position is multiplied, rather than each output position.
    """

    groups: int
    outputs: int
    inputs: int
    kernel: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    transposed: bool

    @property
    def dense(self) -> int:
        """Cost of the convolution as it is."""
        moved = math.prod(self.before if self.transposed else self.after)
        return moved * self.groups * self.outputs * self.inputs * math.prod(self.kernel)


@dataclass(frozen=True)
class Convs:
    """A decomposition.

    Attributes:
        method: one of :data:`METHODS`.
        ranks: one number, of ``tucker2`` two.
        layers: which take the convolution's place, in order.
        matrix: the kernel that they make together, ``[groups, out, in · k²]``.
        fit: how one of them was fitted to data.
    """

    method: str
    ranks: tuple[int, ...]
    layers: tuple[nn.Module, ...]
    matrix: torch.Tensor
    fit: Fit | None = None


def applies(method: str, shape: Shape) -> bool:
    """Whether the method says anything about kernels of this shape."""
    if method == "spatial":
        return sum(size > 1 for size in shape.kernel) > 1
    return method != "cp" or shape.groups == 1


def steps(method: str, shape: Shape) -> int:
    """Number of the largest step of :func:`ranks_at`: beyond it nothing is approximated."""
    size = math.prod(shape.kernel)
    if method == "channel":
        return min(shape.outputs, shape.inputs * size) - 1
    if method == "spatial":
        first = shape.kernel[_split(shape)]
        return min(shape.outputs * size // first, shape.inputs * first) - 1
    if method == "tucker2":
        return max(shape.outputs, shape.inputs) - 1
    return min(shape.outputs * shape.inputs, shape.outputs * size, shape.inputs * size) - 1


def ranks_at(method: str, shape: Shape, step: int, round_to: int = 1) -> tuple[int, ...]:
    """The ranks of a step; more cost with every step."""
    if method != "tucker2":
        return (max(round_to, step // round_to * round_to),)
    whole = max(shape.outputs, shape.inputs)
    inner, outer = (
        min(width, max(round_to, math.ceil(width * step / whole) // round_to * round_to))
        for width in (shape.inputs, shape.outputs)
    )
    size = math.prod(shape.kernel)
    return min(inner, outer * size), min(outer, inner * size)  # more says nothing: the core has no such rank


def price(method: str, shape: Shape, ranks: Sequence[int]) -> int:
    """What the decomposition costs at these ranks."""
    before, after = math.prod(shape.before), math.prod(shape.after)
    moved = before if shape.transposed else after
    size = math.prod(shape.kernel)
    rank = ranks[0]
    if method == "channel":
        return shape.groups * rank * (moved * shape.inputs * size + after * shape.outputs)
    if method == "spatial":
        axis = _split(shape)
        first = shape.kernel[axis]
        between = before // shape.before[axis] * shape.after[axis]  # moved along one axis only
        one, two = (before, between) if shape.transposed else (between, after)
        return shape.groups * rank * (one * shape.inputs * first + two * shape.outputs * (size // first))
    if method == "tucker2":
        inner, outer = ranks
        ends = before * shape.inputs * inner + after * outer * shape.outputs
        return shape.groups * (ends + moved * inner * outer * size)
    return rank * (before * shape.inputs + moved * size + after * shape.outputs)


def decompose(method: str, layer: Any, kernel: torch.Tensor, ranks: Sequence[int], metric: Metric) -> Convs:
    """The layers of a method at given ranks.

    Args:
        method: one of :data:`METHODS` that applies.
        layer: the convolution.
        kernel: ``[groups, out, in, kernel…]``.
        ranks: below full rank.
        metric: of the patches, or plain.
    """
    make = {"channel": _channel, "spatial": _spatial, "tucker2": _tucker2, "cp": _cp}[method]
    return Convs(method, tuple(ranks), *make(layer, kernel, tuple(ranks), metric))


def _channel(layer: Any, kernel: torch.Tensor, ranks: tuple[int, ...], metric: Metric) -> Any:
    made = truncate(kernel.flatten(2), metric, ranks[0])
    assert isinstance(made, Factors)
    inner = made.inner.unflatten(2, kernel.shape[2:])
    every = tuple(range(kernel.dim() - 3))
    layers = (stage(layer, inner, axes=every), pointwise(layer, made.outer, layer.bias))
    return layers, made.outer @ made.inner, None


def _spatial(layer: Any, kernel: torch.Tensor, ranks: tuple[int, ...], metric: Metric) -> Any:
    groups, outputs, inputs, *spatial = kernel.shape
    rank, axis = ranks[0], next(i for i, size in enumerate(spatial) if size > 1)
    first = spatial[axis]
    moved = kernel.movedim(3 + axis, 3).flatten(4)  # [groups, out, in, first, rest]
    rest = moved.shape[4]
    table = moved.permute(0, 1, 4, 2, 3).reshape(groups, outputs * rest, inputs * first)
    made = truncate(table, plain_metric(), rank)
    assert isinstance(made, Factors)
    inner = made.inner.reshape(groups, rank, inputs, first)
    outer = made.outer.reshape(groups, outputs, rest, rank).permute(0, 1, 3, 2)  # [groups, out, rank, rest]
    fitted: Fit | None = None
    if metric.moment is not None:

        def read(patches: torch.Tensor) -> torch.Tensor:
            """The rank × rest numbers that the second convolution reads of each patch."""
            parted = patches.unflatten(1, (inputs, *spatial)).movedim(2 + axis, 2).flatten(3, -2)
            return torch.einsum("gric,gicjn->grjn", inner.double(), parted).flatten(1, 2)

        fitted, _ = _fitted(kernel, read, outer.flatten(2), metric)
        outer = fitted.factor.reshape(outer.shape).to(kernel.dtype)
    ones = [1] * len(spatial)
    shape_one, shape_two = list(ones), list(spatial)
    shape_one[axis], shape_two[axis] = first, 1
    others = tuple(i for i in range(len(spatial)) if i != axis)
    layers = (
        stage(layer, inner.reshape(groups, rank, inputs, *shape_one), axes=(axis,)),
        stage(layer, outer.reshape(groups, outputs, rank, *shape_two), bias=layer.bias, axes=others),
    )
    whole = torch.einsum("gorj,gric->goicj", outer, inner)
    whole = whole.unflatten(4, [spatial[i] for i in others]).movedim(3, 3 + axis)
    return layers, whole.flatten(2), fitted


def _tucker2(layer: Any, kernel: torch.Tensor, ranks: tuple[int, ...], metric: Metric) -> Any:
    groups, outputs, inputs, *spatial = kernel.shape
    inner_rank, outer_rank = ranks
    size = math.prod(spatial)
    basis, outer, core = tucker2(kernel.flatten(3), inner_rank, outer_rank)
    fitted: Fit | None = None
    if metric.moment is not None:
        # With the first convolution given, the others are the best of their rank in the metric of what they read.
        now = (outer @ core.flatten(2)).reshape(groups, outputs, -1)

        def read(patches: torch.Tensor) -> torch.Tensor:
            parted = patches.unflatten(1, (inputs, size))
            return torch.einsum("gir,gikn->grkn", basis, parted).flatten(1, 2)

        fitted, seen = _fitted(kernel, read, now, metric)
        whole = fitted.factor
        made = truncate(whole, Metric(seen, singular=True), outer_rank) if outer_rank < min(whole.shape[1:]) else 0
        if isinstance(made, Factors):
            outer, core = made.outer, made.inner.unflatten(2, (inner_rank, size))
            fitted = replace(fitted, held_out_error=None)  # what this truncation loses is not in it
        elif outer_rank == outputs:
            outer = torch.eye(outputs, dtype=basis.dtype, device=basis.device).expand(groups, -1, -1)
            core = whole.unflatten(2, (inner_rank, size))
        else:  # the middle convolution can hand on all that it reads
            one = torch.eye(outer_rank, whole.shape[2], dtype=basis.dtype, device=basis.device)
            outer = whole @ one.T
            core = one.expand(groups, -1, -1).unflatten(2, (inner_rank, size))
    dtype = kernel.dtype
    basis, outer, core = basis.to(dtype), outer.to(dtype), core.to(dtype)
    every = tuple(range(len(spatial)))
    layers = (
        pointwise(layer, basis.mT),
        stage(layer, core.unflatten(3, spatial), axes=every),
        pointwise(layer, outer, layer.bias),
    )
    return layers, torch.einsum("gos,gsrk,gir->goik", outer, core, basis).flatten(2), fitted


def _cp(layer: Any, kernel: torch.Tensor, ranks: tuple[int, ...], metric: Metric) -> Any:
    spatial = kernel.shape[3:]
    rank = ranks[0]
    outer, inner, middle = cp_factors(kernel[0].flatten(2).double(), rank)  # [out, r], [in, r], [k², r]
    fitted: Fit | None = None
    if metric.moment is not None:
        maps = torch.einsum("ir,kr->rik", inner, middle).reshape(1, rank, -1)
        fitted, _ = _fitted(kernel, lambda patches: maps @ patches, outer[None], metric)
        outer = fitted.factor[0]
    outer, inner, middle = (factor.to(kernel.dtype) for factor in (outer, inner, middle))
    every = tuple(range(len(spatial)))
    layers = (
        pointwise(layer, inner.mT[None]),
        stage(layer, middle.T.reshape(rank, 1, 1, *spatial), axes=every),
        pointwise(layer, outer[None], layer.bias),
    )
    return layers, torch.einsum("or,ir,kr->oik", outer, inner, middle).flatten(1)[None], fitted


def _fitted(
    kernel: torch.Tensor, read: Callable[[torch.Tensor], torch.Tensor], now: torch.Tensor, metric: Metric
) -> tuple[Fit, torch.Tensor]:
    """The weights that make the output best from what a layer reads, and the second moment of that.

    Args:
        kernel: ``[groups, out, in, kernel…]``.
        read: what the layer reads of patches: linear, ``[groups, in · k², n]`` to ``[groups, d, n]``.
        now: the weights so far, ``[groups, out, d]``; the fitted ones are float64.
        metric: of the patches.
    """
    weight = kernel.double().flatten(2)

    def sums(moment: torch.Tensor) -> Sums:
        half = read(moment)
        return Sums(weight @ half.mT, read(half.mT), float(((weight @ moment) * weight).sum()))

    assert metric.moment is not None
    whole = sums(metric.moment)
    whole.fold = None if metric.fold is None else sums(metric.fold)
    return fit(whole, now.double()), whole.moment


def _split(shape: Shape) -> int:
    """The axis of the first of two spatial convolutions."""
    return next(axis for axis, size in enumerate(shape.kernel) if size > 1)
