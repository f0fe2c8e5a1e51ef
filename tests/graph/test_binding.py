"""Calls as users write them, to the flat list of leaves."""

from __future__ import annotations

from typing import Any

import pytest
from torch.utils import _pytree as pytree

from fxcompress.errors import PreconditionError
from fxcompress.graph.binding import bind, signature_text
from fxcompress.graph.structure import Structure

# forward(x, pair, flag=None, *, mask, extra): called as forward(1, (2, 3), None, mask=4, extra={"scale": 5})
CALL = Structure.from_spec(
    pytree.tree_structure(((1, (2, 3), None), {"mask": 4, "extra": {"scale": 5}})), {3: None}
).with_parameters(["x", "pair", "flag", "mask", "extra"])
NAMES = ["x", "pair_0", "pair_1", "mask", "extra_scale"]


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((1, (2, 3), None), {"mask": 4, "extra": {"scale": 5}}),
        ((1, [2, 3]), {"extra": {"scale": 5}, "mask": 4}),
        ((1,), {"pair": (2, 3), "mask": 4, "extra": {"scale": 5}}),
        ((), {"x": 1, "pair": (2, 3), "flag": None, "mask": 4, "extra": {"scale": 5}}),
        ((1, (2, 3), None, 4, {"scale": 5}), {}),
        ((1, (2, 3)), {"mask": 4, "extra_scale": 5}),
        ((1,), {"pair_1": 3, "pair_0": 2, "mask": 4, "extra_scale": 5}),
        ((), {"x": 1, "pair_0": 2, "pair_1": 3, "mask": 4, "extra_scale": 5}),
        ((1, 2, 3, 4, 5), {}),
        ((1, 2), {"pair_1": 3, "mask": 4, "extra_scale": 5}),
        (({"x": 1, "pair": (2, 3), "mask": 4, "extra": {"scale": 5}},), {}),
        (({"x": 1, "pair_0": 2, "pair_1": 3, "mask": 4, "extra_scale": 5},), {}),
    ],
)
def test_every_way_of_calling(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    assert bind(CALL, NAMES, args, kwargs) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, "missing 'x', 'pair_0', 'pair_1', 'mask', 'extra_scale'"),
        ((1, (2, 3)), {"mask": 4}, "missing 'extra_scale'"),
        ((1, (2, 3)), {"x": 1, "mask": 4, "extra": {"scale": 5}}, "argument 'x' is given twice"),
        ((1, (2, 3)), {"pair_0": 1, "mask": 4, "extra_scale": 5}, "parts of argument 'pair' are given twice"),
        ((1, (2, 3)), {"mask": 4, "extra": {"scale": 5}, "typo": 6}, "unknown argument 'typo'"),
        ((1, (2, 3), None, 4, {"scale": 5}, 6), {}, "6 positional arguments are more than the 5 parameters"),
        ((1, (2, 3, 4)), {"mask": 4, "extra_scale": 5}, "expected a tuple of 2, got tuple of 3"),
        ((1, (2, 3), True), {"mask": 4, "extra_scale": 5}, "expected None, which capture made part of the graph"),
    ],
)
def test_wrong_calls_say_what_was_expected_and_given(
    args: tuple[Any, ...], kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(PreconditionError) as caught:
        bind(CALL, NAMES, args, kwargs)
    assert message in caught.value.problem
    assert "expected (x, pair=(pair_0, pair_1), flag=None, mask, extra={extra_scale})" in caught.value.problem
    assert "given (" in caught.value.problem
    assert "x, pair_0, pair_1, mask, extra_scale" in str(caught.value.remedy)


def test_a_parameter_that_is_a_dict_takes_its_dict() -> None:
    structure = Structure.from_spec(pytree.tree_structure((({"a": 1, "b": 2},), {}))).with_parameters(["batch"])
    names = ["batch_a", "batch_b"]
    assert bind(structure, names, ({"b": 2, "a": 1},), {}) == [1, 2]
    assert bind(structure, names, ({"batch_a": 1, "batch_b": 2},), {}) == [1, 2]
    assert bind(structure, names, (), {"batch": {"a": 1, "b": 2}}) == [1, 2]


def test_nameless_parameters_go_by_position_or_leaf_name() -> None:
    structure = Structure.from_spec(pytree.tree_structure(((1, 2), {}))).with_parameters([])
    assert bind(structure, ["a", "b"], (1, 2), {}) == [1, 2]
    assert bind(structure, ["a", "b"], (1,), {"b": 2}) == [1, 2]
    assert signature_text(structure, ["a", "b"]) == "a, b"
    with pytest.raises(PreconditionError, match="missing 'b'"):
        bind(structure, ["a", "b"], (1,), {})
