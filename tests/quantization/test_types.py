"""Grids cover their range, hold zero exactly, and survive empty ranges."""

import pytest
import torch

from fxcompress.quantization.types import QuantType, parameters_of_range

UINT8, INT8 = QuantType(8, signed=False, symmetric=False), QuantType(8, signed=True, symmetric=True, narrow=True)


def grid(low, high, kind):
    scale, zero = parameters_of_range(torch.tensor(low), torch.tensor(high), kind)
    return (kind.minimum - zero) * scale, (kind.maximum - zero) * scale, scale, zero


@pytest.mark.parametrize(
    ("low", "high"), [(-1.0, 3.0), (0.0, 6.0), (-2.0, 0.0), (1.0, 5.0), (-7.0, -3.0), (-1e-3, 1e3)]
)
@pytest.mark.parametrize("kind", [UINT8, INT8, QuantType(7, True, True), QuantType(8, False, True), QuantType(4)])
def test_range_is_covered_within_one_step(low, high, kind):
    least, most, scale, zero = grid(low, high, kind)
    assert least <= min(low, 0) + scale and most >= max(high, 0) - scale
    assert kind.minimum <= zero <= kind.maximum  # zero is on the grid
    assert zero.dtype == torch.int32 and scale.dtype == torch.float32


def test_values_after_a_relu_use_the_whole_type():
    _, most, _, zero = grid(0.0, 6.0, UINT8)
    assert zero == 0 and torch.isclose(most, torch.tensor(6.0))


def test_symmetric_grids_have_no_offset():
    _, _, scale, zero = grid(-1.0, 2.54, INT8)
    assert zero == 0 and torch.isclose(scale, torch.tensor(0.02))


def test_an_empty_range_has_scale_one():
    for kind in (UINT8, INT8):
        _, _, scale, zero = grid(0.0, 0.0, kind)
        assert scale == 1 and zero == 0
    scale, _ = parameters_of_range(torch.tensor([0.0, -1.0]), torch.tensor([0.0, 1.0]), INT8)
    assert scale[0] == 1 and scale[1] < 0.01
