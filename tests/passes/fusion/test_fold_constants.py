"""What depends on weights alone is computed once, and what it was computed for is a layer again."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from fxcompress.capture import capture
from fxcompress.passes.base import PassContext
from fxcompress.passes.fuse_modules import FuseModules
from tests.support import check_pass, randomize

FOLD = FuseModules(rules=("merge_duplicates", "fold_constants", "raise_layers"))
IMAGE = (torch.randn(2, 4, 6, 6),)


class StandardizedConv(nn.Conv2d):
    """Weight standardisation with a gain, as in NFNets and BiT."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def forward(self, x):
        mean, variance = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True)[::-1]
        weight = (self.weight - mean) * (variance + 1e-5).rsqrt() * self.gain
        return self._conv_forward(x, weight, self.bias)


class Net(nn.Module):
    def __init__(self, forward, **held):
        super().__init__()
        for name, value in held.items():
            if isinstance(value, nn.Module):
                self.add_module(name, value)
            elif isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value, persistent=name != "transient")
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


def test_weight_standardisation_before_and_after():
    check_pass(
        nn.Sequential(StandardizedConv(4, 6, 3), nn.ReLU()).eval(),
        IMAGE,
        FOLD,
        before="""
            graph(input_1: f32[batch, 4, 6, 6]):
              _0_weight: f32[6, 4, 3, 3] = parameter 0.weight
              _0_bias: f32[6] = parameter 0.bias
              _0_gain: f32[6, 1, 1, 1] = parameter 0.gain
              var_mean: (f32[6, 1, 1, 1], f32[6, 1, 1, 1]) = aten.var_mean.dim(_0_weight, [1, 2, 3], True, True)
              getitem: f32[6, 1, 1, 1] = getitem(var_mean, 0)
              getitem_1: f32[6, 1, 1, 1] = getitem(var_mean, 1)
              sub: f32[6, 4, 3, 3] = aten.sub.Tensor(_0_weight, getitem_1)
              add: f32[6, 1, 1, 1] = aten.add.Tensor(getitem, 1e-05)
              rsqrt: f32[6, 1, 1, 1] = aten.rsqrt(add)
              mul: f32[6, 4, 3, 3] = aten.mul.Tensor(sub, rsqrt)
              mul_1: f32[6, 4, 3, 3] = aten.mul.Tensor(mul, _0_gain)
              conv2d: f32[batch, 6, 4, 4] = aten.conv2d(input_1, mul_1, _0_bias)
              relu: f32[batch, 6, 4, 4] = aten.relu(conv2d)
              return relu
        """,
        after="""
            graph(input_1: f32[batch, 4, 6, 6]):
              _0: f32[batch, 6, 4, 4] = Conv2d(4, 6, kernel_size=(3, 3), stride=(1, 1)) @0 (input_1)
              relu: f32[batch, 6, 4, 4] = aten.relu(_0)
              return relu
        """,
        rewrites=2,
        skipped=(),
    )


def test_a_standardised_convolution_and_its_norm_become_one_layer_that_trains():
    model = randomize(nn.Sequential(StandardizedConv(4, 6, 3, bias=False), nn.BatchNorm2d(6)))
    graph_module = check_pass(model, IMAGE, FuseModules(), rewrites=3, skipped=()).graph_module
    assert list(graph_module.state_dict()) == ["0.weight", "0.bias"]
    graph_module.train()
    graph_module(*IMAGE).sum().backward()
    assert all(p.grad is not None for p in graph_module.parameters())


@pytest.mark.parametrize("parametrize", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrised_layers(parametrize):
    model = nn.Sequential(parametrize(nn.Conv2d(4, 6, 3)), nn.ReLU(), parametrize(nn.ConvTranspose2d(6, 4, 3)))
    graph_module = check_pass(model.eval(), IMAGE, FOLD, skipped=()).graph_module
    assert {name: type(layer) for name, layer in graph_module.named_children()} == {
        "0": nn.Conv2d,
        "2": nn.ConvTranspose2d,
    }


def test_one_projection_split_in_three():
    def forward(net, x):
        q, k, v = net.weight.chunk(3)
        return F.linear(x, q) * F.linear(x, k, net.bias) + F.linear(x, v)

    net = Net(forward, weight=nn.Parameter(torch.randn(12, 6)), bias=nn.Parameter(torch.randn(4)))
    graph_module = check_pass(net.eval(), IMAGE, FOLD, skipped=()).graph_module
    assert [type(layer) for layer in graph_module.children()] == [nn.Linear] * 3


def test_a_shared_standardised_weight_stays_tied():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = StandardizedConv(4, 4, 3, padding=1)

        def forward(self, x):
            return self.conv(self.conv(x).relu())

    graph_module = check_pass(Twice().eval(), IMAGE, FOLD, skipped=()).graph_module
    called = [graph_module.get_submodule(n.target) for n in graph_module.graph.nodes if n.op == "call_module"]
    assert len(called) == 2
    assert called[0].weight is called[1].weight


def test_position_table():
    def forward(net, x):
        table = F.interpolate(net.table, size=(6, 6), mode="bilinear")
        return x + table[:, :, :6] * net.scale

    net = Net(forward, table=nn.Parameter(torch.randn(1, 4, 3, 3)), scale=torch.rand(4, 1, 1))
    result = check_pass(net.eval(), IMAGE, FOLD, rewrites=1, skipped=())
    (name, table), *_ = result.graph_module.named_parameters()
    assert (name, table.shape, table.requires_grad) == ("table", (1, 4, 6, 6), True)
    assert result.rewrites[0].detail["tensor"] == "table"


def test_masks_of_static_size():
    def forward(net, x):
        mask = x.new_zeros((6, 6))
        mask[:3, 3:] = 1
        causal = torch.arange(6)[:, None] >= torch.arange(6)
        return torch.where(causal, x, 0.0).masked_fill(mask == 1, -1.0)

    graph_module = check_pass(Net(forward).eval(), IMAGE, FOLD, skipped=()).graph_module
    assert not graph_module.state_dict(), "constants made of nothing that is saved are not saved either"
    assert len(list(graph_module.buffers())) == 2


def test_a_bias_gathered_by_index():
    def forward(net, x):
        bias = net.table[net.index.view(-1)].view(6, 6, 4).permute(2, 0, 1).contiguous().unsqueeze(0)
        return (x + bias).softmax(-1)

    index = torch.randint(0, 11, (6, 6))
    net = Net(forward, table=nn.Parameter(torch.randn(11, 4)), index=index).eval()
    check_pass(net, IMAGE, FOLD, rewrites=1, skipped=())


def test_layers_on_constants():
    def forward(net, x):
        return x * net.mlp(net.grid).reshape(1, 4, 1, 1)

    net = Net(forward, mlp=nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)), grid=torch.rand(4, 2)).eval()
    graph_module = check_pass(net, IMAGE, FOLD, rewrites=1, skipped=()).graph_module
    assert [tuple(p.shape) for p in graph_module.parameters()] == [(1, 4, 1, 1)]


def test_what_nothing_learned_is_made_of_is_a_buffer():
    net = Net(
        lambda net, x: x * net.transient.square() + net.kept.square(), transient=torch.rand(6), kept=torch.rand(6)
    )
    graph_module = check_pass(net.eval(), IMAGE, FOLD, rewrites=2, skipped=()).graph_module
    assert not list(graph_module.parameters())
    assert list(graph_module.state_dict()) == ["kept"]


def test_a_buffer_that_a_layer_holds_too_keeps_its_value():
    net = Net(lambda net, x: net.norm(x) + (net.norm.running_mean * 2)[:, None, None], norm=nn.BatchNorm2d(4))
    result = check_pass(randomize(net), IMAGE, FOLD, rewrites=1, skipped=())
    assert torch.equal(result.graph_module.get_submodule("norm").running_mean, net.norm.running_mean)


def test_two_constants_of_one_buffer():
    net = Net(lambda net, x: x * net.kept[:6] + net.kept[6:].square(), kept=torch.rand(12))
    graph_module = check_pass(net.eval(), IMAGE, FOLD, rewrites=2, skipped=()).graph_module
    assert len(list(graph_module.buffers())) == 2


# --- not done -------------------------------------------------------------------------------------------------------


def test_a_result_much_larger_than_what_it_is_made_of():
    net = Net(lambda net, x: x[:, :1, :1, :1] * (net.small + 1).expand(600, 600), small=torch.rand(600)).eval()
    result = check_pass(net, IMAGE, FOLD, rewrites=["add"], skipped={"expand": "too_large"})
    assert [tuple(b.shape) for b in result.graph_module.buffers()] == [(600,)]


def test_a_tied_weight():
    def forward(net, x):
        return net.embedding(x) @ net.embedding.weight.t()

    net = Net(forward, embedding=nn.Embedding(7, 5)).eval()
    check_pass(net, (torch.randint(0, 7, (2, 3)),), FOLD, rewrites=0, skipped=["tied_weight"])


def test_random_numbers():
    net = Net(lambda net, x: x + 0 * torch.rand(6) + 0 * F.dropout(net.c, 0.5, training=True), c=torch.rand(6)).eval()
    check_pass(net, IMAGE, FOLD, rewrites=0, skipped=["nothing_to_fuse"])


def test_while_the_graph_trains():
    graph_module = capture(nn.Sequential(StandardizedConv(4, 6, 3)).eval(), IMAGE).train()
    result = FOLD.run(graph_module, PassContext())
    assert not result.changed
    assert [skip.code for skip in result.skipped] == ["training"]


def test_a_fixed_kernel_does_not_become_a_layer():
    net = Net(lambda net, x: F.conv2d(x, net.kernel.repeat(4, 1, 1, 1), groups=4), kernel=torch.rand(1, 1, 3, 3)).eval()
    graph_module = check_pass(net, IMAGE, FOLD, rewrites=1, skipped=()).graph_module
    assert not list(graph_module.children())
