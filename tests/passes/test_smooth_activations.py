"""SmoothQuant: factors that norms and layers absorb, products where nothing can, and what it is for."""

import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress.errors import OptionError
from fxcompress.passes import PassContext, Quantize, SmoothActivations
from tests.support import check_pass, randomize

F = nn.functional


class Block(nn.Module):
    """A transformer block with outliers in a few channels of what its layers read."""

    def __init__(self):
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (layer(y).view(x.shape[0], x.shape[1], 4, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


X = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))


def data(count=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 6, 16, generator=generator) for _ in range(count)]


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = randomize(Block())
    with torch.no_grad():
        made.norm.weight[3] *= 40
        made.norm2.weight[5] *= 30
    return made


def test_absorbed_by_norms_and_values_and_a_product_behind_gelu(model):
    result = check_pass(model, (X,), SmoothActivations(data(), alpha=0.5), rewrites={"q", "out", "up", "down"})
    told = {item.site: item for item in result.rewrites}
    assert told["q"].detail["with"] == ["k", "v"] and told["down"].result == "smoothed by a product before it"
    assert all(told[site].result == "smoothed" for site in ("q", "out", "up"))
    muls = result.graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)
    assert len(muls) == 1


def test_ranges_become_those_of_the_weights_with_alpha_0(model):
    graph = check_pass(model, (X,), SmoothActivations(data(), alpha=0.0), idempotent=True).graph_module
    columns = torch.stack([graph.get_submodule(path).weight.abs().amax(0) for path in "qkv"]).amax(0)
    torch.testing.assert_close(columns, torch.ones(16), rtol=1e-4, atol=0)


def test_search_lowers_the_expected_noise_of_every_site(model):
    result = check_pass(model, (X,), SmoothActivations(data()), idempotent=False)
    assert {item.site for item in result.rewrites} >= {"q", "up"}
    assert all(item.detail["expected_noise"] < 1 for item in result.rewrites)


def test_quantization_loses_less_after_it(model):
    def error(*passes):
        compiled = fxc.compile(model, [*passes, Quantize(data())], (X,), verify=False, progress=False)
        expected = model(X)
        return float(((compiled(X) - expected).norm() / expected.norm()).detach())

    assert error(SmoothActivations(data())) < 0.7 * error()


def test_without_products_and_ignored(model):
    result = check_pass(
        model, (X,), SmoothActivations(data(), 0.5, insert=False, ignore=("out",)), rewrites={"q", "up"}
    )
    assert {item.site: item.code for item in result.skipped} == {"out": "ignored", "down": "not_absorbed"}


class Unfit(nn.Module):
    """A layer called twice on inputs that nothing scales, one with a tied weight, one that reads what others read."""

    def __init__(self):
        super().__init__()
        self.twice, self.tied, self.other = (nn.Linear(8, 8) for _ in range(3))
        self.other.weight = self.tied.weight

    def forward(self, x):
        x = self.twice(torch.tanh(self.twice(torch.sigmoid(x))))
        return self.other(torch.tanh(self.tied(x)))


def test_what_cannot_be_smoothed_is_told():
    result = check_pass(Unfit().eval(), (torch.randn(2, 8),), SmoothActivations([torch.randn(4, 8)]), rewrites=0)
    codes = {item.site: item.code for item in result.skipped}
    assert codes["twice"] == "several_calls" and codes["tied"] == codes["other"] == "tied_weight"


def test_dead_inputs_keep_their_scale():
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4)).eval()
    with torch.no_grad():
        model[0].weight[2] = 0
        model[0].weight[3] = 50
        model[1].weight[:, 5] = 0
    check_pass(model, (torch.randn(3, 8),), SmoothActivations([torch.randn(16, 8)], alpha=0.5), rewrites=1)


def test_bad_options():
    with pytest.raises(OptionError, match="outside"):
        SmoothActivations([], alpha=2.0)
    with pytest.raises(OptionError, match="no linear layer matches"):
        SmoothActivations([torch.randn(2, 8)], ignore=("nowhere",)).run(_captured(), PassContext())


def _captured():
    from fxcompress.capture import capture

    return capture(nn.Linear(8, 8).eval(), (torch.randn(2, 8),))
