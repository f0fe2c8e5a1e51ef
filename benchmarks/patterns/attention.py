"""Attention: heads of every kind, masks, biases, tables."""

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.patterns.model import tokens


def _heads(queries=4, keys=4, **more):
    return lambda: {
        "q": nn.Linear(16, queries * 8),
        "k": nn.Linear(16, keys * 8),
        "v": nn.Linear(16, keys * 8),
        "out": nn.Linear(queries * 8, 16),
        **{name: make() for name, make in more.items()},
    }


def _split(x, heads):
    return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def _joined(m, y):
    return m.out(y.transpose(1, 2).flatten(2))


@tokens(lambda: {"attention": nn.MultiheadAttention(16, 4, batch_first=True)})
def attention_module(m, x):
    return m.attention(x, x, x, need_weights=False)[0]


@tokens(_heads())
def separate_projections(m, x):
    return _joined(m, F.scaled_dot_product_attention(_split(m.q(x), 4), _split(m.k(x), 4), _split(m.v(x), 4)))


@tokens(_heads())
def attention_by_matmul(m, x):
    q, k, v = (_split(layer(x), 4) for layer in (m.q, m.k, m.v))
    return _joined(m, torch.softmax(q @ k.transpose(-2, -1) * 8**-0.5, -1) @ v)


@tokens(_heads())
def attention_by_bmm(m, x):
    n, t, _ = x.shape
    q, k, v = (_split(layer(x), 4).reshape(n * 4, t, 8) for layer in (m.q, m.k, m.v))
    scores = torch.baddbmm(torch.zeros(1, 1, 1), q, k.transpose(1, 2), alpha=8**-0.5)
    return _joined(m, torch.bmm(scores.softmax(-1), v).view(n, 4, t, 8))


@tokens(_heads())
def attention_by_einsum(m, x):
    q, k, v = (layer(x).unflatten(-1, (4, 8)) for layer in (m.q, m.k, m.v))
    weights = torch.einsum("bihd,bjhd->bhij", q, k).mul(8**-0.5).softmax(-1)
    return m.out(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))


@tokens(_heads(4, 1))
def multi_query(m, x):
    q, k, v = _split(m.q(x), 4), _split(m.k(x), 1), _split(m.v(x), 1)
    return _joined(m, F.scaled_dot_product_attention(q, k.expand(-1, 4, -1, -1), v.expand(-1, 4, -1, -1)))


@tokens(_heads(4, 1))
def multi_query_broadcast(m, x):
    q, k, v = _split(m.q(x), 4), _split(m.k(x), 1), _split(m.v(x), 1)
    return _joined(m, (q @ k.transpose(-2, -1)).softmax(-1) @ v)


@tokens(_heads(4, 2))
def grouped_query(m, x):
    q, k, v = _split(m.q(x), 4), _split(m.k(x), 2), _split(m.v(x), 2)
    return _joined(m, F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)))


@tokens(_heads(8, 2))
def grouped_query_expanded(m, x):
    n, t, _ = x.shape
    q = _split(m.q(x), 8)
    k, v = (_split(y, 2)[:, :, None].expand(n, 2, 4, t, 8).reshape(n, 8, t, 8) for y in (m.k(x), m.v(x)))
    return _joined(m, F.scaled_dot_product_attention(q, k, v))


@tokens(_heads(4, 2))
def grouped_query_flag(m, x):
    q, k, v = _split(m.q(x), 4), _split(m.k(x), 2), _split(m.v(x), 2)
    return _joined(m, F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


@tokens(lambda: {"qkv": nn.Linear(16, 96), "out": nn.Linear(32, 16)})
def fused_projection(m, x):
    b, n, _ = x.shape
    q, k, v = m.qkv(x).reshape(b, n, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
    return _joined(m, F.scaled_dot_product_attention(q, k, v))


@tokens(lambda: {"qkv": nn.Linear(16, 96), "out": nn.Linear(32, 16)})
def fused_projection_in_chunks(m, x):
    q, k, v = (_split(y, 4) for y in m.qkv(x).chunk(3, -1))
    return _joined(m, F.scaled_dot_product_attention(q, k, v))


@tokens(lambda: {"qkv": nn.Linear(16, 64), "out": nn.Linear(32, 16)})
def fused_unequal_split(m, x):
    q, k, v = m.qkv(x).split([32, 16, 16], -1)
    q, k, v = _split(q, 4), _split(k, 2), _split(v, 2)
    return _joined(m, F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


@tokens(_heads(bias=lambda: nn.Parameter(torch.randn(4, 6, 6))))
def relative_position_bias(m, x):
    q, k, v = (_split(layer(x), 4) for layer in (m.q, m.k, m.v))
    return _joined(m, F.scaled_dot_product_attention(q, k, v, attn_mask=m.bias))


@tokens(_heads(table=lambda: nn.Parameter(torch.randn(11, 4))))
def relative_position_table(m, x):
    places = torch.arange(6)
    bias = m.table[places[:, None] - places[None, :] + 5].permute(2, 0, 1)
    q, k, v = (_split(layer(x), 4) for layer in (m.q, m.k, m.v))
    return _joined(m, (q @ k.transpose(-2, -1) + bias).softmax(-1) @ v)


@tokens(_heads(scale=lambda: nn.Parameter(torch.rand(4, 1, 1) + 1)))
def cosine_attention(m, x):
    q, k, v = (_split(layer(x), 4) for layer in (m.q, m.k, m.v))
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    return _joined(m, (scores * m.scale.clamp(max=100.0)).softmax(-1) @ v)


@tokens(_heads(norm_q=lambda: nn.RMSNorm(8, eps=1e-5), norm_k=lambda: nn.RMSNorm(8, eps=1e-5)))
def query_key_norm(m, x):
    q, k, v = (_split(layer(x), 4) for layer in (m.q, m.k, m.v))
    return _joined(m, F.scaled_dot_product_attention(m.norm_q(q), m.norm_k(k), v))


@tokens(_heads())
def rotary_embedding(m, x):
    q, k, v = (_split(layer(x), 4) for layer in (m.q, m.k, m.v))
    angle = torch.arange(6)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03]).repeat(2)

    def turned(y):
        left, right = y.chunk(2, -1)
        return y * angle.cos() + torch.cat([-right, left], -1) * angle.sin()

    return _joined(m, F.scaled_dot_product_attention(turned(q), turned(k), v))


@tokens(_heads())
def causal_mask(m, x):
    q, k, v = (_split(layer(x), 4) for layer in (m.q, m.k, m.v))
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    return _joined(m, (q @ k.transpose(-2, -1)).masked_fill(~mask, -1e9).softmax(-1) @ v)


@tokens(lambda: {"token": nn.Parameter(torch.randn(1, 1, 16)), "table": nn.Parameter(torch.randn(1, 7, 16))})
def class_token_and_positions(m, x):
    x = torch.cat([m.token.expand(x.shape[0], -1, -1), x], 1) + m.table
    return F.gelu(x)


@tokens(_heads(latent=lambda: nn.Parameter(torch.randn(1, 3, 16))))
def learned_queries(m, x):
    q = _split(m.q(m.latent.expand(x.shape[0], -1, -1)), 4)
    return _joined(m, F.scaled_dot_product_attention(q, _split(m.k(x), 4), _split(m.v(x), 4)))


@tokens(_heads())
def linear_attention(m, x):
    q, k, v = (_split(layer(x), 4) for layer in (m.q, m.k, m.v))
    return _joined(m, F.relu(q) @ (F.relu(k).transpose(-2, -1) @ v))


@tokens(_heads())
def linear_attention_elu(m, x):
    q, k, v = (_split(layer(x), 4) for layer in (m.q, m.k, m.v))
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return _joined(m, q @ (k.transpose(-2, -1) @ v))


@tokens(lambda: {"a": nn.Linear(16, 24), "b": nn.Linear(12, 16)})
def gated_feed_forward(m, x):
    gate, value = m.a(x).chunk(2, -1)
    return x + m.b(F.silu(gate) * value)
