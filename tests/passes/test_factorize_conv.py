import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress.capture import capture
from fxcompress.errors import OptionError
from fxcompress.passes import FactorizeConv, FactorizeLinear, FuseModules, PruneChannels, SubstituteDepthwiseSeparable
from fxcompress.passes.base import PassContext
from tests.support import check_pass

LAYERS = {
    "plain": (lambda: nn.Conv2d(8, 16, 3, padding=1), (3, 8, 9, 9)),
    "uneven": (lambda: nn.Conv2d(12, 16, (3, 5), (2, 1), (1, 2), (2, 1), groups=2), (3, 12, 12, 11)),
    "same, reflected": (lambda: nn.Conv2d(8, 16, 3, padding="same", padding_mode="reflect"), (3, 8, 9, 8)),
    "one dimension": (lambda: nn.Conv1d(8, 16, 5, stride=2, bias=False), (3, 8, 20)),
    "three dimensions": (lambda: nn.Conv3d(4, 6, (1, 3, 3), stride=(1, 2, 1)), (2, 4, 5, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(8, 12, 3, 2, 1, output_padding=1, groups=2), (3, 8, 6, 5)),
    "transposed in one": (lambda: nn.ConvTranspose1d(8, 12, 4, stride=3, dilation=2), (3, 8, 6)),
}
METHODS = ("channel", "spatial", "tucker2", "cp", "auto")


def single(name):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    return nn.Sequential(make()).eval(), torch.randn(shape)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", LAYERS)
def test_errors_are_what_the_outputs_show_and_costs_what_was_asked(name, method):
    model, x = single(name)
    layer = model[0]
    found = {}
    for calibration in (None, [x]):
        result = check_pass(model, (x,), FactorizeConv(method=method, ratio=0.6, calibration=calibration))
        if not result.changed:
            one_dimensional = sum(size > 1 for size in layer.kernel_size) < 2
            assert (method == "spatial" and one_dimensional) or (method == "cp" and layer.groups > 1)
            assert [skip.code for skip in result.skipped] == ["method"]
            return
        detail = result.rewrites[0].detail
        assert detail["macs_after"] <= 0.6 * detail["macs_before"]
        with torch.no_grad():
            expected, actual = model(x).double(), result.graph_module(x).double()
            bias = 0 if layer.bias is None else layer.bias.double().view(-1, *[1] * (x.dim() - 2))
            found[calibration is not None] = float((expected - actual).norm() / (expected - bias).norm())
        if calibration is not None:
            assert abs(found[True] - detail["output_error"]) < 1e-5
    if detail.get("ridge", 0.0) is not None:
        assert found[True] < found[False]  # fitted on just this data
    else:  # no half of it tells anything about the other
        assert found[True] == found[False]


def test_channel_equals_the_tail_of_the_svd():
    model, x = single("plain")
    result = check_pass(model, (x,), FactorizeConv(method="channel", rank=5), rewrites=["0"])
    values = torch.linalg.svdvals(model[0].weight.detach().double().flatten(1))
    expected = float(values[5:].norm() / values.norm())
    assert abs(result.rewrites[0].detail["weight_error"] - expected) < 1e-6
    whitened = check_pass(model, (x,), FactorizeConv(method="channel", rank=5, calibration=[x]), rewrites=["0"])
    rows = nn.functional.unfold(x, 3, padding=1).transpose(1, 2).reshape(-1, 72).double()
    weight = model[0].weight.detach().double().flatten(1)
    tail = float(torch.linalg.eigvalsh(weight @ rows.T @ rows @ weight.T).flip(0)[5:].sum())
    assert abs(whitened.rewrites[0].detail["loss"] - tail) / tail < 1e-4


def test_spatial_equals_the_tail_of_the_svd():
    model, x = single("plain")
    result = check_pass(model, (x,), FactorizeConv(method="spatial", rank=6), rewrites=["0"])
    weight = model[0].weight.detach().double()  # [out, in, h, w]
    values = torch.linalg.svdvals(weight.permute(0, 3, 1, 2).reshape(48, 24))
    assert abs(result.rewrites[0].detail["weight_error"] - float(values[6:].norm() / values.norm())) < 1e-6
    first, second = (result.graph_module.get_submodule(f"0.{index}") for index in range(2))
    assert (first.kernel_size, second.kernel_size) == ((3, 1), (1, 3))
    assert (first.padding, second.padding) == ((1, 0), (0, 1))


def test_a_kernel_of_low_rank_is_found_exactly():
    torch.manual_seed(0)
    x = torch.randn(2, 12, 8, 8)
    model = nn.Sequential(nn.Conv2d(12, 20, 3)).eval()
    core, left, right = torch.randn(5, 4, 9), torch.randn(20, 5), torch.randn(12, 4)
    with torch.no_grad():
        model[0].weight.copy_(torch.einsum("os,srk,ir->oik", left, core, right).view(20, 12, 3, 3))
    exact = check_pass(model, (x,), FactorizeConv(method="tucker2", rank=(4, 5)), rewrites=["0"])
    assert exact.rewrites[0].detail["weight_error"] < 1e-5
    bounded = check_pass(model, (x,), FactorizeConv(error=1e-4), rewrites=["0"])
    assert bounded.rewrites[0].detail["weight_error"] < 1e-4
    with torch.no_grad():
        model[0].weight.add_(0.1 * torch.randn(20, 12, 3, 3))
    noisy = check_pass(model, (x,), FactorizeConv(method="tucker2", rank="vbmf"), rewrites=["0"])
    assert noisy.rewrites[0].detail["rank"] == [4, 5]


def test_auto_takes_the_least_error_at_equal_cost():
    model, x = single("plain")
    errors = {
        method: check_pass(model, (x,), FactorizeConv(method=method, ratio=0.5)).rewrites[0].detail["weight_error"]
        for method in ("channel", "spatial", "tucker2", "auto")
    }
    assert errors["auto"] == min(errors[method] for method in ("channel", "spatial", "tucker2"))


@pytest.mark.parametrize("option", [{"error": 0.6}, {"energy": 0.64}])
@pytest.mark.parametrize("method", ["channel", "spatial", "tucker2", "auto"])
@pytest.mark.parametrize("data", [False, True])
def test_bounds_are_kept(option, method, data):
    model, x = single("plain")
    pass_ = FactorizeConv(method=method, **option, calibration=[x] if data else None, force=True)
    detail = check_pass(model, (x,), pass_, rewrites=["0"]).rewrites[0].detail
    assert detail["output_error" if data else "weight_error"] <= 0.6 + 1e-6


def test_ranks_are_multiples():
    model, x = single("plain")
    for method in ("channel", "spatial", "tucker2"):
        detail = check_pass(model, (x,), FactorizeConv(method=method, ratio=0.6, round_to=4)).rewrites[0].detail
        ranks = detail["rank"] if isinstance(detail["rank"], list) else [detail["rank"]]
        assert all(rank % 4 == 0 for rank in ranks)


@pytest.mark.parametrize(
    ("layer", "options", "code"),
    [
        (nn.Conv2d(8, 16, 3), {"rank": 15}, "does_not_pay"),
        (nn.Conv2d(8, 16, 3), {"method": "channel", "rank": 16}, "full_rank"),
        (nn.Conv2d(8, 16, 3), {"method": "tucker2", "rank": (8, 16)}, "full_rank"),
        (nn.Conv2d(8, 8, 3, groups=8), {}, "depthwise"),
        (nn.Conv2d(8, 8, 1), {}, "pointwise"),
        (nn.Conv2d(8, 16, 3), {"ignore": "0"}, "ignored"),
        (nn.Conv2d(8, 2, 2), {"method": "channel", "rank": 2}, "full_rank"),
    ],
)
def test_what_is_left_and_why(layer, options, code):
    torch.manual_seed(0)
    x = torch.randn(2, 8, 8, 8)
    check_pass(nn.Sequential(layer).eval(), (x,), FactorizeConv(**options), rewrites=0, skipped=[code])


def test_options_are_checked():
    for options in (
        {"rank": (2, 3)},
        {"rank": "vbmf"},
        {"rank": 3, "ratio": 0.5},
        {"rank": (0, 2), "method": "tucker2"},
        {"method": "unknown"},
        {"energy": 1.0},
    ):
        with pytest.raises(OptionError):
            FactorizeConv(**options)


@pytest.mark.parametrize("method", ["channel", "spatial", "tucker2", "cp"])
def test_together_with_other_passes_and_as_an_engine(method, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 20),
    ).eval()
    x = torch.randn(4, 3, 12, 12)
    low = [FactorizeConv(method=method, ratio=0.5, calibration=[x]), FactorizeLinear(ratio=0.5)]
    for passes in ([*low, FuseModules(), PruneChannels(ratio=0.25)], [FuseModules(), PruneChannels(ratio=0.25), *low]):
        compiled = fxc.compile(model, passes, (x,))
        assert compiled(x).shape == (4, 20)
    engine = compiled.export("onnxruntime", tmp_path / "engine")
    torch.testing.assert_close(torch.as_tensor(engine(x)), compiled(x), rtol=1e-4, atol=1e-5)
    compiled.module.train()
    compiled.module(x).square().mean().backward()
    assert all(p.grad is not None for p in compiled.module.parameters())


@pytest.mark.parametrize("channels", [(3, 32), (32, 3), (2, 40), (3, 64)])
@pytest.mark.parametrize("options", [{"ratio": 0.5}, {"rank": (1, 20)}, {"error": 0.3}, {"rank": "vbmf"}])
def test_tucker_between_few_channels_and_many(channels, options):
    torch.manual_seed(0)
    inputs, outputs = channels
    model, x = nn.Sequential(nn.Conv2d(inputs, outputs, 3)).eval(), torch.randn(4, inputs, 8, 8)
    pass_ = FactorizeConv(method="tucker2", calibration=[x], force=True, **options)
    result = check_pass(model, (x,), pass_, idempotent=False)  # forced, and so it would be again
    for rewrite in result.rewrites:
        with torch.no_grad():
            left = (result.graph_module(x) - model(x)).double()
            whole = (model(x) - model[0].bias.view(-1, 1, 1)).double()
        assert abs(float(left.norm() / whole.norm()) - rewrite.detail["output_error"]) < 1e-5


@pytest.mark.parametrize("pass_", [FactorizeConv, SubstituteDepthwiseSeparable])
def test_what_is_no_faster_by_measurement_is_left(pass_):
    torch.manual_seed(0)
    graph_module = capture(nn.Sequential(nn.Conv2d(16, 32, 3)).eval(), (torch.randn(2, 16, 8, 8),))
    with pytest.raises(OptionError, match="latency cannot be measured"):
        pass_(ratio=0.5, cost="latency").run(graph_module, PassContext())
    for slow in (True, False):

        def latency(graph, backend, inputs, slow=slow):
            layers = sum(node.op == "call_module" for node in graph.graph.nodes)
            return float(layers if slow else -layers)

        made = capture(nn.Sequential(nn.Conv2d(16, 32, 3)).eval(), (torch.randn(2, 16, 8, 8),))
        result = pass_(ratio=0.5, cost="latency").run(made, PassContext(latency=latency))
        assert [skip.code for skip in result.skipped] == (["does_not_pay"] if slow else [])
        assert len(result.rewrites) == (not slow)
        if slow:
            assert "onnxruntime" in result.skipped[0].reason


def test_latency_is_measured_inside_compile():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.Flatten(), nn.Linear(32 * 16, 64)]
    model = nn.Sequential(*layers).eval()
    passes = [
        FactorizeConv(ratio=0.5, cost="latency", only="0"),
        SubstituteDepthwiseSeparable(ratio=0.5, cost="latency", only="2"),
        FactorizeLinear(ratio=0.5, cost="latency", only="4"),
    ]
    compiled = fxc.compile(model, passes, (torch.randn(2, 3, 8, 8),))
    for result in compiled.report.passes:
        told = [skip.reason for skip in result.skipped if skip.code == "does_not_pay"]
        assert len(told) + len(result.rewrites) == 1
        assert all("On onnxruntime 2 layers take" in reason or "3 layers" in reason for reason in told)


@pytest.mark.parametrize("rank", [16, 99])
def test_a_full_rank_is_left_whatever_the_method(rank):
    model, x = single("plain")
    for method in ("auto", "channel", "tucker2"):
        pass_ = FactorizeConv(method=method, rank=rank)
        check_pass(model, (x,), pass_, rewrites=0, skipped={"0": "full_rank"})
