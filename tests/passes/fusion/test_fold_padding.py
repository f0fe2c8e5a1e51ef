"""pad → conv ⇒ conv, and padding by name."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxcompress.passes.fuse_modules import FuseModules
from tests.support import check_pass

FOLD = FuseModules(rules=("fold_padding", "normalize_padding"))
IMAGE = (torch.randn(2, 4, 6, 7),)


class Net(nn.Module):
    def __init__(self, forward, layer=None):
        super().__init__()
        self.layer = layer or nn.Conv2d(4, 6, 3)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


def test_the_graph_before_and_after():
    check_pass(
        nn.Sequential(nn.ZeroPad2d((2, 2, 1, 1)), nn.Conv2d(4, 6, 3, padding=1)).eval(),
        IMAGE,
        FOLD,
        before="""
            graph(input_1: f32[batch, 4, 6, 7]):
              pad: f32[batch, 4, 8, 11] = aten.pad(input_1, [2, 2, 1, 1], 'constant', 0.0)
              _1: f32[batch, 6, 8, 11] = Conv2d(4, 6, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1)) @1 (pad)
              return _1
        """,
        after="""
            graph(input_1: f32[batch, 4, 6, 7]):
              _1: f32[batch, 6, 8, 11] = Conv2d(4, 6, kernel_size=(3, 3), stride=(1, 1), padding=(2, 3)) @1 (input_1)
              return _1
        """,
        rewrites=1,
        skipped=(),
    )


@pytest.mark.parametrize("rank", [1, 3])
def test_other_ranks(rank):
    conv = getattr(nn, f"Conv{rank}d")(4, 6, 3, stride=2)
    net = Net(lambda net, x: net.layer(F.pad(x, (1, 1))), conv)
    check_pass(net.eval(), (torch.randn(2, 4, *(5,) * rank),), FOLD, rewrites=["pad"], skipped=())


@pytest.mark.parametrize(
    ("forward", "layer", "codes"),
    [
        (lambda net, x: net.layer(F.pad(x, (0, 1, 0, 1))), None, ["asymmetric_padding"]),
        (lambda net, x: net.layer(F.pad(x, (-1, -1))), None, ["asymmetric_padding"]),
        (lambda net, x: net.layer(F.pad(x, (1, 1), value=1.0)), None, ["not_zero_padding"]),
        (lambda net, x: net.layer(F.pad(x, (1, 1, 1, 1), "reflect")), None, ["not_zero_padding"]),
        (lambda net, x: net.layer(F.pad(x, (0, 0, 0, 0, 1, 1))), nn.Conv2d(6, 6, 3), ["channel_padding"]),
        (lambda net, x: net.layer(y := F.pad(x, (1, 1))).sum() + y.sum(), None, ["shared_value"]),
        (lambda net, x: net.layer(F.pad(x, (1, 1))).sum() + net.layer(x).sum(), None, ["shared_layer"]),
        (lambda net, x: net.layer(F.pad(x, (1, 1))), nn.ConvTranspose2d(4, 6, 3), ["transposed"]),
        (lambda net, x: F.max_pool2d(F.pad(net.layer(x), (1, 1)), 2), None, ["not_convolution"]),
        (lambda net, x: F.pad(net.layer(x), (1, 1)).relu(), None, ["nothing_to_fuse"]),
    ],
)
def test_not_legal(forward, layer, codes):
    check_pass(Net(forward, layer).eval(), IMAGE, FOLD, rewrites=0, skipped=codes)


def test_padding_that_depends_on_the_input_is_left():
    net = Net(lambda net, x: net.layer(F.pad(x, (x.shape[3] % 2, x.shape[3] % 2))))
    sizes = {"x": {0: "batch", 3: "width"}}
    check_pass(net.eval(), IMAGE, FOLD, rewrites=0, skipped=["dynamic_size"], dynamic_shapes=sizes)


@pytest.mark.parametrize(
    ("layer", "padding"),
    [
        (nn.Conv2d(4, 6, (3, 5), padding="same", dilation=(2, 1)), (2, 2)),
        (nn.Conv2d(4, 6, 2, padding="same", dilation=2), (1, 1)),
        (nn.Conv2d(4, 6, 4, padding="valid"), (0, 0)),
    ],
)
def test_padding_by_name_becomes_numbers(layer, padding):
    graph_module = check_pass(Net(lambda net, x: net.layer(x), layer).eval(), IMAGE, FOLD, skipped=()).graph_module
    assert graph_module.get_submodule("layer").padding == padding


def test_an_even_kernel_pads_unevenly():
    net = Net(lambda net, x: net.layer(x), nn.Conv2d(4, 6, 4, padding="same"))
    check_pass(net.eval(), IMAGE, FOLD, rewrites=0, skipped={"layer": "asymmetric_padding"})


def test_both_rules_together():
    model = nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(4, 6, 3, padding="same"))
    graph_module = check_pass(model.eval(), IMAGE, FOLD, rewrites=2, skipped=()).graph_module
    assert graph_module.get_submodule("1").padding == (2, 2)
