"""What runs in integers: told by layer, with reasons, from the graph that ONNX Runtime made."""

import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress.passes import FuseModules, Quantize, QuantizeDynamic, QuantizeWeights
from fxcompress.reporting.console import format_report
from fxcompress.reporting.model import Report

X = torch.randn(2, 3, 8, 8)


class Block(nn.Module):
    """Four convolutions, one of them transposed, a residual, a product of two activations, a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.mix, self.skipped = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.body(x).relu()
        x = self.up(self.skipped(self.mix(x))).flatten(2)
        return self.head((x @ x.mT).softmax(-1) @ x.mean(2, keepdim=True).expand(-1, -1, 8))


def built(model, passes, x):
    torch.manual_seed(0)
    return fxc.compile(model.eval(), passes, (x,), backend="onnxruntime", progress=False)


@pytest.fixture(scope="module")
def compiled():
    passes = [FuseModules(), Quantize([X], ignore=("skipped",))]
    return built(Block(), passes, X)


def test_layers_are_counted_by_kind_and_macs(compiled):
    kinds = {kind.kind: kind for kind in compiled.report.engine.integers.kinds}
    assert list(kinds) == ["convolution", "linear", "matrix product", "residual addition"]
    assert (kinds["convolution"].count, kinds["convolution"].integer) == (5, 3)
    assert kinds["convolution"].integer_macs == 64 * (3 * 9 * 8 + 8 * 8 + 8 * 9 * 8)
    assert kinds["convolution"].macs == 64 * (3 * 9 * 8 + 2 * 8 * 8 + 8 * 9 * 8 + 8 * 8 * 4)
    assert (kinds["linear"].count, kinds["linear"].integer) == (1, 1)
    assert (kinds["matrix product"].count, kinds["matrix product"].integer) == (2, 0)
    assert (kinds["residual addition"].count, kinds["residual addition"].integer) == (1, 1)
    found = compiled.engine.optimized_op_counts()
    assert (
        found["QLinearConv"] == 3 and found["QLinearAdd"] == 1 and found["QGemm"] == 1 and found["ConvTranspose"] == 1
    )


def test_what_is_left_has_a_reason(compiled):
    left = {site.site: site for site in compiled.report.engine.integers.left}
    assert left["skipped"].reason == "it matches a pattern of ignore"
    assert left["up"].reason == "ConvTranspose2d has no integer kernel in the engine"
    assert left["matmul"].kind == "matrix product" and left["matmul"].macs == 8 * 256 * 8
    assert len(left) == 4


def test_it_stands_in_every_form_of_the_report(compiled, tmp_path):
    report = compiled.report
    text = format_report(report)
    assert "in integers" in text and "residual addition" in text
    assert "1× it matches a pattern of ignore (skipped)" in text
    page = report.save(tmp_path / "r.html").read_text()
    assert "What runs in integers" in page and "ConvTranspose2d has no integer kernel" in page
    again = Report.load(report.save(tmp_path / "r.json"))
    assert again.engine.integers == report.engine.integers and str(again) == str(report)
    share = report.engine.integers.macs_share
    assert f"{100 * share:.1f}%" in text and 0.2 < share < 0.9


def test_a_layer_whose_result_nobody_rounds_is_told_apart():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.a(x) + self.b(x.sin())

    x = torch.randn(4, 6)
    compiled = built(Net(), [Quantize([x])], x)
    (add,) = (kind for kind in compiled.report.engine.integers.kinds if kind.kind == "residual addition")
    assert compiled.engine.optimized_op_counts().get("QLinearAdd", 0) == add.integer
    assert add.count == 1 and {site.kind for site in compiled.report.engine.integers.left} <= {"residual addition"}


def test_dynamic_and_weight_only_layers():
    model, x = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)), torch.randn(4, 32)
    (kind,) = built(model, [QuantizeDynamic()], x).report.engine.integers.kinds
    assert (kind.kind, kind.count, kind.integer, kind.macs) == ("linear", 2, 2, 32 * 40)
    share = built(model, [QuantizeWeights(bits=4)], x).report.engine.integers
    assert share.macs_share == 0
    assert {site.reason for site in share.left} == {"its weight is stored in 4 bits; it computes in floating point"}


def test_a_floating_point_engine_says_nothing():
    compiled = built(nn.Linear(4, 4), [], torch.randn(2, 4))
    assert compiled.report.engine.integers is None
    assert "in integers" not in format_report(compiled.report)


def test_weights_count_as_the_engine_stores_them(compiled):
    before, after = compiled.report.before, compiled.report.after
    quantized = 8 * 3 * 9 + 8 * 8 + 8 * 8 * 9 + 4 * 8
    assert after.bytes - after.stored_bytes == 3 * quantized
    assert after.engine_bytes < before.engine_bytes == before.bytes
    assert "in PyTorch" in format_report(compiled.report)


@pytest.mark.parametrize("activation", [nn.functional.silu, nn.functional.hardswish])
def test_an_activation_that_gates_itself_runs_in_integers(activation):
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.gate, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            x = activation(self.a(x))
            return self.b(x * nn.functional.hardsigmoid(self.gate(x.mean((2, 3), keepdim=True))))

    compiled = built(Gated(), [Quantize([X])], X)
    found = compiled.engine.optimized_op_counts()
    assert found["QLinearConv"] == 3 and found["QLinearMul"] == 2 and found["QLinearGlobalAveragePool"] == 1
    hard = activation is nn.functional.hardswish
    assert found["QLinearAdd"] == 1 + hard and found.get("QLinearSigmoid", 0) == 1 - hard
    assert found["QuantizeLinear"] == found["DequantizeLinear"] == 1  # at the model's ends


def test_a_gated_activation_between_floats_stays_whole():
    model = nn.Sequential(nn.LayerNorm(8), nn.SiLU(), nn.Linear(8, 4), nn.Hardswish())
    counts = built(model, [Quantize([torch.randn(4, 8)])], torch.randn(4, 8)).engine.optimized_op_counts()
    assert counts["QuickGelu"] == 1 and counts["QGemm"] == 1 and not counts.get("QLinearMul")


def test_large_products_of_bytes_do_not_overflow():
    """Without VNNI two products of 255 and 127 overflow the 16 bits in which the usual kernels add them."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 40, 1), nn.Linear(40, 4)
            for layer in (self.a, self.b, self.c):
                nn.init.constant_(layer.weight, 0.5)

        def forward(self, x):
            return self.c(self.b(self.a(x)).mean((2, 3)))

    x = torch.ones(2, 2, 4, 4)
    for bits in (7, 8):
        compiled = built(Net(), [Quantize([x], weight_bits=bits)], x)
        torch.testing.assert_close(torch.as_tensor(compiled.engine(x)), compiled(x), rtol=1e-2, atol=0)
        assert compiled.engine.manifest.measurements.get("weights_in_8_bits", False) == (bits == 8)


class Transformer(nn.Module):
    """A residual stream that a layer norm reads, and starts with a parameter."""

    def __init__(self):
        super().__init__()
        self.start, self.norm = nn.Parameter(torch.randn(8)), nn.LayerNorm(8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.start + x
        x = x + self.first(self.norm(x))
        return x + self.second(self.norm(x))


def test_a_residual_stream_in_floating_point_has_a_reason():
    x = torch.randn(4, 6, 8)
    share = built(Transformer(), [Quantize([x])], x).report.engine.integers
    told = "it comes from what computes in floating point (a parameter, an input); "
    reasons = [site.reason for site in share.left if site.kind == "residual addition"]
    assert len(reasons) == 2 and all(told in reason for reason in reasons)
    assert reasons[0].endswith("LayerNorm reads it") and reasons[1].endswith("the output reads it")
