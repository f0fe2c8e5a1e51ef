"""Products of values, recurrent layers, embeddings."""

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.patterns.model import image, tokens


def _two(width=12):
    return lambda: {"a": nn.Linear(16, width), "b": nn.Linear(16, width)}


@tokens(_two(), out=6)
def einsum(m, x):
    return torch.einsum("bic,bjc->bij", m.a(x), m.b(x))


@tokens(_two(), out=6)
def einsum_with_ellipsis(m, x):
    return torch.einsum("...ic,...jc->...ij", m.a(x).tanh(), m.b(x))


@tokens(_two(), out=12)
def product_of_features(m, x):
    return torch.bmm(m.a(x).transpose(1, 2), m.b(x))


@tokens(_two(), out=144)
def outer_product_flattened(m, x):
    return (m.a(x).unsqueeze(-1) * m.b(x).unsqueeze(-2)).flatten(2)


@tokens(lambda: {"a": nn.Linear(16, 12)}, out=6, refused="would not be zero")
def product_of_sigmoids(m, x):
    y = torch.sigmoid(m.a(x))
    return y @ y.transpose(1, 2)


@tokens(lambda: {"a": nn.Linear(16, 12)}, out=6, refused="would not be zero")
def product_of_normalized(m, x):
    y = F.layer_norm(m.a(x), (12,))
    return torch.einsum("bic,bjc->bij", y, y)


@tokens(_two(), out=6)
def product_with_one_sigmoid(m, x):
    return torch.sigmoid(m.a(x)) @ m.b(x).transpose(1, 2)


@tokens(_two(), out=6)
def tensordot_with_addition(m, x):
    return torch.baddbmm(x.new_zeros(1, 6, 6), m.a(x), m.b(x).mT, beta=0.5, alpha=2.0)


@tokens(lambda: {"layer": nn.Bilinear(16, 16, 12), "b": nn.Linear(12, 16)})
def bilinear(m, x):
    return m.b(m.layer(x, F.relu(x)))


@tokens(_two(), out=1)
def cosine_similarity(m, x):
    return F.cosine_similarity(m.a(x), m.b(x), dim=-1).unsqueeze(-1)


@tokens(_two(), out=6)
def pairwise_distances(m, x):
    return torch.cdist(m.a(x), m.b(x))


@tokens(lambda: {"a": nn.Linear(16, 12)}, out=12, refused="topk")
def topk(m, x):
    return m.a(x).topk(12, -1)[0]


@tokens(lambda: {"a": nn.Linear(16, 12), "b": nn.Linear(12, 16)})
def cumulative_sum_over_features(m, x):
    return m.b(m.a(x).cumsum(-1))


@tokens(lambda: {"a": nn.Linear(16, 12)}, out=12, refused="cumprod")
def cumulative_product(m, x):
    return m.a(x).cumprod(-1)


@tokens(lambda: {"a": nn.Linear(16, 12)}, out=12, refused="cummax")
def operation_without_rule(m, x):
    return torch.cummax(m.a(x), -1)[0]


@tokens(lambda: {"layer": nn.LSTM(16, 12, batch_first=True)}, out=12)
def lstm(m, x):
    return m.layer(x)[0]


@tokens(lambda: {"layer": nn.LSTM(16, 12, 2, bidirectional=True, batch_first=True)}, out=24)
def lstm_stacked_bidirectional(m, x):
    return m.layer(x)[0]


@tokens(lambda: {"layer": nn.GRU(16, 12, 2, batch_first=True)}, out=12)
def gru_last_state(m, x):
    return m.layer(x)[1][-1]


@tokens(lambda: {"layer": nn.RNN(16, 12, nonlinearity="relu", batch_first=True)}, out=12)
def rnn(m, x):
    return m.layer(x)[0]


@tokens(lambda: {"layer": nn.GRU(16, 12, batch_first=True), "init": nn.Linear(16, 12)}, out=12)
def gru_with_given_state(m, x):
    return m.layer(x, m.init(x.mean(1)).unsqueeze(0))[0]


@tokens(lambda: {"layer": nn.LSTM(16, 12, batch_first=True), "h": nn.Linear(16, 12), "c": nn.Linear(16, 12)}, out=12)
def lstm_with_given_states(m, x):
    first = x.mean(1)
    return m.layer(x, (m.h(first).unsqueeze(0), torch.sigmoid(m.c(first)).unsqueeze(0)))[0]


@tokens(lambda: {"one": nn.LSTM(16, 12, batch_first=True), "two": nn.LSTM(16, 12, batch_first=True)}, out=12)
def encoder_and_decoder(m, x):
    state = m.one(x)[1]
    return m.two(x, state)[0]


@tokens(lambda: {"layer": nn.LSTM(16, 12, proj_size=8, batch_first=True)}, out=8)
def lstm_with_projection(m, x):
    return m.layer(x)[0]


@tokens(lambda: {"table": nn.Embedding(10, 16), "b": nn.Linear(16, 16)})
def embedding(m, x):
    ids = x[..., 0].abs().mul(3).long().clamp(max=9)
    return m.b(m.table(ids) + x)


@tokens(lambda: {"table": nn.Embedding(10, 12), "a": nn.Linear(16, 12)}, outputs=())
def tied_embedding_and_head(m, x):
    ids = x[..., 0].abs().mul(3).long().clamp(max=9)
    return F.linear(F.gelu(m.table(ids) + m.a(x)), m.table.weight)


@image(out=256)
def bilinear_pooling(m, x):
    flat = x.flatten(2)
    return (flat @ flat.transpose(1, 2)).flatten(1)


@image(lambda: {"a": nn.Linear(64, 64)})
def product_over_space(m, x):
    flat = x.flatten(2)
    return (flat @ torch.softmax(m.a(flat).transpose(1, 2) @ flat, -1).transpose(1, 2)[..., :1]).unsqueeze(-1) * x
