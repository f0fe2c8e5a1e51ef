"""conv → norm ⇒ conv: where it is legal, and every reason why it may not be."""

import pytest
import torch
from torch import nn

from fxcompress.capture import capture
from fxcompress.graph.edit import GraphEditor
from fxcompress.graph.running import max_relative_error
from fxcompress.passes.base import PassContext
from fxcompress.passes.fuse_modules import FuseModules
from tests.support import check_pass, randomize

FOLD = FuseModules(rules=("fold_norm_after",))
IMAGE = (torch.randn(2, 4, 6, 6),)


def test_the_graph_before_and_after():
    model = nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
    result = check_pass(
        randomize(model),
        IMAGE,
        FOLD,
        before="""
            graph(input_1: f32[batch, 4, 6, 6]):
              _0: f32[batch, 6, 4, 4] = Conv2d(4, 6, kernel_size=(3, 3), stride=(1, 1), bias=False) @0 (input_1)
              _1: f32[batch, 6, 4, 4] = BatchNorm2d(6, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True) @1 (_0)
              relu: f32[batch, 6, 4, 4] = aten.relu(_1)
              return relu
        """,  # noqa: E501
        after="""
            graph(input_1: f32[batch, 4, 6, 6]):
              _0: f32[batch, 6, 4, 4] = Conv2d(4, 6, kernel_size=(3, 3), stride=(1, 1)) @0 (input_1)
              relu: f32[batch, 6, 4, 4] = aten.relu(_0)
              return relu
        """,
        rewrites=["1"],
        skipped=(),
    )
    (rewrite,) = result.rewrites
    assert rewrite.result == "folded into 0"
    assert rewrite.detail == {"rule": "fold_norm_after", "layers": ["0", "1"], "weight": [6, 4, 3, 3]}


@pytest.mark.parametrize(
    ("transposed", "rank", "bias", "groups"),
    [
        (False, 1, True, 2),
        (False, 2, False, 2),
        (False, 3, True, 1),
        (True, 1, False, 1),
        (True, 2, True, 2),
        (True, 3, False, 2),
    ],
)
def test_convolutions_of_every_kind(transposed, rank, bias, groups):
    name = f"Conv{'Transpose' * transposed}{rank}d"
    conv = getattr(nn, name)(4, 6, 3, stride=2, padding=1, groups=groups, bias=bias)
    model = nn.Sequential(conv, getattr(nn, f"BatchNorm{rank}d")(6))
    check_pass(randomize(model), (torch.randn(2, 4, *(7,) * rank),), FOLD, rewrites=["1"], skipped=())


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8)), id="depthwise"),
        pytest.param(nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8, affine=False)), id="norm without weights"),
        pytest.param(nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8)), id="two norms in a row"),
        pytest.param(
            nn.Sequential(nn.Conv2d(4, 8, 3), nn.InstanceNorm2d(8, affine=True, track_running_stats=True)),
            id="instance norm with running statistics",
        ),
        pytest.param(
            nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(2), nn.BatchNorm1d(8)), id="through a reshape of the image"
        ),
    ],
)
def test_more_that_is_legal(model):
    result = check_pass(randomize(model), IMAGE, FOLD, skipped=())
    assert len(list(result.graph_module.children())) == 1


class TokensThenNorm(nn.Module):
    """A linear layer over tokens and a norm over its features, the way LeViT or a point network write it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.linear = nn.Linear(5, 7)
        self.norm = nn.BatchNorm1d(7)

    def forward(self, x):
        x = self.linear(x)
        if self.how == "flatten":
            return self.norm(x.flatten(0, 1)).reshape_as(x)
        if self.how == "transpose":
            return self.norm(x.transpose(1, 2))
        return self.norm(x.permute(0, 2, 1).reshape(x.shape[0], 7, 1, -1).squeeze(2))


def test_linear_and_norm_over_features():
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7))
    check_pass(randomize(model), (torch.randn(3, 5),), FOLD, rewrites=["1"], skipped=())


@pytest.mark.parametrize("how", ["transpose", "permute"])
def test_through_views_that_keep_the_channels(how):
    check_pass(randomize(TokensThenNorm(how)), (torch.randn(2, 3, 5),), FOLD, rewrites=["norm"], skipped=())


def test_through_a_reshape_whose_shape_another_view_reads():
    model, tokens = randomize(TokensThenNorm("flatten")), (torch.randn(2, 3, 5),)
    check_pass(model, tokens, FOLD, rewrites=0, skipped={"norm": "shared_value"})
    check_pass(model, tokens, FuseModules(), rewrites=["reshape_as", "norm", "reshape"], skipped=())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_folds_in_float64_and_rounds_once(dtype):
    model = randomize(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))).to(dtype)
    result = check_pass(model, (IMAGE[0].to(dtype),), FOLD, rewrites=1)
    assert all(p.dtype is dtype for p in result.graph_module.parameters())


def test_what_was_trainable_still_trains_and_what_was_frozen_stays_frozen():
    model = randomize(
        nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6))
    )
    model[2].requires_grad_(False)
    graph_module = check_pass(model, IMAGE, FOLD, rewrites=2).graph_module
    assert {name: p.requires_grad for name, p in graph_module.named_parameters()} == {
        "0.weight": True,
        "0.bias": True,
        "2.weight": False,
        "2.bias": False,
    }
    graph_module.train()
    graph_module(*IMAGE).sum().backward()
    assert graph_module.get_parameter("0.weight").grad is not None


def test_weights_in_one_buffer_that_do_not_touch_are_not_tied():
    model = randomize(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)))
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    start = 0
    for parameter in model.parameters():
        parameter.data = flat[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    check_pass(model, IMAGE, FOLD, rewrites=1, skipped=())


# --- not legal ------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """``conv``, ``norm`` and ``other``, put together by the test."""

    def __init__(self, forward, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


def conv(**options):
    return nn.Conv2d(4, 4, 3, padding=1, **options)


def has_another_user():
    def forward(net, x):
        y = net.conv(x)
        return net.norm(y) + y.relu()

    return Net(forward, conv=conv(), norm=nn.BatchNorm2d(4))


def feeds_two_norms():
    def forward(net, x):
        y = net.conv(x)
        return net.norm(y) * net.other(y)

    return Net(forward, conv=conv(), norm=nn.BatchNorm2d(4), other=nn.BatchNorm2d(4))


def is_called_twice():
    return Net(
        lambda net, x: net.other(net.conv(net.norm(net.conv(x)).relu())),
        conv=conv(),
        norm=nn.BatchNorm2d(4),
        other=nn.BatchNorm2d(4),
    )


def is_tied():
    net = Net(lambda net, x: net.norm(net.conv(x)) + net.other(x), conv=conv(), other=conv(), norm=nn.BatchNorm2d(4))
    net.other.weight = net.conv.weight
    return net


def is_tied_to_a_view():
    net = Net(
        lambda net, x: net.norm(net.conv(x)) + (x * net.scale).relu(),
        conv=conv(),
        norm=nn.BatchNorm2d(4),
    )
    net.scale = nn.Parameter(net.conv.weight.detach()[:1, :, :1, :1])
    return net


def the_norm_is_called_twice():
    return Net(
        lambda net, x: net.norm(net.conv(x)) + net.norm(net.other(x)),
        conv=conv(),
        other=conv(),
        norm=nn.BatchNorm2d(4),
    )


def the_norm_uses_the_batch():
    return nn.Sequential(conv(), nn.BatchNorm2d(4, track_running_stats=False))


def the_variance_is_negative():
    model = nn.Sequential(conv(), nn.BatchNorm2d(4))
    model[1].running_var -= 2
    return model


def the_norm_has_another_dtype():
    return nn.Sequential(conv().bfloat16(), nn.BatchNorm2d(4))


@pytest.mark.parametrize(
    ("make", "skipped"),
    [
        (has_another_user, {"norm": "shared_value"}),
        (feeds_two_norms, {"norm": "shared_value", "other": "shared_value"}),
        (is_called_twice, {"norm": "shared_layer", "other": "shared_layer"}),
        (is_tied, {"norm": "tied_weight"}),
        (is_tied_to_a_view, {"norm": "tied_weight"}),
        (the_norm_is_called_twice, {"norm": "shared_layer"}),
        (the_norm_uses_the_batch, {"1": "batch_statistics"}),
    ],
)
def test_not_legal(make, skipped):
    check_pass(randomize(make()), IMAGE, FOLD, rewrites=0, skipped=skipped)


def test_not_legal_where_numbers_are_not_numbers():
    check_pass(the_variance_is_negative().eval(), IMAGE, FOLD, rewrites=0, skipped={"1": "not_finite"})


def test_not_legal_across_dtypes():
    image = (IMAGE[0].bfloat16(),)
    check_pass(randomize(the_norm_has_another_dtype()), image, FOLD, rewrites=0, skipped={"1": "mixed_dtype"})


def test_not_legal_over_another_dimension():
    model = nn.Sequential(
        nn.Linear(5, 3), nn.BatchNorm1d(3)
    )  # of [N, 3, 5]: the norm runs over dim 1, not over features
    check_pass(randomize(model), (torch.randn(2, 3, 5),), FOLD, rewrites=0, skipped={"1": "channel_mismatch"})


def test_not_legal_when_a_weight_is_nan():
    graph_module = capture(randomize(nn.Sequential(conv(), nn.BatchNorm2d(4))), IMAGE)
    with GraphEditor(graph_module) as editor:
        editor.set_tensor("0.weight", torch.full((4, 4, 3, 3), torch.nan))
    result = FOLD.run(graph_module, PassContext())
    assert not result.changed
    assert [skip.code for skip in result.skipped] == ["not_finite"]


def test_not_legal_when_half_precision_would_overflow():
    model = randomize(nn.Sequential(conv(), nn.BatchNorm2d(4))).half()
    model[1].running_var.fill_(0)
    model[1].weight.data.fill_(1e4)
    graph_module = capture(model, (IMAGE[0].half(),))
    assert [skip.code for skip in FOLD.run(graph_module, PassContext()).skipped] == ["not_finite"]


@pytest.mark.parametrize("path", ["0", "1"])
def test_not_legal_in_training(path):
    graph_module = capture(randomize(nn.Sequential(conv(), nn.BatchNorm2d(4))), IMAGE)
    graph_module.get_submodule(path).train()
    result = FOLD.run(graph_module, PassContext())
    assert not result.changed
    assert [(skip.site, skip.code) for skip in result.skipped] == [("1", "training")]


def test_the_skip_says_who_is_in_the_way():
    (skip,) = check_pass(randomize(has_another_user()), IMAGE, FOLD, rewrites=0).skipped
    assert skip.reason == "What 'conv' produces is also read without the norm."
    assert skip.blocking == ("relu",)


# --- the fuser of torch ---------------------------------------------------------------------------------------------


def feeds_two_norms_by_two_calls():
    layers = {"conv": conv(), "norm": nn.BatchNorm2d(4), "other": nn.BatchNorm2d(4)}
    return Net(lambda net, x: net.norm(net.conv(x)) * net.other(net.conv(x)), **layers)


def is_read_without_the_norm_by_another_call():
    return Net(lambda net, x: net.norm(net.conv(x)) + net.conv(x).relu(), conv=conv(), norm=nn.BatchNorm2d(4))


def goes_by_two_names():
    net = Net(lambda net, x: net.norm(net.conv(x)) + net.other(x.relu()), conv=conv(), norm=nn.BatchNorm2d(4))
    net.other = net.conv
    return net


@pytest.mark.parametrize(
    "make", [feeds_two_norms_by_two_calls, is_read_without_the_norm_by_another_call, goes_by_two_names]
)
def test_where_the_fuser_of_torch_is_wrong(make):
    from torch.fx.experimental.optimization import fuse

    model = randomize(make())
    ours = check_pass(model, IMAGE, FuseModules()).graph_module
    with torch.no_grad():
        expected = [model(*IMAGE)]
        assert max_relative_error(expected, [ours(*IMAGE)])[0] < 1e-6
        assert max_relative_error(expected, [fuse(model)(*IMAGE)])[0] > 0.1
