"""Without example inputs: each operation is the one that an export has; writes become values; the rest is refused."""

from __future__ import annotations

from collections import Counter, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxcompress.capture import capture
from fxcompress.errors import CaptureError, PreconditionError
from fxcompress.graph.info import info
from tests.capture.helpers import call, same, targets
from tests.capture.tracing import Of, traced

T = torch.Tensor
Pair = namedtuple("Pair", ["left", "right"])


# --- operations: each as an export has it ----------------------------------------------------------------------

IMAGE = torch.randn(2, 4, 6, 6)
FUNCTIONS: dict[str, Callable[[T], Any]] = {
    "relu": lambda x: F.relu(x) + torch.relu(x) + x.relu(),
    "gelu": lambda x: F.gelu(x) + F.gelu(x, approximate="tanh"),
    "relu6": F.relu6,
    "activations": lambda x: F.silu(F.elu(F.selu(F.celu(F.leaky_relu(F.mish(F.softplus(x)), 0.2))))),
    "hard": lambda x: F.hardswish(x) + F.hardsigmoid(x) + F.hardtanh(x, -2, 2) + F.hardshrink(x),
    "sigmoid": lambda x: torch.sigmoid(x) + x.sigmoid() + F.sigmoid(x) + torch.tanh(x) + F.logsigmoid(x),
    "soft": lambda x: F.softsign(x) + F.tanhshrink(x) + F.softshrink(x),
    "softmax": lambda x: F.softmax(x, dim=-1) + x.softmax(1) + torch.log_softmax(x, 2) + F.softmin(x, 1),
    "glu": lambda x: F.glu(x, 1),
    "arithmetic": lambda x: (2 + x - 1) * 3 / (x.abs() + 1) - (1 - x) + 2 / (x * x + 1) + (-x) ** 2 + x % 2 + 2**x,
    "compare": lambda x: ((x > 0) & (x < 1)).float() + (x == 0) + (~(x <= 1)).to(torch.float32),
    "matmul": lambda x: x @ x.transpose(2, 3) + torch.matmul(x, x.mT) + torch.einsum("bchw,bcwv->bchv", x, x),
    "minmax": lambda x: x.max(1)[0] + torch.min(x, dim=1).values + x.amax(1) + x.argmax(1) + torch.maximum(x, x)[:, 0],
    "returns": lambda x: torch.max(x, 1),
    "reduce": lambda x: (
        x.mean() + x.sum((2, 3)).sum() + x.mean(dim=[2, 3], keepdim=True) + torch.sum(x, 1, keepdim=True)
    ),
    "spread": lambda x: x.std(1).mean() + x.var((2, 3), unbiased=False, keepdim=True) + torch.std(x, 2, keepdim=True),
    "norm": lambda x: (
        F.normalize(x, dim=1) + x.norm(dim=1, keepdim=True) + torch.norm(x, p=2, dim=(2, 3), keepdim=True)
    ),
    "named": lambda x: torch.sum(input=x, axis=1) + x.mean(axis=(1, 2), keepdims=True)[0] + x.var(1, correction=0),
    "clamp": lambda x: x.clamp(min=0) + torch.clamp(x, -1, 1) + x.clip(max=0.5),
    "where": lambda x: torch.where(x > 0, x, 0.0) + x.masked_fill(x > 1, 5.0),
    "view": lambda x: x.view(x.size(0), -1) + x.reshape(x.shape[0], 144) + x.flatten(1) + torch.flatten(x, 1),
    "permute": lambda x: x.permute(0, 2, 3, 1).contiguous().transpose(1, 3) + x.permute((0, 1, 3, 2)).transpose(2, 3),
    "expand": lambda x: (
        x.mean(1, keepdim=True).expand(-1, 4, -1, -1) + x[:, :1].expand_as(x) + x[:, :1].repeat(1, 4, 1, 1)
    ),
    "squeeze": lambda x: x.unsqueeze(1).squeeze(1) + x[:, None].squeeze() + x.movedim(1, 2).movedim(2, 1),
    "cat": lambda x: torch.cat([x, x.flip(1)], dim=1) + torch.stack((x, x), 1).flatten(1, 2) + torch.concat([x, x], 1),
    "chunk": lambda x: (lambda a, b: a * b)(*[x.chunk(2, 1)[0], torch.chunk(x, 2, dim=1)[1]]),
    "split": lambda x: x.split(2, 1)[0] + torch.split(x, [2, 2], dim=1)[1] + x.split([1, 3], dim=1)[0],
    "unbind": lambda x: torch.unbind(x, 1)[0] + x.unbind(1)[3],
    "index": lambda x: (x[:, 0, 1:5:2, None], x[..., 2:4, 1], x[:, -1, ::3, 1:2], x[0, 0, 0, 0], x[:, None, ..., -1:]),
    "gather": lambda x: x[:, torch.tensor([0, 2])] + x.index_select(1, torch.tensor([1, 3])) + x[x > 9].sum(),
    "roll": lambda x: x.roll(1, 2) + torch.roll(x, (1, 2), (2, 3)) + torch.tril(x) + x.triu(1),
    "cast": lambda x: x.half().float() + x.to(torch.float64).type_as(x) + x.to(x.dtype) + x.double().to(x) + x.int(),
    "pools": lambda x: F.max_pool2d(x, 2) + F.avg_pool2d(x, 2) + F.max_pool2d(x, 3, stride=2, padding=1),
    "adaptive": lambda x: (
        F.adaptive_avg_pool2d(x, 1) + F.adaptive_max_pool2d(x, (3, 3)) + F.adaptive_avg_pool2d(x, (3, 1))
    ),
    "indices": lambda x: F.max_pool2d(x, 2, return_indices=True),
    "pad": lambda x: (
        F.pad(x, (1, 1))[..., 1:-1]
        + F.pad(x, (1, 0, 0, 1), value=2.0)[:, :, :-1, 1:]
        + F.pad(x, [0, 0, 0, 0], mode="reflect")
    ),
    "bilinear": lambda x: (
        F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        + F.interpolate(x, size=(12, 12), mode="bicubic")
    ),
    "resize": lambda x: (
        F.interpolate(x, size=x.shape[2:], mode="bilinear") + F.interpolate(x, size=x.shape[-2:], mode="nearest")
    ),
    "nearest": lambda x: F.interpolate(F.max_pool2d(F.conv2d(x, torch.ones(2, 4, 1, 1)), 2), scale_factor=(2, 2)),
    "norms": lambda x: F.layer_norm(x, (6, 6)) + F.group_norm(x, 2) + F.instance_norm(x) + F.rms_norm(x, (6,)),
    "dropouts": lambda x: F.dropout(x, 0.5, False) + F.dropout(x, training=False, inplace=False),
    "shuffle": lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), downscale_factor=2) + F.channel_shuffle(x, 2),
    "unfold": lambda x: F.fold(F.unfold(x, 2, stride=2), (6, 6), 2, stride=2),
    "grid": lambda x: F.grid_sample(x, x[:, :3, :3, :2], align_corners=False),
    "similarity": lambda x: F.cosine_similarity(x, x + 1, dim=1),
    "factories": lambda x: x.new_zeros(x.shape[0], 4, 6, 6) + torch.ones_like(x) + torch.zeros(6, device=x.device),
    "arange": lambda x: x + torch.arange(x.shape[3]) + torch.full_like(x, 2.0),
    "meshgrid": lambda x: torch.meshgrid(x[0, 0, 0], x[0, 0, 1], indexing="ij")[1],
    "sizes": lambda x: x.view(x.shape[0] * x.shape[1], x.shape[2] // 2, -1).view(x.shape[0], -1, 2 * 3),
    "same_shape": lambda x: (
        x.flatten(1).view(x.shape) + x.mean((2, 3), keepdim=True).expand(x.shape) + x.flatten().reshape(x.size())
    ),
    "put_together": lambda x: x.view(x.shape[:2] + torch.Size([36])) + x.view(*(x.shape[0], x.shape[1]), 36),
    "containers": lambda x: {"a": [x, (x * 2, None)], "b": Pair(x, x + 1), "c": 3, "d": "text"},
    "einops": lambda x: x.unflatten(1, (2, 2)).sum(1) + x.masked_fill(x.isnan(), 0)[:, :2] + x.nan_to_num()[:, 2:],
}
# What an export folds away or spells otherwise, with the same result.
SPELLED_OTHERWISE = {"arange", "cast", "nearest", "put_together", "resize", "same_shape", "sizes"}


@pytest.mark.parametrize("case", FUNCTIONS)
def test_operations_are_those_of_an_export(case: str) -> None:
    model = Of(FUNCTIONS[case])
    graph = traced(model, IMAGE)
    x = torch.cat([IMAGE, IMAGE[:1]])
    same(call(model, (x,)), call(graph, (x,)))
    exported = capture(model, (IMAGE,))
    if case not in SPELLED_OTHERWISE:
        assert Counter(targets(graph)) == Counter(targets(exported))


# --- writes ----------------------------------------------------------------------------------------------------


def renamed(x: T) -> T:
    y = x * 2
    z = y
    y += 1
    return y * z


def chained(x: T) -> T:
    y = (x + 1).relu_().mul_(2)
    y.clamp_(max=3).add_(x)
    y /= 2
    return torch.sigmoid_(y.masked_fill_(x > 1, 0))


def of_a_view(x: T) -> T:
    return (x * 1).view(-1).add_(1)


def zeroed(x: T) -> T:
    return (x + 1).zero_() + x


def read_before(x: T) -> T:
    y = x + 1
    z = y.flatten(1).sum()
    y.mul_(2)
    return y + z


def other_dtype(x: T) -> T:
    z = (x > 0).to(torch.int32)
    y = x.half()  # may be x itself, for all that is known: x is not read again
    z.add_(y.long())
    y += z.float()
    return y * z


@pytest.mark.parametrize(
    "function", [renamed, chained, of_a_view, zeroed, read_before, other_dtype], ids=lambda f: f.__name__
)
def test_writes_become_values(function: Callable[[T], T]) -> None:
    traced(Of(function), IMAGE)


def view_read_after(x: T) -> T:
    y = x * 1
    rows = y[:, 0]
    y.add_(1)
    return rows + y[:, 1]


def source_read_after(x: T) -> T:
    y = x * 1
    y.view(-1).add_(1)
    return y


def part_written(x: T) -> T:
    y = x * 1
    y[:, 0] = 0
    return y


@pytest.mark.parametrize("function", [view_read_after, source_read_after, part_written], ids=lambda f: f.__name__)
def test_writes_that_views_may_see_are_refused(function: Callable[[T], T]) -> None:
    with pytest.raises(CaptureError, match=r"memory|part of a tensor") as caught:
        capture(Of(function).eval())
    assert "test_symbolic_operations.py" in str(caught.value) and "example_inputs" in str(caught.value.remedy)


def test_a_write_into_the_input_is_noted() -> None:
    graph = traced(Of(lambda x: x.add_(1) * 2), IMAGE)
    assert info(graph).notes == ["the model writes into its input 'x'; the captured graph leaves it alone"]


def test_a_write_into_a_buffer_is_refused() -> None:
    def function(m: Any, x: T) -> T:
        m.count.add_(1)
        return x + m.count

    with pytest.raises(CaptureError, match="a write into 'count'"):
        capture(Of(function, count=torch.zeros(1)).eval())


# --- refusals --------------------------------------------------------------------------------------------------


class Takes(nn.Module):
    def forward(self, pair: tuple[T, T]) -> T:
        return pair[0] + pair[1]


class Variadic(nn.Module):
    def forward(self, *tensors: T) -> T:
        return tensors[0]


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (Of(lambda x: x * 2 if x.sum() > 0 else x), "control flow"),
        (Of(lambda x: x if x.dim() == 4 else x[None]), "control flow|dims"),
        (Of(lambda x: x * len(x)), "len"),
        (Of(lambda x: x.new_zeros(x.shape)), "number of dims"),
        (Of(lambda x: torch.zeros(x.shape[0], 3)), "zeros"),
        (Of(lambda x: x.reshape(x.shape[2:])), "number of dims"),
        (Of(lambda x: x + x.sum().item()), "value of a tensor"),
        (Of(lambda x: torch.zeros(3, dtype=x.dtype) + x), "dtype"),
        (Of(lambda x: F.interpolate(x, scale_factor=2)), "number of dims"),
        (Of(lambda x: F.gumbel_softmax(x)), "gumbel_softmax.*cannot be brought"),
        (Of(lambda x: x.cuda()), "between devices"),
        (Of(lambda x: F.relu(x, nonsense=3)), "nonsense"),
        (Of(lambda x: x.split(2, 3, 4, 5)), "split.*cannot be brought"),
        (Of(lambda x: x + torch.randn(4)), "random numbers"),
        (Of(lambda m, x: m.a(x, x, x)[0], a=nn.MultiheadAttention(4, 2)), "cannot be traced"),
        (Takes(), "whose parts only example inputs tell"),
        (Variadic(), "whose parts only example inputs tell"),
    ],
)
def test_what_only_example_inputs_tell(model: nn.Module, match: str) -> None:
    with pytest.raises(CaptureError, match=match) as caught:
        capture(model.eval())
    assert "example_inputs" in str(caught.value.remedy) and caught.value.where


def test_autocast_is_refused() -> None:
    def function(m: Any, x: T) -> T:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return m.fc(x)

    with pytest.raises(CaptureError, match="autocast"):
        capture(Of(function, fc=nn.Linear(4, 4)).eval())


def test_training_mode_is_refused() -> None:
    with pytest.raises(PreconditionError, match="training mode"):
        capture(nn.Dropout().train())
