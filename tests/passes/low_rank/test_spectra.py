"""Spectra, and ranks that follow from them, where there is little room."""

import pytest
import torch
from torch import nn

from fxcompress.analysis.statistics import PackedMoments, Triangle
from fxcompress.capture import capture
from fxcompress.passes import FactorizeLinear, PassContext
from fxcompress.passes.low_rank.grams import Unmade
from fxcompress.passes.low_rank.metric import Metric, data_metric, diagonal_metric, output_metric, plain_metric
from fxcompress.passes.low_rank.spectra import crowded, spectrum
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
    assert metric.of_outputs is None or (metric.of_outputs.bands == []) == (spend and kind != "diagonal")


def test_a_moment_of_few_rows_is_multiplied_without_its_matrix():
    weight, data = case(rows=300)
    metric = outputs_of(weight, data)
    assert metric.jitter > 0
    made, unmade = metric.by_rows(weight[None], 64)[0], Unmade(weight, metric)
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
    unmade = Unmade(weight, metric)
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


def test_weights_are_crowded_by_their_eigenvectors():
    square, wide, small = torch.empty(1, SIZE, SIZE), torch.empty(1, SIZE, 4 * SIZE), torch.empty(1, 8, 8)
    layer = 4 * SIZE**2
    assert crowded(square, 3 * layer, measured=False)
    assert not crowded(wide, 12 * layer, measured=True)
    assert not crowded(square, 7 * layer, measured=False) and crowded(square, 7 * layer, measured=True)
    assert not crowded(small, 0, measured=False)


@pytest.mark.parametrize("options", [{"energy": 0.9}, {"error": 0.3}, {"error": 0.02, "force": True}])
@pytest.mark.parametrize("rows", [0, 2 * SIZE])
def test_bounds_hold_where_ranks_come_from_float32(options, rows):
    weight, data = case(rows or 1)
    layer = nn.Linear(SIZE, SIZE, bias=False)
    decayed = weight * torch.logspace(0, -3, SIZE)
    layer.weight = nn.Parameter(decayed)
    graph_module = capture(nn.Sequential(layer).eval(), (torch.randn(2, SIZE),), dynamic_shapes="batch")
    calibration = list(data.split(128)) if rows else None
    made = FactorizeLinear(**options, calibration=calibration).run(graph_module, PassContext())
    (rewrite,) = made.rewrites
    matrix = decayed @ data.T if rows else decayed
    energies = torch.linalg.svdvals(matrix.double()).square()
    tails = energies.flip(0).cumsum(0).flip(0) / energies.sum()
    lost = 1 - options["energy"] if "energy" in options else options["error"] ** 2
    least = int((tails > lost).sum())
    assert least <= rewrite.detail["rank"] <= least + 1
    told = rewrite.detail["output_error" if rows else "weight_error"]
    assert told**2 <= lost * (1 + 1e-5)
    assert told**2 == pytest.approx(float(tails[rewrite.detail["rank"]]), rel=1e-3)
