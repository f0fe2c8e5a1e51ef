"""Operations that return their argument go; what only looks like one stays."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxcompress.capture import capture
from fxcompress.passes.base import PassContext
from fxcompress.passes.fuse_modules import FuseModules
from tests.support import check_pass

REMOVE = FuseModules(rules=("remove_identities",))
VIEWS = FuseModules(rules=("merge_views",))
IMAGE = (torch.randn(2, 4, 6, 6),)


class Net(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


def net(forward):
    return Net(forward).eval()


def test_the_graph_before_and_after():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 6), nn.Dropout2d(0.5), nn.Identity(), nn.ReLU())
    check_pass(
        model.eval(),
        IMAGE,
        REMOVE,
        before="""
            graph(input_1: f32[batch, 4, 6, 6]):
              _0: f32[batch, 4, 6, 6] = Dropout(p=0.5, inplace=False) @0 (input_1)
              _1: f32[batch, 4, 6, 6] = Linear(in_features=6, out_features=6, bias=True) @1 (_0)
              _2: f32[batch, 4, 6, 6] = Dropout2d(p=0.5, inplace=False) @2 (_1)
              relu: f32[batch, 4, 6, 6] = aten.relu(_2)
              return relu
        """,
        after="""
            graph(input_1: f32[batch, 4, 6, 6]):
              _1: f32[batch, 4, 6, 6] = Linear(in_features=6, out_features=6, bias=True) @1 (input_1)
              relu: f32[batch, 4, 6, 6] = aten.relu(_1)
              return relu
        """,
        rewrites=["0", "2"],
        skipped=(),
    )


@pytest.mark.parametrize(
    "forward",
    [
        pytest.param(lambda x: x * 1, id="times one"),
        pytest.param(lambda x: x / 1.0 - 0, id="over one, minus nothing"),
        pytest.param(lambda x: x + 0.0, id="plus nothing"),
        pytest.param(lambda x: x**1, id="to the power of one"),
        pytest.param(lambda x: x.clone(), id="clone"),
        pytest.param(lambda x: x.to(torch.float32, copy=True), id="to the same dtype"),
        pytest.param(lambda x: x.reshape(-1, 4, 6, 6), id="reshape"),
        pytest.param(lambda x: x.expand(-1, 4, 6, 6), id="expand"),
        pytest.param(lambda x: x.repeat(1, 1, 1, 1), id="repeat"),
        pytest.param(lambda x: x.permute(0, 1, 2, 3), id="permute"),
        pytest.param(lambda x: torch.cat([x]), id="cat of one"),
        pytest.param(lambda x: F.pad(x, (0, 0, 0, 0)), id="pad by nothing"),
        pytest.param(lambda x: x.roll(0, 2), id="roll by nothing"),
        pytest.param(lambda x: x.squeeze(1), id="squeeze of a dimension that is not one"),
        pytest.param(lambda x: F.interpolate(x, size=(6, 6)), id="resize to the same size"),
        pytest.param(lambda x: F.interpolate(x, scale_factor=1.0, mode="bilinear"), id="resize by one"),
        pytest.param(lambda x: F.dropout(x, 0.5, training=False), id="functional dropout in eval"),
    ],
)
def test_identities(forward):
    graph_module = check_pass(net(lambda net, x: forward(x).relu()), IMAGE, REMOVE, skipped=()).graph_module
    assert [node.name for node in graph_module.graph.nodes if node.op == "call_function"] == ["relu"]


@pytest.mark.parametrize(
    "forward",
    [
        pytest.param(lambda x: x.int() + 0.0, id="promotes"),
        pytest.param(lambda x: F.pad(x, (-1, 1)), id="crops and pads"),
        pytest.param(lambda x: x.permute(0, 1, 3, 2), id="swaps equal sizes"),
        pytest.param(lambda x: x.roll(6, 2) + x.flip(1), id="rolls and flips"),
        pytest.param(lambda x: F.interpolate(x, scale_factor=1.1, mode="bilinear"), id="resizes to the same size"),
        pytest.param(lambda x: x.double().float().half().float(), id="rounds"),
        pytest.param(lambda x: F.dropout(x, 0.0, training=True), id="dropout that is on"),
        pytest.param(lambda x: torch.ones(()) / x, id="one over x"),
        pytest.param(lambda x: 0 - x, id="nothing minus x"),
    ],
)
def test_what_is_no_identity(forward):
    check_pass(net(lambda net, x: forward(x)), IMAGE, REMOVE, rewrites=0, skipped=["nothing_to_fuse"])


def test_a_detach_of_what_is_trained_stays():
    model = net(lambda net, x: net.linear(x).detach() + net.linear(x))
    check_pass(model, IMAGE, REMOVE, rewrites=0, skipped={"detach": "blocks_gradient"})


def test_dropout_in_training_mode_stays():
    graph_module = capture(nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)).eval(), IMAGE).train()
    result = REMOVE.run(graph_module, PassContext())
    assert not result.changed
    assert [skip.code for skip in result.skipped] == ["training"]


# --- memory layout --------------------------------------------------------------------------------------------------


def test_a_copy_for_a_view_goes_for_the_view_was_captured_as_a_reshape():
    model = net(lambda net, x: x.view(-1, 2, 2, 6, 6).transpose(1, 2).contiguous().view(-1, 4, 6, 6).relu())
    check_pass(
        model,
        IMAGE,
        REMOVE,
        after="""
            graph(x: f32[batch, 4, 6, 6]):
              view: f32[batch, 2, 2, 6, 6] = aten.reshape(x, [-1, 2, 2, 6, 6])
              transpose: f32[batch, 2, 2, 6, 6] = aten.transpose.int(view, 1, 2)
              view_1: f32[batch, 4, 6, 6] = aten.reshape(transpose, [-1, 4, 6, 6])
              relu: f32[batch, 4, 6, 6] = aten.relu(view_1)
              return relu
        """,
        rewrites=["contiguous"],
        skipped=(),
    )


@pytest.mark.parametrize(
    "forward",
    [
        pytest.param(
            lambda net, x: x.transpose(1, 3).contiguous().relu().view(-1, 144), id="through another operation"
        ),
        pytest.param(lambda net, x: x.permute(0, 2, 3, 1).contiguous().view(-1, 36, 4), id="a view of two dimensions"),
        pytest.param(lambda net, x: net.linear(x.transpose(1, 3).contiguous().transpose(1, 3)), id="a layer"),
    ],
)
def test_a_copy_goes_whatever_the_views_after_it(forward):
    check_pass(net(forward), IMAGE, REMOVE, rewrites=["contiguous"], skipped=())


@pytest.mark.parametrize(
    "reader",
    [
        pytest.param(lambda x: x.view(torch.int32).float(), id="the bits as another dtype"),
        pytest.param(lambda x: torch.as_strided(x, (2, 3), (6, 1)), id="strides by hand"),
    ],
)
def test_a_copy_stays_where_an_operation_asks_for_strides(reader):
    model = net(lambda net, x: reader(x.transpose(2, 3).contiguous().relu()))
    check_pass(model, IMAGE, REMOVE, rewrites=0, skipped={"contiguous": "layout"}, dynamic_shapes=None)


# --- views of views -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("forward", "left"),
    [
        pytest.param(lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2), [], id="there and back"),
        pytest.param(lambda x: x.transpose(1, 2).transpose(2, 3).transpose(1, 2), ["permute"], id="three in one"),
        pytest.param(lambda x: x.permute(0, 2, 3, 1).permute(0, 2, 1, 3), ["permute"], id="two in one"),
        pytest.param(lambda x: x.flatten(1).reshape(-1, 12, 12), ["reshape"], id="reshape of a reshape"),
        pytest.param(lambda x: x.reshape(-1, 144).view(-1, 4, 6, 6), [], id="reshaped back"),
        pytest.param(lambda x: x.unsqueeze(1).squeeze(1), [], id="unsqueezed and squeezed"),
        pytest.param(lambda x: x.view(-1, 2, 72).view_as(x), [], id="viewed as itself"),
        pytest.param(lambda x: x.flatten(1).unsqueeze(1), ["flatten", "unsqueeze"], id="not one view"),
    ],
)
def test_views_of_views(forward, left):
    graph_module = check_pass(net(lambda net, x: forward(x).relu()), IMAGE, VIEWS).graph_module
    names = [node.target.overloadpacket.__name__ for node in graph_module.graph.nodes if node.op == "call_function"]
    assert names == [*left, "relu"]


def test_a_view_that_others_read_is_kept_unless_it_is_undone():
    def forward(net, x):
        y = x.permute(0, 2, 3, 1)
        return y.permute(0, 3, 1, 2) + y.permute(0, 2, 1, 3).permute(0, 3, 1, 2), y

    graph_module = check_pass(net(forward), IMAGE, VIEWS, rewrites=2).graph_module
    assert len(graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.permute.default)) == 2


def test_reshapes_are_merged_whatever_the_layout_between_them():
    def forward(net, x):
        return x.transpose(1, 3).reshape(-1, 144).view(-1, 6, 6, 4).relu().view(-1, 144)

    check_pass(net(forward), IMAGE, VIEWS, rewrites=1, skipped=())
