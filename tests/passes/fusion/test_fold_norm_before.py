"""norm → conv ⇒ conv: legal without padding, or without a shift."""

import pytest
import torch
from torch import nn

from fxcompress.passes.fuse_modules import FuseModules
from tests.support import check_pass, randomize

FOLD = FuseModules(rules=("fold_norm_before",))
IMAGE = (torch.randn(2, 4, 6, 6),)


def without_shift(norm):
    """A norm that only scales: mean and bias are zero."""
    norm.running_mean.zero_()
    if norm.bias is not None:
        norm.bias.data.zero_()
    return norm


def test_the_graph_before_and_after():
    check_pass(
        randomize(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, bias=False))),
        IMAGE,
        FOLD,
        after="""
            graph(input_1: f32[batch, 4, 6, 6]):
              _1: f32[batch, 6, 4, 4] = Conv2d(4, 6, kernel_size=(3, 3), stride=(1, 1)) @1 (input_1)
              return _1
        """,
        rewrites=["0"],
        skipped=(),
    )


@pytest.mark.parametrize(
    "layer",
    [
        pytest.param(nn.Conv2d(4, 6, 3, stride=2, groups=2), id="groups"),
        pytest.param(nn.Conv2d(4, 8, 3, groups=4, padding="valid"), id="depthwise, padding by name"),
        pytest.param(nn.ConvTranspose2d(4, 6, 1, groups=2), id="transposed, kernel and stride 1"),
    ],
)
def test_more_that_is_legal(layer):
    check_pass(randomize(nn.Sequential(nn.BatchNorm2d(4), layer)), IMAGE, FOLD, rewrites=["0"], skipped=())


def test_before_a_linear_layer():
    model = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3))
    check_pass(randomize(model), (torch.randn(4, 5),), FOLD, rewrites=["0"], skipped=())


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3, padding=1), nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)])
def test_legal_in_any_case_where_nothing_is_shifted(layer):
    model = randomize(nn.Sequential(nn.BatchNorm2d(4), layer))
    without_shift(model[0])
    check_pass(model, IMAGE, FOLD, rewrites=["0"], skipped=())


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.one, self.two = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        y = self.norm(x)
        return self.one(y) * self.two(y)


class CalledTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.conv(self.norm(x)) * self.conv(x)


@pytest.mark.parametrize(
    ("model", "skipped"),
    [
        (nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1)), {"0": "padded_shift"}),
        (nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding="same")), {"0": "padded_shift"}),
        (nn.Sequential(nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 3)), {"0": "padded_shift"}),
        (nn.Sequential(nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 1, stride=2)), {"0": "padded_shift"}),
        (nn.Sequential(nn.BatchNorm2d(4), nn.Linear(6, 6)), {"0": "channel_mismatch"}),
        (nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False), nn.Conv2d(4, 6, 1)), {"0": "batch_statistics"}),
        (nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 1)), {"0": "no_neighbour"}),
        (Twice(), {"norm": "shared_value"}),
        (CalledTwice(), {"norm": "shared_layer"}),
    ],
)
def test_not_legal(model, skipped):
    check_pass(randomize(model), IMAGE, FOLD, rewrites=0, skipped=skipped)


def test_a_norm_between_two_layers_goes_into_the_first():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
    (rewrite,) = check_pass(randomize(model), IMAGE, FuseModules(), skipped=()).rewrites
    assert rewrite.detail["layers"] == ["0", "1"]
