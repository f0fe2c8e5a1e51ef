"""Chains of per-channel arithmetic, after and before a layer."""

import pytest
import torch
from torch import nn

from fxcompress.passes.fuse_modules import FuseModules
from tests.support import check_pass, randomize

FOLD = FuseModules(rules=("fold_affine",))
CHAIN = FuseModules(rules=("fold_affine", "fold_constants", "raise_layers"))
IMAGE = (torch.randn(2, 4, 6, 6),)
TOKENS = (torch.randn(2, 3, 5),)


class Net(nn.Module):
    """A layer, constants, and how they are put together."""

    def __init__(self, forward, layer, second=None, **constants):
        super().__init__()
        self.layer, self.second = layer, second
        for name, value in constants.items():
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


def channels(count, rank=2):
    return torch.rand(count, *(1,) * rank) + 0.5


def learned(tensor):
    return nn.Parameter(tensor)


class LayerScale(nn.Module):
    """As ConvNeXt writes it: a linear layer over channels last, scaled with channels first."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.gamma = nn.Parameter(channels(4))

    def forward(self, x):
        return x + self.gamma * self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class FrozenNorm(nn.Module):
    """As detection models write it: statistics are buffers, the arithmetic is spelt out."""

    def __init__(self, count):
        super().__init__()
        for name in ("weight", "bias", "mean", "variance"):
            self.register_buffer(name, torch.rand(count) + 0.5)

    def forward(self, x):
        scale = (self.weight * (self.variance + 1e-5).rsqrt()).reshape(1, -1, 1, 1)
        shift = self.bias.reshape(1, -1, 1, 1) - self.mean.reshape(1, -1, 1, 1) * scale
        return x * scale + shift


def test_layer_scale_before_and_after():
    check_pass(
        LayerScale().eval(),
        IMAGE,
        FOLD,
        before="""
            graph(x: f32[batch, 4, 6, 6]):
              gamma: f32[4, 1, 1] = parameter gamma
              permute: f32[batch, 6, 6, 4] = aten.permute(x, [0, 2, 3, 1])
              linear_1: f32[batch, 6, 6, 4] = Linear(in_features=4, out_features=4, bias=True) @linear (permute)
              permute_1: f32[batch, 4, 6, 6] = aten.permute(linear_1, [0, 3, 1, 2])
              mul: f32[batch, 4, 6, 6] = aten.mul.Tensor(gamma, permute_1)
              add: f32[batch, 4, 6, 6] = aten.add.Tensor(x, mul)
              return add
        """,
        after="""
            graph(x: f32[batch, 4, 6, 6]):
              permute: f32[batch, 6, 6, 4] = aten.permute(x, [0, 2, 3, 1])
              linear_1: f32[batch, 6, 6, 4] = Linear(in_features=4, out_features=4, bias=True) @linear (permute)
              permute_1: f32[batch, 4, 6, 6] = aten.permute(linear_1, [0, 3, 1, 2])
              add: f32[batch, 4, 6, 6] = aten.add.Tensor(x, permute_1)
              return add
        """,
        rewrites=["mul"],
        skipped=(),
    )


def test_frozen_batch_norm():
    model = nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), FrozenNorm(6), nn.ReLU(), nn.Conv2d(6, 4, 1), FrozenNorm(4))
    result = check_pass(model.eval(), IMAGE, CHAIN, skipped=())
    assert [type(layer).__name__ for layer in result.graph_module.children()] == ["Conv2d", "Conv2d"]


@pytest.mark.parametrize(
    "forward",
    [
        pytest.param(lambda net, x: net.layer(x) * net.c, id="mul"),
        pytest.param(lambda net, x: net.c / 2 * net.layer(x) / 3.0, id="mul and div by numbers"),
        pytest.param(lambda net, x: net.layer(x) / net.c, id="div"),
        pytest.param(lambda net, x: net.layer(x) + net.c - 1, id="add and sub"),
        pytest.param(lambda net, x: net.c - net.layer(x), id="reversed sub"),
        pytest.param(lambda net, x: 1 - net.layer(x), id="rsub"),
        pytest.param(lambda net, x: -net.layer(x), id="neg"),
        pytest.param(lambda net, x: torch.add(net.layer(x), net.c, alpha=2), id="add with alpha"),
        pytest.param(lambda net, x: torch.sub(net.c, net.layer(x), alpha=2), id="sub with alpha"),
        pytest.param(lambda net, x: torch.addcmul(net.c, net.layer(x), net.c, value=0.5), id="addcmul"),
        pytest.param(lambda net, x: net.layer(x).reshape(-1) * 2, id="a number, through any view"),
    ],
)
def test_every_operation(forward):
    net = Net(forward, nn.Conv2d(4, 6, 3, bias=False), c=channels(6)).eval()
    result = check_pass(net, IMAGE, CHAIN, skipped=())
    assert all(rewrite.detail["rule"] != "fold_affine" or rewrite.detail["layers"] for rewrite in result.rewrites)
    assert {type(layer) for layer in result.graph_module.children()} == {nn.Conv2d}
    assert not any(node.op == "get_attr" for node in result.graph_module.graph.nodes)


@pytest.mark.parametrize(
    ("layer", "constant", "inputs"),
    [
        pytest.param(nn.Linear(5, 4), torch.rand(4), TOKENS, id="linear"),
        pytest.param(nn.ConvTranspose2d(4, 6, 3, groups=2), channels(6), IMAGE, id="grouped transposed"),
        pytest.param(nn.LayerNorm(5), learned(torch.rand(5)), TOKENS, id="layer norm"),
        pytest.param(nn.LayerNorm(5, bias=False), torch.rand(5), TOKENS, id="layer norm without bias"),
        pytest.param(nn.GroupNorm(2, 4), channels(4), IMAGE, id="group norm"),
        pytest.param(nn.BatchNorm2d(4), channels(4), IMAGE, id="batch norm"),
    ],
)
def test_every_layer(layer, constant, inputs):
    net = randomize(Net(lambda net, x: net.layer(x) * net.c + net.d, layer, c=constant, d=constant.detach().clone()))
    result = check_pass(net, inputs, CHAIN)
    assert len(list(result.graph_module.graph.nodes)) == 3
    assert all(p.requires_grad for p in result.graph_module.parameters())


def test_a_functional_norm_is_arithmetic():
    def forward(net, x):
        return nn.functional.batch_norm(net.layer(x), net.mean, net.variance, weight=net.w)

    model = Net(forward, nn.Conv2d(4, 6, 3), mean=torch.rand(6), variance=torch.rand(6) + 0.5, w=torch.rand(6))
    check_pass(model.eval(), IMAGE, FOLD, rewrites=1, skipped=())


def test_input_normalisation_goes_into_the_first_layer():
    def forward(net, x):
        return net.layer((x / 255 - net.mean) / net.std)

    net = Net(forward, nn.Conv2d(4, 6, 3, stride=2), mean=channels(4), std=channels(4))
    check_pass(net.eval(), IMAGE, FOLD, rewrites=["div"], skipped=())


def test_arithmetic_before_a_batch_norm_goes_into_its_statistics():
    net = Net(lambda net, x: net.layer((0.3 - x) * net.c), nn.BatchNorm2d(4), c=channels(4))
    result = check_pass(randomize(net), IMAGE, FOLD, rewrites=["rsub"], skipped=())
    # It trains as before: batch statistics, too, are those of the scaled input.
    net.train(), result.graph_module.train()
    torch.testing.assert_close(result.graph_module(*IMAGE), net(*IMAGE), atol=1e-4, rtol=1e-4)


def test_only_a_scale_goes_into_a_layer_that_pads():
    conv = nn.Conv2d(4, 6, 3, padding=1)
    check_pass(Net(lambda net, x: net.layer(x * net.c), conv, c=channels(4)).eval(), IMAGE, FOLD, rewrites=["mul"])
    net = Net(lambda net, x: net.layer(x - net.c), conv, c=channels(4)).eval()
    check_pass(net, IMAGE, FOLD, rewrites=0, skipped={"sub": "padded_shift"})


def shared_value():
    return Net(lambda net, x: (y := net.layer(x)) * net.c + y.relu(), nn.Conv2d(4, 4, 3), c=channels(4))


def another_dimension():
    return Net(lambda net, x: net.layer(x) * net.c, nn.Conv2d(4, 4, 3), c=torch.rand(4))


def tied_constant():
    return Net(
        lambda net, x: net.layer(x) * net.c + x[:, :, 1:5, 1:5] * net.c, nn.Conv2d(4, 4, 3), c=learned(channels(4))
    )


def tied_layer():
    net = Net(
        lambda net, x: net.layer(x) * net.c + net.second(x), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), c=channels(4)
    )
    net.second.weight = net.layer.weight
    return net


def called_twice():
    return Net(lambda net, x: net.layer(net.layer(x) * net.c), nn.Conv2d(4, 4, 3, padding=1), c=channels(4))


def division_by_zero():
    return Net(lambda net, x: (net.layer(x) / net.c).clamp(-1, 1), nn.Conv2d(4, 4, 3), c=torch.zeros(4, 1, 1))


def scale_larger_than_the_variance():
    return Net(lambda net, x: net.layer(x * 1e4), nn.BatchNorm2d(4))


def shift_without_bias():
    return Net(lambda net, x: net.layer(x) + net.c, nn.RMSNorm(6), c=torch.rand(6))


def no_scale_to_fold_into():
    return Net(lambda net, x: net.layer(x) * net.c, nn.BatchNorm2d(4, affine=False), c=channels(4))


@pytest.mark.parametrize(
    ("make", "codes"),
    [
        (shared_value, ["shared_value"]),
        (another_dimension, ["channel_mismatch"]),
        (tied_constant, ["tied_weight"]),
        (tied_layer, ["tied_weight"]),
        (called_twice, ["shared_layer"]),
        (division_by_zero, ["not_finite"]),
        (scale_larger_than_the_variance, ["not_finite"]),
        (shift_without_bias, ["no_bias"]),
        (no_scale_to_fold_into, ["no_affine"]),
    ],
)
def test_not_legal(make, codes):
    check_pass(randomize(make()), IMAGE, FOLD, rewrites=0, skipped=codes)


def test_positions_are_not_per_channel():
    net = Net(lambda net, x: net.layer(x) + net.c, nn.Linear(5, 4), c=torch.rand(1, 3, 4)).eval()
    check_pass(net, TOKENS, FOLD, rewrites=0, skipped=["nothing_to_fuse"])


def test_arithmetic_that_promotes_is_left():
    net = Net(lambda net, x: net.layer(x) * net.c, nn.Linear(5, 4), c=torch.rand(4, dtype=torch.float64)).eval()
    check_pass(net, TOKENS, FOLD, rewrites=0, skipped=["nothing_to_fuse"])


def test_a_chain_that_two_sites_share_is_folded_once():
    # conv·s is read by the chain into the second conv and by relu: the first site replaces what the second one reads.
    def forward(net, x):
        y = net.layer(x) * net.c
        return net.second(y * 2) + y.relu()

    net = Net(forward, nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1), c=channels(4)).eval()
    check_pass(net, IMAGE, FOLD, rewrites=["mul", "mul_1"], skipped=())
