"""Against the optimum: no matrix of that rank is closer."""

import pytest
import torch

from fxcompress.analysis.statistics import Moments
from fxcompress.passes.low_rank.metric import data_metric, plain_metric
from fxcompress.passes.low_rank.truncate import Factors, spectrum, truncate


def moments_of(rows: torch.Tensor) -> Moments:
    wide = rows.double()[None]
    return Moments(wide.mT @ wide, wide.sum(1), len(rows))


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (50, 50), (7, 200)])
@pytest.mark.parametrize("rank", [1, 5])
def test_plain_equals_the_eckart_young_error(shape, rank):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    made = truncate(weight[None], plain_metric(), rank)
    error = (weight - made.outer[0] @ made.inner[0]).double().norm()
    optimum = torch.linalg.svdvals(weight.double())[rank:].norm()
    assert float((error - optimum).abs() / optimum) < 1e-5
    assert abs(made.tail**0.5 - float(optimum)) < 1e-9 * float(optimum)
    balance = made.outer[0].norm(dim=0) / made.inner[0].norm(dim=1)
    torch.testing.assert_close(balance, torch.ones(rank))


@pytest.mark.parametrize("shape", [(30, 50), (50, 30)])
def test_whitened_loss_on_the_data_equals_the_tail_of_its_spectrum(shape):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=generator)
    mix = torch.randn(shape[1], shape[1], generator=generator)
    rows = torch.randn(400, shape[1], generator=generator) @ mix * torch.logspace(0, -3, shape[1])
    metric = data_metric(moments_of(rows))
    made = truncate(weight[None], metric, 8)
    approximation = made.outer[0] @ made.inner[0]
    loss = float((rows @ (weight - approximation).T).double().square().sum())
    root = torch.linalg.cholesky(rows.double().T @ rows.double())
    tail = float(torch.linalg.svdvals(weight.double() @ root)[8:].square().sum())
    assert metric.jitter == 0
    assert abs(loss - tail) / tail < 1e-4
    assert abs(made.tail - tail) / tail < 1e-4
    plain = truncate(weight[None], plain_metric(), 8)
    worse = float((rows @ (weight - plain.outer[0] @ plain.inner[0]).T).double().square().sum())
    assert worse > loss


def test_fewer_rows_than_features_needs_jitter_and_says_so():
    rows = torch.randn(10, 40, generator=torch.Generator().manual_seed(2))
    metric = data_metric(moments_of(rows))
    assert metric.jitter > 0
    weight = torch.randn(30, 40, generator=torch.Generator().manual_seed(3))
    made = truncate(weight[None], metric, 12)
    loss = float(((weight - made.outer[0] @ made.inner[0]) @ rows.T).square().sum())
    assert loss < 1e-6 * float((weight @ rows.T).square().sum())  # rank 12 covers all that 10 rows can tell


def test_groups_are_truncated_each_for_itself():
    weight = torch.randn(3, 12, 20, generator=torch.Generator().manual_seed(4))
    made = truncate(weight, plain_metric(), 4)
    for group in range(3):
        alone = truncate(weight[group : group + 1], plain_metric(), 4)
        torch.testing.assert_close(made.outer[group] @ made.inner[group], alone.outer[0] @ alone.inner[0])


def test_zero_matrix():
    made = truncate(torch.zeros(1, 10, 12), plain_metric(), 3)
    assert not bool((made.outer @ made.inner).any())
    assert made.tail == 0


def test_randomized_is_taken_where_it_is_accurate_and_only_there():
    generator = torch.Generator().manual_seed(5)
    low = torch.randn(1100, 20, generator=generator) @ torch.randn(20, 1100, generator=generator)
    low = low + 1e-3 * torch.randn(1100, 1100, generator=generator)
    fast = truncate(low[None], plain_metric(), 20)
    assert isinstance(fast, Factors)
    assert fast.randomized
    slow = truncate(low[None], plain_metric(), 20, randomized=False)
    assert not slow.randomized
    errors = [float((low - made.outer[0] @ made.inner[0]).norm()) for made in (fast, slow)]
    assert abs(errors[0] - errors[1]) < 1e-5 * errors[1]
    flat = torch.randn(1100, 1100, generator=generator)
    assert not truncate(flat[None], plain_metric(), 20).randomized


def test_spectrum_is_that_of_the_weight():
    weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(6))
    torch.testing.assert_close(spectrum(weight[None], plain_metric())[0].sqrt(), torch.linalg.svdvals(weight.double()))


def test_a_rank_that_is_full_is_handed_back():
    assert truncate(torch.randn(1, 8, 9), plain_metric(), 8) == 8
    assert truncate(torch.randn(1, 8, 9), plain_metric(), lambda energy: 11) == 11


def test_half_precision_weights_stay_so():
    made = truncate(torch.randn(1, 20, 30).bfloat16(), plain_metric(), 4)
    assert made.outer.dtype == made.inner.dtype == torch.bfloat16
