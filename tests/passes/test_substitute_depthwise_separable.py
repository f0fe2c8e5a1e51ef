import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress.capture import capture
from fxcompress.errors import OptionError
from fxcompress.graph.edit import GraphEditor
from fxcompress.passes import FuseModules, PruneChannels, SubstituteDepthwiseSeparable
from fxcompress.passes.base import PassContext
from tests.support import check_pass

LAYERS = {
    "plain": (lambda: nn.Conv2d(8, 16, 3, padding=1), (3, 8, 9, 9)),
    "strided and grouped": (lambda: nn.Conv2d(8, 24, 3, stride=2, groups=2, dilation=2), (3, 8, 12, 11)),
    "same, reflected": (lambda: nn.Conv2d(8, 16, 3, padding="same", padding_mode="reflect"), (3, 8, 9, 8)),
    "few outputs": (lambda: nn.Conv2d(8, 4, (3, 5), padding=(1, 2), bias=False), (3, 8, 7, 9)),
    "one dimension": (lambda: nn.Conv1d(8, 16, 5, stride=2), (3, 8, 20)),
    "three dimensions": (lambda: nn.Conv3d(4, 6, 3, padding=1), (2, 4, 5, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(8, 12, 3, 2, 1, output_padding=1, groups=2), (3, 8, 6, 5)),
    "transposed in one": (lambda: nn.ConvTranspose1d(8, 12, 4, stride=3, dilation=2), (3, 8, 6)),
}


def single(name):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    return nn.Sequential(make()).eval(), torch.randn(shape)


def outputs(model, graph_module, x):
    with torch.no_grad():
        return model(x).double(), graph_module(x).double()


@pytest.mark.parametrize("name", LAYERS)
def test_all_terms_are_exact(name):
    model, x = single(name)
    layer = model[0]
    terms = min(layer.weight[0, 0].numel(), layer.out_channels // layer.groups)
    for calibration in (None, [x]):
        pass_ = SubstituteDepthwiseSeparable(terms=terms, force=True, calibration=calibration)
        result = check_pass(model, (x,), pass_, rewrites=["0"], skipped=())
        expected, actual = outputs(model, result.graph_module, x)
        assert float((expected - actual).norm() / expected.norm()) < 1e-5
    more = SubstituteDepthwiseSeparable(terms=1000, force=True)
    assert check_pass(model, (x,), more).rewrites[0].detail["terms"] == terms


@pytest.mark.parametrize("name", LAYERS)
def test_fewer_terms_are_the_truncated_svd_of_every_channel_and_data_makes_them_better(name):
    model, x = single(name)
    layer = model[0]
    result = check_pass(model, (x,), SubstituteDepthwiseSeparable(terms=2, force=True), rewrites=["0"])
    weight = layer.weight.detach().double()
    if layer.transposed:
        channels = weight.flatten(2)
    else:
        channels = weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1).flatten(2)
    tail = torch.linalg.svdvals(channels)[:, 2:].norm()
    assert abs(result.rewrites[0].detail["weight_error"] - float(tail / weight.norm())) < 1e-6
    fitted = check_pass(
        model, (x,), SubstituteDepthwiseSeparable(terms=2, force=True, calibration=x.split(2)), rewrites=["0"]
    )
    bias = 0 if layer.bias is None else layer.bias.detach().double().view(-1, *[1] * (x.dim() - 2))
    expected, plain = outputs(model, result.graph_module, x)
    _, better = outputs(model, fitted.graph_module, x)
    relative = [float((made - expected).norm() / (expected - bias).norm()) for made in (plain, better)]
    assert relative[1] < relative[0]
    assert abs(fitted.rewrites[0].detail["output_error"] - relative[1]) < 1e-5


def test_the_layers_and_the_account():
    model, x = single("plain")
    result = check_pass(model, (x,), SubstituteDepthwiseSeparable(terms=2), rewrites=["0"], skipped=())
    first, second = result.graph_module.get_submodule("0.0"), result.graph_module.get_submodule("0.1")
    assert (first.groups, first.out_channels, first.kernel_size, first.bias) == (8, 16, (3, 3), None)
    assert (second.kernel_size, second.in_channels, second.out_channels) == ((1, 1), 16, 16)
    detail = result.rewrites[0].detail
    assert (detail["macs_before"], detail["macs_after"]) == (81 * 8 * 16 * 9, 81 * 16 * (9 + 16))
    assert detail["parameters_after"] == 16 * (9 + 16) + 16


@pytest.mark.parametrize("data", [False, True])
def test_an_error_bound_is_kept_by_the_fewest_terms(data):
    model, x = single("plain")
    calibration = [x] if data else None
    result = check_pass(model, (x,), SubstituteDepthwiseSeparable(error=0.5, calibration=calibration), rewrites=["0"])
    detail = result.rewrites[0].detail
    column = "output_error" if data else "weight_error"
    assert detail[column] <= 0.5
    fewer = SubstituteDepthwiseSeparable(terms=detail["terms"] - 1, calibration=calibration)
    assert check_pass(model, (x,), fewer).rewrites[0].detail[column] > 0.5


def test_terms_by_cost():
    model, x = single("plain")
    assert check_pass(model, (x,), SubstituteDepthwiseSeparable()).rewrites[0].detail["terms"] == 2
    assert check_pass(model, (x,), SubstituteDepthwiseSeparable(ratio=0.7)).rewrites[0].detail["terms"] == 4


@pytest.mark.parametrize(
    ("layer", "options", "code"),
    [
        (nn.Conv2d(8, 16, 3), {"terms": 6}, "does_not_pay"),
        (nn.Conv2d(8, 2, 3), {"terms": 2}, "does_not_pay"),
        (nn.Conv2d(8, 8, 3, groups=8), {"terms": 1}, "depthwise"),
        (nn.Conv2d(8, 8, 1), {"terms": 1}, "pointwise"),
        (nn.Conv2d(8, 1, 3), {"terms": 1}, "depthwise"),
        (nn.Conv2d(8, 16, 3), {"terms": 1, "ignore": "0"}, "ignored"),
        (nn.ConvTranspose2d(8, 8, 2, stride=2), {"terms": 1}, "does_not_pay"),
    ],
)
def test_what_is_left_and_why(layer, options, code):
    model = nn.Sequential(layer).eval()
    x = torch.randn(2, 8, 8, 8)
    check_pass(model, (x,), SubstituteDepthwiseSeparable(**options), rewrites=0, skipped=[code])


def test_tied_shared_and_broken_layers():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.c(torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x)))))))

    torch.manual_seed(0)
    x = torch.randn(2, 8, 6, 6)
    pass_ = SubstituteDepthwiseSeparable(terms=2, calibration=[x])
    check_pass(Net().eval(), (x,), pass_, rewrites=["c"], skipped={"a": "tied_weight", "b": "tied_weight"})
    graph_module = capture(nn.Sequential(nn.Conv2d(8, 8, 3)).eval(), (x,), dynamic_shapes="batch")
    with GraphEditor(graph_module) as editor:
        editor.set_tensor("0.weight", torch.full((8, 8, 3, 3), float("inf")))
    left = SubstituteDepthwiseSeparable(terms=1).run(graph_module, PassContext())
    assert [skip.code for skip in left.skipped] == ["not_finite"]
    linear = nn.Linear(4, 4).eval()
    check_pass(linear, (torch.randn(2, 4),), pass_, rewrites=0, skipped=["nothing_to_substitute"])
    zero = nn.Sequential(nn.Conv2d(8, 16, 3)).eval()
    nn.init.zeros_(zero[0].weight)
    check_pass(zero, (x,), SubstituteDepthwiseSeparable(terms=2, calibration=[x]), rewrites=1)


@pytest.mark.parametrize("data", [False, True])
def test_a_norm_between_changes_nothing_until_it_is_trained(data):
    model, x = single("plain")
    calibration = [x] if data else None
    bare = check_pass(model, (x,), SubstituteDepthwiseSeparable(terms=2, calibration=calibration))
    normed = check_pass(model, (x,), SubstituteDepthwiseSeparable(terms=2, calibration=calibration, norm=True))
    with torch.no_grad():
        torch.testing.assert_close(normed.graph_module(x), bare.graph_module(x), rtol=1e-3, atol=1e-4)
        between = normed.graph_module.get_submodule("0.1")
        seen = normed.graph_module.get_submodule("0.0")(x)
    if data:
        torch.testing.assert_close(between.running_mean, seen.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(between.running_var, seen.var((0, 2, 3), correction=0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("activation", ["relu", "relu6", "silu", "hardswish"])
def test_the_block_of_mobilenet_is_fitted_on_data_and_trains(activation):
    model, x = single("plain")
    block = SubstituteDepthwiseSeparable(terms=3, norm=True, activation=activation, calibration=[x])
    result = check_pass(model, (x,), block, rewrites=["0"])
    assert result.rewrites[0].detail["refitted"]
    raw = check_pass(model, (x,), SubstituteDepthwiseSeparable(terms=3, norm=True, activation=activation))
    expected, fitted = outputs(model, result.graph_module, x)
    _, unfitted = outputs(model, raw.graph_module, x)
    assert float((fitted - expected).norm()) < float((unfitted - expected).norm())
    module = result.graph_module.train()
    module(x).square().mean().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_options_are_checked():
    for options in ({"terms": 0}, {"terms": 1, "error": 0.1}, {"ratio": 2.0}, {"activation": "relu"}, {"terms": 1.5}):
        with pytest.raises(OptionError):
            SubstituteDepthwiseSeparable(**options)


@pytest.mark.parametrize("before", [True, False])
def test_together_with_fusion_and_pruning_and_as_an_engine(before, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 5),
    ).eval()
    x = torch.randn(4, 3, 12, 12)
    own = SubstituteDepthwiseSeparable(terms=2, calibration=[x])
    others = [FuseModules(), PruneChannels(ratio=0.25)]
    compiled = fxc.compile(model, [own, *others] if before else [*others, own], (x,))
    assert compiled.report.passes[0 if before else 2].rewrites
    engine = compiled.export("onnxruntime", tmp_path / "engine")
    torch.testing.assert_close(torch.as_tensor(engine(x)), compiled(x), rtol=1e-4, atol=1e-5)


def test_one_sample_is_enough_to_start_a_block_from():
    torch.manual_seed(0)
    x = torch.nn.functional.interpolate(torch.randn(1, 12, 4, 4), (16, 16), mode="bilinear")
    model = nn.Sequential(nn.Conv2d(12, 32, 3, padding=1)).eval()
    pass_ = SubstituteDepthwiseSeparable(ratio=0.5, norm=True, activation="relu", calibration=[x])
    made = pass_.run(capture(model, (x,)), PassContext())
    with torch.no_grad():
        expected = model(x)
        assert float((made.graph_module(x) - expected).norm() / expected.norm()) < 0.7
