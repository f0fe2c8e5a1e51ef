"""Bias correction and learned rounding: what they promise of each layer, and what they leave."""

import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress.capture import capture
from fxcompress.errors import OptionError, PreconditionError
from fxcompress.graph.edit import copy_graph
from fxcompress.graph.verify import verify
from fxcompress.passes import (
    Calibrate,
    CorrectBias,
    FuseModules,
    InsertQuantStubs,
    PassContext,
    Quantize,
    RoundAdaptively,
)
from fxcompress.quantization.layers import QUANTIZED
from fxcompress.quantization.noise import switched_off
from tests.support import randomize

X = torch.randn(2, 3, 8, 8)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.grouped = nn.Conv2d(16, 16, 3, stride=2, groups=4)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.a(x).relu()
        x = x + self.depthwise(x)
        return self.head(self.grouped(x).relu().mean((2, 3)))


def data(count=4):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 3, 8, 8, generator=generator) + 0.5, torch.zeros(8)) for _ in range(count)]


@pytest.fixture(scope="module")
def quantized():
    torch.manual_seed(0)
    graph = FuseModules().run(capture(randomize(Net()), (X,)), PassContext(example_inputs=[X])).graph_module
    return Quantize(data(), weight_bits=4, correct_bias=False).run(graph, PassContext()).graph_module


def run(pass_, graph):
    result = pass_.run(copy_graph(graph), PassContext())
    verify(result.graph_module, shapes=True)
    return result


def mean_error(graph, reference):
    """Largest mean error of an output, on the calibration data."""
    x = torch.cat([images for images, _ in data()])
    with torch.no_grad():
        return float((graph(x) - reference(x)).mean(0).abs().max())


def test_mean_errors_are_gone(quantized):
    result = run(CorrectBias(data()), quantized)
    assert [item.site for item in result.rewrites] == ["a", "depthwise", "grouped", "head"]
    assert all(i.detail["signal_to_noise_db"] >= i.detail["signal_to_noise_db_before"] for i in result.rewrites)
    reference = switched_off(quantized)
    assert mean_error(result.graph_module, reference) < 0.2 * mean_error(quantized, reference)
    assert result.graph_module.get_submodule("a").bias is not None  # it had none


def test_the_graph_given_stays_and_a_second_run_finds_nothing_more(quantized):
    before = {name: tensor.clone() for name, tensor in quantized.state_dict().items()}
    once = run(CorrectBias(data()), quantized)
    assert all(torch.equal(tensor, before[name]) for name, tensor in quantized.state_dict().items())
    twice = run(CorrectBias(data()), once.graph_module)
    # Last bits of a bias may take a value over the border of two integers, one step of one value among thousands.
    for first, second in zip(once.rewrites, twice.rewrites, strict=True):
        assert second.detail["largest_shift"] < 1e-3 * first.detail["largest_shift"]
    torch.testing.assert_close(twice.graph_module(data()[0][0]), once.graph_module(data()[0][0]), rtol=0, atol=0.1)


def test_without_rounding_biases_are_those_of_the_network(quantized):
    corrected = run(CorrectBias(data()), quantized).graph_module
    x = data()[0][0]
    torch.testing.assert_close(switched_off(corrected)(x), switched_off(quantized)(x), rtol=1e-5, atol=1e-5)
    anew = run(Calibrate(data(), "mse"), corrected).graph_module
    torch.testing.assert_close(anew(x), run(Calibrate(data(), "mse"), quantized).graph_module(x), rtol=0, atol=1e-2)
    assert not any("bias_before" in name for name in anew.state_dict())


def test_roundings_learned_after_correction_aim_at_the_network(quantized):
    corrected = run(CorrectBias(data()), quantized).graph_module
    x = data()[0][0]
    expected = switched_off(quantized)(x)
    for graph in (quantized, corrected):
        learned = run(RoundAdaptively(data(), iterations=50), graph).graph_module
        assert mean_error(learned, switched_off(quantized)) < 0.2 * mean_error(quantized, switched_off(quantized))
        assert (learned(x) - expected).norm() < (quantized(x) - expected).norm()


def test_quantize_corrects_biases_itself(quantized):
    graph = capture(randomize(Net()), (X,))
    fused = FuseModules().run(graph, PassContext(example_inputs=[X])).graph_module
    plain, corrected = (
        Quantize(data(), weight_bits=4, correct_bias=correct).run(copy_graph(fused), PassContext())
        for correct in (False, True)
    )
    assert mean_error(corrected.graph_module, fused) < 0.2 * mean_error(plain.graph_module, fused)
    assert all(
        ("largest_shift" in item.detail) is (result is corrected)
        for result in (plain, corrected)
        for item in result.rewrites
    )


def test_it_saves_and_loads(quantized, tmp_path):
    passes = [FuseModules(), Quantize(data(), weight_bits=4)]
    compiled = fxc.compile(randomize(Net()), passes, (X,), progress=False)
    compiled.save(tmp_path / "net.fxc")
    loaded = fxc.load(tmp_path / "net.fxc")
    assert torch.equal(loaded(X), compiled(X))
    torch.testing.assert_close(switched_off(loaded.module)(X), switched_off(compiled.module)(X))


def test_learned_roundings_lie_on_the_grid_and_lose_less(quantized):
    result = run(RoundAdaptively(data(), iterations=150), quantized)
    graph = result.graph_module
    for layer in (m for m in graph.modules() if isinstance(m, tuple(QUANTIZED.values()))):
        integers = layer.weight_quantizer.integers(layer.weight)
        torch.testing.assert_close(layer.weight_quantizer(layer.weight), layer.weight, rtol=0, atol=0)
        assert int(integers.abs().max()) <= 7
    x = torch.cat([images for images, _ in data()])
    expected = switched_off(quantized)(x)

    def error(candidate):
        return float((candidate(x) - expected).norm().detach())

    corrected = run(CorrectBias(data()), quantized).graph_module
    assert error(graph) < error(corrected) < error(quantized)
    assert any(item.detail["weights_not_to_nearest"] > 0 for item in result.rewrites)
    again = run(RoundAdaptively(data(), iterations=10), graph)
    assert not again.changed and {item.code for item in again.skipped} == {"on_grid", "nothing_to_round"}


@pytest.mark.parametrize("scheme", ["onnxruntime", "tensorrt"])
def test_the_engine_holds_the_repaired_model(tmp_path, scheme):
    torch.manual_seed(0)
    passes = [FuseModules(), Quantize(data(), scheme=scheme), RoundAdaptively(data(), iterations=20)]
    compiled = fxc.compile(randomize(Net()), passes, (X,), backend="onnxruntime", output=tmp_path / "b", progress=False)
    error = (compiled.engine(X) - compiled(X)).abs().max() / compiled(X).abs().max()
    assert float(error.detach()) < 0.05


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.b(self.a(self.a(x).relu()))


def test_a_layer_called_twice_is_left():
    graph = capture(Twice().eval(), (torch.randn(2, 8),))
    quantized = Quantize([torch.randn(4, 8)]).run(graph, PassContext()).graph_module
    result = run(CorrectBias([torch.randn(4, 8)]), quantized)
    assert [item.site for item in result.rewrites] == ["b"]
    assert [(item.site, item.code) for item in result.skipped] == [("a", "several_calls")]


def test_nothing_to_repair_is_told_and_bad_input_refused(quantized):
    plain = capture(Twice().eval(), (torch.randn(2, 8),))
    assert [item.code for item in run(CorrectBias([X]), plain).skipped] == ["nothing_to_correct"]
    assert [item.code for item in run(RoundAdaptively([X]), plain).skipped] == ["nothing_to_round"]
    with pytest.raises(PreconditionError, match="not calibrated"):
        run(CorrectBias([X]), InsertQuantStubs().run(copy_graph(plain), PassContext()).graph_module)
    with pytest.raises(PreconditionError, match="no batch"):
        run(CorrectBias([]), quantized)
    with pytest.raises(PreconditionError, match="not finite"):
        run(CorrectBias([X * float("nan")]), quantized)
    for options in ({"samples": 0}, {"iterations": 0}, {"rows": 0}, {"batch": 0}):
        with pytest.raises(OptionError, match="below 1"):
            RoundAdaptively(data(), **options)
