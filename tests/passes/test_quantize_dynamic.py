"""Dynamic quantization of LSTMs and of products of matrices: which kernels, what they compute, what is left."""

import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress.capture import capture
from fxcompress.errors import OptionError
from fxcompress.graph.edit import copy_graph
from fxcompress.graph.verify import verify
from fxcompress.passes import QuantizeDynamic
from fxcompress.passes.base import PassContext


class Tagger(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.recurrent = nn.LSTM(12, 16, batch_first=True, **options)
        self.head = nn.Linear(16 * (2 if options.get("bidirectional") else 1), 5)

    def forward(self, x):
        return self.head(self.recurrent(x)[0])


class Products(nn.Module):
    """Attention written out, and a product with a parameter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Parameter(torch.randn(16, 16) / 4)

    def forward(self, x):
        scores = torch.matmul(x, x.transpose(-2, -1)) / 4
        return torch.matmul(torch.matmul(scores.softmax(-1), x), self.mix)


def run(model, x, pass_):
    result = pass_.run(copy_graph(capture(model.eval(), (x,))), PassContext(example_inputs=[x]))
    verify(result.graph_module, shapes=True)
    return result


def relative_error(got, expected):
    expected = expected.detach()
    return float((torch.as_tensor(got).detach() - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    "options",
    [{}, {"bidirectional": True}, {"num_layers": 2, "bias": False}, {"num_layers": 2, "bidirectional": True}],
    ids=str,
)
def test_an_lstm_runs_on_integer_weights(options, tmp_path):
    model, x = Tagger(**options).eval(), torch.randn(2, 7, 12)
    compiled = fxc.compile(model, [QuantizeDynamic()], example_inputs=(x,), progress=False)
    assert {rewrite.site for rewrite in compiled.report.passes[0].rewrites} == {"recurrent", "head"}
    engine = compiled.export("onnxruntime", tmp_path / "b")
    counts = engine.optimized_op_counts()
    assert counts["DynamicQuantizeLSTM"] == options.get("num_layers", 1) and "LSTM" not in counts
    assert relative_error(engine(x), model(x)) < 0.05
    assert relative_error(compiled(x), model(x)) < 0.05


def test_a_quantized_lstm_is_saved_and_loaded(tmp_path):
    x = torch.randn(2, 7, 12)
    compiled = fxc.compile(Tagger().eval(), [QuantizeDynamic()], example_inputs=(x,), progress=False)
    compiled.save(tmp_path / "saved")
    assert torch.equal(fxc.load(tmp_path / "saved")(x), compiled(x))


def test_products_multiply_integers(tmp_path):
    model, x = Products().eval(), torch.randn(2, 7, 16)
    pass_ = QuantizeDynamic(kinds=("matmul",))
    compiled = fxc.compile(model, [pass_], example_inputs=(x,), progress=False)
    assert len(compiled.report.passes[0].rewrites) == 3
    engine = compiled.export("onnxruntime", tmp_path / "b")
    counts = engine.optimized_op_counts()
    assert (
        counts.get("MatMulInteger", 0) + counts.get("MatMulIntegerToFloat", 0) + counts.get("DynamicQuantizeMatMul", 0)
        == 3
    ), counts
    assert "MatMul" not in counts and "FusedMatMul" not in counts
    assert relative_error(engine(x), model(x)) < 0.05


def test_products_stay_unless_asked_for():
    result = run(Products(), torch.randn(2, 7, 16), QuantizeDynamic())
    assert [skip.code for skip in result.skipped] == ["nothing_to_quantize"]


@pytest.mark.parametrize(
    ("model", "code"),
    [
        pytest.param(nn.GRU(12, 16), "no_kernel", id="a GRU"),
        pytest.param(nn.LSTM(12, 16, proj_size=4), "no_kernel", id="projected states"),
        pytest.param(nn.LSTM(12, 16).double(), "dtype", id="float64"),
    ],
)
def test_recurrent_layers_that_are_left(model, code):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.recurrent = model

        def forward(self, x):
            return self.recurrent(x)[0]

    x = torch.randn(7, 2, 12, dtype=next(model.parameters()).dtype)
    result = run(Net(), x, QuantizeDynamic())
    assert {skip.site: skip.code for skip in result.skipped} == {"recurrent": code, "all": "nothing_to_quantize"}


def test_an_unknown_kind_is_refused():
    with pytest.raises(OptionError, match="no kind 'conv'"):
        QuantizeDynamic(kinds=("conv",))


def test_a_pattern_spares_an_lstm():
    result = run(Tagger(), torch.randn(2, 7, 12), QuantizeDynamic(ignore=("recurrent",)))
    assert {skip.site: skip.code for skip in result.skipped} == {"recurrent": "ignored"}
    assert [rewrite.site for rewrite in result.rewrites] == ["head"]
