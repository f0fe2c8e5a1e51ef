"""Observers: each against what it promises, on distributions with outliers."""

import pytest
import torch

from fxcompress.analysis.statistics import Histogram
from fxcompress.errors import OptionError
from fxcompress.quantization.observers import (
    RunningSums,
    check_observer,
    merged,
    observed_range,
    statistic_of,
    weight_range,
)
from fxcompress.quantization.types import QuantType, parameters_of_range

UINT8, INT4 = QuantType(8, signed=False, symmetric=False), QuantType(4)


def histogram(*batches):
    counts = Histogram().start(None)
    for batch in batches:
        counts.add(batch)
    return counts.value()


@pytest.fixture
def values():
    torch.manual_seed(0)
    return torch.cat([torch.randn(20000), torch.tensor([40.0])])


def error(values, low, high, kind):
    scale, zero = parameters_of_range(torch.tensor(low), torch.tensor(high), kind)
    on_grid = ((values / scale + zero).round().clamp(kind.minimum, kind.maximum) - zero) * scale
    return (on_grid - values).square().mean().item()


def test_minmax_covers_all(values):
    seen = [(half.min(), half.max()) for half in values.flatten().chunk(2)]  # as `Range` gives them
    assert observed_range("minmax", seen, UINT8, 0) == (values.min().item(), values.max().item())


def test_percentile_leaves_out_the_rarest(values):
    low, high = observed_range("percentile", [histogram(values)], UINT8, 99.9)
    assert -4.5 < low < -2.5 and 2.5 < high < 4.5


@pytest.mark.parametrize("kind", [INT4, QuantType(4, signed=False, symmetric=False)])
def test_mse_beats_covering_all(values, kind):
    clipped = error(values, *observed_range("mse", [histogram(values)], kind, 0), kind)
    assert clipped < 0.7 * error(values, values.min().item(), 40.0, kind)


def test_entropy_clips_a_lonely_outlier(values):
    low, high = observed_range("entropy", [histogram(values)], INT4, 0)
    assert high < 40.0 and low >= values.min().item()


def test_moving_average_follows_batches():
    extremes = statistic_of("moving_average").start(None)
    for top in (1.0, 2.0):
        extremes.add(torch.tensor([-1.0, top]))
    assert observed_range("moving_average", [extremes.value()], UINT8, 0) == pytest.approx((-1.0, 1.1))


def test_histograms_of_different_reach_merge():
    torch.manual_seed(0)
    small, large = torch.randn(500), 30 * torch.randn(500)
    together, apart = histogram(small, large), merged([histogram(small), histogram(large)])
    assert torch.equal(together.edges, apart.edges) and apart.counts.sum() == 1000
    assert (together.low, together.high) == (apart.low, apart.high)


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_ranges_of_weights(axis):
    weight = torch.randn(4, 3, 5)
    low, high = weight_range(weight, axis, INT4, "minmax")
    others = tuple(dim for dim in range(3) if dim != axis)
    assert torch.equal(high, weight.amax(others) if axis is not None else weight.max())
    clipped = weight_range(weight, axis, INT4, "mse")
    assert (clipped[1] <= high).all() and (clipped[0] >= low).all()


def test_unknown_observers_are_refused():
    with pytest.raises(OptionError, match="no observer 'msee'"):
        check_observer("msee")


@pytest.mark.parametrize("kind", [UINT8, INT4, QuantType(8)])
@pytest.mark.parametrize("make", [torch.Tensor.clone, torch.relu, torch.exp, lambda x: -x.exp()])
def test_error_of_a_range_from_running_sums(values, make, kind):
    """The same as bin by bin: what is clipped, and a twelfth of the squared step for the rest but zero."""
    seen = histogram(make(values.clamp(-4, 4)))
    used = seen.counts > 0
    counts, centres = seen.counts[used], ((seen.edges[1:] + seen.edges[:-1]) / 2)[used].clamp(seen.low, seen.high)
    low, high = (end * torch.linspace(0.1, 1, 9).double() for end in (min(seen.low, 0.0), max(seen.high, 0.0)))
    scale, zero = (part.double()[:, None] for part in parameters_of_range(low, high, kind))
    outside = centres - centres.clamp((kind.minimum - zero) * scale, (kind.maximum - zero) * scale)
    inside = (outside == 0) & (centres != 0)
    expected = ((outside.square() + inside * scale.square() / 12) * counts).sum(1)
    torch.testing.assert_close(RunningSums(counts, centres).squared_error(low, high, kind), expected, rtol=1e-9, atol=0)
