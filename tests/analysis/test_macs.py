"""Multiply-accumulates agree with torch's own counter, on whole models and on single operations."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxcompress.analysis.cost import cost
from fxcompress.capture import capture
from tests.analysis.counting import Call, check

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
    check(model, torch.empty(2, 3, 224, 224, device="meta"))


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
