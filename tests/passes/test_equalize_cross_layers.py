"""Cross-layer equalization: exact on every path that keeps scales, refused with the reason on all others."""

import pytest
import torch
from torch import nn

from fxcompress.passes import EqualizeCrossLayers, FuseModules, PassContext, Quantize
from tests.support import check_pass, randomize

F = nn.functional
X = torch.randn(2, 3, 16, 16)


def uneven(model, seed=0):
    """Output channels of every layer with weights of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in randomize(model).parameters():
            shape = [parameter.shape[0], *[1] * (parameter.dim() - 1)]
            parameter.mul_(torch.randn(shape, generator=generator).exp())
    return model.eval()


class Chain(nn.Module):
    """A residual stream with two makers and two readers, depthwise, grouped and transposed layers, pools, a flatten."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.b = nn.Conv2d(8, 8, 1, bias=False)
        self.grouped = nn.Conv2d(8, 12, 3, groups=4, stride=2)
        self.up = nn.ConvTranspose2d(12, 6, 2, groups=2)
        self.slope = nn.PReLU(6)
        self.head = nn.Linear(6 * 9, 5)

    def forward(self, x):
        x = self.a(x).relu()
        x = x + self.b(F.leaky_relu(self.depthwise(x), 0.1))
        x = F.max_pool2d(self.grouped(x).relu(), 2)
        return self.head(F.adaptive_avg_pool2d(self.slope(self.up(x)), 3).flatten(1))


def spread(model, layer, dims):
    ranges = dict(model.named_parameters())[f"{layer}.weight"].detach().abs().amax(dims)
    return float(ranges.max() / ranges.min())


def test_equalizes_chains_and_residual_streams():
    model = uneven(Chain())
    result = check_pass(
        model, (X,), EqualizeCrossLayers(), rewrites={"a", "depthwise", "b", "grouped", "up"}, skipped=["scale_fixed"]
    )
    told = {item.site: item.detail for item in result.rewrites}
    assert told["a"]["with"] == told["b"]["with"] == ["depthwise", "grouped"]
    assert spread(result.graph_module, "depthwise", (1, 2, 3)) < spread(model, "depthwise", (1, 2, 3))


def test_ranges_meet():
    """After it, what makes a channel and what reads it have the same range, up to a factor common to all channels."""
    model = uneven(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)))
    weights = dict(check_pass(model, (X,), EqualizeCrossLayers(), rewrites=1).graph_module.named_parameters())
    ratio = weights["0.weight"].abs().amax((1, 2, 3)) / weights["2.weight"].abs().amax((0, 2, 3))
    torch.testing.assert_close(ratio, ratio.mean().expand(8), rtol=1e-2, atol=0)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (layer(y).view(x.shape[0], x.shape[1], 4, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


def test_norms_make_and_values_pass_attention():
    result = check_pass(uneven(Attention()), (torch.randn(2, 6, 16),), EqualizeCrossLayers(), rewrites={"norm", "v"})
    assert {item.site: item.code for item in result.skipped} == dict.fromkeys(["q", "k", "out"], "scale_fixed")


class Moves(nn.Module):
    """Split, concatenation, shuffle, NHWC, a norm written out."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.d, self.weight, self.e = nn.Linear(8, 8), nn.Parameter(torch.rand(8) + 0.5), nn.Linear(8, 4)

    def forward(self, x):
        left, right = self.a(x).relu().chunk(2, 1)
        x = self.b(torch.cat([right, left], 1)).relu()
        x = F.channel_shuffle(x, 2)
        x = self.d(self.c(x).relu().permute(0, 2, 3, 1)).mean((1, 2))
        return self.e(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1) * self.weight)


def test_channels_are_followed_through_moves():
    sites = {item.site for item in check_pass(uneven(Moves()), (X,), EqualizeCrossLayers()).rewrites}
    assert sites == {"a", "b", "c", "weight"}


class Clipped(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.b(F.relu6(4 * self.a(x)))


def test_a_clip_stops_it_or_gets_limits_for_each_channel():
    model = uneven(Clipped())
    result = check_pass(model, (X,), EqualizeCrossLayers(), rewrites=0)
    assert result.skipped[0].blocking == ("relu6",)
    result = check_pass(model, (X,), EqualizeCrossLayers("per_channel"), rewrites={"a"})
    assert result.rewrites[0].detail["clips"] == ["relu6"]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x).relu())


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(self.a(self.a(x).relu()).relu())


@pytest.mark.parametrize(
    "model",
    [
        Tied(),
        Twice(),
        nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3)),
        nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)),
        nn.Tanh(),
    ],
)
def test_nothing_to_equalize_is_told(model):
    result = check_pass(uneven(model), (torch.randn(4, 8),), EqualizeCrossLayers(), rewrites=0)
    assert result.skipped[-1].code == "nothing_to_equalize"


def test_zero_channels_keep_their_scale():
    model = uneven(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)))
    with torch.no_grad():
        model[0].weight[2] = 0
        model[2].weight[:, 5] = 0
    check_pass(model, (X,), EqualizeCrossLayers(), rewrites=1)


def test_a_quantized_graph_is_left():
    from fxcompress.capture import capture

    graph = FuseModules().run(capture(uneven(Chain()), (X,)), PassContext(example_inputs=[X])).graph_module
    graph = Quantize([X]).run(graph, PassContext()).graph_module
    result = EqualizeCrossLayers().run(graph, PassContext())
    assert not result.changed and result.skipped[-1].code == "nothing_to_equalize"
