"""Weight-only and dynamic quantization of linear layers: what they store, what they compute, what they leave."""

import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress.capture import capture
from fxcompress.errors import OptionError
from fxcompress.graph.edit import copy_graph
from fxcompress.graph.verify import verify
from fxcompress.passes import QuantizeDynamic, QuantizeWeights
from fxcompress.passes.base import PassContext
from fxcompress.quantization.operators import pack, unpack
from fxcompress.quantization.rounding import gptq, round_to_nearest


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(100, 64), nn.Linear(64, 32, bias=False)
        self.norm = nn.LayerNorm(64)

    def forward(self, x):
        return self.b(self.norm(nn.functional.gelu(self.a(x))))


X = torch.randn(2, 7, 100)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def captured(model):
    return capture(model, (X,))


def run(pass_, graph):
    result = pass_.run(copy_graph(graph), PassContext(example_inputs=[X]))
    verify(result.graph_module, shapes=True)
    return result


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("count", [1, 6, 7])
def test_packing_is_undone_by_unpacking(bits, count):
    integers = torch.randint(0, 2**bits, (3, count))
    found = unpack(pack(integers, bits), bits)
    assert torch.equal(found[:, :count], integers.int()) and not found[:, count:].any()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [16, 64])
def test_rounding_errs_by_half_a_step(bits, block):
    weight = torch.randn(5, 100)
    integers, scale, zero = round_to_nearest(weight, bits, block)
    stored = ((integers - zero[..., None]) * scale[..., None]).flatten(1)
    assert not stored[:, 100:].any() and integers.min() >= 0 and integers.max() < 2**bits
    steps = scale.repeat_interleave(block, 1)[:, :100]
    assert ((stored[:, :100] - weight).abs() <= steps * 0.51 + 1e-7).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_blocks_need_no_zero_point(bits):
    torch.manual_seed(0)
    weight, middle = torch.randn(5, 100), 2 ** (bits - 1)
    weight[0, :32] = 0.0
    moment = (weight.T @ weight).double()
    for integers, scale, zero in (
        round_to_nearest(weight, bits, 32, symmetric=True),
        gptq(weight, moment, bits, 32, symmetric=True),
    ):
        assert (zero == middle).all() and integers.min() >= 0 and integers.max() < 2**bits and (scale > 0).all()
        assert (integers[:, -1, 4:] == middle).all(), "what pads the last block stands for 0"
    integers, scale, zero = round_to_nearest(weight, bits, 32, symmetric=True)
    stored = ((integers - zero[..., None]) * scale[..., None]).flatten(1)[:, :100]
    assert ((stored - weight).abs() <= scale.repeat_interleave(32, 1)[:, :100] * 0.51).all()


def test_gptq_keeps_the_output_better_than_rounding():
    torch.manual_seed(0)
    x = torch.randn(2000, 12) @ torch.randn(12, 96) + 0.1 * torch.randn(2000, 96)  # correlated, as activations are
    weight = torch.randn(32, 96)

    def error(rounded):
        integers, scale, zero = rounded
        stored = ((integers - zero[..., None]) * scale[..., None].double()).flatten(1)[:, :96]
        return (x.double() @ (stored - weight).T).square().mean().item()

    moment = (x.T @ x).double()
    assert error(gptq(weight, moment, 4, 32)) < 0.5 * error(round_to_nearest(weight, 4, 32))
    moment[5] = moment[:, 5] = 0  # an input that is never used
    assert torch.isfinite(gptq(weight, moment, 4, 32)[1]).all()


@pytest.mark.parametrize(
    ("pass_", "kernel", "allowed"),
    [
        (QuantizeWeights(bits=4), "MatMulNBits", 0.2),
        (QuantizeWeights(bits=8, block_size=16), "MatMulNBits", 0.02),
        (QuantizeWeights(bits=4, symmetric=True), "MatMulNBits", 0.25),
        (QuantizeWeights(algorithm="gptq", calibration=[torch.randn(64, 7, 100)]), "MatMulNBits", 0.2),
        (QuantizeDynamic(), "DynamicQuantizeMatMul", 0.03),
    ],
)
def test_onnxruntime_has_the_kernel(model, tmp_path, pass_, kernel, allowed):
    compiled = fxc.compile(model, [pass_], (X,), backend="onnxruntime")
    assert compiled.engine.optimized_op_counts()[kernel] == 2
    item = compiled.report.passes[0]
    assert 0 < item.error < allowed and item.after.bytes < 0.4 * item.before.bytes
    assert item.after.macs == item.before.macs
    assert max(compiled.engine.manifest.measurements["verification"]["relative_error"].values()) < 1e-5
    compiled.save(tmp_path / "saved")
    assert torch.equal(fxc.load(tmp_path / "saved")(X), compiled(X))


def test_calibration_lowers_the_error_on_the_data(captured):
    torch.manual_seed(1)
    base = torch.randn(10, 100)
    data = [torch.randn(32, 7, 10) @ base for _ in range(3)]
    expected = torch.cat([captured(batch) for batch in data])
    errors = []
    for options in ({}, {"algorithm": "gptq", "calibration": (b for b in data)}):
        result = run(QuantizeWeights(bits=4, **options), captured)
        found = torch.cat([result.graph_module(batch) for batch in data])
        errors.append((found - expected).square().mean().item())
    assert errors[1] < 0.8 * errors[0]
    assert all("output_error" in item.detail for item in result.rewrites)


@pytest.mark.parametrize("pass_", [QuantizeWeights(), QuantizeDynamic()])
def test_what_is_left(pass_):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.inner = nn.Embedding(20, 32), nn.Linear(32, 32)
            self.out = nn.Linear(32, 20, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, tokens):
            return self.out(self.inner(self.embed(tokens)))

    tokens = torch.randint(0, 20, (2, 5))
    graph = capture(Tied().eval(), (tokens,))
    result = pass_.run(copy_graph(graph), PassContext())
    assert [item.site for item in result.rewrites] == ["inner"]
    assert {skip.site: skip.code for skip in result.skipped} == {"out": "tied_weight"}
    again = pass_.run(copy_graph(result.graph_module), PassContext())
    assert not again.changed  # what is quantized is no linear layer any more
    ignoring = type(pass_)(ignore=("inner",)).run(copy_graph(graph), PassContext())
    assert {skip.code for skip in ignoring.skipped} == {"tied_weight", "ignored", "nothing_to_quantize"}
    with pytest.raises(OptionError, match="no linear layer matches"):
        type(pass_)(ignore=("outer",)).run(copy_graph(graph), PassContext())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "not valid"),
        ({"block_size": 8}, "power of two"),
        ({"block_size": 48}, "power of two"),
        ({"algorithm": "gptq"}, "needs data"),
        ({"algorithm": "magic"}, "not valid"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(OptionError, match=message):
        QuantizeWeights(**options)


def test_dynamic_inputs_of_zeros_give_the_bias(model, captured):
    graph = run(QuantizeDynamic(), captured).graph_module
    torch.testing.assert_close(graph(torch.zeros(1, 7, 100)), model(torch.zeros(1, 7, 100)), rtol=0, atol=0.05)


def test_awq_spares_the_inputs_that_are_large_on_data(model):
    outliers = torch.ones(100)
    outliers[::25] = 30.0
    scaled = nn.Sequential(nn.LayerNorm(100), nn.Linear(100, 64)).eval()
    scaled[0].weight.data.mul_(outliers)  # what AWQ is for: a few channels carry large activations
    x = torch.randn(64, 100)
    graph = capture(scaled, (x,))
    expected = scaled(x).detach()
    errors = {}
    for algorithm, data in (("rtn", None), ("awq", [x])):
        pass_ = QuantizeWeights(bits=4, block_size=32, algorithm=algorithm, calibration=data)
        result = pass_.run(copy_graph(graph), PassContext(example_inputs=[x]))
        verify(result.graph_module, shapes=True)
        errors[algorithm] = float((result.graph_module(x).detach() - expected).norm() / expected.norm())
    detail = result.rewrites[0].detail
    assert detail["alpha"] > 0 and detail["expected_error"] < 0.98
    assert errors["awq"] < 0.9 * errors["rtn"], errors


def test_awq_leaves_what_nothing_can_scale():
    # The first layer reads the model's input, which nothing before it can divide.
    linear = nn.Sequential(nn.Linear(64, 32)).eval()
    x = torch.randn(8, 64)
    graph = capture(linear, (x,))
    results = [
        QuantizeWeights(bits=4, algorithm=a, calibration=d).run(copy_graph(graph), PassContext(example_inputs=[x]))
        for a, d in (("rtn", None), ("awq", [x]))
    ]
    assert torch.equal(results[0].graph_module(x), results[1].graph_module(x))
    assert "alpha" not in results[1].rewrites[0].detail
