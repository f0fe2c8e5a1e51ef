"""What a grid does to the outputs is told right from one walk, and the better grid is taken."""

import pytest
import torch
from torch import nn

from fxcompress.capture import capture
from fxcompress.graph.batches import as_batch, first_samples
from fxcompress.passes import Calibrate, InsertQuantStubs
from fxcompress.passes.base import PassContext
from fxcompress.quantization.calibrate import stubs_of
from fxcompress.quantization.damage import SAMPLES, damage_of_grids
from fxcompress.quantization.fake_quant import Quantizer
from fxcompress.quantization.grid_choice import GridChoice
from fxcompress.quantization.types import QuantType, parameters_of_range

UINT8, INT8 = QuantType(8, signed=False, symmetric=False), QuantType(8, narrow=True)


def grid(low, high, kind=UINT8):
    made = Quantizer(kind)
    made.set(*parameters_of_range(torch.tensor(low), torch.tensor(high), kind))
    return made


def told(value, gradient, *grids):
    return GridChoice(grids, torch.Generator().manual_seed(0)).damage(value, gradient)


@pytest.mark.parametrize("kind", [UINT8, INT8])
@pytest.mark.parametrize("positions", [500, 100_000])  # all of them, or some drawn
def test_within_the_grid_squares_add_up(kind, positions):
    torch.manual_seed(0)
    value, gradient = torch.randn(8, positions), torch.randn(8, positions)
    grids = [grid(-6.0, 6.0, kind), grid(-12.0, 12.0, kind)]
    expected = [float((gradient * (one(value) - value)).double().square().sum()) for one in grids]
    assert told(value, gradient, *grids) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("side", [1, -1])
def test_what_is_clipped_adds_up_before_it_is_squared(side):
    value = torch.zeros(2, 50_000)
    value[0, 123], value[0, 40_000], value[1, 7] = 3.0 * side, 4.0 * side, 5.0 * side
    gradient = torch.full_like(value, 2.0)
    narrow, wide = grid(-1.0, 1.0, INT8), grid(-5.0, 5.0, INT8)
    found = told(value, gradient, narrow, wide)
    assert found[0] == pytest.approx((2 * (2 + 3)) ** 2 + (2 * 4) ** 2, rel=1e-6)
    assert found[1] < 0.1


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (7,), ()])
def test_odd_shapes(shape):
    value = torch.full(shape, 3.0)
    (found,) = told(value, torch.ones(shape), grid(0.0, 1.0))
    assert found == pytest.approx((2.0 * value.numel()) ** 2 if len(shape) < 2 else 0.0)


def test_rare_values_count_by_what_the_outputs_make_of_them():
    """One network relies on them, the other cuts them off right behind: the same values get different ranges."""
    torch.manual_seed(0)
    x = torch.randn(64, 400)
    x[:, 0] = 30.0
    found = []
    for clip in (nn.Identity(), nn.Hardtanh(-4.0, 4.0)):
        model = nn.Sequential(nn.Linear(400, 400, bias=False), clip, nn.Linear(400, 3)).eval()
        with torch.no_grad():
            model[0].weight.copy_(torch.eye(400))
        graph = InsertQuantStubs("tensorrt").run(capture(model, (x,)), PassContext()).graph_module
        stub = next(iter(stubs_of(graph)))
        grids = {stub: [grid(-4.0, 4.0, INT8), grid(-30.0, 30.0, INT8)]}
        damage, samples = damage_of_grids(graph, [x], grids)
        assert samples == SAMPLES
        found.append(damage[stub][0] < damage[stub][1])
    assert found == [False, True]


@pytest.mark.parametrize(("shapes", "refined"), [("batch", SAMPLES), (None, 50)])
def test_only_so_many_samples_are_run_there_and_back(shapes, refined):
    """Of a large batch the first, but where the graph takes no other size."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    data = [torch.randn(50, 4) ** 5, torch.randn(50, 4) ** 5]
    graph = capture(model, (data[0],), dynamic_shapes=shapes)
    stubbed = InsertQuantStubs().run(graph, PassContext()).graph_module
    note = Calibrate(data).run(stubbed, PassContext()).note
    assert note.startswith("calibrated on 100 samples in ") and f"refined on {refined} of them in " in note


def test_first_samples():
    graph = capture(nn.Linear(4, 2).eval(), (torch.randn(3, 4),))
    batch = as_batch(graph, torch.arange(20.0).reshape(5, 4))
    assert first_samples(graph, batch, 2).leaves[0].tolist() == batch.leaves[0][:2].tolist()
    assert first_samples(graph, batch, 5) is batch
