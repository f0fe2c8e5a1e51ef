"""Shapes of recurrent layers without unrolling them.

On fake tensors torch works out the shape of an ``nn.LSTM`` or ``nn.GRU`` by running every time step: half a minute for
two layers and thirty steps. The shapes are known beforehand. So while a model is captured, or shapes are propagated,
calls are diverted to operators of our own that have the same schema and know their shapes; the graph then gets the
ATen operator back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["KnownShapes", "original"]

aten = torch.ops.aten

_NAMES = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_LIBRARY = torch.library.Library("fxcompress", "FRAGMENT")


def _shapes(data: torch.Tensor, hx: Any, params: Any, *options: Any) -> tuple[torch.Tensor, ...]:
    states = list(hx) if isinstance(hx, (list, tuple)) else [hx]
    directions = 2 if options[4] else 1
    output = data.new_empty((data.shape[0], data.shape[1], states[0].shape[2] * directions))
    return (output, *(state.new_empty(state.shape) for state in states))


def _divert(name: str) -> Any:
    schema = str(getattr(aten, name).input._schema)
    _LIBRARY.define(name + schema[schema.index("(") :])
    torch.library.register_fake(f"fxcompress::{name}", _shapes, lib=_LIBRARY)
    return getattr(torch.ops.fxcompress, name).default


_DIVERTED: dict[Callable[..., Any], Any] = {getattr(torch, name): _divert(name) for name in _NAMES}
_ORIGINAL = {diverted: getattr(aten, str(diverted).split(".")[1]).input for diverted in _DIVERTED.values()}


def original(target: Any) -> Any:
    """The ATen operator that ``target`` stands for; ``target`` itself if it is not one of ours."""
    return _ORIGINAL.get(target, target)


class KnownShapes(TorchFunctionMode):
    """Inside the block recurrent calls on whole sequences (not on packed ones) tell their shapes at once."""

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        diverted = _DIVERTED.get(func)
        if diverted is not None and len(args) == 9 and isinstance(args[2], (list, tuple)) and not kwargs:
            return diverted(*args)
        return func(*args, **(kwargs or {}))
