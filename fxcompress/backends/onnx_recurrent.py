"""Recurrent layers: one ONNX node per layer, with the gates in ONNX's order and no state where it starts from zero.

On fake tensors torch runs ``aten.lstm`` step by step, and the exporter looks at every node that way. So a call becomes
an operation of our own that knows its shapes, and that one is translated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import torch
from torch import fx

from fxcompress.graph.lowering import Lowering

__all__ = ["RECURRENT_RULES", "recurrent_translation"]

aten = torch.ops.aten

_LIBRARY = torch.library.Library("fxcompress_onnx", "FRAGMENT")
_LIBRARY.define(
    "recurrent(str kind, Tensor input, Tensor? hidden, Tensor? cell, Tensor[] params, bool biases, int layers, "
    "bool bidirectional, bool batch_first) -> (Tensor, Tensor, Tensor)"
)


def _shapes(
    kind: str,
    input: torch.Tensor,
    hidden: torch.Tensor | None,
    cell: torch.Tensor | None,
    params: list[torch.Tensor],
    biases: bool,
    layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    directions, width = 2 if bidirectional else 1, params[1].shape[1]
    state = layers * directions, input.shape[0 if batch_first else 1], width
    output = input.new_empty((input.shape[0], input.shape[1], directions * width))
    return output, input.new_empty(state), input.new_empty(state)


torch.library.register_fake("fxcompress_onnx::recurrent", _shapes, lib=_LIBRARY)


# --- in the graph ----------------------------------------------------------------------------------------------------


def _rule(kind: str) -> Callable[[Lowering, dict[str, Any]], Any]:
    def rule(lowering: Lowering, a: dict[str, Any]) -> Any:
        if "params" not in a or lowering.value is None:  # a call on packed sequences
            return NotImplemented
        params, layers, directions = list(a["params"]), a["num_layers"], 2 if a["bidirectional"] else 1
        if len(params) != layers * directions * (4 if a["has_biases"] else 2):  # ONNX has no projected states
            return NotImplemented
        states = [None if _is_zero(state) else state for state in (a["hx"] if kind == "lstm" else (a["hx"], None))]
        if kind == "lstm" and (states[0] is None) != (states[1] is None):
            states = list(a["hx"])
        y, *rest = lowering.value
        options = a["has_biases"], layers, a["bidirectional"], a["batch_first"]
        call = torch.ops.fxcompress_onnx.recurrent.default
        return lowering.emit(call, (kind, a["input"], *states, params, *options), value=(y, *rest, rest[0])[:3])

    return rule


def _is_zero(state: Any) -> bool:
    return state is None or (isinstance(state, fx.Node) and state.target is aten.zeros.default)


RECURRENT_RULES: dict[Any, Callable[[Lowering, dict[str, Any]], Any]] = {
    aten.lstm.input: _rule("lstm"),
    aten.gru.input: _rule("gru"),
    aten.rnn_tanh.input: _rule("rnn_tanh"),
    aten.rnn_relu.input: _rule("rnn_relu"),
}


# --- in ONNX ---------------------------------------------------------------------------------------------------------

# Torch has the gates i f g o and r z n, ONNX i o f c and z r h.
_INT8 = 3  # of onnx.TensorProto.DataType
_ORDER = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2)}


def recurrent_translation(
    op: Any, contributed: Callable[..., Any] | None = None
) -> dict[Callable[..., Any], Callable[..., Any]]:
    """The entry for the translation table.

    Args:
        op: as for :func:`fxcompress.backends.onnx_translate.translation_table`.
        contributed: likewise; given where an LSTM on integer weights may be an operator of ONNX Runtime.
    """

    def recurrent(
        kind: str,
        input: Any,
        hidden: Any,
        cell: Any,
        params: Any,
        biases: bool,
        layers: int,
        bidirectional: bool,
        batch_first: bool,
    ) -> Any:
        directions = 2 if bidirectional else 1
        width, per_cell = int(params[1].shape[1]), 4 if biases else 2
        x = op.Transpose(input, perm=[1, 0, 2]) if batch_first else input
        lasts: list[tuple[Any, Any]] = []
        for layer in range(layers):
            first = layer * directions
            cells = [params[(first + d) * per_cell : (first + d + 1) * per_cell] for d in range(directions)]
            integers = (
                kind == "lstm" and contributed is not None and all(map(_integers, (*cells[0][:2], *cells[-1][:2])))
            )
            weights = [
                _join(op, [_reorder(op, _integers(cell[i]) if integers else cell[i], kind, width) for cell in cells])
                for i in (0, 1)
            ]
            bias = None
            if biases:
                both = [op.Concat(*(_reorder(op, c[i], kind, width) for i in (2, 3)), axis=0) for c in cells]
                bias = _join(op, both)
            states = [_part(op, state, first, directions) for state in (hidden, cell)]
            if integers:
                assert contributed is not None
                grids = [_join(op, [_reorder(op, _scale(cell[i]), kind, width) for cell in cells]) for i in (0, 1)]
                y, *last = _dynamic(op, contributed, x, weights, grids, bias, states, width, bidirectional)
            else:
                y, *last = _node(op, kind, x, weights, bias, states, width, bidirectional)
            lasts.append((last[0], last[-1]))
            if directions == 1:
                x = op.Squeeze(y, op.Constant(value_ints=[1]))
            else:
                merged = op.Transpose(y, perm=[0, 2, 1, 3])
                x = op.Reshape(merged, op.Constant(value_ints=[0, 0, directions * width]))
        output = op.Transpose(x, perm=[1, 0, 2]) if batch_first else x
        ends = [op.Concat(*state, axis=0) if layers > 1 else state[0] for state in zip(*lasts, strict=True)]
        return (output, *ends)

    return {torch.ops.fxcompress_onnx.recurrent.default: recurrent}


def _node(
    op: Any, kind: str, x: Any, weights: list[Any], bias: Any, states: list[Any], width: int, bidirectional: bool
) -> Any:
    options = {"hidden_size": width, "direction": "bidirectional" if bidirectional else "forward"}
    if kind == "lstm":
        return op.LSTM(x, *weights, bias, None, *states, **options)
    if kind == "gru":
        return op.GRU(x, *weights, bias, None, states[0], linear_before_reset=1, **options)
    activations = [kind.removeprefix("rnn_").capitalize()] * (2 if bidirectional else 1)
    return op.RNN(x, *weights, bias, None, states[0], activations=activations, **options)


def _integers(weight: Any) -> Any:
    """The integers of a dequantized weight, None of any other."""
    producer = weight.producer()
    return producer.inputs[0] if producer is not None and producer.op_type == "DequantizeLinear" else None


def _scale(weight: Any) -> Any:
    return weight.producer().inputs[1]


def _dynamic_lstm() -> onnx.defs.OpSchema:
    """ONNX Runtime's LSTM on integer weights, as its documentation has it."""
    schema = onnx.defs.OpSchema
    optional = schema.FormalParameterOption.Optional
    kinds = {"T": ["tensor(float)"], "T1": ["tensor(int32)"], "T2": ["tensor(int8)", "tensor(uint8)"]}
    names = {"X": "T", "W": "T2", "R": "T2", "B": "T", "sequence_lens": "T1", "initial_h": "T", "initial_c": "T"}
    names |= {"P": "T", "W_scale": "T", "W_zero_point": "T2", "R_scale": "T", "R_zero_point": "T2"}
    needed = ("X", "W", "R", "W_scale", "W_zero_point", "R_scale", "R_zero_point")
    return schema(
        "DynamicQuantizeLSTM",
        "com.microsoft",
        1,
        inputs=[
            schema.FormalParameter(name, kind)
            if name in needed
            else schema.FormalParameter(name, kind, param_option=optional)
            for name, kind in names.items()
        ],
        outputs=[schema.FormalParameter(name, "T") for name in ("Y", "Y_h", "Y_c")],
        type_constraints=[(name, types, "") for name, types in kinds.items()],
        attributes=[
            schema.Attribute("hidden_size", schema.AttrType.INT),
            schema.Attribute("direction", schema.AttrType.STRING),
        ],
    )


def _dynamic(
    op: Any,
    contributed: Callable[..., Any],
    x: Any,
    weights: list[Any],
    scales: list[Any],
    bias: Any,
    states: list[Any],
    width: int,
    bidirectional: bool,
) -> Any:
    """Weights ``[directions, inputs, 4 · width]``, scales and zero points ``[directions, 4 · width]``."""
    columns = [op.Transpose(weight, perm=[0, 2, 1]) for weight in weights]
    zeros = op.Cast(op.Constant(value_ints=[0] * (4 * width)), to=_INT8)
    zero = _join(op, [zeros] * (2 if bidirectional else 1))
    direction = "bidirectional" if bidirectional else "forward"
    return contributed(_dynamic_lstm())(
        x, *columns, bias, None, *states, None, scales[0], zero, scales[1], zero, hidden_size=width, direction=direction
    )


def _reorder(op: Any, tensor: Any, kind: str, width: int) -> Any:
    if kind not in _ORDER:
        return tensor
    axis = op.Constant(value_ints=[0])
    gates = [
        op.Slice(tensor, op.Constant(value_ints=[gate * width]), op.Constant(value_ints=[(gate + 1) * width]), axis)
        for gate in _ORDER[kind]
    ]
    return op.Concat(*gates, axis=0)


def _join(op: Any, tensors: list[Any]) -> Any:
    """One entry per direction on a new first axis."""
    expanded = [op.Unsqueeze(tensor, op.Constant(value_ints=[0])) for tensor in tensors]
    return op.Concat(*expanded, axis=0) if len(expanded) > 1 else expanded[0]


def _part(op: Any, state: Any, first: int, count: int) -> Any:
    if state is None:
        return None
    ends = op.Constant(value_ints=[first]), op.Constant(value_ints=[first + count])
    return op.Slice(state, *ends, op.Constant(value_ints=[0]))
