"""Verification: what counts as an error, and what is said about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from onnx import helper

from fxcompress.backends.engine import Engine
from fxcompress.backends.onnxruntime import OnnxRuntimeEngine
from fxcompress.backends.signature import TensorSpec
from fxcompress.backends.verification import relative_error, verify_engine
from fxcompress.errors import VerificationError

INF, NAN = float("inf"), float("nan")
SETS = [[torch.tensor([[1.0, -2.0]])], [torch.tensor([[4.0, 3.0], [2.0, 1.0]])]]


@pytest.fixture
def engine(open_engine: Callable[..., OnnxRuntimeEngine]) -> Engine:
    """x → {"double": 2x, "square": x²}"""
    x, double = TensorSpec("x", ("batch", 2), "float32"), TensorSpec("double", ("batch", 2), "float32")
    square = TensorSpec("square", ("batch", 2), "float32")
    nodes = [helper.make_node("Add", ["x", "x"], ["double"]), helper.make_node("Mul", ["x", "x"], ["square"])]
    return open_engine(nodes, [x], [double, square], result={"double": 0, "square": 0})


@pytest.mark.parametrize(
    ("reference", "value", "error"),
    [
        ([1.0, -4.0], [1.0, -4.0], 0.0),
        ([1.0, -4.0], [1.5, -4.0], 0.125),
        ([0.0, 0.0], [0.0, 0.5], 0.5),
        ([1.0, NAN], [1.0, NAN], 0.0),
        ([1.0, NAN], [1.0, 2.0], INF),
        ([1.0, 2.0], [1.0, NAN], INF),
        ([INF, -INF, 2.0], [INF, -INF, 1.0], 0.5),
        ([INF, 1.0], [-INF, 1.0], INF),
        ([NAN], [NAN], 0.0),
        ([], [], 0.0),
        ([True, False], [True, True], 1.0),
        ([2**40, 1], [2**40, 2], 1.0),
        ([2**40, 2**35], [2**40, 2**35 + 1], 2.0**-40),
        ([1 + 1j], [1 + 2j], 1.0),
    ],
)
def test_relative_error(reference: list[Any], value: list[Any], error: float) -> None:
    assert relative_error(torch.tensor(reference), torch.tensor(value)) == error


def test_low_precision_differences_are_not_rounded_away() -> None:
    reference = torch.tensor([1000.0, 1.0], dtype=torch.float16)
    assert relative_error(reference, reference + torch.tensor([0.0, 0.5], dtype=torch.float16)) == 0.0005


def test_what_a_mask_hides_does_not_hide_errors() -> None:
    """Logits of which some are the lowest number there is: the others are held to their own size."""
    lowest = torch.finfo(torch.float32).min
    logits = torch.tensor([[1.0, -2.0, lowest], [4.0, lowest, lowest]])
    assert relative_error(logits, logits + torch.tensor([1.0, 0.0, 0.0])) == 0.25
    assert relative_error(logits, torch.where(logits == lowest, 0.5 * lowest, logits)) == 0.5, "marks that differ"
    assert relative_error(torch.tensor([999.0, 1.0]), torch.tensor([999.0, 1.5])) == pytest.approx(0.5 / 999)
    assert relative_error(torch.tensor([lowest, lowest]), torch.tensor([lowest, lowest])) == 0


@pytest.mark.parametrize("form", ["dict", "flat", "tuple"])
def test_errors_of_every_output(engine: Engine, form: str) -> None:
    def expected(x: torch.Tensor) -> Any:
        parts = {"double": 2 * x, "square": x * x * 1.25}
        return parts if form == "dict" else list(parts.values()) if form == "flat" else tuple(parts.values())

    errors = verify_engine(engine, expected, SETS, tolerance=0.2)
    assert errors == {"double": 0.0, "square": pytest.approx(0.2, abs=1e-6)}


def test_the_worst_output_and_its_inputs_are_named(engine: Engine) -> None:
    def expected(x: torch.Tensor) -> Any:
        return 2 * x * (1 + 1e-3), x * x * (1 + (1e-2 if len(x) == 2 else 0))

    with pytest.raises(VerificationError, match=r"relative 0\.0099; 0\.0001 is allowed") as caught:
        verify_engine(engine, expected, SETS, tolerance=1e-4)
    assert caught.value.where == "output 'square' for inputs of shape (2, 2)"


def test_nan_in_one_of_them(engine: Engine) -> None:
    with pytest.raises(VerificationError, match="relative inf") as caught:
        verify_engine(engine, lambda x: (2 * x, x * x * NAN), SETS, tolerance=1e9)
    assert "output 'square'" in str(caught.value)


def test_a_nan_tolerance_allows_nothing(engine: Engine) -> None:
    with pytest.raises(VerificationError):
        verify_engine(engine, lambda x: (2 * x, x * x), SETS, tolerance=NAN)


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        (lambda x: (2 * x[:1], x * x), r"gives torch.float32 \(2, 2\), PyTorch torch.float32 \(1, 2\)"),
        (lambda x: (2 * x.double(), x * x), r"PyTorch torch.float64 \(1, 2\)"),
        (lambda x: [x], "different structures"),
        (lambda x: {"double": x}, "different structures"),
    ],
)
def test_other_shapes_dtypes_and_structures(engine: Engine, expected: Callable[..., Any], message: str) -> None:
    with pytest.raises(VerificationError, match=message):
        verify_engine(engine, expected, SETS, tolerance=1.0)
