"""Profiles: defaults from the examples, the user's own, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.export import Dim

from fxcompress.backends.signature import TensorSpec, signature_of
from fxcompress.backends.tensorrt_profiles import ranges_of, settle_profiles, symbols_of
from fxcompress.capture import capture
from fxcompress.errors import BackendError, OptionError

IMAGE = TensorSpec("x", ("batch", 3, "height", 32), "float32", example=(2, 3, 48, 32))
MASK = TensorSpec("mask", ("2*batch", "height//4"), "float32", example=(4, 12))


def test_defaults_come_from_the_example() -> None:
    (profile,) = settle_profiles([IMAGE, MASK])
    assert profile.sizes == {"batch": (1, 2, 8), "height": (24, 48, 192)}
    assert profile.shapes["x"] == ((1, 3, 24, 32), (2, 3, 48, 32), (8, 3, 192, 32))
    assert profile.shapes["mask"] == ((2, 6), (4, 12), (16, 48))
    assert str(profile) == "batch 1 to 8 (tuned for 2), height 24 to 192 (tuned for 48)"


def test_fixed_sizes_need_no_profile() -> None:
    assert settle_profiles([TensorSpec("x", (2, 3), "float32")]) == ()


def test_several_profiles_and_what_they_leave_out() -> None:
    first, second = settle_profiles([IMAGE], ({"batch": (1, 1, 4)}, {"batch": (4, 32, 64), "height": (48, 48, 48)}))
    assert first.sizes == {"batch": (1, 1, 4), "height": (24, 48, 192)}
    assert second.shapes == {"x": ((4, 3, 48, 32), (32, 3, 48, 32), (64, 3, 48, 32))}


def test_the_graph_limits_the_range() -> None:
    assert settle_profiles([IMAGE], (), {"height": (40, 64), "batch": (2, 3)})[0].sizes == {
        "batch": (1, 2, 3),
        "height": (40, 48, 64),
    }
    with pytest.raises(OptionError, match="captured with 'batch' up to 3") as caught:
        settle_profiles([IMAGE], ({"batch": (1, 2, 4)},), {"batch": (2, 3)})
    assert "dynamic_shapes" in str(caught.value.remedy)


def test_unknown_symbols_and_missing_examples() -> None:
    with pytest.raises(OptionError, match="no input has a size called 'bach'") as caught:
        settle_profiles([IMAGE], ({"bach": (1, 2, 3)},))
    assert "did you mean 'batch'" in str(caught.value.remedy)
    with pytest.raises(BackendError, match="no size is known that 'n'") as missing:
        settle_profiles([TensorSpec("x", ("n",), "float32")])
    assert "example_inputs" in str(missing.value.remedy)


@pytest.mark.parametrize("size", ["Max(1,batch)", "batch/2", "-batch"])
def test_expressions_that_cannot_be_computed(size: str) -> None:
    with pytest.raises(BackendError, match=r"cannot be computed|no size is known"):
        settle_profiles([TensorSpec("x", ("batch", size), "float32", example=(2, 2))])


def test_sizes_that_shrink_are_refused() -> None:
    with pytest.raises(BackendError, match="shrink"):
        settle_profiles([TensorSpec("x", ("batch", "10-batch"), "float32", example=(2, 8))])


def test_symbols_are_told_once_in_order() -> None:
    assert symbols_of([IMAGE, MASK]) == ["batch", "height"]


def test_ranges_of_a_captured_graph() -> None:
    inputs = (torch.randn(2, 3, 16, 16),)
    shapes = {"input": {0: Dim("batch"), 2: Dim("height", min=8, max=20)}}
    graph = capture(nn.Conv2d(3, 4, 3).eval(), inputs, dynamic_shapes=shapes)
    ranges = ranges_of(graph)
    assert ranges["height"] == (8, 20)
    (profile,) = settle_profiles(signature_of(graph, inputs).inputs, (), ranges)
    assert profile.sizes == {"batch": (1, 2, 8), "height": (8, 16, 20)}
