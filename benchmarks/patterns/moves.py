"""Movements of channels: views, permutations, slices, joins, padding."""

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.patterns.model import conv, image, tokens


@image(lambda: {"a": conv(16, 16)})
def channel_shuffle_by_views(m, x):
    n, c, h, w = x.shape
    return m.a(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


@image(lambda: {"a": conv(16, 16), "shuffle": nn.ChannelShuffle(4)})
def channel_shuffle_module(m, x):
    return m.a(m.shuffle(x))


@image()
def halves_swapped(m, x):
    left, right = x.chunk(2, 1)
    return torch.cat([right, left], 1)


@image(lambda: {"a": conv(6, 16, 1), "b": conv(10, 16, 1)})
def unequal_split(m, x):
    left, right = x.split([6, 10], 1)
    return m.a(left) * m.b(right)


@image(lambda: {"a": conv(6, 16, 1)})
def tensor_split(m, x):
    return m.a(torch.tensor_split(x, 3, 1)[0])


@image()
def flip(m, x):
    return x.flip(1)


@image()
def roll(m, x):
    return torch.roll(x, 5, 1)


@image(out=9)
def slice_(m, x):
    return x[:, 3:12]


@image(out=8)
def slice_with_step(m, x):
    return x[:, ::2]


@image(out=7)
def narrow(m, x):
    return x.narrow(1, 4, 7)


@image(lambda: {"a": conv(8, 16, 1), "b": conv(8, 16, 1)})
def interleaved_halves(m, x):
    return m.a(x[:, 0::2]) + m.b(x[:, 1::2])


@image(lambda: {"permutation": torch.randperm(16)})
def permutation_by_buffer(m, x):
    return x[:, m.permutation] + x


@image(lambda: {"a": conv(5, 16, 1)})
def index_select_constant(m, x):
    return m.a(x.index_select(1, torch.tensor([3, 1, 4, 1, 15])))


@image(lambda: {"a": conv(4, 16, 1)})
def index_by_list(m, x):
    return m.a(x[:, [0, 5, 10, 15]])


@image(lambda: {"mask": torch.arange(16) % 3 == 0, "a": conv(6, 16, 1)})
def index_by_mask(m, x):
    return m.a(x[:, m.mask])


@image(out=256)
def flatten_channels_first(m, x):
    return F.avg_pool2d(x, 2).flatten(1)


@image(out=256)
def flatten_channels_last(m, x):
    return F.avg_pool2d(x, 2).permute(0, 2, 3, 1).reshape(x.shape[0], -1)


@image(lambda: {"a": conv(16, 64)})
def pixel_shuffle(m, x):
    return F.pixel_shuffle(m.a(x), 2)


@image(lambda: {"a": conv(64, 16, 1)})
def pixel_unshuffle(m, x):
    return m.a(F.pixel_unshuffle(x, 2))


@image(lambda: {"a": conv(64, 16, 1)})
def patch_merging(m, x):
    x = torch.cat([x[..., 0::2, 0::2], x[..., 1::2, 0::2], x[..., 0::2, 1::2], x[..., 1::2, 1::2]], 1)
    return m.a(x)


@image(lambda: {"a": conv(32, 16, 1)})
def repeat(m, x):
    return m.a(x.repeat(1, 2, 1, 1))


@image(lambda: {"a": conv(32, 16, 1)})
def repeat_interleave(m, x):
    return m.a(x.repeat_interleave(2, 1))


@image(lambda: {"a": conv(16, 1, 1)})
def repeat_of_one_channel(m, x):
    return x * m.a(x).repeat(1, 16, 1, 1)


@image(lambda: {"a": conv(16, 1, 1)})
def expand_of_one_channel(m, x):
    return x * m.a(x).expand(-1, 16, -1, -1)


@image()
def stack_and_sum(m, x):
    return torch.stack([x, F.relu(x)], 0).sum(0)


@image(lambda: {"a": conv(32, 16, 1)})
def stack_of_channels(m, x):
    return m.a(torch.stack([x, F.relu(x)], 2).flatten(1, 2))


@image(out=20)
def pad_channels(m, x):
    return F.pad(x, (0, 0, 0, 0, 2, 2))


@image(out=13)
def cut_channels_by_padding(m, x):
    return F.pad(x, (0, 0, 0, 0, -4, 1))


@image(lambda: {"a": conv(16, 16)})
def pad_space_with_ones(m, x):
    return m.a(F.pad(x, (1, 1, 1, 1), value=1.0))


@tokens(lambda: {"a": nn.Linear(20, 16)})
def pad_features_circular(m, x):
    return m.a(F.pad(x, (2, 2), mode="circular"))


@tokens(lambda: {"a": nn.Linear(18, 16)})
def pad_features_reflect(m, x):
    return m.a(F.pad(x, (1, 1), mode="reflect"))


@image(lambda: {"a": nn.Linear(144, 16)})
def unfold_image(m, x):
    return m.a(F.unfold(x, 3).transpose(1, 2)).mean(1)[:, :, None, None]


@image(lambda: {"a": conv(16, 64, 1)})
def fold(m, x):
    return F.fold(m.a(F.avg_pool2d(x, 2)).flatten(2), (8, 8), 2, stride=2)


@tokens(lambda: {"a": nn.Linear(48, 16)})
def windows_of_tokens(m, x):
    return m.a(x.unfold(1, 3, 1).flatten(2))


@image(lambda: {"a": conv(1, 16)})
def one_channel_selected(m, x):
    return x + m.a(x[:, 3].unsqueeze(1))


@tokens(lambda: {"a": nn.Linear(4, 16)})
def unbind_of_heads(m, x):
    first, second, *_ = x.unflatten(-1, (4, 4)).unbind(2)
    return m.a(first * second)


@tokens()
def unbind_and_stack(m, x):
    one, two, three, four = x.unflatten(-1, (4, 4)).unbind(2)
    return torch.stack([four, two, three, one], 2).flatten(2)


@tokens(refused="tensor of its own")
def unbind_of_features(m, x):
    parts = x.unbind(-1)
    return torch.stack([parts[-1], *parts[:-1]], -1)


@image()
def written_slice(m, x):
    return torch.slice_scatter(x, F.relu(x[:, :8]), 1, 0, 8)


@image()
def zeroed_slice(m, x):
    y = x.clone()
    y[:, 4:8] = 0
    return y


@image(refused="argsort")
def gather_by_computed_index(m, x):
    order = x.mean((2, 3)).argsort(1)
    return x.gather(1, order[:, :, None, None].expand(-1, -1, 8, 8))


@tokens(lambda: {"a": nn.Linear(6, 6), "b": nn.Linear(16, 16)})
def token_mixing(m, x):
    return m.b(x + F.gelu(m.a(x.transpose(1, 2))).transpose(1, 2))


@image()
def axes_moved(m, x):
    return x.movedim(1, -1).swapaxes(-1, 1).flip(1).roll((2, 1), (1, 3))


@image()
def windows_and_back(m, x):
    n = x.shape[0]
    y = x.view(n, 16, 2, 4, 2, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, 16)
    y = F.relu(y).view(n, 2, 2, 4, 4, 16).permute(0, 5, 1, 3, 2, 4)
    return y.reshape(n, 16, 8, 8)
