"""16-bit graphs: what is narrow, what stays wide, and that callers notice nothing but precision."""

import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress.capture import capture
from fxcompress.errors import OptionError, PreconditionError
from fxcompress.graph.edit import copy_graph
from fxcompress.graph.verify import verify
from fxcompress.passes import Quantize, QuantizeDynamic, QuantizeWeights
from fxcompress.passes.base import PassContext
from fxcompress.passes.convert_precision import ConvertPrecision
from tests.support import randomize


class Net(nn.Module):
    """A convolution, attention with a boolean mask, a norm, a softmax, an LSTM, tokens and two outputs."""

    def __init__(self):
        super().__init__()
        self.embed, self.conv = nn.Embedding(11, 16), nn.Conv1d(16, 16, 3, padding=1)
        self.norm, self.batch = nn.LayerNorm(16), nn.BatchNorm1d(16)
        self.lstm, self.head = nn.LSTM(16, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, tokens, gain):
        x = self.norm(self.embed(tokens)) * gain
        x = self.batch(self.conv(x.transpose(1, 2))).relu().transpose(1, 2)
        mask = (tokens > 2)[:, None]
        x = x + nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)
        y = self.head(self.lstm(x)[0])
        return y.softmax(-1), tokens + 1


INPUTS = (torch.randint(3, 11, (2, 5)), torch.rand(2, 5, 16))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return randomize(Net()).eval()


@pytest.fixture(scope="module")
def captured(model):
    return capture(model, INPUTS)


def run(pass_, graph, inputs=INPUTS):
    result = pass_.run(copy_graph(graph), PassContext(example_inputs=list(inputs)))
    verify(result.graph_module, shapes=True)
    return result


@pytest.mark.parametrize(("dtype", "allowed"), [("float16", 5e-3), ("bfloat16", 5e-2)])
def test_it_computes_narrow_and_answers_wide(captured, dtype, allowed):
    result = run(ConvertPrecision(dtype), captured)
    graph = result.graph_module
    narrow = getattr(torch, dtype)
    assert {graph.get_submodule(name).weight.dtype for name in ("embed", "conv", "head")} == {narrow}
    assert graph.get_submodule("lstm").weight_hh_l0.dtype == narrow
    assert {graph.get_submodule(name).weight.dtype for name in ("norm", "batch")} == {torch.float32}
    assert {skip.site: skip.code for skip in result.skipped} == {"norm": "norm", "batch": "norm"}
    (softmax,) = (n for n in graph.graph.nodes if n.target is torch.ops.aten.softmax.int)
    assert softmax.meta["val"].dtype == torch.float32
    y, tokens = graph(*INPUTS)
    expected, _ = captured(*INPUTS)
    assert y.dtype == torch.float32 and tokens.dtype == torch.int64
    assert 0 < (y - expected).abs().max() < allowed
    assert graph(INPUTS[0][:1], INPUTS[1][:1])[0].shape == (1, 5, 4)


def test_the_users_weights_stay(model, captured):
    run(ConvertPrecision(), captured)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_onnxruntime_takes_it(model):
    compiled = fxc.compile(model, [ConvertPrecision("float16")], INPUTS, backend="onnxruntime")
    item = compiled.report.passes[0]
    assert item.after.bytes < 0.6 * item.before.bytes and "casts" in item.note
    assert compiled.engine(*INPUTS)[0].dtype == torch.float32


def test_onnxruntime_takes_a_transposed_value_before_narrow_weights():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.recurrent, self.head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.recurrent(x)[0])

    x = torch.randn(2, 5, 6)
    compiled = fxc.compile(
        Tagger().eval(), [ConvertPrecision()], example_inputs=(x,), backend="onnxruntime", progress=False
    )
    torch.testing.assert_close(torch.as_tensor(compiled.engine(x)), compiled(x), rtol=1e-2, atol=1e-2)


def test_running_it_twice_changes_nothing(captured):
    once = run(ConvertPrecision(), captured).graph_module
    twice = run(ConvertPrecision(), once).graph_module
    assert len(twice.graph.nodes) == len(once.graph.nodes)
    assert torch.equal(once(*INPUTS)[0], twice(*INPUTS)[0])


def test_layers_kept_wide(captured):
    result = run(ConvertPrecision(keep=("head", "lstm")), captured)
    assert result.graph_module.get_submodule("head").weight.dtype == torch.float32
    with pytest.raises(OptionError, match="nothing matches 'hand'"):
        run(ConvertPrecision(keep="hand"), captured)
    with pytest.raises(OptionError, match="not valid"):
        ConvertPrecision("float8")


def test_overflow_is_refused_and_large_weights_stay_wide():
    x = torch.ones(2, 4)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        for layer in model:
            layer.weight.fill_(1e3)
    graph = capture(model, (x,))
    with pytest.raises(PreconditionError, match="not finite any more in float16"):
        run(ConvertPrecision("float16"), graph, (x,))
    assert run(ConvertPrecision("bfloat16"), graph, (x,)).changed
    with torch.no_grad():
        model[0].weight.fill_(1e5)
        model[1].weight.fill_(1e-6)
    x = x / 10
    result = run(ConvertPrecision("float16"), capture(model, (x,)), (x,))
    assert {skip.site: skip.code for skip in result.skipped} == {"0": "range"}
    torch.testing.assert_close(result.graph_module(x), model(x), rtol=1, atol=1)


def test_nothing_to_convert():
    class Counts(nn.Module):
        def forward(self, x):
            return x + 1

    tokens = torch.arange(4)
    result = run(ConvertPrecision(), capture(Counts().eval(), (tokens,)), (tokens,))
    assert not result.changed and result.skipped[0].code == "nothing_to_convert"


def test_where_all_is_quantized_only_that_is_told():
    x = torch.randn(2, 8)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    told = fxc.compile(model, [Quantize([x]), ConvertPrecision()], (x,), progress=False).report.passes[-1]
    assert not told.rewrites and {skip.code for skip in told.skipped} == {"quantized"}


class Mixed(nn.Module):
    """A convolution and its activation that run in integers, an LSTM, a product of two values, a layer in floats."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu = nn.Conv1d(8, 8, 3, padding=1), nn.ReLU()
        self.lstm, self.head = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x):
        x = self.relu(self.conv(x)).transpose(1, 2)
        x = self.lstm(x)[0]
        return self.head(x.sin() @ x.cos().transpose(1, 2) @ x)


@pytest.mark.parametrize(
    ("quantization", "stay", "narrow"),
    [
        (lambda batches: Quantize(batches), {"conv", "head"}, {"lstm"}),
        (lambda batches: QuantizeDynamic(), {"lstm", "head"}, {"conv"}),
        (lambda batches: QuantizeWeights(bits=8), set(), {"conv", "lstm"}),
    ],
)
def test_what_runs_in_integers_stays_as_engines_want_it(quantization, stay, narrow):
    torch.manual_seed(0)
    x = torch.randn(2, 8, 6)
    passes = [quantization([x, torch.randn(2, 8, 6)]), ConvertPrecision("float16")]
    compiled = fxc.compile(Mixed().eval(), passes, (x,), progress=False)
    told = compiled.report.passes[-1]
    assert stay <= {skip.site for skip in told.skipped if skip.code == "quantized"}
    assert narrow <= {rewrite.site for rewrite in told.rewrites}
    engine = compiled.export("onnxruntime")
    torch.testing.assert_close(torch.as_tensor(engine(x)), compiled(x), rtol=5e-2, atol=5e-2)


def test_an_activation_between_a_layer_and_its_stub_stays_with_them():
    torch.manual_seed(0)
    x = torch.randn(2, 8, 6)
    compiled = fxc.compile(Mixed().eval(), [Quantize([x])], (x,), progress=False)
    result = ConvertPrecision().run(compiled.module, PassContext(example_inputs=[x]))
    told = {skip.site: skip.reason for skip in result.skipped}
    assert "part of an integer kernel" in told["relu"]
