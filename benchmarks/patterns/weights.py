"""Weights that the graph computes: parametrised, normalised, shared, generated."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from benchmarks.patterns.model import conv, image, tokens


class _Tanh(nn.Module):
    def forward(self, weight):
        return torch.tanh(weight)


def _parametrized(layer, parametrization):
    parametrize.register_parametrization(layer, "weight", parametrization)
    return layer


@image(lambda: {"weight": nn.Parameter(torch.randn(12, 16, 3, 3) * 0.2), "b": conv(12, 16)})
def functional_convolution(m, x):
    return m.b(F.conv2d(x, m.weight, padding=1))


@image(lambda: {"weight": nn.Parameter(torch.randn(12, 16, 3, 3)), "b": conv(12, 16)})
def computed_convolution(m, x):
    return m.b(F.relu(F.conv2d(x, torch.tanh(m.weight), padding=1)))


@image(lambda: {"weight": nn.Parameter(torch.randn(24, 4, 3, 3)), "b": conv(24, 16)})
def computed_grouped_convolution(m, x):
    return m.b(F.conv2d(x, m.weight * 0.5, padding=1, groups=4))


@image(lambda: {"weight": nn.Parameter(torch.randn(16, 1, 3, 3)), "b": conv(16, 16)})
def computed_depthwise_convolution(m, x):
    return m.b(F.conv2d(x, m.weight.abs(), padding=1, groups=16))


@image(lambda: {"weight": nn.Parameter(torch.randn(16, 12, 2, 2)), "b": conv(12, 16)})
def computed_transposed_convolution(m, x):
    return m.b(F.conv_transpose2d(x, m.weight * 2, stride=2))


@tokens(lambda: {"weight": nn.Parameter(torch.randn(12, 16)), "bias": nn.Parameter(torch.randn(12))}, out=12)
def computed_linear(m, x):
    return F.linear(x, torch.tanh(m.weight), m.bias)


@tokens(lambda: {"weight": nn.Parameter(torch.randn(16, 12)), "bias": nn.Parameter(torch.randn(12))}, out=12)
def linear_by_matmul(m, x):
    return x @ m.weight + m.bias


@tokens(lambda: {"weight": nn.Parameter(torch.randn(16, 4, 6)), "b": nn.Linear(24, 16)})
def linear_by_einsum(m, x):
    return m.b(torch.einsum("btc,chd->bthd", x, m.weight).flatten(2))


@tokens(lambda: {"layer": _parametrized(nn.Linear(16, 12), _Tanh())}, out=12)
def parametrized_linear(m, x):
    return m.layer(x)


@image(lambda: {"layer": parametrizations.weight_norm(conv(16, 12)), "b": conv(12, 16)})
def weight_norm(m, x):
    return m.b(F.relu(m.layer(x)))


@tokens(lambda: {"layer": parametrizations.spectral_norm(nn.Linear(16, 12))}, out=12)
def spectral_norm(m, x):
    return m.layer(x)


@tokens(lambda: {"weight": nn.Parameter(torch.randn(12, 16)), "b": nn.Linear(16, 16)}, outputs=())
def cosine_head(m, x):
    return F.linear(F.normalize(m.b(x), dim=-1), F.normalize(m.weight, dim=-1))


@image(
    lambda: {
        "weight": nn.Parameter(torch.randn(12, 16, 3, 3)),
        "gain": nn.Parameter(torch.rand(12, 1, 1, 1) + 0.5),
        "b": conv(12, 16),
    }
)
def standardized_weight(m, x):
    flat = m.weight.reshape(1, 12, -1)
    weight = F.batch_norm(flat, None, None, weight=(m.gain * 0.1).view(-1), training=True, momentum=0.0, eps=1e-6)
    return m.b(F.relu(F.conv2d(F.relu(x), weight.reshape_as(m.weight), padding=1)))


@image(lambda: {"weight": nn.Parameter(torch.randn(24, 4, 3, 3)), "b": conv(24, 16)})
def standardized_grouped_weight(m, x):
    weight = F.batch_norm(m.weight.reshape(1, 24, -1), None, None, training=True).reshape_as(m.weight)
    return m.b(F.silu(F.conv2d(F.relu(x), weight, padding=1, groups=4)))


@image(lambda: {"weight": nn.Parameter(torch.randn(12, 16, 3, 3)), "b": conv(12, 16)})
def weight_standardized_by_hand(m, x):
    deviation, mean = torch.std_mean(m.weight, (1, 2, 3), keepdim=True, unbiased=False)
    return m.b(F.relu(F.conv2d(F.relu(x), (m.weight - mean) / (deviation + 1e-5), padding=1)))


@image(
    lambda: {
        "weight": nn.Parameter(torch.randn(12, 16, 1, 1)),
        "mask": torch.rand(12, 16, 1, 1) > 0.3,
        "b": conv(12, 16),
    }
)
def masked_weight(m, x):
    return m.b(F.conv2d(x, m.weight * m.mask))


@tokens(lambda: {"a": nn.Linear(16, 12), "b": nn.Linear(12, 16, bias=False)})
def autoencoder_with_tied_weights(m, x):
    hidden = F.relu(m.a(x))
    return F.linear(hidden, m.a.weight.t()) + m.b(hidden)


@tokens(
    lambda: {
        "a": nn.Linear(16, 16),
        "left": nn.Parameter(torch.randn(16, 2)),
        "right": nn.Parameter(torch.randn(2, 16)),
    }
)
def low_rank_adapter(m, x):
    return m.a(x) + (x @ m.left) @ m.right


@tokens(lambda: {"a": nn.Linear(16, 12).requires_grad_(False), "b": nn.Linear(12, 16)})
def frozen_layer(m, x):
    return m.b(F.relu(m.a(x)))


def _matrix(*shape):
    return nn.Parameter(torch.randn(*shape) * 0.2)


@tokens(lambda: {"a": _matrix(16, 24), "bias": _matrix(24), "b": _matrix(12, 24)}, out=12)
def products_with_parameters(m, x):
    return F.relu(x @ m.a + m.bias) @ m.b.t()


@tokens(lambda: {"gate": nn.Linear(16, 4), "a": _matrix(4, 16, 24), "b": _matrix(4, 24, 12)}, out=12)
def experts_by_einsum(m, x):
    hidden = F.gelu(torch.einsum("bti,eih->bteh", x, m.a))
    return torch.einsum("bteh,eho,bte->bto", hidden, m.b, m.gate(x).softmax(-1))


@tokens(
    lambda: {"gate": nn.Linear(16, 4), "a": _matrix(4, 16, 24), "bias": _matrix(4, 1, 24), "b": _matrix(4, 24, 12)},
    out=12,
)
def experts_by_product(m, x):
    hidden = F.gelu(torch.matmul(x.unsqueeze(1), m.a) + m.bias)
    return (torch.matmul(hidden, m.b) * m.gate(x).softmax(-1).mT.unsqueeze(-1)).sum(1)
