"""Spectra, and ranks that follow from them, where there is little room."""

import re

import pytest
import torch
from torch import nn

from fxcompress.analysis.statistics import PackedMoments, Triangle
from fxcompress.capture import capture
from fxcompress.passes import FactorizeLinear, PassContext
from fxcompress.passes.low_rank.grams import Unmade
from fxcompress.passes.low_rank.metric import Metric, data_metric, diagonal_metric, output_metric, plain_metric
from fxcompress.passes.low_rank.spectra import spectrum
from fxcompress.passes.low_rank.truncate import truncate

SIZE = 512


def outputs_of(weight: torch.Tensor, rows: torch.Tensor) -> Metric:
    made = rows.double() @ weight.double().T
    half = Triangle.zeros(len(weight), made.device)
    half.add_square(made)
    return output_metric(PackedMoments(half, made.sum(0)[None], len(made)), len(weight))


def case(rows: int = 2 * SIZE) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(rows, SIZE, generator=generator) * torch.logspace(0, -2, SIZE)
    return torch.randn(SIZE, SIZE, generator=generator), data


@pytest.mark.parametrize("kind", ["plain", "outputs", "few outputs", "diagonal"])
@pytest.mark.parametrize("spend", [False, True])
def test_float32_tells_the_same_spectrum(kind, spend):
    weight, data = case(100 if kind == "few outputs" else 2 * SIZE)
    if kind == "plain":
        metric, matrix = plain_metric(), weight
    elif kind == "diagonal":
        scale = torch.rand(SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1
        metric, matrix = diagonal_metric(outputs_of(weight, data), scale[None], 1.0), weight * scale
    else:
        metric, matrix = outputs_of(weight, data), weight @ data.T
    energies = torch.linalg.svdvals(matrix.double()).square()
    energies = torch.cat([energies, energies.new_zeros(SIZE - len(energies))])
    exact = spectrum(weight[None], metric)[0]
    narrow = spectrum(weight[None], metric, room=0, spend=spend)[0]
    # A moment of few rows has a jitter of 1e-8, which float32 leaves out.
    torch.testing.assert_close(exact, energies, rtol=1e-6, atol=1e-7 * float(energies[0]))
    torch.testing.assert_close(narrow, energies, rtol=1e-4, atol=1e-5 * float(energies[0]))
    assert narrow.dtype == torch.float64 and not torch.equal(narrow, exact)
    assert metric.of_outputs is None or (metric.of_outputs.bands == []) == spend


def test_a_moment_of_few_rows_is_multiplied_without_its_matrix():
    weight, data = case(rows=300)
    metric = outputs_of(weight, data)
    assert metric.jitter > 0
    made, unmade = metric.by_rows(weight[None], 64)[0], Unmade(weight, metric, SIZE)
    block = torch.randn(SIZE, 5, dtype=torch.float64)
    torch.testing.assert_close(unmade.times(block), made @ block, rtol=1e-10, atol=1e-10)
    assert unmade.trace() == pytest.approx(float(made.trace()), rel=1e-12)
    few = truncate(weight[None], metric, 100, room=0)
    every = truncate(weight[None], metric, 100, randomized=False)
    assert few.randomized and not every.randomized
    assert few.tail == pytest.approx(every.tail, rel=2e-5)


@pytest.mark.parametrize("rows", [300, 2 * SIZE])
@pytest.mark.parametrize("high", [SIZE - 100, SIZE, SIZE + 200])
def test_moments_of_inputs_serve_without_a_gram_matrix(rows, high):
    _, data = case(rows)
    weight = torch.randn(high, SIZE, generator=torch.Generator().manual_seed(5))
    half = Triangle.zeros(SIZE, data.device)
    half.add_square(data.double())
    metric = data_metric(PackedMoments(half, data.double().sum(0)[None], rows))
    unmade = Unmade(weight, metric, SIZE)
    jitter = metric.jitter * half.trace / SIZE * torch.eye(SIZE)
    made = weight.double() @ (half.full() + jitter) @ weight.double().T
    block = torch.randn(high, 5, dtype=torch.float64)
    torch.testing.assert_close(unmade.times(block), made @ block, rtol=1e-9, atol=1e-9 * float(made.norm()))
    assert unmade.trace() == pytest.approx(float(made.trace()), rel=1e-9)
    small = weight[:, :SIZE][None]
    if high >= SIZE:
        few, every = (truncate(small, metric, 100, room=room, randomized=room == 0) for room in (0, None))
        assert few.randomized and not every.randomized
        assert few.tail == pytest.approx(every.tail, rel=2e-5)
        for part in (few, every):
            loss = float(((weight - part.outer[0] @ part.inner[0]) @ data.T).double().square().sum())
            assert loss == pytest.approx(every.tail, rel=1e-4 if rows > SIZE else 1e-2)


def layers(*weights: torch.Tensor) -> nn.Sequential:
    made = [nn.Linear(weight.shape[1], weight.shape[0], bias=False) for weight in weights]
    for layer, weight in zip(made, weights, strict=True):
        layer.weight = nn.Parameter(weight)
    return nn.Sequential(*made).eval()


@pytest.mark.parametrize("options", [{"energy": 0.9}, {"error": 0.3}, {"error": 0.01}, {"error": 3e-4}])
@pytest.mark.parametrize("rows", [0, 2 * SIZE, SIZE // 2])
@pytest.mark.parametrize("shape", ["square", "high", "low rank", "decayed"])
def test_ranks_by_energy_and_error_are_the_least(options, rows, shape):
    """In a model of large layers alone there is no room for all eigenvectors of one."""
    weight, data = case(rows or 1)
    if shape == "high":
        weight = torch.randn(SIZE + 80, SIZE, generator=torch.Generator().manual_seed(2))
    elif shape == "low rank":
        weight = weight[:, :50] @ weight[:50] / 512**0.5
    elif shape == "decayed":
        weight = torch.linalg.qr(weight)[0] * torch.logspace(0, -8, SIZE) @ torch.linalg.qr(weight.T)[0]
    graph_module = capture(layers(weight), (torch.randn(2, SIZE),), dynamic_shapes="batch")
    batches = Counted(data.split(128)) if rows else None
    made = FactorizeLinear(**options, calibration=batches).run(graph_module, PassContext())
    matrix = weight.double() @ data.double().T if rows else weight.double()
    energies = torch.linalg.svdvals(matrix).square()
    tails = energies.flip(0).cumsum(0).flip(0) / energies.sum()
    lost = 1 - options["energy"] if "energy" in options else options["error"] ** 2
    least = int((tails > lost).sum())
    assert batches is None or batches.reads == 1
    break_even = -(-weight.numel() // sum(weight.shape))
    if least >= break_even:
        told = re.search(r"[Rr]ank (\d+)", made.skipped[0].reason)
        assert told is not None and abs(int(told[1]) - least) <= 1  # it may come from a spectrum in float32
        return
    (rewrite,) = made.rewrites
    assert rewrite.detail["rank"] == least
    told = rewrite.detail["output_error" if rows else "weight_error"]
    assert told**2 <= lost * (1 + 1e-4)


class Counted(list):
    reads = 0

    def __iter__(self):
        self.reads += 1
        return super().__iter__()


def test_factors_whose_rank_does_not_pay_are_not_made(monkeypatch):
    weight, _ = case()
    made = truncate(weight[None], plain_metric(), lambda energy: 300, room=12 * SIZE**2, limit=256)
    assert made == 300


def test_a_scale_that_float32_cannot_bear():
    weight, _ = case()
    exact = torch.linalg.svdvals(weight.double()).square()
    for scale in (1e18, 1e-20):
        energies = spectrum(weight[None] * scale, plain_metric(), room=0)[0]
        torch.testing.assert_close(energies / scale**2, exact, rtol=1e-4, atol=1e-3)
