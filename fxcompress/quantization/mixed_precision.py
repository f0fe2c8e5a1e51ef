"""Which layers stay in floating point: the fewest that keep a loss within bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxcompress.errors import PreconditionError
from fxcompress.graph.batches import batches
from fxcompress.graph.copying import copy_graph

__all__ = ["Choice", "fewest", "output_error"]


@dataclass(frozen=True)
class Choice:
    """How many of a ranking are needed.

    Attributes:
        count: of the first ones.
        drop: with these.
        tried: count → drop of all that were looked at.
    """

    count: int
    drop: float
    tried: dict[int, float] = field(default_factory=dict)


def fewest(total: int, drop: Callable[[int], float], allowed: float) -> Choice:
    """The least count whose drop is allowed, if more never make it worse: doubling, then bisection.

    Args:
        total: the whole ranking; its drop is taken as 0 and not looked at.
        drop: what is lost with the first ``count``; about 2 log₂ count calls.
        allowed: most.
    """
    tried: dict[int, float] = {}

    def fits(count: int) -> bool:
        if count >= total:
            return True
        tried[count] = drop(count)
        return tried[count] <= allowed

    low, high = 0, 1
    if fits(0):
        return Choice(0, tried.get(0, 0.0), tried)
    while not fits(high):
        low, high = high, min(2 * high, total)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return Choice(high, tried.get(high, 0.0), tried)


def output_error(floating: fx.GraphModule, data: Iterable[Any], *, samples: int) -> Callable[[fx.GraphModule], float]:
    """A function that says how far a graph's outputs are from those of ``floating``: ‖a − b‖ / ‖a‖, the worst output.

    Args:
        floating: the reference; run once, now.
        data: batches; so many are read as hold ``samples`` samples.
        samples: their inputs and outputs lie in memory.

    Raises:
        PreconditionError: the data is empty or does not fit, or no output is a tensor of real numbers.
    """
    held: list[list[Any]] = []
    seen = 0
    for batch in batches(floating, data):
        held.append(batch.leaves)
        seen += batch.size
        if seen >= samples:
            break
    expected = [_outputs(floating, leaves) for leaves in held]
    if not expected[0]:
        raise PreconditionError("no output of the model is a tensor of real numbers", remedy="give a metric")
    power = [sum(float(outputs[i].double().square().sum()) for outputs in expected) for i in range(len(expected[0]))]

    def measure(graph_module: fx.GraphModule) -> float:
        noise = [0.0] * len(power)
        for leaves, wanted in zip(held, expected, strict=True):
            for i, (a, b) in enumerate(zip(wanted, _outputs(graph_module, leaves), strict=True)):
                noise[i] += float((a.double() - b.double()).square().sum())
        return max((n / max(p, 1e-30)) ** 0.5 for n, p in zip(noise, power, strict=True))

    return measure


def _outputs(graph_module: fx.GraphModule, leaves: Sequence[Any]) -> list[torch.Tensor]:
    copied = copy_graph(graph_module)
    for module in copied.modules():
        module.training = False
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = fx.Interpreter(copied).run(*leaves, enable_io_processing=False)
    flat = found if isinstance(found, (tuple, list)) else [found]
    return [x for x in flat if isinstance(x, torch.Tensor) and x.is_floating_point()]
