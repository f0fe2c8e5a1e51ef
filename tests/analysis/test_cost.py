"""Cost: sums, ties, symbols, lifetimes of activations. Multiply-accumulates are in ``test_macs``."""

import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress import passes
from fxcompress.analysis.cost import Cost, cost, node_costs
from fxcompress.capture import capture
from fxcompress.errors import OptionError
from fxcompress.graph.edit import GraphEditor
from fxcompress.graph.info import info
from tests.analysis.counting import Call

aten = torch.ops.aten

# --- weights -------------------------------------------------------------------------------------------------------


def test_tied_weights_and_shared_layers_count_once():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(7, 4)
            self.body = nn.Linear(4, 4)
            self.decoder = nn.Linear(4, 7, bias=False)
            self.decoder.weight = self.embedding.weight

        def forward(self, ids):
            return self.decoder(self.body(self.body(self.embedding(ids))))

    graph_module = capture(Model().eval(), (torch.randint(0, 7, (2, 5)),))
    found = cost(graph_module)
    assert found.parameters == 28 + 20
    assert found.bytes == 4 * 48
    assert found.macs == 5 * (16 + 16 + 28)
    holders = {row.layer: row.parameters for row in node_costs(graph_module) if row.parameters}
    assert holders == {"embedding": 28, "body": 20}


@pytest.mark.parametrize("pass_", [passes.QuantizeDynamic(), passes.QuantizeWeights(bits=4, block_size=16)], ids=str)
def test_weights_that_became_integers_count_as_the_parameters_that_they_were(pass_):
    model = nn.Sequential(nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 5))
    report = fxc.compile(model.eval(), passes=[pass_], example_inputs=(torch.randn(2, 48),), progress=False).report
    (done,) = report.passes
    assert done.after.parameters == done.before.parameters == 48 * 32 + 32 + 32 * 5 + 5
    assert done.after.bytes < done.before.bytes / 2
    assert sum(row.parameters for row in report.layers) == done.after.parameters


def test_bytes_go_by_dtype_and_by_memory():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(8, dtype=torch.bfloat16))
            self.register_buffer("front", self.weight.detach()[:4])  # the same memory
            self.register_buffer("table", torch.zeros(3, dtype=torch.int64), persistent=False)

        def forward(self, x):
            return x * self.weight.float().sum() + self.front.float().sum() + self.table.sum()

    found = cost(capture(Model().eval(), (torch.randn(2, 3),)))
    assert found.parameters == 8
    assert found.bytes == 8 * 2 + 3 * 8


def test_a_weight_in_two_interleaved_parameters():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            whole = torch.zeros(10)
            self.even = nn.Parameter(whole[0::2])
            self.odd = nn.Parameter(whole[1::2])

        def forward(self, x):
            return x * self.even + self.odd

    found = cost(capture(Model().eval(), (torch.randn(2, 5),)))
    assert (found.parameters, found.bytes) == (10, 40)


# --- sizes ---------------------------------------------------------------------------------------------------------


def test_other_symbols_keep_their_size_in_the_example():
    sizes = {"x": {0: "batch", 1: "tokens"}}
    graph_module = capture(
        Call(lambda s, x: s.m(x), m=nn.Linear(4, 3)).eval(), (torch.randn(2, 7, 4),), dynamic_shapes=[sizes["x"]]
    )
    assert cost(graph_module, batch=5).macs == 5 * 7 * 12


def test_the_batch_of_a_second_input_goes_along():
    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x, y):
            return self.left(x), self.right(y)

    graph_module = capture(Towers().eval(), (torch.randn(2, 4), torch.randn(2, 4)))
    assert cost(graph_module, batch=1).macs == 24
    assert cost(graph_module, batch=10).macs == 240


def test_fixed_sizes_ignore_the_batch():
    graph_module = capture(nn.Linear(4, 3).eval(), (torch.randn(2, 4),), dynamic_shapes=None)
    assert cost(graph_module, batch=1).macs == cost(graph_module, batch=9).macs == 24


def test_a_batch_must_be_positive():
    graph_module = capture(nn.Linear(4, 3).eval(), (torch.randn(2, 4),))
    with pytest.raises(OptionError, match="positive"):
        cost(graph_module, batch=0)


def test_without_shapes_only_weights_are_known():
    graph_module = capture(nn.Linear(4, 3).eval(), (torch.randn(2, 4),))
    info(graph_module).has_shapes = False
    for node in graph_module.graph.nodes:
        node.meta.pop("val", None)
    assert cost(graph_module) == Cost(parameters=15, macs=None, bytes=60, activation_peak_bytes=None)
    assert [row.macs for row in node_costs(graph_module)] == [None, None]


# --- activations ---------------------------------------------------------------------------------------------------


def peak(function, *inputs, **parts):
    return cost(capture(Call(function, **parts).eval(), inputs)).activation_peak_bytes


def test_a_chain_keeps_two_values_alive():
    x = torch.randn(2, 10)  # 40 bytes at batch 1
    assert peak(lambda s, x: x.relu().tanh().sigmoid(), x) == 2 * 40


def test_a_skip_keeps_a_third():
    x = torch.randn(2, 10)
    assert peak(lambda s, x: x.relu().tanh() + x, x) == 3 * 40


def test_outputs_live_to_the_end():
    x = torch.randn(2, 10)
    assert peak(lambda s, x: (x.relu(), x.tanh(), x.sigmoid()), x) == 4 * 40


def test_views_and_idle_layers_take_no_memory():
    x = torch.randn(2, 4, 10)  # 160 bytes
    assert peak(lambda s, x: x.relu().transpose(1, 2)[:, :3].unsqueeze(1), x) == 2 * 160
    assert peak(lambda s, x: sum(x.relu().chunk(2, 1)), x) == 2 * 160
    assert peak(lambda s, x: s.m(x.relu()), x, m=nn.Dropout()) == 2 * 160
    assert peak(lambda s, x: x.relu().expand(5, *x.shape).mean(0), x) == 2 * 160


def test_a_reshape_copies_only_where_it_must():
    x = torch.randn(2, 4, 10)
    assert peak(lambda s, x: x.relu().reshape(x.shape[0], 40), x) == 2 * 160
    assert peak(lambda s, x: x.relu().transpose(1, 2).reshape(x.shape[0], 40).tanh(), x) == 2 * 160
    assert peak(lambda s, x: x.relu().transpose(1, 2).contiguous() + x.sum(), x) == 2 * 160 + 160
    assert peak(lambda s, x: x.relu().contiguous(), x) == 2 * 160
    assert peak(lambda s, x: x.relu().to(torch.float64), x) == 160 + 320
    assert peak(lambda s, x: x.relu().to(torch.float32), x) == 2 * 160


def test_weights_and_their_views_are_no_activations():
    x = torch.randn(2, 10)
    assert peak(lambda s, x: x + s.p.t().reshape(10), x, p=nn.Parameter(torch.randn(10, 1))) == 2 * 40


def test_peak_is_still_right_after_an_edit():
    """Editing refreshes fake values here and there, so views no longer share a fake storage with their base."""
    x = torch.randn(2, 4, 10)
    graph_module = capture(Call(lambda s, x: x.relu().transpose(1, 2).tanh()).eval(), (x,))
    before = cost(graph_module).activation_peak_bytes
    (relu,) = graph_module.graph.find_nodes(op="call_function", target=aten.relu.default)
    with GraphEditor(graph_module) as editor:
        editor.replace(relu, editor.insert_call(aten.sigmoid.default, relu.args, before=relu))
    assert cost(graph_module).activation_peak_bytes == before == 320
