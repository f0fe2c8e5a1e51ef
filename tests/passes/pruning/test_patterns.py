"""Channel removal on small hard patterns, each judged by the dead-channel oracle.

Zero what was removed in the original model: its outputs must equal the pruned model's. That needs no knowledge of how
the pruning was planned.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxcompress.capture import capture
from fxcompress.graph.edit import copy_graph
from fxcompress.graph.verify import verify
from fxcompress.passes.base import PassContext
from fxcompress.passes.prune_channels import PruneChannels
from tests.support import kept_of

PATTERNS = {}


def pattern(shape, *, fewer=True):
    """Register a module class; ``fewer=False`` says that refusing to prune is the right answer."""

    def register(cls):
        PATTERNS[cls.__name__] = (cls, shape, fewer)
        return cls

    return register


def conv(i, o, k=3, **options):
    return nn.Conv2d(i, o, k, padding=k // 2, **options)


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = conv(3, 16)
        self.head = nn.Linear(16, 5)

    def tail(self, x):
        return self.head(x.mean((2, 3)))


@pattern((3, 8, 8))
class Chain(Base):
    def forward(self, x):
        return self.tail(F.relu(self.stem(x)))


@pattern((3, 8, 8))
class Residual(Base):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv(16, 16), conv(16, 16)
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x):
        x = self.stem(x)
        return self.tail(x + self.norm(self.b(F.relu(self.a(x)))))


@pattern((3, 8, 8))
class Concatenation(Base):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(16, 6), conv(16, 10), conv(16, 16)

    def forward(self, x):
        x = self.stem(x)
        return self.tail(self.c(torch.cat([self.a(x), self.b(x)], 1)))


@pattern((3, 8, 8))
class Depthwise(Base):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv(16, 16, groups=16), conv(16, 16, 1)

    def forward(self, x):
        return self.tail(self.b(F.hardswish(self.a(self.stem(x)))))


@pattern((3, 8, 8))
class DepthwiseMultiplier(Base):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv(16, 32, groups=16), conv(32, 16, 1)

    def forward(self, x):
        return self.tail(self.b(self.a(self.stem(x))))


@pattern((3, 8, 8))
class Grouped(Base):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv(16, 24, groups=4), conv(24, 16, 1)

    def forward(self, x):
        return self.tail(self.b(self.a(self.stem(x))))


@pattern((3, 8, 8))
class TwoGroupCounts(Base):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv(16, 16, groups=2), conv(16, 16, groups=4)

    def forward(self, x):
        x = self.stem(x)
        return self.tail(self.a(x) + self.b(x))


@pattern((3, 8, 8))
class ChannelShuffle(Base):
    def __init__(self):
        super().__init__()
        self.a = conv(16, 16)

    def forward(self, x):
        x = self.stem(x)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.tail(self.a(x))


@pattern((3, 8, 8))
class SplitHalvesSwapped(Base):
    def forward(self, x):
        a, b = self.stem(x).chunk(2, 1)
        return self.tail(torch.cat([b, a], 1))


@pattern((3, 8, 8))
class UnequalSplit(Base):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv(6, 16, 1), conv(10, 16, 1)

    def forward(self, x):
        a, b = self.stem(x).split([6, 10], 1)
        return self.tail(self.a(a) * self.b(b))


@pattern((3, 8, 8))
class Flip(Base):
    def forward(self, x):
        return self.tail(self.stem(x).flip(1))


@pattern((3, 8, 8))
class Roll(Base):
    def forward(self, x):
        return self.tail(torch.roll(self.stem(x), 5, 1))


@pattern((3, 8, 8))
class Slice(Base):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(9, 5)

    def forward(self, x):
        return self.tail(self.stem(x)[:, 3:12])


@pattern((3, 4, 4))
class FlattenNchw(Base):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16 * 16, 5)

    def forward(self, x):
        return self.head(self.stem(x).flatten(1))


@pattern((3, 4, 4))
class FlattenNhwc(Base):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16 * 16, 5)

    def forward(self, x):
        return self.head(self.stem(x).permute(0, 2, 3, 1).reshape(x.shape[0], -1))


@pattern((3, 8, 8))
class SqueezeExcite(Base):
    def __init__(self):
        super().__init__()
        self.down, self.up = conv(16, 4, 1), conv(4, 16, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.tail(x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True))))))


@pattern((3, 8, 8))
class GatedLinearUnit(Base):
    def __init__(self):
        super().__init__()
        self.a = conv(16, 32)

    def forward(self, x):
        return self.tail(F.glu(self.a(self.stem(x)), 1))


@pattern((3, 8, 8))
class PixelShuffle(Base):
    def __init__(self):
        super().__init__()
        self.a = conv(16, 64)

    def forward(self, x):
        return self.tail(F.pixel_shuffle(self.a(self.stem(x)), 2))


@pattern((3, 8, 8))
class PixelUnshuffle(Base):
    def __init__(self):
        super().__init__()
        self.a = conv(64, 16, 1)

    def forward(self, x):
        return self.tail(self.a(F.pixel_unshuffle(self.stem(x), 2)))


@pattern((3, 8, 8))
class Transposed(Base):
    def __init__(self):
        super().__init__()
        self.a = nn.ConvTranspose2d(16, 16, 2, stride=2)

    def forward(self, x):
        return self.tail(self.a(self.stem(x)))


@pattern((3, 8, 8))
class TransposedGrouped(Base):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.ConvTranspose2d(16, 24, 2, stride=2, groups=4), conv(24, 16, 1)

    def forward(self, x):
        return self.tail(self.b(self.a(self.stem(x))))


@pattern((3, 8, 8))
class Broadcast(Base):
    def __init__(self):
        super().__init__()
        self.a = conv(3, 1)

    def forward(self, x):
        return self.tail(self.stem(x) * torch.sigmoid(self.a(x)))


@pattern((3, 8, 8))
class LayerScale(Base):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(16, 1, 1))

    def forward(self, x):
        return self.tail(self.stem(x) * self.scale)


@pattern((3, 8, 8))
class PadChannels(Base):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(20, 5)

    def forward(self, x):
        return self.tail(F.pad(self.stem(x), (0, 0, 0, 0, 2, 2)))


@pattern((3, 8, 8))
class Repeat(Base):
    def __init__(self):
        super().__init__()
        self.a = conv(32, 16, 1)

    def forward(self, x):
        return self.tail(self.a(self.stem(x).repeat(1, 2, 1, 1)))


@pattern((3, 8, 8))
class RepeatInterleave(Base):
    def __init__(self):
        super().__init__()
        self.a = conv(32, 16, 1)

    def forward(self, x):
        return self.tail(self.a(self.stem(x).repeat_interleave(2, 1)))


@pattern((3, 8, 8))
class Stack(Base):
    def forward(self, x):
        x = self.stem(x)
        return self.tail(torch.stack([x, F.relu(x)], 0).sum(0))


@pattern((3, 8, 8))
class SharedModule(Base):
    def __init__(self):
        super().__init__()
        self.a = conv(16, 16)

    def forward(self, x):
        return self.tail(self.a(F.relu(self.a(self.stem(x)))))


@pattern((3, 8, 8))
class InstanceNorm(Base):
    def __init__(self):
        super().__init__()
        self.norm = nn.InstanceNorm2d(16, affine=True)

    def forward(self, x):
        return self.tail(F.relu(self.norm(self.stem(x))))


@pattern((3, 8, 8))
class PRelu(Base):
    def __init__(self):
        super().__init__()
        self.act = nn.PReLU(16)

    def forward(self, x):
        return self.tail(self.act(self.stem(x)))


@pattern((3, 8, 8), fewer=False)
class SoftmaxOverChannels(Base):
    def forward(self, x):
        return self.tail(torch.softmax(self.stem(x), 1))


@pattern((3, 8, 8))
class MeanOverChannels(Base):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 5)

    def forward(self, x):
        return self.head(self.stem(x).mean(1).flatten(1))


@pattern((3, 8, 8), fewer=False)
class UnknownOperation(Base):
    def forward(self, x):
        return self.tail(torch.cummax(self.stem(x), 1)[0])


@pattern((6, 16))
class AttentionModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.stem, self.head = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.attention(x, x, x, need_weights=False)[0])


class Heads(nn.Module):
    def __init__(self, queries=4, keys=4):
        super().__init__()
        self.queries, self.keys = queries, keys
        self.q = nn.Linear(16, queries * 8)
        self.k = nn.Linear(16, keys * 8)
        self.v = nn.Linear(16, keys * 8)
        self.out, self.head = nn.Linear(queries * 8, 16), nn.Linear(16, 3)

    def split(self, x, heads):
        return x.view(x.shape[0], x.shape[1], heads, 8).transpose(1, 2)


@pattern((6, 16))
class SeparateProjections(Heads):
    def forward(self, x):
        q, k, v = self.split(self.q(x), 4), self.split(self.k(x), 4), self.split(self.v(x), 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.head(self.out(y.transpose(1, 2).reshape(x.shape[0], x.shape[1], 32)))


@pattern((6, 16))
class MatmulAttention(Heads):
    def forward(self, x):
        q, k, v = self.split(self.q(x), 4), self.split(self.k(x), 4), self.split(self.v(x), 4)
        y = torch.softmax(q @ k.transpose(-2, -1) * 8**-0.5, -1) @ v
        return self.head(self.out(y.transpose(1, 2).flatten(2)))


@pattern((6, 16))
class MultiQuery(Heads):
    def __init__(self):
        super().__init__(4, 1)

    def forward(self, x):
        q, k, v = self.split(self.q(x), 4), self.split(self.k(x), 1), self.split(self.v(x), 1)
        y = F.scaled_dot_product_attention(q, k.expand(-1, 4, -1, -1), v.expand(-1, 4, -1, -1))
        return self.head(self.out(y.transpose(1, 2).flatten(2)))


@pattern((6, 16))
class GroupedQuery(Heads):
    def __init__(self):
        super().__init__(4, 2)

    def forward(self, x):
        q, k, v = self.split(self.q(x), 4), self.split(self.k(x), 2), self.split(self.v(x), 2)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.head(self.out(y.transpose(1, 2).flatten(2)))


@pattern((6, 16))
class FusedProjection(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out, self.head = nn.Linear(16, 96), nn.Linear(32, 16), nn.Linear(16, 3)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.head(self.out(y.transpose(1, 2).reshape(b, n, 32)))


@pattern((6, 16))
class Einsum(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(16, 12), nn.Linear(16, 12), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.einsum("bic,bjc->bij", self.a(x), self.b(x)))


@pattern((6, 16))
class BatchedProduct(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(16, 12), nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, x):
        return self.head(torch.bmm(self.a(x).transpose(1, 2), self.b(x)))


@pattern((6, 16))
class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(16, 10)
        self.lstm = nn.LSTM(10, 12, 2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(24, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.gru(self.lstm(self.stem(x))[0])[0])


@pattern((6, 16))
class SeveralHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 3), nn.Linear(16, 4)

    def forward(self, x):
        x = F.gelu(self.stem(x))
        return {"a": self.a(x), "b": [self.b(x)]}


def outputs(model, x):
    return torch.utils._pytree.tree_leaves(model(x))


def oracle(model, kept):
    """The original model with everything zeroed that was removed."""
    model = copy.deepcopy(model)
    state = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    with torch.no_grad():
        for name, dims in kept.items():
            for dim, indices in dims.items():
                gone = torch.ones(state[name].shape[dim], dtype=torch.bool)
                gone[indices] = False
                state[name].index_fill_(dim, gone.nonzero().flatten(), 0)
    return model


@pytest.mark.parametrize("importance", ["l2", "random"])
@pytest.mark.parametrize("name", PATTERNS)
def test_pruned_outputs_equal_those_of_dead_channels(name, importance):
    cls, shape, fewer = PATTERNS[name]
    model = cls().eval()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.InstanceNorm2d)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    captured = capture(model, (torch.randn(2, *shape),))
    state = copy.deepcopy(model.state_dict())
    result = PruneChannels(ratio=0.5, importance=importance, seed=1).run(copy_graph(captured), PassContext())
    pruned = result.graph_module
    verify(pruned, shapes=True)
    x = torch.randn(3, *shape)
    with torch.no_grad():
        if not fewer:
            assert not result.changed and result.skipped
            return
        kept = kept_of(result)
        assert sum(p.numel() for p in pruned.parameters()) < 0.8 * sum(p.numel() for p in model.parameters())
        for expected, actual in zip(outputs(oracle(model, kept), x), outputs(pruned, x), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in state.items())
    pruned.train()
    sum(leaf.sum() for leaf in outputs(pruned, x)).backward()
    assert all(p.grad is not None for p in pruned.parameters())
