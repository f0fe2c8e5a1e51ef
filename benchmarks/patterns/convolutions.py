"""Convolutions: grouped, depthwise, transposed, shared, in branches."""

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.patterns.model import conv, image, tokens


@image()
def chain(m, x):
    return F.relu(x)


@image(lambda: {"a": conv(16, 16), "b": conv(16, 16), "norm": nn.BatchNorm2d(16)})
def residual(m, x):
    return x + m.norm(m.b(F.relu(m.a(x))))


@image(lambda: {"a": conv(16, 6), "b": conv(16, 10), "c": conv(16, 16)})
def concatenation(m, x):
    return m.c(torch.cat([m.a(x), m.b(x)], 1))


@image(lambda: {"a": conv(16, 8), "b": conv(24, 8), "c": conv(32, 16)})
def dense_block(m, x):
    x = torch.cat([x, F.relu(m.a(x))], 1)
    return m.c(torch.cat([x, F.relu(m.b(x))], 1))


@image(lambda: {"a": conv(16, 16, groups=16), "b": conv(16, 16, 1)})
def depthwise(m, x):
    return m.b(F.hardswish(m.a(x)))


@image(lambda: {"a": conv(16, 32, groups=16), "b": conv(32, 16, 1)})
def depthwise_multiplier(m, x):
    return m.b(m.a(x))


@image(lambda: {"a": conv(16, 24, groups=4), "b": conv(24, 16, 1)})
def grouped(m, x):
    return m.b(m.a(x))


@image(lambda: {"a": conv(16, 16, groups=2), "b": conv(16, 16, groups=4)})
def two_group_counts(m, x):
    return m.a(x) + m.b(x)


@image(lambda: {"a": conv(16, 24, 1), "b": conv(24, 24, groups=4), "c": conv(24, 24, groups=6), "d": conv(24, 16, 1)})
def groups_of_four_then_six(m, x):
    x = m.a(x)
    return m.d(F.relu(m.b(x)) + F.relu(m.c(x)))


@image(lambda: {"a": nn.ConvTranspose2d(16, 16, 2, stride=2)})
def transposed(m, x):
    return m.a(x)


@image(lambda: {"a": nn.ConvTranspose2d(16, 24, 2, stride=2, groups=4), "b": conv(24, 16, 1)})
def transposed_grouped(m, x):
    return m.b(m.a(x))


@image(lambda: {"a": nn.ConvTranspose2d(16, 16, 3, padding=1, groups=16)})
def transposed_depthwise(m, x):
    return F.relu(m.a(x))


@image(lambda: {"a": conv(16, 16)})
def shared_module(m, x):
    return m.a(F.relu(m.a(x)))


@image(lambda: {"a": conv(16, 16, 1), "norm": nn.BatchNorm2d(16)})
def shared_norm(m, x):
    return m.norm(m.a(F.relu(m.norm(x))))


@image(lambda: {"a": conv(3, 1)})
def broadcast_map(m, x):
    return x * torch.sigmoid(m.a(x[:, :3]))


@image(lambda: {"down": conv(16, 4, 1), "up": conv(4, 16, 1)})
def squeeze_excite(m, x):
    return x * torch.sigmoid(m.up(F.relu(m.down(x.mean((2, 3), keepdim=True)))))


@image(lambda: {"down": nn.Linear(16, 4), "up": nn.Linear(4, 16)})
def squeeze_excite_linear(m, x):
    scale = F.hardsigmoid(m.up(F.relu(m.down(F.adaptive_avg_pool2d(x, 1).flatten(1)))))
    return x * scale[:, :, None, None]


@image(lambda: {"a": conv(16, 32)})
def gated_linear_unit(m, x):
    return F.glu(m.a(x), 1)


@image(lambda: {"a": conv(16, 24), "b": conv(12, 16)})
def gate_by_chunks(m, x):
    left, right = m.a(x).chunk(2, 1)
    return m.b(left * right)


@image(lambda: {"act": nn.PReLU(16)})
def prelu(m, x):
    return m.act(x)


@image(lambda: {"a": nn.Conv3d(1, 8, 3, padding=1), "b": nn.Conv3d(8, 1, 3, padding=1)})
def conv3d_over_channels(m, x):
    return m.b(F.relu(m.a(x.unsqueeze(1)))).squeeze(1)


@image(lambda: {"a": nn.Conv2d(1, 1, 3, padding=1)}, out=64, refused="would not be zero")
def each_channel_by_one_kernel(m, x):
    return m.a(x.flatten(0, 1).unsqueeze(1)).view(-1, 16, 64).amax(1)


@image(lambda: {"a": nn.Conv2d(1, 1, 3, padding=1, bias=False)}, out=64)
def each_channel_by_one_kernel_without_bias(m, x):
    return m.a(x.flatten(0, 1).unsqueeze(1)).view(-1, 16, 64).amax(1)


@tokens(lambda: {"a": nn.Conv1d(6, 9, 1), "b": nn.Conv1d(9, 6, 1), "c": nn.Linear(16, 16)})
def tokens_mixed_by_convolution(m, x):
    return m.c(x + m.b(F.gelu(m.a(x))))


@tokens(lambda: {"a": nn.Conv2d(1, 4, (3, 1), padding=(1, 0)), "b": nn.Conv2d(4, 1, 1)})
def convolution_along_tokens(m, x):
    return m.b(F.relu(m.a(x.unsqueeze(1)))).squeeze(1)


@tokens(lambda: {"a": nn.Conv1d(16, 24, 3, padding=1), "b": nn.Conv1d(24, 16, 3, padding=1, groups=2)})
def conv1d(m, x):
    return m.b(F.gelu(m.a(x.transpose(1, 2)))).transpose(1, 2)


@image(lambda: {"a": conv(16, 8, 1), "b": conv(16, 8, 1), "c": conv(16, 8, 1)})
def several_outputs_of_one_cat(m, x):
    both = torch.cat([m.a(x), m.b(x)], 1)
    return both + torch.cat([m.c(x), m.a(x)], 1)


@image(lambda: {"a": conv(16, 12), "one": nn.Linear(12, 3), "two": nn.Linear(12, 4)}, outputs=("one", "two"))
def several_heads(m, x):
    y = F.gelu(m.a(x)).mean((2, 3))
    return {"one": m.one(y), "two": [m.two(y)]}


@image(lambda: {"a": conv(16, 12), "head": nn.Linear(12, 3)}, outputs=("stem", "head"))
def feature_map_as_output(m, x):
    y = m.a(x)
    return x, m.head(F.relu(y).amax((2, 3)))


@image(lambda: {"a": conv(16, 16, 1), "b": conv(16, 16, 1)})
def weighted_sum_of_scales(m, x):
    low = F.interpolate(m.a(F.avg_pool2d(x, 2)), scale_factor=2.0, mode="bilinear")
    return F.relu(low * 0.5 + m.b(x))


@image(lambda: {"a": conv(16, 20, 1), "b": conv(10, 16, 1)})
def maxout(m, x):
    left, right = m.a(x).split(10, 1)
    return m.b(torch.maximum(left, right))
