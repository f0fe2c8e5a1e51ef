"""Against the optimum: no matrix of that rank is closer."""

import pytest
import torch

from fxcompress.analysis.statistics import Moments
from fxcompress.passes.low_rank.metric import data_metric, plain_metric
from fxcompress.passes.low_rank.spectra import spectrum
from fxcompress.passes.low_rank.truncate import truncate


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


@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1e18, 1e25])
def test_weights_whose_squares_leave_float32(scale):
    weight = torch.randn(1, 520, 600, generator=torch.Generator().manual_seed(8)) * scale
    for rank in (26, 200):
        made = truncate(weight, plain_metric(), rank)
        error = float((weight[0].double() - made.outer[0].double() @ made.inner[0].double()).norm())
        optimum = float(torch.linalg.svdvals(weight[0].double())[rank:].norm())
        assert error <= optimum * (1 + 1e-5)


def of_spectrum(values: torch.Tensor, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = len(values)
    left, right = (torch.linalg.qr(torch.randn(n, size, generator=generator)).Q for n in (size, width))
    return (left * values) @ right.T


STEPS = torch.arange(520) / 520
SPECTRA = {
    "gaussian": None,
    "falling slowly": 1 - STEPS,
    "falling fast": torch.exp(-14 * STEPS),
    "a power": 1 / (1 + 520 * STEPS),
    "all equal": torch.ones(520),
    "two levels": torch.where(STEPS < 0.3, 1.1, 0.1),
    "low and noise": torch.where(STEPS < 0.05, 1.0, 1e-3),
    "a spike": torch.cat([torch.tensor([1e3]), 1 - STEPS[1:]]),
    "very steep": torch.exp(-30 * STEPS),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_large_weights_come_as_close_as_any(name):
    values = SPECTRA[name]
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(520, 600, generator=generator) if values is None else of_spectrum(values, 600)
    energies = torch.linalg.svdvals(weight.double()).square()
    rounding = 1e-7 * float(weight.norm())  # of the factors, which are float32
    for rank, given in ((8, weight), (26, weight), (26, weight.T), (80, weight), (200, weight.T)):
        made = truncate(given[None], plain_metric(), rank)
        error = float((given.double() - made.outer[0].double() @ made.inner[0].double()).norm())
        optimum = float(energies[rank:].sum().sqrt())
        assert error <= optimum * (1 + 1e-5) + rounding
        assert abs(made.tail**0.5 - optimum) <= 1e-5 * optimum + rounding


def test_a_random_block_is_taken_where_it_costs_less(monkeypatch):
    weight = of_spectrum(SPECTRA["falling slowly"], 600)[None]
    assert truncate(weight, plain_metric(), 26).randomized
    assert not truncate(weight, plain_metric(), 26, randomized=False).randomized
    assert not truncate(weight, plain_metric(), 200).randomized  # too many: all of them cost no more
    monkeypatch.setattr("fxcompress.passes.low_rank.leading._LACKING", 1e-30)  # it never converges
    made = truncate(weight, plain_metric(), 26)
    assert not made.randomized
    assert abs(made.tail / float(torch.linalg.svdvals(weight.double())[0, 26:].square().sum()) - 1) < 1e-5


def test_on_data_large_weights_lose_the_tail_of_their_spectrum():
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(520, 560, generator=generator)
    rows = torch.randn(2000, 560, generator=generator) * torch.logspace(0, -1, 560)
    made = truncate(weight[None], data_metric(moments_of(rows)), 40)
    assert made.randomized
    error = weight.double() - made.outer[0].double() @ made.inner[0].double()
    loss = float((rows.double() @ error.T).square().sum())
    tail = float(torch.linalg.svdvals(weight.double() @ rows.double().T)[40:].square().sum())
    assert abs(loss - tail) < 1e-4 * tail
    assert abs(made.tail - tail) < 1e-4 * tail


def test_spectrum_is_that_of_the_weight():
    weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(6))
    torch.testing.assert_close(spectrum(weight[None], plain_metric())[0].sqrt(), torch.linalg.svdvals(weight.double()))


def test_a_rank_that_is_full_is_handed_back():
    assert truncate(torch.randn(1, 8, 9), plain_metric(), 8) == 8
    assert truncate(torch.randn(1, 8, 9), plain_metric(), lambda energy: 11) == 11


def test_half_precision_weights_stay_so():
    made = truncate(torch.randn(1, 20, 30).bfloat16(), plain_metric(), 4)
    assert made.outer.dtype == made.inner.dtype == torch.bfloat16
