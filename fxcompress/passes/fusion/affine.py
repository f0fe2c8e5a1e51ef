"""Per-channel affine maps, ``y = scale·x + shift``, and the nodes that compute one.

A map has one scale and one shift per index of one dimension, or one for all (``dim`` is None). In float64, so that a
chain of maps is rounded once, when it is folded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxcompress.graph.shapes import same_value
from fxcompress.passes.fusion.facts import Facts, tensor_value

__all__ = ["BATCH_NORMS", "Affine", "Step", "norm_affine", "read_step"]

aten = torch.ops.aten

BATCH_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)
"""Layers that normalise by running statistics in eval mode, along dimension 1."""


@dataclass(frozen=True)
class Affine:
    """``scale·x + shift`` with float64 vectors over the channels, or scalars."""

    scale: torch.Tensor
    shift: torch.Tensor

    def then(self, after: Affine) -> Affine:
        """First this map, then ``after``."""
        return Affine(self.scale * after.scale, self.shift * after.scale + after.shift)

    def shifts(self) -> bool:
        """Whether any shift is not zero."""
        return bool(self.shift.count_nonzero())

    def on(self, channels: int, device: torch.device) -> Affine:
        """The map as two vectors of ``channels`` on ``device``."""
        return Affine(self.scale.to(device).expand(channels), self.shift.to(device).expand(channels))


@dataclass(frozen=True)
class Step:
    """A node that applies ``affine`` to its argument ``index`` along ``dim``, reading ``constants`` (``get_attr``)."""

    node: fx.Node
    index: int
    affine: Affine
    dim: int | None
    constants: tuple[fx.Node, ...] = ()

    @property
    def data(self) -> fx.Node:
        """What the map is applied to; read afresh, for another site's rewrite may have replaced it."""
        data = self.node.args[self.index]
        assert isinstance(data, fx.Node)
        return data


def norm_affine(layer: nn.Module) -> Affine | None:
    """``γ/σ·x + β − μ·γ/σ`` of a norm with running statistics; None where it has none, or where σ² is not positive."""
    assert isinstance(layer, nn.modules.batchnorm._NormBase)
    return _normalised(layer.running_mean, layer.running_var, layer.weight, layer.bias, layer.eps)


def _normalised(mean: Any, variance: Any, weight: Any, bias: Any, eps: float) -> Affine | None:
    if mean is None or variance is None or mean.device.type == "meta":
        return None
    spread = variance.detach().double() + eps
    if not bool((spread > 0).all()):
        return None
    scale = spread.rsqrt() if weight is None else weight.detach().double() * spread.rsqrt()
    shift = -mean.detach().double() * scale
    return Affine(scale, shift if bias is None else shift + bias.detach().double())


_Maker = Callable[[torch.Tensor, float], tuple[Any, Any]]


def _shifted(sign: float) -> _Maker:
    return lambda value, alpha: (1.0, sign * alpha * value)


# (scale, shift) from a constant and alpha, where the data is the first and where it is the second argument.
_BINARY: dict[Any, tuple[_Maker, _Maker | None]] = {
    aten.mul.Tensor: (lambda value, alpha: (value, 0.0), lambda value, alpha: (value, 0.0)),
    aten.mul.Scalar: (lambda value, alpha: (value, 0.0), None),
    aten.div.Tensor: (lambda value, alpha: (value.reciprocal(), 0.0), None),
    aten.div.Scalar: (lambda value, alpha: (value.reciprocal(), 0.0), None),
    aten.add.Tensor: (_shifted(1.0), lambda value, alpha: (alpha, value)),
    aten.add.Scalar: (_shifted(1.0), None),
    aten.sub.Tensor: (_shifted(-1.0), lambda value, alpha: (-alpha, value)),
    aten.sub.Scalar: (_shifted(-1.0), None),
    aten.rsub.Tensor: (lambda value, alpha: (-alpha, value), _shifted(-1.0)),
    aten.rsub.Scalar: (lambda value, alpha: (-alpha, value), None),
}


def read_step(facts: Facts, node: fx.Node) -> Step | None:
    """``node`` as an affine map of one of its arguments; None where it is not one that keeps shape and dtype."""
    if node.op != "call_function":
        return None
    if node.target in _BINARY:
        return _read_binary(facts, node)
    if node.target is aten.neg.default:
        return _step(node, 0, None, torch.tensor(-1.0), torch.tensor(0.0))
    if node.target is aten.addcmul.default:
        return _read_addcmul(facts, node)
    if node.target is aten.batch_norm.default:
        return _read_norm(facts, node)
    return None


def _read_binary(facts: Facts, node: fx.Node) -> Step | None:
    if len(node.args) < 2:
        return None
    for index, make in enumerate(_BINARY[node.target]):
        data, other = node.args[index], node.args[1 - index]
        constant = _constant(facts, other)
        value = tensor_value(data)
        if constant is None or value is None or make is None or facts.constant(data) is not None:
            continue  # tried the other way round
        found, dim = _along(constant, value.dim())
        if found is None:
            return None
        alpha = node.args[2] if len(node.args) > 2 else node.kwargs.get("alpha", 1)
        if not isinstance(alpha, (int, float)):
            return None
        scale, shift = make(found, float(alpha))
        return _step(node, index, dim, torch.as_tensor(scale), torch.as_tensor(shift), (other,))
    return None


def _read_addcmul(facts: Facts, node: fx.Node) -> Step | None:
    """``shift + value·scale·x``, as layers with a learned scale and shift write it."""
    value = node.kwargs.get("value", 1)
    for index in (1, 2):
        data, factor = node.args[index], node.args[3 - index]
        made, added = facts.constant(factor), facts.constant(node.args[0])
        tensor = tensor_value(data)
        if made is None or added is None or tensor is None or not isinstance(value, (int, float)):
            continue  # tried the other way round
        (scale, first), (shift, second) = _along(made, tensor.dim()), _along(added, tensor.dim())
        if scale is None or shift is None or (first != second and None not in (first, second)):
            return None
        dim = first if first is not None else second
        return _step(node, index, dim, scale * value, shift, (factor, node.args[0]))
    return None


def _read_norm(facts: Facts, node: fx.Node) -> Step | None:
    """A batch norm in eval mode that is no layer: one with a weight but no bias, say."""
    arguments = [facts.constant(item) for item in node.args[1:5]]
    computed = any(item is not None and facts.constant(item) is None for item in node.args[1:5])
    if len(node.args) < 8 or node.args[5] or computed or not isinstance(node.args[7], float):
        return None
    weight, bias, mean, variance = arguments
    affine = _normalised(mean, variance, weight, bias, node.args[7])
    if affine is None:
        return None
    return _step(node, 0, 1, affine.scale, affine.shift, node.args[1:5])


def _step(
    node: fx.Node, index: int, dim: int | None, scale: torch.Tensor, shift: torch.Tensor, others: tuple[Any, ...] = ()
) -> Step | None:
    value = tensor_value(node.args[index])
    if value is None or not value.is_floating_point() or not same_value(value, node.meta.get("val")):
        return None
    if dim is not None and (
        not isinstance(value.shape[dim], int) or max(scale.numel(), shift.numel()) != value.shape[dim]
    ):
        return None
    constants = tuple(item for item in others if isinstance(item, fx.Node))
    return Step(node, index, Affine(scale.double(), shift.double()), dim, constants)


def _constant(facts: Facts, item: Any) -> torch.Tensor | None:
    if isinstance(item, (int, float)):
        return torch.tensor(float(item), dtype=torch.float64)
    found = facts.constant(item)
    return None if found is None or found.device.type == "meta" or found.is_complex() else found


def _along(constant: torch.Tensor, rank: int) -> tuple[torch.Tensor | None, int | None]:
    """The constant as a float64 vector and the dimension of the data it lies along; None where it spans several."""
    wide = [index for index, size in enumerate(constant.shape) if size != 1]
    if len(wide) > 1 or constant.dim() > rank:
        return None, None
    values = constant.detach().double()
    if not wide:
        return values.reshape(()), None
    return values.reshape(-1), rank - constant.dim() + wide[0]
