"""Mixed precision: the fewest layers in floating point, the ranking behind it, and the account of it."""

import math

import pytest
import torch
from torch import nn

from fxcompress.capture import capture
from fxcompress.errors import PreconditionError
from fxcompress.graph.edit import copy_graph
from fxcompress.graph.verify import verify
from fxcompress.passes import PassContext, Quantize
from fxcompress.quantization.damage import measure_damage
from fxcompress.quantization.mixed_precision import fewest
from fxcompress.quantization.noise import compare_layers, switched_off
from tests.support import randomize


class Net(nn.Module):
    """Five layers, one of which reads outliers that eight bits cannot hold."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(5))

    def forward(self, x):
        for number, layer in enumerate(self.layers):
            if number == 2:
                x = torch.cat([x[:, :1] * 3000, x[:, 1:]], 1)
            x = torch.tanh(layer(x))
        return x


def data(count=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 16, generator=generator) for _ in range(count)]


@pytest.fixture(scope="module")
def graph():
    torch.manual_seed(0)
    model = randomize(Net())
    with torch.no_grad():
        model.layers[2].weight[:, 0] /= 3000
    return capture(model, (torch.randn(2, 16),))


def run(graph, **options):
    result = Quantize(data(), observer="minmax", **options).run(copy_graph(graph), PassContext())
    verify(result.graph_module, shapes=True)
    return result


def error(graph, result):
    x = torch.cat(data())
    return float(((result.graph_module(x) - graph(x)).norm() / graph(x).norm()).detach())


def test_the_worst_layer_alone_stays_in_float(graph):
    whole = run(graph)
    result = run(graph, max_drop=0.25 * error(graph, whole))
    kept = [skip for skip in result.skipped if skip.code == "max_drop"]
    assert [skip.site for skip in kept] == ["layers.2"] and "rank 1 of 5" in kept[0].reason
    assert error(graph, result) <= 0.25 * error(graph, whole)
    assert "1 of 5 layers stay in floating point" in result.note


def test_nothing_stays_where_all_is_well(graph):
    result = run(graph, max_drop=10.0)
    assert len(result.rewrites) == 5 and not result.skipped and "0 of 5" in result.note


def test_no_drop_at_all_leaves_the_whole_graph(graph):
    result = run(graph, max_drop=0.0)
    assert not result.changed and len(result.skipped) == 5


def test_the_users_metric_decides(graph):
    x, seen = torch.cat(data()), []
    expected = graph(x)

    def metric(module):
        seen.append(module)
        assert not module.training
        return -float((module(x) - expected).abs().max().detach())

    whole = metric(run(graph).graph_module)
    result = run(graph, max_drop=-whole / 3, metric=metric)
    assert [skip.site for skip in result.skipped] == ["layers.2"] and len(seen) <= 6


def test_damage_predicts_the_movement_of_the_outputs(graph):
    quantized = run(graph).graph_module
    x = torch.cat(data())
    damage = measure_damage(quantized, data(), samples=48)
    expected = graph(x)
    for path, told in damage.stubs.items():
        alone = switched_off(quantized)
        alone.get_submodule(path).enabled = True
        found = float(((alone(x) - expected).square().sum() / expected.square().sum()).detach())
        assert found / 3 < told < 3 * found, (path, told, found)


@pytest.mark.parametrize(("total", "needed"), [(1, 0), (1, 1), (7, 3), (100, 0), (100, 1), (100, 37), (100, 100)])
def test_fewest(total, needed):
    choice = fewest(total, lambda count: 0.0 if count >= needed else 1.0, 0.5)
    assert choice.count == needed
    assert len(choice.tried) <= 2 * math.log2(max(2, needed)) + 3


def test_comparison_of_layers(graph):
    quantized = run(graph).graph_module
    found = compare_layers(quantized, data())
    assert {item.layer for item in found} == {f"layers.{i}" for i in range(5)}
    assert [item.noise.decibels for item in found] == sorted(item.noise.decibels for item in found)
    assert found[0].kind == "Linear" and "dB" in str(found[0]) and 0 < found[0].noise.largest < found[0].noise.peak
    assert compare_layers(quantized, data(), reference=graph) == found
    with pytest.raises(PreconditionError, match="no layer of the graph is quantized"):
        compare_layers(graph, data())
