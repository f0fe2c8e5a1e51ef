"""Multiply-accumulate operations of one call, from the sizes of its inputs and outputs.

One rule per kind of layer and per ATen operation. Counted are the products of convolutions, linear layers, matrix
products, attention and recurrent layers; element-wise work (activations, norms, pooling, softmax, additions, bias) and
look-ups (embedding, gather) count nothing. ``torch.utils.flop_counter`` counts the same, in FLOPs: two for each of
these MACs. Only we count matrix × vector and dot products, ``addbmm`` and ``bilinear``, whose kernels it does not know;
nor does it know the CPU's kernels for attention and for LSTMs, so compare on the meta device, where these are taken
apart. As there, causal masks and sparse weights save nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import fx, nn

__all__ = ["Sizes", "count_like_linear", "count_like_matmul", "macs"]

aten = torch.ops.aten

Sizes: TypeAlias = Callable[[torch.Tensor], tuple[int, ...]]
"""Gives the sizes of a fake tensor as plain numbers."""

Shape: TypeAlias = tuple[int, ...]


def macs(node: fx.Node, module: nn.Module | None, sizes: Sizes) -> int:
    """Multiply-accumulates of one node; 0 where it multiplies nothing that is summed.

    Args:
        node: a node whose inputs and itself have ``meta["val"]``.
        module: the layer that it calls, if it calls one.
        sizes: from a fake tensor to numbers.
    """
    if module is not None:
        inputs = [item.meta["val"] for item in node.args if isinstance(item, fx.Node)]
        for kind, layer_rule in _LAYERS.items():
            if isinstance(module, kind):
                return layer_rule(module, [sizes(v) for v in inputs if isinstance(v, torch.Tensor)], node, sizes)
        return 0
    rule = _CALLS.get(node.target) if isinstance(node.target, torch._ops.OpOverload) else None
    return rule(_Call(node, sizes)) if rule else 0


# --- layers --------------------------------------------------------------------------------------------------------


def _linear_layer(module: Any, inputs: Sequence[Shape], node: fx.Node, sizes: Sizes) -> int:
    return math.prod(inputs[0]) * sizes(node.meta["val"])[-1]


def _conv_layer(module: Any, inputs: Sequence[Shape], node: fx.Node, sizes: Sizes) -> int:
    weight = tuple(module.weight.shape)
    counted = inputs[0] if module.transposed else sizes(node.meta["val"])
    return math.prod(counted) * math.prod(weight[1:])


def _bilinear_layer(module: Any, inputs: Sequence[Shape], node: fx.Node, sizes: Sizes) -> int:
    return _bilinear(inputs[0], tuple(module.weight.shape))


def _recurrent_layer(module: Any, inputs: Sequence[Shape], node: fx.Node, sizes: Sizes) -> int:
    """Every step of every sequence multiplies by each weight matrix once."""
    steps = math.prod(inputs[0][:-1])
    return steps * sum(weight.numel() for name, weight in module.named_parameters() if name.startswith("weight"))


_LAYERS: dict[type[nn.Module] | tuple[type[nn.Module], ...], Callable[..., int]] = {
    nn.Linear: _linear_layer,
    nn.modules.conv._ConvNd: _conv_layer,
    nn.RNNBase: _recurrent_layer,
    nn.Bilinear: _bilinear_layer,
}


def count_like_linear(kind: type[nn.Module]) -> None:
    """Count layers of ``kind`` as linear layers: each input feature is multiplied once per output feature."""
    _LAYERS[kind] = _linear_layer


# --- ATen calls ----------------------------------------------------------------------------------------------------


class _Call:
    """Arguments of an ATen call by their schema names, tensors as their sizes."""

    def __init__(self, node: fx.Node, sizes: Sizes) -> None:
        self._node = node
        self._sizes = sizes
        names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
        self._values: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}

    def shape(self, name: str) -> Shape:
        return self._shape_of(self._values[name])

    def shapes(self, name: str) -> list[Shape]:
        return [self._shape_of(item) for item in self._values[name]]

    def given(self, name: str) -> Any:
        return self._values.get(name)

    @property
    def result(self) -> Shape:
        return self._sizes(self._node.meta["val"])

    def _shape_of(self, node: fx.Node) -> Shape:
        return self._sizes(node.meta["val"])


Rule: TypeAlias = Callable[[_Call], int]


def _product(left: str, right: str) -> Rule:
    """Products of matrices, batches of them, and vectors, as ``torch.matmul`` combines them."""
    return lambda call: _matmul(call.shape(left), call.shape(right))


def _matmul(left: Shape, right: Shape) -> int:
    batch = _broadcast(left[:-2], right[:-2])
    rows = left[-2] if len(left) > 1 else 1
    columns = right[-1] if len(right) > 1 else 1
    return math.prod(batch) * rows * left[-1] * columns


def _broadcast(left: Shape, right: Shape) -> Shape:
    return tuple(torch.broadcast_shapes(left, right))


def _linear(call: _Call) -> int:
    weight = call.shape("weight")
    return math.prod(call.shape("input")) * (weight[0] if len(weight) > 1 else 1)


def _conv(call: _Call) -> int:
    return math.prod(call.result) * math.prod(call.shape("weight")[1:])


def _conv_transpose(call: _Call) -> int:
    return math.prod(call.shape("input")) * math.prod(call.shape("weight")[1:])


def _convolution(call: _Call) -> int:
    return _conv_transpose(call) if call.given("transposed") else _conv(call)


def _attention(call: _Call) -> int:
    """Queries × keys, then scores × values; shared key and value heads are multiplied once per query head."""
    *_, queries, width = call.shape("query")
    *_, keys, _ = call.shape("key")
    heads = math.prod(call.result[:-2])
    return heads * queries * keys * (width + call.shape("value")[-1])


def _inner(call: _Call) -> int:
    """Every row of the one by every row of the other, along their last dims."""
    left, right = call.shape("self"), call.shape("other")
    return math.prod(left) * math.prod(right[:-1]) if left and right else 0


def _tensordot(call: _Call) -> int:
    left, right = call.shape("self"), call.shape("other")
    summed = math.prod(right[dim] for dim in call.given("dims_other"))
    return math.prod(left) * math.prod(right) // max(summed, 1)


def _bilinear(left: Shape, weight: Shape) -> int:
    """``x1 · (W · x2)``: for each of the outputs a matrix × vector, then a dot product."""
    outputs, first, second = weight
    return math.prod(left[:-1]) * outputs * first * (second + 1)


def _multi_dot(call: _Call) -> int:
    """Left to right; the cheapest order, which the kernel chooses, may need fewer."""
    first, *rest = call.shapes("tensors" if call.given("tensors") is not None else "matrices")
    total = 0
    for shape in rest:
        total += _matmul(first, shape)
        first = (*first[:-1], *shape[1:])
    return total


def _einsum(call: _Call) -> int:
    """Two operands at a time, from the left. A contraction that sums nothing is element-wise and counts nothing."""
    operands, output, lengths = _einsum_terms(call.given("equation"), call.shapes("tensors"))
    total = 0
    first, *rest = operands
    for index, second in enumerate(rest):
        later = set(output).union(*rest[index + 1 :])
        # What only one operand has, and nobody needs later, is summed away before they are multiplied.
        first = {label for label in first if label in second or label in later}
        second = {label for label in second if label in first or label in later}
        together = first | second
        if together - later:
            total += math.prod(lengths[label] for label in together)
        first = together & later
    return total


def _einsum_terms(equation: str, shapes: Sequence[Shape]) -> tuple[list[set[str]], set[str], Mapping[str, int]]:
    """The labels of each operand and of the result, and the length of each label; ``...`` becomes digits."""
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    lengths: dict[str, int] = {}
    operands: list[set[str]] = []
    ellipsis: set[str] = set()
    counts: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        before, dots, after = term.partition("...")
        hidden = [str(n) for n in reversed(range(len(shape) - len(before) - len(after)))] if dots else []
        ellipsis.update(hidden)
        labels = [*before, *hidden, *after]
        for label, length in zip(labels, shape, strict=True):
            lengths[label] = max(lengths.get(label, 1), length)
        for label in set(labels):
            counts[label] = counts.get(label, 0) + labels.count(label)
        operands.append(set(labels))
    if arrow:
        kept = set(result.replace("...", "")) | (ellipsis if "..." in result else set())
    else:
        kept = {label for label, count in counts.items() if count == 1} | ellipsis
    return operands, kept, lengths


def _recurrent(call: _Call) -> int:
    steps = math.prod(call.shape("input")[:-1])
    return steps * sum(math.prod(shape) for shape in call.shapes("params") if len(shape) == 2)


_CALLS: dict[Any, Rule] = {
    aten.linear.default: _linear,
    aten.mm.default: _product("self", "mat2"),
    aten.mm.dtype: _product("self", "mat2"),
    aten.bmm.default: _product("self", "mat2"),
    aten.bmm.dtype: _product("self", "mat2"),
    aten.matmul.default: _product("self", "other"),
    aten.mv.default: _product("self", "vec"),
    aten.dot.default: _product("self", "tensor"),
    aten.vdot.default: _product("self", "other"),
    aten.addmm.default: _product("mat1", "mat2"),
    aten.addmm.dtype: _product("mat1", "mat2"),
    aten.addmv.default: _product("mat", "vec"),
    aten.addbmm.default: _product("batch1", "batch2"),
    aten.baddbmm.default: _product("batch1", "batch2"),
    aten.baddbmm.dtype: _product("batch1", "batch2"),
    aten.inner.default: _inner,
    aten.tensordot.default: _tensordot,
    aten.einsum.default: _einsum,
    aten.linalg_multi_dot.default: _multi_dot,
    aten.chain_matmul.default: _multi_dot,
    aten.scaled_dot_product_attention.default: _attention,
    aten.bilinear.default: lambda call: _bilinear(call.shape("input1"), call.shape("weight")),
    aten.convolution.default: _convolution,
    **{
        getattr(getattr(aten, f"conv{rank}d"), overload): _conv
        for rank in (1, 2, 3)
        for overload in ("default", "padding")
    },
    aten.conv_transpose1d.default: _conv_transpose,
    aten.conv_transpose2d.input: _conv_transpose,
    aten.conv_transpose3d.input: _conv_transpose,
    aten.lstm.input: _recurrent,
    aten.gru.input: _recurrent,
    aten.rnn_tanh.input: _recurrent,
    aten.rnn_relu.input: _recurrent,
}


def count_like_matmul(operation: Any, left: str, right: str) -> None:
    """Count calls of ``operation`` as ``torch.matmul`` of the arguments of these names."""
    _CALLS[operation] = _product(left, right)
