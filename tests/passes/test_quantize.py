"""Static quantization: what is placed where for each engine, what runs in integers, what is refused."""

import math

import onnx
import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress.backends.onnx_export import write_onnx
from fxcompress.capture import capture
from fxcompress.errors import BackendError, OptionError, PreconditionError
from fxcompress.graph.edit import copy_graph
from fxcompress.graph.verify import verify
from fxcompress.passes import Calibrate, FuseModules, InsertQuantStubs, Quantize
from fxcompress.passes.base import PassContext
from fxcompress.quantization.calibrate import stubs_of
from fxcompress.quantization.fake_quant import Quantizer
from tests.support import randomize


class Net(nn.Module):
    """Convolutions with relu and hardswish, a residual, a concatenation, pools, gating, and a token-wise linear."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.a, self.b = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.gate = nn.Conv2d(16, 16, 1)
        self.mix = nn.Conv2d(32, 24, 1)
        self.tokens, self.norm = nn.Linear(24, 24), nn.LayerNorm(24)
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.b(nn.functional.hardswish(self.a(x)))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        x = self.mix(torch.cat([x, nn.functional.max_pool2d(x, 3, 1, 1)], 1)).relu()
        x = nn.functional.avg_pool2d(x, 2).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.tokens(x)).mean(1))


X = torch.randn(2, 3, 8, 8)


def data(count=2):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 3, 8, 8, generator=generator), torch.zeros(4)) for _ in range(count)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return randomize(Net()).eval()


@pytest.fixture(scope="module")
def fused(model):
    return FuseModules().run(copy_graph(capture(model, (X,))), PassContext(example_inputs=[X])).graph_module


def run(pass_, graph):
    result = pass_.run(copy_graph(graph), PassContext(example_inputs=[X]))
    verify(result.graph_module, shapes=True)
    return result


LAYERS = {"stem.0", "a", "b", "gate", "mix", "tokens", "head"}


def test_every_layer_is_quantized_and_ranked_by_noise(fused):
    result = run(Quantize(data()), fused)
    assert {item.site for item in result.rewrites} == LAYERS and not result.skipped
    decibels = [item.detail["signal_to_noise_db"] for item in result.rewrites]
    assert decibels == sorted(decibels) and 15 < decibels[0] < math.inf
    x = torch.randn(3, 3, 8, 8)
    error = (result.graph_module(x) - fused(x)).abs().max() / fused(x).abs().max()
    assert 0 < error < 0.1


def test_openvino_gets_no_stub_on_what_only_an_activation_reads(fused):
    def stubs(scheme):
        graph = run(Quantize(data(), scheme=scheme), fused).graph_module
        return {
            str(node.args[0])
            for path in stubs_of(graph)
            for node in graph.graph.find_nodes(op="call_module", target=path)
        }

    # Only a hardswish reads the first: onnxruntime has it as a gate and a product, openvino as one.
    assert stubs("onnxruntime") - stubs("openvino") == {"a", "hardsigmoid_default", "mul_tensor"}
    assert stubs("openvino") - stubs("onnxruntime") == {"hardswish"}


def test_values_that_an_engine_reads_as_one_share_a_scale(fused):
    graph = run(Quantize(data()), fused).graph_module
    (cat,) = (node for node in graph.graph.nodes if node.target is torch.ops.aten.cat.default)
    sources = {str(source.target) for source in cat.all_input_nodes}
    assert len(sources) == 1 and {str(user.target) for user in cat.users} == sources
    (pool,) = (node for node in graph.graph.nodes if node.target is torch.ops.aten.max_pool2d.default)
    assert str(pool.args[0].target) in sources


def test_a_clip_is_part_of_the_rounding_behind_it(fused):
    graph = run(Quantize(data()), fused).graph_module
    for node in graph.graph.nodes:
        if node.target is torch.ops.aten.relu.default:
            assert not isinstance(graph.get_submodule(node.args[0].target), Quantizer)
            (stub,) = node.users
            assert graph.get_submodule(stub.target).zero_point == 0


def test_onnxruntime_runs_it_in_integers(model, tmp_path):
    compiled = fxc.compile(
        model,
        [FuseModules(), Quantize(data(), scheme="onnxruntime")],
        (X,),
        backend="onnxruntime",
        output=tmp_path / "b",
    )
    found = compiled.engine.optimized_op_counts()
    assert found["QLinearConv"] == 5 and found["QGemm"] == 2 and found["QLinearAdd"] == 2  # and a hard sigmoid
    assert not found.get("Conv") and not found.get("Gemm") and not found.get("MatMul")
    assert found["QLinearMul"] == 2 and found["QLinearSigmoid"] == 1
    assert not {"HardSigmoid", "HardSwish", "Clip", "Mul"} & found.keys()
    held = onnx.load(tmp_path / "b" / "model.onnx").graph.initializer
    kinds = {item.data_type for item in held if math.prod(item.dims) > 32}
    assert kinds == {onnx.TensorProto.INT8}
    errors = compiled.engine.manifest.measurements["verification"]
    assert 1e-2 <= errors["tolerance"] <= 5e-2 and max(errors["relative_error"].values()) < 2e-2
    torch.testing.assert_close(torch.as_tensor(compiled.engine(X[:1])), compiled(X[:1]), rtol=0, atol=0.1)


def test_the_tensorrt_scheme(fused, tmp_path):
    graph = run(Quantize(data(), scheme="tensorrt"), fused).graph_module
    stubs = stubs_of(graph)
    for path, nodes in stubs.items():
        quantizer = graph.get_submodule(path)
        assert quantizer.zero_point == 0 and quantizer.kind.signed
        for node in nodes:
            for user in node.users:  # inputs of layers, and the skip branch of the residual
                assert user.op == "call_module" or user.target is torch.ops.aten.add.Tensor
    (add,) = (node for node in graph.graph.nodes if node.target is torch.ops.aten.add.Tensor)
    assert [str(source.target) in stubs for source in add.args[:2]] == [True, False]
    write_onnx(graph, tmp_path / "m.onnx")
    exported = onnx.load(tmp_path / "m.onnx")
    kinds = {i.name: i.data_type for i in exported.graph.initializer}
    assert onnx.TensorProto.UINT8 not in kinds.values()
    for node in exported.graph.node:
        if node.op_type == "Conv":  # biases stay in floating point
            assert kinds[node.input[2]] == onnx.TensorProto.FLOAT


def test_for_tensorrt_linear_layers_take_no_addition_up():
    """The residual stream of a transformer stays in floating point: its outliers would make the steps wide."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x):
            return x + self.linear(self.norm(x))

    x = torch.randn(2, 5, 8)
    graph = run_on(Quantize([x], scheme="tensorrt"), Residual().eval(), x).graph_module
    readers = [user for nodes in stubs_of(graph).values() for node in nodes for user in node.users]
    assert [str(user.target) for user in readers] == ["linear"]


def test_stubs_do_nothing_before_calibration(fused, tmp_path):
    stubbed = run(InsertQuantStubs(), fused)
    assert {item.site for item in stubbed.rewrites} == LAYERS
    torch.testing.assert_close(stubbed.graph_module(X), fused(X))  # a hardswish became two operations
    with pytest.raises((BackendError, PreconditionError), match="not calibrated"):
        write_onnx(stubbed.graph_module, tmp_path / "never.onnx")
    calibrated = run(Calibrate(data()), stubbed.graph_module)
    both = run(Quantize(data(), correct_bias=False), fused)
    assert torch.equal(calibrated.graph_module(X), both.graph_module(X))
    again = run(Calibrate(data(), observer="minmax"), calibrated.graph_module)
    fresh = run(Calibrate(data(), observer="minmax"), stubbed.graph_module)
    assert torch.equal(again.graph_module(X), fresh.graph_module(X))  # it starts anew, in floating point


def test_layers_left_in_floating_point(fused):
    result = run(Quantize(data(), ignore=("mix",), ignore_kinds=("Linear",), ends="float"), fused)
    left = {skip.site: skip.code for skip in result.skipped}
    assert left == dict.fromkeys(("stem.0", "mix", "tokens", "head"), "ignored")
    assert {item.site for item in result.rewrites} == LAYERS - left.keys()


def test_a_norm_that_was_not_fused_is_named(model):
    result = run(Quantize(data()), capture(model, (X,)))
    assert {skip.site: skip.code for skip in result.skipped} == {"stem.0": "norm_follows"}


def test_running_it_twice_is_safe(fused):
    once = run(Quantize(data()), fused).graph_module
    twice = run(Quantize(data()), once)
    assert not twice.changed and twice.skipped[0].code == "already_quantized"
    idle = run(InsertQuantStubs(), once)
    assert {skip.code for skip in idle.skipped} == {"already_quantized"} and not idle.changed


def test_it_saves_and_loads(model, tmp_path):
    compiled = fxc.compile(model, [FuseModules(), Quantize(data())], (X,))
    compiled.save(tmp_path / "saved")
    loaded = fxc.load(tmp_path / "saved")
    assert torch.equal(loaded(X), compiled(X))


def test_it_trains(fused):
    graph = run(Quantize(data()), fused).graph_module.train()
    graph(X).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in graph.parameters())


def test_tied_weights_stay_in_floating_point():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight
            self.c = nn.Linear(6, 2)

        def forward(self, x):
            return self.c(self.b(self.a(x).relu()))

    x = torch.randn(4, 6)
    result = run_on(Quantize([x]), Tied().eval(), x)
    assert {skip.site: skip.code for skip in result.skipped} == {"a": "tied_weight", "b": "tied_weight"}


def run_on(pass_, model, x):
    return pass_.run(capture(model, (x,)), PassContext(example_inputs=[x]))


def test_strange_data():
    x = torch.randn(4, 6)
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    for bad, message in (
        ([], "holds no batch"),
        ([torch.full((4, 6), torch.nan)], "not finite"),
        ([torch.randn(4, 5)], "captured with"),
    ):
        with pytest.raises(PreconditionError, match=message):
            run_on(Quantize(bad), model, x)
    with torch.no_grad():
        model[0].weight[0] = 0
        model[0].weight[1:] = -model[0].weight[1:].abs()
        model[0].bias.fill_(-1)
    result = run_on(Quantize([x.abs()]), model, x)  # the relu gives zeros only
    assert result.graph_module(x.abs()).shape == (4, 2)
    assert next(i for i in result.rewrites if i.site == "0").detail["note"] == "1 channel is all zero"


def test_nothing_to_quantize_is_told():
    result = run_on(Quantize([torch.randn(2, 3)]), nn.Tanh().eval(), torch.randn(2, 3))
    assert not result.changed and [skip.code for skip in result.skipped] == ["nothing_to_quantize"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "onnx"}, "no scheme 'onnx'"),
        ({"observer": "max"}, "no observer 'max'"),
        ({"percentile": 40.0}, "outside"),
        ({"weight_bits": 3}, "not valid"),
        ({"max_drop": -1.0}, "below 0"),
        ({"metric": len}, "needs max_drop"),
        ({"min_speedup": 0.0}, "not above 0"),
        ({"ends": "none"}, "not valid"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(OptionError, match=message):
        Quantize(data(), **options)


def test_patterns_must_match(fused):
    with pytest.raises(OptionError, match="matches 'nowhere'"):
        run(Quantize(data(), ignore=("nowhere",)), fused)
    with pytest.raises(OptionError, match="no kind of layer"):
        run(Quantize(data(), ignore_kinds=("Conv",)), fused)
    with pytest.raises(PreconditionError, match="no quantization stubs"):
        run(Calibrate(data()), fused)


@pytest.mark.parametrize(("asked", "changed"), [(1.0, True), (1.5, False)])
def test_integers_only_where_they_pay(fused, asked, changed):
    """An engine that takes 5 ms in floating point and 4 ms in integers."""
    measured = []

    def latency(graph, backend):
        measured.append(backend)
        return 4.0 if stubs_of(graph) else 5.0

    context = PassContext(example_inputs=[X], latency=latency)
    result = Quantize(data(), min_speedup=asked).run(copy_graph(fused), context)
    assert result.changed is changed and set(measured) == {"onnxruntime"}
    if changed:
        assert "4 ms in integers, 5 ms in floating point" in result.note
        return
    (skip,) = (skip for skip in result.skipped if skip.site == "all")
    assert skip.code == "not_faster" and "1.25 times faster, 1.5 was asked for" in skip.reason
    assert not stubs_of(result.graph_module) and torch.equal(result.graph_module(X), fused(X))


class _Mixed(nn.Module):
    """A dense, a grouped and a depthwise convolution, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.depthwise(self.grouped(self.dense(x).relu()).relu()).relu()
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("gains", "floating", "asked"),
    [
        ({"grouped": 3.0}, ["grouped"], 1.0),
        ({"grouped": 3.0, "depthwise": 1.0, "head": -1.0}, ["grouped", "depthwise"], 1.0),
        ({"grouped": 0.5}, None, 1.0),  # better, and not enough
        ({}, None, 1.0),
    ],
)
def test_kinds_of_layers_that_are_faster_in_floating_point(gains, floating, asked):
    """10 ms in floating point, 12 in integers, less what each layer gains by floats."""
    graph = fxc.compile(_Mixed().eval(), [FuseModules()], (torch.randn(2, 3, 8, 8),)).module
    layers = ["dense", "grouped", "depthwise", "head"]

    def integers(graph):
        return [path for path in layers if type(graph.get_submodule(path)).__name__.startswith("Quant")]

    def latency(graph, backend):
        if not stubs_of(graph):
            return 10.0
        return 12.0 - sum(gain for path, gain in gains.items() if path not in integers(graph))

    context = PassContext(example_inputs=[torch.randn(2, 3, 8, 8)], latency=latency)
    batches = [torch.randn(4, 3, 8, 8)]
    result = Quantize(batches, min_speedup=asked).run(copy_graph(graph), context)
    codes = {skip.site: skip.code for skip in result.skipped}
    if floating is None:
        assert codes["all"] == "not_faster" and not result.changed
        return
    assert integers(result.graph_module) == [path for path in layers if path not in floating]
    assert {site for site, code in codes.items() if code == "not_faster"} == set(floating)
    assert "ms in integers but for grouped convolutions" in result.note and "10 ms in floating point" in result.note


def test_latency_needs_an_engine(fused):
    with pytest.raises(PreconditionError, match="only be measured inside compile"):
        Quantize(data(), min_speedup=1.0).run(copy_graph(fused), PassContext())


def test_metric_and_data_come_from_a_file(tmp_path, model):
    (tmp_path / "data.py").write_text(
        "import torch\n"
        "batches = [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))]\n"
        "def accuracy(graph):\n"
        "    return float(len(list(graph.modules())) > 0)\n"
    )
    from fxcompress.model_specs import load_value
    from fxcompress.passes.registry import parse_pass

    file = tmp_path / "data.py"
    text = f"quantize(data='{file}:batches', max_drop=0.1, metric='{file}:accuracy')"
    compiled = fxc.compile(model, ["fuse_modules", parse_pass(text, load_value)], (X,), progress=False)
    assert "0 of 7 layers stay in floating point: the drop of the metric is 0" in compiled.report.passes[1].note


@pytest.mark.parametrize("ends", [{"min": True}, {"max": True}, {"min": True, "max": True}], ids=["min", "max", "both"])
def test_clips_with_limits_for_each_channel_lower(ends: dict[str, bool]) -> None:
    class Clips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.register_buffer("low", torch.tensor([-0.5, 0.0, -0.2, 0.1]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            limits = {name: self.low + (name == "max") for name in ends}
            return self.second(torch.clamp(self.first(x), **limits))

    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    compiled = fxc.compile(Clips().eval(), [FuseModules(), Quantize([x])], (x,), backend="onnxruntime")
    assert compiled.report.engine is not None
    assert max(compiled.report.engine.errors.values()) <= compiled.report.engine.tolerance


def test_recurrent_layers_that_stay_in_floating_point_are_told() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells, self.head = nn.GRU(4, 6, batch_first=True), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.cells(x)[0])

    x = torch.randn(3, 5, 4)
    (done,) = fxc.compile(Tagger().eval(), [Quantize([x])], (x,)).report.passes
    assert ("cells", "kind") in [(skip.site, skip.code) for skip in done.skipped]
