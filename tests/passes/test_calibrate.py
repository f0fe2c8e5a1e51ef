"""Calibration on data that is empty, constant, not finite, padded, or never gets somewhere."""

import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress.capture import capture
from fxcompress.errors import BackendError, OptionError, PreconditionError
from fxcompress.graph.copying import copy_graph
from fxcompress.passes import Calibrate, CorrectBias, InsertQuantStubs, Quantize, SmoothActivations
from fxcompress.passes.base import PassContext
from fxcompress.quantization.noise import layer_noise
from fxcompress.quantization.observers import OBSERVERS

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).eval()


def run(pass_, graph):
    return pass_.run(copy_graph(graph), PassContext())


@pytest.fixture
def stubs():
    return run(InsertQuantStubs(), capture(network(), (X,))).graph_module


@pytest.mark.parametrize("observer", OBSERVERS)
def test_every_observer_gives_grids(stubs, observer):
    many = torch.randn(20000, 6, generator=torch.Generator().manual_seed(1))
    result = run(Calibrate([many, many / 2], observer), stubs)
    error = (result.graph_module(X) - network()(X)).norm() / network()(X).norm()
    assert 0 < error < 0.05 and all(rewrite.detail["scale"] > 0 for rewrite in result.rewrites)


@pytest.mark.parametrize("data", [[], (), iter([]), {}.values()])
def test_no_batches(stubs, data):
    with pytest.raises(PreconditionError, match="holds no batch"):
        run(Calibrate(data), stubs)


@pytest.mark.parametrize("pass_", [Calibrate, Quantize, SmoothActivations])
def test_no_batches_are_asked_for(pass_):
    with pytest.raises(OptionError, match="batches=0 is below 1"):
        pass_([X], batches=0)


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_values_that_are_not_finite(stubs, observer, bad, place):
    """In any batch, whatever the others hold."""
    data = [X.clone(), X.clone()]
    data[place][1, 2] = bad
    with pytest.raises(PreconditionError, match="not finite"):
        run(Calibrate(data, observer), stubs)


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize(("value", "note"), [(0.0, "zero"), (3.0, "the same"), (-3.0, "the same")])
def test_constant_activations(stubs, observer, value, note):
    constant = torch.full((4, 6), value)
    result = run(Calibrate([constant], observer), stubs)
    first = result.rewrites[0].detail
    assert first["values"] == ["input_1"] and note in first["note"]
    stub = result.graph_module.get_submodule(result.rewrites[0].site)
    torch.testing.assert_close(stub(constant), constant, rtol=0, atol=0.02)


def test_an_all_zero_channel_is_told_and_runs(tmp_path):
    model = network()
    with torch.no_grad():
        model[0].weight[3] = 0
        model[0].bias[3] = 0
    compiled = fxc.compile(model, [Quantize([X, -X])], (X,), backend="onnxruntime", output=tmp_path / "engine")
    notes = [rewrite.detail.get("note", "") for rewrite in compiled.report.passes[0].rewrites]
    assert notes.count("1 channel is all zero") == 1
    torch.testing.assert_close(torch.as_tensor(compiled.engine(X)), compiled(X), rtol=0, atol=0.02)


def test_values_that_are_always_zero_are_told():
    model = network()
    with torch.no_grad():
        model[0].weight.abs_()
        model[0].bias.fill_(-1)
    result = run(Quantize([-X.abs()]), capture(model, (X,)))
    assert "1 value was zero on all data" in result.note


class Tokens(nn.Module):
    """Two linear layers over the tokens of a sequence; padding is not read by the pooling."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x, attention_mask):
        y = self.second(self.first(x).relu())
        weight = attention_mask[..., None].to(y.dtype)
        return (y * weight).sum(1) / weight.sum(1)


def padded(garbage):
    """Three batches of sequences whose second half is padding, which holds ``garbage``."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(5, 10, dtype=torch.int64)
    mask[:, 5:] = 0
    made = []
    for _ in range(3):
        x = torch.randn(5, 10, 6, generator=generator)
        x[:, 5:] = garbage
        made.append({"x": x, "attention_mask": mask})
    return made


@pytest.fixture(scope="module")
def tokens():
    return capture(Tokens().eval(), padded(0.0)[0])


@pytest.mark.parametrize("observer", OBSERVERS)
def test_padding_does_not_widen_a_grid(tokens, observer):
    clean, dirty = (
        run(Calibrate(padded(garbage), observer), run(InsertQuantStubs(), tokens).graph_module).rewrites
        for garbage in (0.0, 1000.0)
    )
    ours = [(a.detail["low"], a.detail["high"]) for a in clean if "x" not in a.detail["values"]]
    assert ours == [(b.detail["low"], b.detail["high"]) for b in dirty if "x" not in b.detail["values"]]
    assert [a.detail["scale"] for a in clean] == [b.detail["scale"] for b in dirty]


def test_repairs_and_noise_do_not_count_padding(tokens):
    graph = run(Calibrate(padded(0.0)), run(InsertQuantStubs(), tokens).graph_module).graph_module
    clean, dirty = (run(CorrectBias(padded(garbage)), graph).graph_module.state_dict() for garbage in (0.0, 1000.0))
    assert torch.equal(clean["first.bias"], dirty["first.bias"])
    assert not torch.equal(clean["first.bias"], graph.state_dict()["first.bias"])
    one, other = (layer_noise(tokens, graph, ["first", "second"], padded(g)) for g in (0.0, 1000.0))
    assert one == other


class Stepped(nn.Module):
    """An operation between two layers that has no derivative."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = self.first(x).abs() + 1
        return self.second(torch.igamma(x, torch.ones_like(x)))


def test_without_derivatives_ranges_are_chosen_by_error():
    graph, many = capture(Stepped().eval(), (X,)), torch.randn(5000, 6, generator=torch.Generator().manual_seed(1))
    result = run(Quantize([many]), graph)
    assert "ranges by mse instead: the graph cannot be differentiated" in result.note
    other = run(Quantize([many], observer="mse"), graph)
    assert torch.equal(result.graph_module(X), other.graph_module(X)) and "instead" not in other.note


def test_weights_that_do_not_train_and_inputs_that_are_numbers_can_be_differentiated():
    model = nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).eval().requires_grad_(False)
    tokens = torch.arange(10).reshape(2, 5)
    result = run(Quantize([tokens]), capture(model, (tokens,)))
    assert result.changed and "instead" not in result.note


def test_a_generator_is_read_once():
    graph = run(InsertQuantStubs(), capture(network(), (X,))).graph_module
    batches = [X, -X, 2 * X]
    once, again = (run(Calibrate(data), graph).rewrites for data in (iter(batches), batches))
    assert [item.detail for item in once] == [item.detail for item in again]


def test_a_layer_that_the_data_never_reaches(stubs):
    with pytest.raises(PreconditionError, match="never reaches"):
        run(Calibrate([X[:0]]), stubs)


@pytest.mark.parametrize("observer", OBSERVERS)
def test_an_empty_batch_among_others_counts_nothing(stubs, observer):
    one, other = (run(Calibrate(data, observer), stubs).rewrites for data in ([X], [X[:0], X]))
    assert [item.detail for item in one] == [item.detail for item in other]


def test_another_engines_scheme_is_refused_by_tensorrt(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(BackendError, match="uint8") as caught:
        fxc.compile(model, [Quantize([x], scheme="onnxruntime")], (x,), backend="tensorrt", output=tmp_path / "engine")
    assert "scheme='tensorrt'" in str(caught.value) and not (tmp_path / "engine").exists()
    with pytest.raises(OptionError, match="no scheme 'torchscript'"):
        Quantize([x], scheme="torchscript")
