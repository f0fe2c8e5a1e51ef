"""Signatures: names, shapes, dtypes and structures read from captured graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxcompress.backends.signature import TensorSpec, signature_of
from fxcompress.errors import GraphError

Capture = Callable[..., fx.GraphModule]


class Mixed(nn.Module):
    def forward(self, ids: Tensor, pair: tuple[Tensor, Tensor], *, mask: Tensor, flag: Any = None) -> dict[str, Any]:
        logits = pair[0] + pair[1] * mask
        return {"logits": logits, "extra": (ids.repeat(2, 1), 3, None), "ids": ids + 1}


def inputs() -> tuple[tuple[Any, ...], dict[str, Any]]:
    pair = (torch.ones(2, 4, dtype=torch.float16), torch.ones(2, 4, dtype=torch.float16))
    return (torch.tensor([[3], [9]]), pair), {"mask": torch.ones(2, 1, dtype=torch.bool), "flag": None}


def test_names_shapes_dtypes_and_structures(captured: Capture) -> None:
    args, kwargs = inputs()
    signature = signature_of(captured(Mixed(), args, kwargs))
    assert signature.inputs == (
        TensorSpec("ids", ("batch", 1), "int64"),
        TensorSpec("pair_0", ("batch", 4), "float16"),
        TensorSpec("pair_1", ("batch", 4), "float16"),
        TensorSpec("mask", ("batch", 1), "bool"),
    )
    assert signature.outputs == (
        TensorSpec("logits", ("batch", 4), "float16"),
        TensorSpec("extra_0", ("2*batch", 1), "int64"),
        TensorSpec("ids_1", ("batch", 1), "int64"),
    ), "an output never shares an input's name"
    assert signature.input_structure.flatten((args, kwargs)) == [args[0], *args[1], kwargs["mask"]]
    assert signature.input_structure.children[0].keys == ("ids", "pair")
    assert signature.output_structure.unflatten([1, 2, 3]) == {"logits": 1, "extra": (2, 3, None), "ids": 3}


def test_examples_are_remembered(captured: Capture) -> None:
    args, kwargs = inputs()
    signature = signature_of(captured(Mixed(), args, kwargs), [args[0], *args[1], kwargs["mask"]])
    ids, pair, _, mask = signature.inputs
    assert (ids.example, ids.low, ids.high) == ((2, 1), 3, 9)
    assert (pair.example, pair.low, mask.low) == ((2, 4), None, None)


def test_a_graph_that_was_not_captured_is_refused() -> None:
    with pytest.raises(GraphError, match="was not captured by fxcompress"):
        signature_of(fx.symbolic_trace(nn.Linear(2, 2)))
