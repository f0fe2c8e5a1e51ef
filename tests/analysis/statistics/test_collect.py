import gc
import math
import weakref
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fxcompress.analysis.statistics import (
    CrossMoment,
    Histogram,
    Mean,
    MeanAbs,
    MeanSquare,
    Range,
    SecondMoment,
    collect,
)
from fxcompress.analysis.statistics.kinds import Accumulator, Statistic
from fxcompress.capture import capture
from fxcompress.errors import OptionError, PreconditionError
from fxcompress.graph.copying import copy_graph


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()


def graph_of(model, *inputs):
    return capture(model, inputs, dynamic_shapes="batch")


def names(graph_module):
    return {str(node.target): node.name for node in graph_module.graph.nodes if node.op == "call_module"}


def test_equals_statistics_of_all_activations_at_once():
    model, x = small(), torch.randn(40, 6) * 3 + 1
    graph_module = graph_of(model, x[:4])
    first = names(graph_module)["0"]
    kinds = [Mean(dim=1), MeanAbs(), MeanSquare("input", dim=-1), Range(dim=1), SecondMoment()]
    statistics = collect(graph_module, [x[:7], x[7:30], x[30:]], {first: kinds})
    with torch.no_grad():
        y = model[0](x).double()
    wide = x.double()
    assert (statistics.batches, statistics.samples) == (3, 40)
    torch.testing.assert_close(statistics[first, Mean(dim=1)], y.mean(0))
    torch.testing.assert_close(statistics[first, MeanAbs()], y.abs().mean())
    torch.testing.assert_close(statistics[first, MeanSquare("input", dim=-1)], wide.square().mean(0))
    low, high = statistics[first, Range(dim=1)]
    assert torch.equal(low, y.amin(0))
    assert torch.equal(high, y.amax(0))
    moments = statistics[first, SecondMoment()]
    torch.testing.assert_close(moments.total[0], wide.T @ wide)
    torch.testing.assert_close(moments.covariance[0], torch.cov(wide.T, correction=0))
    assert moments.count == 40


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(4, 6, 3, stride=2, padding=1), (3, 4, 9)),
        (nn.Conv2d(4, 6, (3, 2), padding=(1, 0), dilation=(2, 1), groups=2), (3, 4, 9, 8)),
        (nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"), (3, 4, 9, 8)),
        (nn.Conv3d(2, 3, 2, stride=(1, 2, 1)), (3, 2, 4, 5, 4)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (3, 4, 5, 4)),
        (nn.ConvTranspose1d(4, 6, 4, stride=3, dilation=2), (3, 4, 5)),
    ],
)
def test_second_moment_of_a_convolution_tells_the_energy_of_its_output(layer, shape):
    x = torch.randn(shape)
    graph_module = graph_of(nn.Sequential(layer).eval(), x[:2])
    name = names(graph_module)["0"]
    moments = collect(graph_module, [x[:2], x[2:]], {name: SecondMoment()})[name, SecondMoment()]
    weight = layer.weight.detach().double()
    groups = layer.groups
    if layer.transposed:
        split = weight.unflatten(0, (groups, -1)).transpose(1, 2).flip(tuple(range(3, weight.dim() + 1)))
    else:
        split = weight.unflatten(0, (groups, -1))
    rows = split.flatten(2)
    predicted = torch.einsum("gij,gjk,gik->gi", rows, moments.total, rows).flatten()
    with torch.no_grad():
        y = layer(x).double() - layer.bias.double().view(-1, *[1] * (x.dim() - 2))
    actual = y.square().transpose(0, 1).flatten(1).sum(1)
    torch.testing.assert_close(predicted, actual, rtol=1e-5, atol=1e-6)


def test_histogram_is_the_same_however_the_data_is_cut_and_keeps_every_value():
    x = torch.randn(50, 6) * torch.logspace(-3, 2, 50)[:, None]
    graph_module = graph_of(nn.Sequential(nn.Linear(6, 6)).eval(), x[:4])
    name = next(node.name for node in graph_module.graph.nodes if node.op == "placeholder")
    one = collect(graph_module, [x], {name: Histogram(bins=64)})[name, Histogram(bins=64)]
    many = collect(graph_module, list(x.split(3)), {name: Histogram(bins=64)})[name, Histogram(bins=64)]
    assert one.counts.sum() == many.counts.sum() == x.numel()
    torch.testing.assert_close(one.edges, many.edges)
    assert (one.low, one.high) == (many.low, many.high) == (float(x.min()), float(x.max()))
    assert one.edges[0] <= one.low <= one.high <= one.edges[-1]
    assert abs(one.quantile(0.5) - float(x.median())) <= float(one.edges[1] - one.edges[0])


def test_nodes_that_read_the_same_value_share_their_second_moment():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x):
            return self.q(x) * self.k(x)

    graph_module = graph_of(Attention().eval(), torch.randn(4, 6))
    q, k = names(graph_module)["q"], names(graph_module)["k"]
    statistics = collect(graph_module, [torch.randn(5, 6)], {q: SecondMoment(), k: SecondMoment()})
    assert statistics[q, SecondMoment()] is statistics[k, SecondMoment()]


def test_cross_moment_of_two_graphs():
    model, x = small(), torch.randn(20, 6)
    graph_module = graph_of(model, x[:4])
    other = copy_graph(graph_module)
    name = names(graph_module)["2"]
    asked = CrossMoment(with_=name)
    found = collect(graph_module, [x[:9], x[9:]], {name: asked}, beside=other)[name, asked]
    with torch.no_grad():
        y = model(x).double()
    torch.testing.assert_close(found.cross, y.T @ y)
    torch.testing.assert_close(found.moments.total[0], y.T @ y)
    assert found.moments.count == 20


@pytest.mark.parametrize("sizes", [(9, 11), (1, 1, 1), (1,)])
def test_folds_are_halves_of_the_samples(sizes):
    model, x = small(), torch.randn(sum(sizes), 6)
    graph_module = graph_of(model, torch.randn(4, 6))
    first, last = (names(graph_module)[path] for path in ("0", "2"))
    cross = CrossMoment(with_=last, folds=True)
    requests = {first: SecondMoment(folds=True), last: cross}
    found = collect(graph_module, x.split(sizes), requests, beside=copy_graph(graph_module))
    halves = {(9, 11): [*range(4), *range(9, 14)], (1, 1, 1): [0, 2], (1,): []}[sizes]
    with torch.no_grad():
        y = model(x).double()
    moments, pairs = found[first, requests[first]], found[last, cross]
    for got, rows in ((moments, x.double()), (pairs.moments, y)):
        torch.testing.assert_close(got.total[0], rows.T @ rows)
        assert got.count == len(rows)
        assert (got.fold is None) == (not halves)
        if halves:
            torch.testing.assert_close(got.fold.total[0], rows[halves].T @ rows[halves])
            torch.testing.assert_close(got.fold.sum[0], rows[halves].sum(0))
            assert got.fold.count == len(halves)
    torch.testing.assert_close(pairs.cross, y.T @ y)
    assert pairs.energy == pytest.approx(float(y.square().sum()))
    if halves:
        torch.testing.assert_close(pairs.fold.cross, y[halves].T @ y[halves])
        assert pairs.fold.energy == pytest.approx(float(y[halves].square().sum()))
        both = moments + moments
        torch.testing.assert_close(both.fold.total, 2 * moments.fold.total)


@pytest.mark.parametrize("form", ["tensors", "tuples", "dicts", "loader", "generator"])
def test_forms_of_data(form):
    x, labels = torch.randn(12, 6), torch.arange(12)
    graph_module = graph_of(small(), x[:4])
    data = {
        "tensors": list(x.split(5)),
        "tuples": [(part,) for part in x.split(5)],
        "dicts": [{"input": part} for part in x.split(5)],
        "loader": DataLoader(TensorDataset(x, labels), batch_size=5),
        "generator": (part for part in x.split(5)),
    }[form]
    name = names(graph_module)["0"]
    statistics = collect(graph_module, data, {name: Mean("input", dim=1)})
    torch.testing.assert_close(statistics[name, Mean("input", dim=1)], x.double().mean(0))


def test_limits_and_progress():
    x = torch.randn(20, 6)
    graph_module = graph_of(small(), x[:4])
    name = names(graph_module)["0"]
    told: list[tuple[int, int]] = []
    collected = collect(
        graph_module, x.split(4), {name: Mean()}, limit=3, progress=lambda done, total, what: told.append((done, total))
    )
    assert (collected.batches, collected.samples) == (3, 12)
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert collect(graph_module, x.split(4), {name: Mean()}, samples=5).samples == 8
    rows = collect(graph_module, x.split(10), {name: SecondMoment(rows=3)})[name, SecondMoment(rows=3)]
    assert rows.count == 6


def test_runs_in_eval_mode_and_leaves_the_mode_and_the_statistics_of_norms():
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3)).eval()
    x = torch.randn(8, 6)
    graph_module = graph_of(model, x).train()
    before = model[1].running_mean.clone()
    name = names(graph_module)["3"]
    found = collect(graph_module, [x], {name: Mean(dim=1)})[name, Mean(dim=1)]
    assert all(module.training for module in graph_module.modules())
    assert torch.equal(graph_module.get_submodule("1").running_mean, before)
    with torch.no_grad():
        torch.testing.assert_close(found, model(x).double().mean(0))


def test_runs_only_as_far_as_asked():
    x = torch.randn(4, 6)
    graph_module = graph_of(small(), x)
    called = []
    graph_module.get_submodule("2").register_forward_hook(lambda *_: called.append(1))
    collect(graph_module, [x], {names(graph_module)["0"]: Mean()})
    assert not called


def test_refusals():
    x = torch.randn(4, 6)
    graph_module = graph_of(small(), x)
    name = names(graph_module)["0"]
    with pytest.raises(PreconditionError, match="no batch"):
        collect(graph_module, [], {name: Mean()})
    spent = iter([x])
    next(spent)
    with pytest.raises(PreconditionError, match="no batch"):
        collect(graph_module, spent, {name: Mean()})
    with pytest.raises(PreconditionError, match="batch 1 of the data"):
        collect(graph_module, [x, torch.randn(4, 7)], {name: Mean()})
    with pytest.raises(PreconditionError, match="not finite"):
        collect(graph_module, [x / 0.0], {name: SecondMoment()})
    with pytest.raises(PreconditionError, match="not finite"):
        collect(graph_module, [x * float("nan")], {name: Histogram()})
    with pytest.raises(OptionError, match="no node 'nothing'"):
        collect(graph_module, [x], {"nothing": Mean()})
    with pytest.raises(OptionError, match="limit=0"):
        collect(graph_module, [x], {name: Mean()}, limit=0)
    with pytest.raises(OptionError, match="no dimension 5"):
        collect(graph_module, [x], {name: Mean(dim=5)})
    with pytest.raises(OptionError, match="not collected"):
        collect(graph_module, [x], {name: Mean()})[name, MeanAbs()]


def test_wide_moments_are_those_of_all_features():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(515, 3)).eval(), torch.randn(40, 515)
    graph_module = graph_of(model, x[:4])
    name = names(graph_module)["0"]
    found = collect(graph_module, list(x.split(7)), {name: SecondMoment()})[name, SecondMoment()]
    torch.testing.assert_close(found.total[0], x.double().T @ x.double())


class Sequences(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.fc, self.name = nn.Linear(4, 4), name

    def forward(self, x, attention_mask=None, key_padding_mask=None):
        mask = attention_mask if self.name == "attention_mask" else ~key_padding_mask
        return self.fc(x * mask[..., None])


@pytest.mark.parametrize("form", ["attention_mask", "attention_mask as numbers", "key_padding_mask"])
def test_padding_is_left_out_where_it_is_asked_for(form):
    torch.manual_seed(0)
    real = torch.tensor([[True, True, False], [True, False, False], [True, True, True], [True, True, True]])
    name = form.split()[0]
    mask = ~real if name == "key_padding_mask" else real.long() if "numbers" in form else real
    x = torch.randn(4, 3, 4)
    batch = {"x": x, name: mask}
    graph_module = capture(Sequences(name).eval(), batch, dynamic_shapes="batch")
    node = names(graph_module)["fc"]
    requests = {node: [SecondMoment(), Mean("output", dim=-1)]}
    whole = collect(graph_module, [batch], requests)
    without = collect(graph_module, [batch], requests, padding=False)
    assert (whole[node, SecondMoment()].count, without[node, SecondMoment()].count) == (12, 9)
    rows = x[real].double()
    torch.testing.assert_close(without[node, SecondMoment()].total[0], rows.T @ rows)
    with torch.no_grad():
        mean = graph_module.get_submodule("fc")(x[real]).double().mean(0)
    torch.testing.assert_close(without[node, Mean("output", dim=-1)], mean)


@pytest.mark.parametrize("device", ["cuda:77", "nonsense"])
def test_a_device_that_cannot_be_used_is_refused(device):
    graph = capture(nn.Linear(3, 2).eval(), (torch.randn(2, 3),))
    with pytest.raises(OptionError, match=device):
        collect(graph, [torch.randn(2, 3)], {}, device=device)


class _Seen(Accumulator):
    refs: ClassVar[list[weakref.ref]] = []

    def __init__(self):
        self.last = None
        self.refs.append(weakref.ref(self))

    def add(self, *tensors):
        self.last = tensors[0]
        self.refs.append(weakref.ref(self.last))

    def value(self):
        return torch.zeros(1)


@dataclass(frozen=True)
class _Watch(Statistic):
    def start(self, layer):
        return _Seen()


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_waits_for_a_collection_of_cycles(fails):
    """Neither activations nor what is added up: of a large model that is as much as its largest layers."""
    graph_module = graph_of(small(), torch.randn(4, 6))
    first = names(graph_module)["0"]
    data = [torch.randn(8, 6), torch.randn(8, 6) * (math.inf if fails else 1)]
    _Seen.refs.clear()
    gc.collect()
    gc.disable()
    try:
        statistics = None
        try:
            statistics = collect(graph_module, data, {first: [_Watch(), SecondMoment(packed=True)]})
        except PreconditionError:
            assert fails
        assert (statistics is None) == fails
        assert len(_Seen.refs) == 3
        assert [ref() for ref in _Seen.refs] == [None] * 3
        if statistics is not None:
            moment = weakref.ref(statistics.pop((first, SecondMoment(packed=True))).half.bands[0])
            assert moment() is None
    finally:
        gc.enable()
