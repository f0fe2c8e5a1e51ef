"""Random compositions of operations, judged by the dead-channel rule."""

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from benchmarks.patterns.judge import ours
from benchmarks.patterns.model import Pattern

# Steps from tokens [B, 6, C] to tokens [B, 6, C']: (name, needs C divisible by, what it does with layers made for C).


def _linear(width):
    return lambda c: (nn.Linear(c, width), lambda m, x: m(x))


def _plain(function):
    return lambda c: (nn.Identity(), lambda m, x: function(x))


def _two(function, width=8):
    def make(c):
        return nn.ModuleList([nn.Linear(c, width), nn.Linear(c, width)]), lambda m, x: function(m[0](x), m[1](x))

    return make


def _residual(function):
    return lambda c: (nn.Linear(c, c), lambda m, x: x + function(m(x)))


STEPS = {
    "linear": (1, _linear(12)),
    "wide": (1, _linear(20)),
    "relu": (1, _plain(F.relu)),
    "sigmoid": (1, _plain(torch.sigmoid)),
    "exp": (1, _plain(lambda x: torch.exp(x * 0.1))),
    "shifted": (1, _plain(lambda x: x + 0.5)),
    "gelu": (1, _plain(F.gelu)),
    "residual": (1, _residual(torch.tanh)),
    "gated": (1, _residual(lambda y: y * torch.sigmoid(y))),
    "mean": (1, _plain(lambda x: x * x.mean(-1, keepdim=True))),
    "rms": (1, _plain(lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3))),
    "unit": (1, _plain(lambda x: F.normalize(x, dim=-1))),
    "variance": (1, _plain(lambda x: x * (x.var(-1, keepdim=True) + 1).rsqrt())),
    "rms_layer": (1, lambda c: (nn.RMSNorm(c, eps=1e-3), lambda m, x: m(x))),
    "softmax_tokens": (1, _plain(lambda x: x.softmax(1))),
    "similarity": (1, _two(lambda a, b: a @ b.transpose(1, 2))),
    "linear_attention": (1, _two(lambda a, b: a @ (b.transpose(1, 2) @ b))),
    "soft_attention": (1, _two(lambda a, b: (a @ b.transpose(1, 2)).softmax(-1) @ b)),
    "heads": (
        1,
        _two(
            lambda a, b: (
                F.scaled_dot_product_attention(*(y.unflatten(-1, (2, 4)).transpose(1, 2) for y in (a, b, b)))
                .transpose(1, 2)
                .flatten(2)
            )
        ),
    ),
    "gram": (1, _plain(lambda x: x @ x.transpose(1, 2))),
    "both": (1, _two(lambda a, b: torch.cat([a, F.silu(b)], -1))),
    "outer": (1, _two(lambda a, b: (a.unsqueeze(-1) * b.unsqueeze(-2)).flatten(2), 4)),
    "stacked": (1, _two(lambda a, b: torch.stack([a, b], -1).flatten(2))),
    "flip": (1, _plain(lambda x: x.flip(-1))),
    "roll": (1, _plain(lambda x: x.roll(3, -1))),
    "every_other": (2, _plain(lambda x: x[..., ::2])),
    "cut": (2, _plain(lambda x: x[..., 1:-1])),
    "swapped": (2, _plain(lambda x: torch.cat(x.chunk(2, -1)[::-1], -1))),
    "glu": (2, _plain(lambda x: F.glu(x, -1))),
    "shuffled": (2, _plain(lambda x: x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(2))),
    "quarters": (4, _plain(lambda x: x.unflatten(-1, (4, -1)).sum(2))),
    "grouped": (4, lambda c: (nn.Conv1d(c, 2 * c, 1, groups=4), lambda m, x: m(x.transpose(1, 2)).transpose(1, 2))),
    "depthwise": (1, lambda c: (nn.Conv1d(c, c, 3, padding=1, groups=c), lambda m, x: m(x.mT).mT)),
    "twice": (1, _plain(lambda x: x.repeat(1, 1, 2))),
    "doubled": (1, _plain(lambda x: x.repeat_interleave(2, -1))),
    "padded": (1, _plain(lambda x: F.pad(x, (1, 2)))),
    "reversed": (1, _plain(lambda x: x[..., torch.arange(x.shape[-1] - 1, -1, -1)])),
    "mixed": (1, lambda c: (nn.Linear(6, 6), lambda m, x: m(x.transpose(1, 2)).transpose(1, 2))),
    "gru": (1, lambda c: (nn.GRU(c, 8, batch_first=True), lambda m, x: m(x)[0])),
    "clamped": (1, _plain(lambda x: x.clamp(0.1, 2.0))),
    "squared": (1, _plain(lambda x: x.square())),
    "cumulative": (1, _plain(lambda x: x.cumsum(-1) * 0.1)),
    "group_norm": (4, lambda c: (nn.GroupNorm(c, c), lambda m, x: m(x.mT).mT)),
}


def pattern_of(names):
    """The composition of steps; a step that does not fit the width gets a linear layer before it."""
    plan, width = [], 16
    for name in names:
        divisor, make = STEPS[name]
        if width % divisor or width < 4 or width > 64:
            plan.append(STEPS["linear"][1])
            width = 12
        plan.append(make)
        with torch.no_grad():
            layer, step = make(width)
            width = step(layer, torch.zeros(2, 6, width)).shape[-1]

    def parts():
        made, width = {}, 16
        for index, make in enumerate(plan):
            layer, step = make(width)
            made[f"s{index}"] = layer
            with torch.no_grad():
                width = step(layer, torch.zeros(2, 6, width)).shape[-1]
        return made

    def body(m, x):
        for index, make in enumerate(plan):
            x = make(x.shape[-1])[1](getattr(m, f"s{index}"), x)
        return x

    return Pattern("_".join(names), "tokens", body, parts, width)


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from(sorted(STEPS)), min_size=2, max_size=6))
def test_random_compositions_are_exact_or_refused(names):
    verdict = ours((pattern_of(names),), "random")
    assert verdict.outcome in ("exact", "refused"), (names, verdict)
