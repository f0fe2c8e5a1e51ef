"""Statistics over channels, norms, and functions that do not keep zero."""

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.patterns.model import conv, image, tokens


@image(out=64)
def mean_over_channels(m, x):
    return x.mean(1).flatten(1)


@image(out=64)
def sum_over_channels(m, x):
    return F.relu(x).sum(1).flatten(1)


@image(out=64, refused="would not be zero")
def sum_of_sigmoids(m, x):
    return torch.sigmoid(x).sum(1).flatten(1)


@image(out=64, refused="would not be zero")
def mean_after_addition(m, x):
    return (x + 1).mean(1).flatten(1)


@image(out=64)
def variance_over_channels(m, x):
    return x.var(1).flatten(1)


@image(out=64)
def deviation_and_mean(m, x):
    deviation, mean = torch.std_mean(x, 1, unbiased=False)
    return (deviation * mean).flatten(1)


@image(out=64)
def length_over_channels(m, x):
    return x.norm(dim=1).flatten(1)


@image(out=64)
def maximum_over_channels(m, x):
    return x.amax(1).flatten(1)


@image(out=64, refused="logsumexp")
def logsumexp_over_channels(m, x):
    return x.logsumexp(1).flatten(1)


@image(out=64, refused="prod")
def product_over_channels(m, x):
    return x.prod(1).flatten(1)


@image(out=64, refused="median")
def median_over_channels(m, x):
    return x.median(1).values.flatten(1)


@image(lambda: {"pool": nn.FractionalMaxPool2d(2, output_size=4)}, refused="random places")
def pooling_at_random_places(m, x):
    return m.pool(x)


@image(refused="softmax")
def softmax_over_channels(m, x):
    return torch.softmax(x, 1)


@image(lambda: {"a": conv(16, 16)})
def spatial_attention(m, x):
    return m.a(x * torch.sigmoid(x.mean(1, keepdim=True)))


@image(lambda: {"a": conv(16, 16)})
def exponential_before_layer(m, x):
    return m.a(torch.exp(x) + 1)


@image(refused="not finite")
def logarithm(m, x):
    return x.log().nan_to_num()


@image()
def normalized_channels(m, x):
    return F.normalize(x, dim=1)


@tokens(lambda: {"norm": nn.RMSNorm(16)})
def rms_norm(m, x):
    return m.norm(x)


@tokens(lambda: {"weight": nn.Parameter(torch.rand(16) + 0.5), "a": nn.Linear(16, 16)})
def rms_norm_by_hand(m, x):
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return m.a(m.weight * y)


@tokens(lambda: {"a": nn.Linear(16, 16)})
def rms_norm_functional(m, x):
    return m.a(F.rms_norm(x, (16,)))


@tokens(lambda: {"weight": nn.Parameter(torch.rand(16)), "bias": nn.Parameter(torch.rand(16))})
def layer_norm_by_hand_with_var(m, x):
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True) + 1e-5) * m.weight + m.bias


@image(lambda: {"a": conv(16, 16), "norm": nn.BatchNorm2d(16)})
def batch_norm(m, x):
    return m.a(F.relu(m.norm(x)))


@image(lambda: {"a": conv(16, 16), "norm": nn.BatchNorm2d(16, affine=False)})
def batch_norm_without_weights(m, x):
    return m.a(m.norm(x)).sum(1, keepdim=True) * x


@image(lambda: {"norm": nn.InstanceNorm2d(16, affine=True)})
def instance_norm(m, x):
    return F.relu(m.norm(x))


@image()
def instance_norm_functional(m, x):
    return F.instance_norm(x)


@image(lambda: {"norm": nn.GroupNorm(8, 16)})
def group_norm_whole_groups(m, x):
    return m.norm(x)


@image(lambda: {"norm": nn.GroupNorm(16, 16)})
def group_norm_per_channel(m, x):
    return m.norm(x)


@image()
def group_norm_functional(m, x):
    return F.group_norm(x, 8)


@image()
def batch_norm_functional(m, x):
    return F.batch_norm(x, torch.zeros(16), torch.ones(16))


@image(lambda: {"scale": nn.Parameter(torch.rand(16, 1, 1))})
def layer_scale(m, x):
    return x * m.scale


@image(lambda: {"keep": torch.arange(16).view(1, 16, 1, 1) % 3 > 0})
def masked_channels(m, x):
    return x.masked_fill(~m.keep, 0.0)


@image(lambda: {"low": nn.Parameter(-torch.rand(16, 1, 1)), "high": nn.Parameter(torch.rand(16, 1, 1))})
def clamp_by_parameters(m, x):
    return torch.clamp(x, m.low, m.high)


@image(lambda: {"low": torch.tensor(float("-inf")), "high": torch.tensor(1.5)}, out=64)
def clamp_by_numbers(m, x):
    return torch.clamp(x, m.low, m.high).sum(1).flatten(1)


@image(lambda: {"low": torch.tensor(0.5), "high": torch.tensor(1.5)}, out=64, refused="would not be zero")
def clamp_above_zero(m, x):
    return torch.clamp(x, m.low, m.high).sum(1).flatten(1)


@image()
def batch_norm_by_the_batch(m, x):
    return F.batch_norm(x, None, None, training=True)


@image(lambda: {"a": nn.Linear(16, 1)}, out=64)
def instance_norm_over_channels(m, x):
    return m.a(F.instance_norm(F.relu(x).flatten(2).transpose(1, 2))).squeeze(2)


@image(lambda: {"a": conv(16, 16)})
def constants_of_full_size(m, x):
    return m.a(x + x.new_ones(1, 16, 1, 1)) * torch.full((1, 16, 1, 1), 0.5)


@image(lambda: {"a": conv(16, 8), "b": conv(16, 8)}, out=64)
def correlation_of_maps(m, x):
    return (m.a(x) * torch.sigmoid(m.b(x))).sum(1).flatten(1)


@image(refused="avg_pool3d")
def local_response(m, x):
    return F.local_response_norm(x, 3)
