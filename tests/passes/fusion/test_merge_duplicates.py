"""Values that are computed twice."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxcompress.passes.fuse_modules import FuseModules
from tests.support import check_pass

MERGE = FuseModules(rules=("merge_duplicates",))
IMAGE = (torch.randn(2, 4, 6, 6),)


class Net(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.linear, self.other, self.dropout = nn.Linear(6, 6), nn.Linear(6, 6), nn.Dropout(0.5)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


def test_the_graph_before_and_after():
    check_pass(
        Net(lambda net, x: net.linear(x.relu() * 2) + net.linear(x.relu() * 2).tanh()).eval(),
        IMAGE,
        MERGE,
        before="""
            graph(x: f32[batch, 4, 6, 6]):
              relu: f32[batch, 4, 6, 6] = aten.relu(x)
              mul: f32[batch, 4, 6, 6] = aten.mul.Tensor(relu, 2)
              linear_2: f32[batch, 4, 6, 6] = Linear(in_features=6, out_features=6, bias=True) @linear (mul)
              relu_1: f32[batch, 4, 6, 6] = aten.relu(x)
              mul_1: f32[batch, 4, 6, 6] = aten.mul.Tensor(relu_1, 2)
              linear_3: f32[batch, 4, 6, 6] = Linear(in_features=6, out_features=6, bias=True) @linear (mul_1)
              tanh: f32[batch, 4, 6, 6] = aten.tanh(linear_3)
              add: f32[batch, 4, 6, 6] = aten.add.Tensor(linear_2, tanh)
              return add
        """,
        after="""
            graph(x: f32[batch, 4, 6, 6]):
              relu: f32[batch, 4, 6, 6] = aten.relu(x)
              mul: f32[batch, 4, 6, 6] = aten.mul.Tensor(relu, 2)
              linear_2: f32[batch, 4, 6, 6] = Linear(in_features=6, out_features=6, bias=True) @linear (mul)
              tanh: f32[batch, 4, 6, 6] = aten.tanh(linear_2)
              add: f32[batch, 4, 6, 6] = aten.add.Tensor(linear_2, tanh)
              return add
        """,
        rewrites=["relu_1", "mul_1", "linear_3"],
        skipped=(),
    )


@pytest.mark.parametrize(
    "forward",
    [
        pytest.param(lambda net, x: net.linear(x) + net.other(x), id="two layers"),
        pytest.param(lambda net, x: x * 1 + x * 1.0, id="numbers of two types"),
        pytest.param(lambda net, x: x * 0.0 + x * -0.0, id="two zeros"),
        pytest.param(lambda net, x: torch.add(x, x, alpha=2) * torch.add(x, x), id="two options"),
        pytest.param(lambda net, x: (x - 1) * (1 - x), id="two orders"),
    ],
)
def test_what_differs_is_left(forward):
    check_pass(Net(forward).eval(), IMAGE, MERGE, rewrites=0, skipped=["nothing_to_fuse"])


@pytest.mark.parametrize(
    ("forward", "codes"),
    [
        pytest.param(lambda net, x: x + 0 * torch.rand(6) * torch.rand(6), ["random"], id="random numbers"),
        pytest.param(lambda net, x: net.dropout(x) * net.dropout(x), ["random"], id="dropout"),
    ],
)
def test_random_numbers_are_drawn_twice(forward, codes):
    check_pass(Net(forward).eval(), IMAGE, MERGE, rewrites=0, skipped=codes)


def test_attention_without_dropout_is_not_random():
    def forward(net, x):
        return F.scaled_dot_product_attention(x, x, x) + F.scaled_dot_product_attention(x, x, x)

    check_pass(Net(forward).eval(), IMAGE, MERGE, rewrites=1, skipped=())


def test_options_that_are_lists_dtypes_and_slices():
    def forward(net, x):
        return (
            x.sum([1, 2], dtype=torch.float64)
            + x.sum([1, 2], dtype=torch.float64)
            + x[:, :, 1:3, 0].sum([1, 2])[:, None]
        )

    check_pass(Net(forward).eval(), IMAGE, MERGE, rewrites=1, skipped=())
