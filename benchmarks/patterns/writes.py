"""Reads and writes at places that a tensor tells, sampling, transforms, recurrent cells, extremes over channels."""

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.patterns.model import conv, image, tokens

EDGES = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 2], [1, 2, 3, 4, 5, 0, 3, 5]])


@tokens(lambda: {"edges": EDGES, "a": nn.Linear(16, 16)})
def message_passing_by_index_add(m, x):
    source, target = m.edges
    return F.relu(m.a(torch.zeros_like(x).index_add(1, target, x[:, source]))) + x


@tokens(lambda: {"edges": EDGES, "a": nn.Linear(16, 16)})
def message_passing_by_scatter_add(m, x):
    source, target = m.edges
    messages = m.a(x)[:, source]
    return x.scatter_add(1, target[None, :, None].expand_as(messages), messages)


@tokens(lambda: {"edges": EDGES, "a": nn.Linear(16, 16)})
def message_passing_by_largest(m, x):
    source, target = m.edges
    messages = F.relu(m.a(x))[:, source]
    places = target[None, :, None].expand(x.shape[0], -1, 16)
    return torch.zeros_like(x).scatter_reduce(1, places, messages, "amax")


@tokens(lambda: {"a": nn.Linear(16, 16)})
def nearest_neighbours(m, x):
    nearest = torch.cdist(x, x).topk(3, largest=False)[1]
    found = x.unsqueeze(1).expand(-1, 6, -1, -1).gather(2, nearest.unsqueeze(-1).expand(-1, -1, -1, 16))
    return m.a(found - x.unsqueeze(2)).amax(2)


@tokens(lambda: {"places": torch.tensor([4, 1])})
def overwritten_tokens(m, x):
    return x.index_copy(1, m.places, x[:, :2] * 2).index_fill(1, m.places[:1], 0.0)


@image(lambda: {"a": conv(16, 16)})
def overwritten_rows(m, x):
    x = x.clone()
    x[:, :, torch.tensor([0, 7])] = m.a(x)[:, :, 2:4]
    return x


@image(lambda: {"a": conv(16, 16), "flow": conv(16, 2)})
def warped_by_flow(m, x):
    line = torch.linspace(-1, 1, 8)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)
    flow = m.flow(x).permute(0, 2, 3, 1)
    return F.grid_sample(m.a(x), grid + 0.1 * flow, padding_mode="border", align_corners=True)


@image(lambda: {"a": conv(16, 16), "theta": nn.Linear(16, 6)})
def spatial_transformer(m, x):
    grid = F.affine_grid(m.theta(x.mean((2, 3))).view(-1, 2, 3), x.shape, align_corners=False)
    return F.grid_sample(m.a(x), grid, mode="bilinear", align_corners=False)


@image(lambda: {"a": conv(16, 16)})
def unpooled(m, x):
    pooled, places = F.max_pool2d(x, 2, return_indices=True)
    return F.max_unpool2d(m.a(pooled), places, 2)


@tokens(lambda: {"table": nn.EmbeddingBag(10, 16, mode="mean"), "bags": torch.arange(6).view(2, 3)})
def bags_of_embeddings(m, x):
    return x + m.table(m.bags).sum(0)


@image(lambda: {"a": conv(16, 16, 1), "weight": nn.Parameter(torch.randn(16, 16, 3, 3, dtype=torch.cfloat) * 0.2)})
def fourier_layer(m, x):
    low = torch.einsum("bixy,ioxy->boxy", torch.fft.rfft2(x)[:, :, :3, :3], m.weight)
    return torch.fft.irfft2(F.pad(low, (0, 2, 0, 5)), s=(8, 8)) + m.a(x)


@tokens(lambda: {"a": nn.Linear(16, 16)})
def fourier_token_mixing(m, x):
    return m.a(torch.fft.fft(x, dim=1).real)


@tokens(refused="fft_fft mixes")
def fourier_over_features(m, x):
    return torch.fft.fft(x, dim=-1).real


@tokens(lambda: {"cell": nn.LSTMCell(16, 12)}, out=12)
def lstm_cell(m, x):
    hidden, state = x.new_zeros(x.shape[0], 12), x.new_zeros(x.shape[0], 12)
    steps = []
    for token in x.unbind(1):
        hidden, state = m.cell(token, (hidden, state))
        steps.append(hidden)
    return torch.stack(steps, 1)


@tokens(lambda: {"cell": nn.GRUCell(16, 12), "init": nn.Linear(16, 12)}, out=12)
def gru_cell_with_given_state(m, x):
    hidden = m.init(x[:, 0])
    for token in x.unbind(1):
        hidden = m.cell(token, hidden)
    return hidden.unsqueeze(1).expand(-1, 6, -1)


@tokens(lambda: {"one": nn.RNNCell(16, 12), "two": nn.RNNCell(12, 12, nonlinearity="relu")}, out=12)
def stacked_rnn_cells(m, x):
    first = second = None
    for token in x.unbind(1):
        first = m.one(token, first)
        second = m.two(first, second)
    return second.unsqueeze(1).expand(-1, 6, -1)


@image()
def scaled_to_range(m, x):
    low, high = x.aminmax(dim=1, keepdim=True)
    return (x - low) / (high - low + 1)


@image(refused="the place of the max")
def strongest_channel(m, x):
    return x * (x.max(1, keepdim=True)[1] > 3)


@image()
def differences_in_space(m, x):
    return F.pad(torch.diff(x, dim=2), (0, 0, 0, 1)) + torch.rot90(x, 1, (2, 3)) + x.cummax(3)[0]


@image()
def diagonal_of_gram_matrix(m, x):
    flat = x.flatten(2)
    return x * torch.diagonal(flat @ flat.transpose(1, 2), dim1=1, dim2=2)[..., None, None]


@image(lambda: {"a": conv(16, 16)})
def reflected_in_space(m, x):
    return m.a(F.pad(x, (1, 1, 1, 1), mode="reflect"))


@image()
def rounded_to_a_grid(m, x):
    return torch.fake_quantize_per_tensor_affine(x, 0.1, 3, -128, 127)


@image(refused="depend on the input")
def convolution_per_sample(m, x):
    batch = x.shape[0]
    weight = x.mean((2, 3))[:, :, None, None, None].expand(-1, -1, 1, 3, 3).reshape(-1, 1, 3, 3)
    return F.conv2d(x.reshape(1, -1, 8, 8), weight, padding=1, groups=batch * 16).view(batch, 16, 8, 8)


@tokens(lambda: {"mask": torch.full((6, 6), float("-inf")).triu(1), "qkv": nn.Linear(16, 48), "a": nn.Linear(16, 16)})
def mask_of_infinities(m, x):
    q, k, v = m.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-1, -2) / 8**0.5 + m.mask
    return m.a((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@image(lambda: {"kernel": conv(16, 162, 1), "a": conv(16, 16, 1)})
def outlook_attention(m, x):
    windows = F.unfold(m.a(x), 3, padding=1).view(-1, 2, 8, 9, 64).permute(0, 1, 4, 3, 2)
    weights = m.kernel(x).flatten(2).view(-1, 2, 9, 9, 64).permute(0, 1, 4, 2, 3)
    mixed = (weights @ windows).permute(0, 1, 4, 3, 2).reshape(-1, 144, 64)
    return F.fold(mixed, (8, 8), 3, padding=1)
