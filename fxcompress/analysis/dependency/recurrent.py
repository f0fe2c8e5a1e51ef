"""Rules of recurrent layers and cells: hidden units, projections, given states.

A unit without weights holds ``h = 0``: an LSTM's ``c' = σ(0)·c + σ(0)·tanh(0)`` and ``h = σ(0)·tanh(c')``; a GRU's
``h' = (1−σ(0))·tanh(0) + σ(0)·h``. So it stays zero if it starts from zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from fxcompress.analysis.dependency.builder import Builder, Rule
from fxcompress.analysis.dependency.convolution import made_by
from fxcompress.analysis.dependency.layout import Dim, Factor, Layout, blocks, dirtied, inert, is_live, labelled, vector
from fxcompress.analysis.dependency.zeros import combine, contract, every
from fxcompress.capture.raising import call_arguments

__all__ = ["GATES", "RULES", "recurrent"]

aten = torch.ops.aten

__all__ = ["recurrent"]

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def recurrent(b: Builder, node: fx.Node, module: nn.RNNBase, path: str, source: Layout) -> Any:
    """The layouts of the sequence and the states; all layers and directions have one width."""
    projected = module.proj_size > 0
    directions = 2 if module.bidirectional else 1
    cell = b.fresh(module.hidden_size, made=True)
    hidden = b.fresh(module.proj_size, made=True) if projected else cell
    out: Dim = (Factor(directions), *hidden) if directions == 2 else hidden
    _weigh(b, node, module, path, (source[-1], out, cell, hidden))
    for dim in source[:-1]:
        if is_live(dim):
            b.barrier(node, "a recurrent layer runs along this dimension", [dim])
    if len(node.args) > 1 and _dirty(b, node, node.args[1], (hidden, cell) if projected else (cell, cell)):
        out, hidden, cell = dirtied(out), dirtied(hidden), dirtied(cell)
    batch = source[:-2] if len(source) == 2 else (source[0],) if module.batch_first else (source[1],)
    count = inert(module.num_layers * directions)
    state = (count, *batch, hidden)
    sequence = (*source[:-1], out)
    return [sequence, [state, (count, *batch, cell)]] if isinstance(module, nn.LSTM) else [sequence, state]


def _weigh(b: Builder, node: fx.Node, module: nn.RNNBase, path: str, dims: tuple[Dim, Dim, Dim, Dim]) -> None:
    read, out, cell, hidden = dims
    stacked: Dim = (Factor(GATES[type(module).__name__]), *cell)
    layouts: dict[str, tuple[Dim, ...]] = {
        "weight_ih": (stacked, read),
        "weight_hh": (stacked, hidden),
        "weight_hr": (hidden, cell),
        "bias_ih": (stacked,),
        "bias_hh": (stacked,),
    }
    for names in module._all_weights:
        for name in names:
            kind, _, rest = name.partition("_l")
            layout = layouts[kind]
            if kind == "weight_ih" and not rest.startswith("0"):
                layout = (stacked, out)
            makes = (0,) if len(layout) == 2 else ()
            b.weight(f"{path}.{name}", getattr(module, name), layout=layout, site=node.name, makes=makes)


def _dirty(b: Builder, node: fx.Node, given: Any, widths: tuple[Dim, Dim]) -> bool:
    """Whether a given state is anything but zero at removed units; its width follows the layer's."""
    dirty = False
    states = list(given) if isinstance(given, (tuple, list)) else [given]
    for state, width in zip(states, widths, strict=False):
        dim = b.layout(state)[-1]
        b.align(width, dim, node.name)
        dirty = dirty or not is_live(dim) or any(bool(block.dirt.any()) for block in blocks(dim))
    return dirty


# --- one step at a time, by weights that the graph holds -------------------------------------------------------------


def _cell(gates: int) -> Rule:
    """``(input, state, weight_ih, weight_hh, biases) → state'``; of an LSTM, the state is hidden and cell."""

    def rule(b: Builder, node: fx.Node) -> Any:
        a = call_arguments(node)
        states = list(a["hx"]) if isinstance(a["hx"], (list, tuple)) else [a["hx"]]
        source, read, back = (b.layout(a[key]) for key in ("input", "w_ih", "w_hh"))
        labels = vector(made_by(b, a["w_ih"], read[0]))
        if labels is None:
            b.barrier(node, "the gates' weights are computed in a way that cannot be followed")
            made: Layout = tuple(inert(size) for size in _shape(node))
            return [made] * len(states) if len(states) > 1 else made
        rows = labels.reshape(gates, -1)
        b.labels.unify(rows, rows[:1])
        hidden = labelled(rows[0])
        stacked: Dim = (Factor(gates), *hidden)
        b.align(stacked, made_by(b, a["w_hh"], back[0]), node.name)
        for key in ("b_ih", "b_hh"):
            if isinstance(a[key], fx.Node):
                b.align(stacked, b.layout(a[key])[0], node.name)
        contract(b, node, [source[-1], read[1]])
        contract(b, node, [hidden, back[1]])
        if _dirty(b, node, states, (hidden, hidden)) and gates > 1:
            hidden = dirtied(hidden)  # a cell without gates forgets its state
        leads = [layout[:-1] for layout in (source, *map(b.layout, states))]
        batch = [combine(b, node, list(dims), every) for dims in zip(*leads, strict=True)]
        made = (*map(dirtied, batch), hidden)
        return [made] * len(states) if len(states) > 1 else made

    return rule


def _shape(node: fx.Node) -> Any:
    value = node.meta["val"]
    return (value[0] if isinstance(value, (tuple, list)) else value).shape


RULES: dict[Any, Rule] = {
    aten.lstm_cell.default: _cell(4),
    aten.gru_cell.default: _cell(3),
    aten.rnn_tanh_cell.default: _cell(1),
    aten.rnn_relu_cell.default: _cell(1),
}
