"""Cost against torch's own counter, sums, ties, symbols and lifetimes."""

import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fxcompress.analysis.cost import Cost, cost, node_costs
from fxcompress.capture import capture
from fxcompress.errors import OptionError
from fxcompress.graph.edit import GraphEditor
from fxcompress.graph.info import info

aten = torch.ops.aten


class Call(nn.Module):
    """A model of one function and the layers or parameters that it reads."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args):
        return self.function(self, *args)


def counted(model, inputs, device):
    """MACs by torch's counter. On the meta device attention and recurrences are taken apart, so that it knows them."""
    model = model.to(device)
    inputs = [tensor.to(device) for tensor in inputs]
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(*inputs)
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return flops // 2


def check(model, *inputs, batches=(1, 3), device="meta"):
    """The graph costs what torch counts, at every batch size, and the table adds up."""
    graph_module = capture(model.eval(), inputs)
    costs = {batch: cost(graph_module, batch=batch) for batch in batches}
    for batch, found in costs.items():
        table = node_costs(graph_module, batch=batch)
        assert sum(row.macs for row in table) == found.macs
        assert sum(row.parameters for row in table) == found.parameters
        assert sum(row.bytes for row in table) == found.bytes
    assert costs[batches[0]].parameters == sum(p.numel() for p in model.parameters())
    resized = {b: [x[:1].expand(b, *x.shape[1:]) for x in inputs] for b in batches}
    for batch, found in costs.items():
        assert found.macs == counted(model, resized[batch], device)
    return graph_module


# --- architectures -------------------------------------------------------------------------------------------------


def _models():
    from benchmarks.zoo import prepare_torchvision

    try:
        prepare_torchvision()
    except ImportError:
        pytest.skip("torchvision is not installed")
    from torchvision import models

    return models


# Captured on the meta device: no weights are drawn and nothing is computed.
def test_agrees_with_torch_on_a_convolutional_network():
    with torch.device("meta"):
        model = _models().get_model("resnet18", weights=None)
    graph_module = check(model, torch.empty(2, 3, 224, 224, device="meta"))
    found = cost(graph_module)
    assert (found.parameters, found.macs) == (11_689_512, 1_814_073_344)  # as published: 11.7 M, 1.8 G


def test_agrees_with_torch_on_a_vision_transformer():
    with torch.device("meta"):
        model = _models().VisionTransformer(32, 8, 1, 4, 32, 64)
    check(model, torch.empty(2, 3, 32, 32, device="meta"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "convnext_tiny",
        "densenet121",
        "efficientnet_b0",
        "googlenet",
        "mobilenet_v3_small",
        "regnet_y_400mf",
        "shufflenet_v2_x0_5",
        "swin_t",
        "vit_b_16",
    ],
)
def test_agrees_with_torch_on_large_networks(name):
    options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    model = _models().get_model(name, weights=None, **options).to("meta")
    graph_module = check(model, torch.empty(2, 3, 224, 224, device="meta"))
    assert _seconds(graph_module) < 0.5  # about 0.05 s on a quiet machine


@pytest.mark.parametrize("kind", ["Bert", "GPT2", "Llama", "Swin"])
def test_agrees_with_torch_on_transformers(kind):
    _models()  # transformers imports torchvision, which some builds of torch have to be prepared for
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 50}
    options = {
        "Bert": {**small, "intermediate_size": 24},
        "GPT2": {"n_embd": 16, "n_layer": 1, "n_head": 4, "vocab_size": 50, "use_cache": False},
        "Llama": {**small, "intermediate_size": 24, "num_key_value_heads": 2, "use_cache": False},
        "Swin": {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2], "num_heads": [2], "window_size": 4},
    }
    config = getattr(transformers, f"{kind}Config")(**options[kind])
    model = getattr(transformers, f"{kind}Model")(config)
    inputs = torch.randn(2, 3, 16, 16) if kind == "Swin" else torch.randint(0, 50, (2, 6))
    check(model, inputs, device="cpu")  # some of these look at values


# --- operations ----------------------------------------------------------------------------------------------------

r = torch.randn

AGREE = {
    "attention layer": (
        lambda s, x: s.m(x, x, x)[0],
        [r(2, 5, 8)],
        {"m": nn.MultiheadAttention(8, 2, batch_first=True)},
    ),
    "encoder": (lambda s, x: s.m(x), [r(2, 5, 8)], {"m": nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)}),
    "grouped heads": (
        lambda s, q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        [r(2, 8, 5, 4), r(2, 2, 7, 4), r(2, 2, 7, 6)],
        {},
    ),
    "attention without heads": (lambda s, q: F.scaled_dot_product_attention(q, q, q), [r(2, 5, 4)], {}),
    "lstm": (lambda s, x: s.m(x)[0], [r(2, 5, 8)], {"m": nn.LSTM(8, 6, 2, bidirectional=True, batch_first=True)}),
    "projected lstm": (lambda s, x: s.m(x)[0], [r(2, 5, 8)], {"m": nn.LSTM(8, 6, proj_size=3, batch_first=True)}),
    "gru": (lambda s, x: s.m(x)[0], [r(2, 5, 8)], {"m": nn.GRU(8, 6, batch_first=True)}),
    "rnn": (lambda s, x: s.m(x)[0], [r(2, 5, 8)], {"m": nn.RNN(8, 6, batch_first=True)}),
    "grouped conv": (lambda s, x: s.m(x), [r(2, 8, 5)], {"m": nn.Conv1d(8, 12, 3, groups=4, stride=2)}),
    "conv3d": (lambda s, x: s.m(x), [r(2, 4, 5, 5, 5)], {"m": nn.Conv3d(4, 6, 3, dilation=2, padding="same")}),
    "transposed": (lambda s, x: s.m(x), [r(2, 8, 5, 5)], {"m": nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2)}),
    "conv by an activation": (lambda s, x: F.conv1d(x, x[:1, :, :3]), [r(2, 4, 9)], {}),
    "transposed by an activation": (lambda s, x: F.conv_transpose1d(x, x[:1].transpose(0, 1)), [r(2, 4, 9)], {}),
    "linear by an activation": (lambda s, x: F.linear(x, x[:, :3].mean(0)), [r(2, 5, 8)], {}),
    "matmul 4d × 2d": (lambda s, x: x @ s.p, [r(2, 3, 4, 5)], {"p": nn.Parameter(r(5, 6))}),
    "matmul broadcast": (lambda s, x, y: x @ y, [r(2, 1, 4, 5), r(2, 3, 5, 6)], {}),
    "bmm": (lambda s, x, y: torch.bmm(x, y), [r(2, 3, 4), r(2, 4, 3)], {}),
    "addmm": (lambda s, x: torch.addmm(s.b, x, s.p), [r(2, 5)], {"p": nn.Parameter(r(5, 6)), "b": nn.Parameter(r(6))}),
    "baddbmm": (lambda s, x: torch.baddbmm(x, x, x), [r(2, 5, 5)], {}),
    "tensordot": (lambda s, x: torch.tensordot(x, s.p, dims=2), [r(2, 5, 4)], {"p": nn.Parameter(r(5, 4, 6))}),
    "inner": (lambda s, x: torch.inner(x, s.p), [r(2, 5, 4)], {"p": nn.Parameter(r(3, 4))}),
    "embedding": (lambda s, x: s.m(x), [torch.randint(0, 4, (2, 5))], {"m": nn.Embedding(4, 8)}),
}


@pytest.mark.parametrize("name", AGREE)
def test_agrees_with_torch_on_operations(name):
    function, inputs, parts = AGREE[name]
    check(Call(function, **parts), *inputs)


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("bij,bjk->bik", [(2, 3, 4), (2, 4, 5)]),
        ("bhid,bhjd->bhij", [(2, 2, 3, 4), (2, 2, 5, 4)]),
        ("b...i,ij->b...j", [(2, 3, 6, 4), (4, 5)]),
        ("bi, bi -> bi", [(2, 3), (2, 3)]),
        ("bi,bi->b", [(2, 3), (2, 3)]),
        ("bi,bj->bij", [(2, 3), (2, 4)]),
        ("bij,bjk,bkl->bil", [(2, 3, 4), (2, 4, 5), (2, 5, 6)]),
        ("bii->b", [(2, 3, 3)]),
        ("bij,bk->bi", [(2, 3, 4), (2, 5)]),
        ("bij,bjk", [(2, 3, 4), (2, 4, 5)]),
        ("bn,anm,bm->ba", [(2, 3), (6, 3, 4), (2, 4)]),
    ],
)
def test_agrees_with_torch_on_einsum(equation, shapes):
    weights = {f"p{n}": nn.Parameter(r(*shape)) for n, shape in enumerate(shapes) if shape[0] != 2}

    order = range(len(shapes))

    def function(self, *inputs):
        given = iter(inputs)
        return torch.einsum(equation, *[getattr(self, f"p{n}") if f"p{n}" in weights else next(given) for n in order])

    check(Call(function, **weights), *[r(*shape) for shape in shapes if shape[0] == 2])


@pytest.mark.parametrize(
    ("function", "inputs", "parts", "macs"),
    [
        (lambda s, x: x @ s.p, [r(2, 4, 5)], {"p": nn.Parameter(r(5))}, 4 * 5),
        (lambda s, x: s.m(x, x), [r(2, 4)], {"m": nn.Bilinear(4, 4, 3)}, 3 * 4 * (4 + 1)),
        (lambda s, x: torch.addbmm(s.b, x, x), [r(2, 5, 5)], {"b": nn.Parameter(r(5, 5))}, 5**3),
    ],
)
def test_counts_what_torch_does_not(function, inputs, parts, macs):
    graph_module = capture(Call(function, **parts).eval(), tuple(inputs))
    assert cost(graph_module).macs == macs


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


def test_time_grows_linearly():
    def seconds(depth):
        model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(depth)]).eval()
        return _seconds(capture(model, (torch.randn(2, 4),)))

    assert seconds(80) < 12 * seconds(20)


def _seconds(graph_module):
    """Of the fastest of five runs."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        cost(graph_module)
        times.append(time.perf_counter() - start)
    return min(times)
