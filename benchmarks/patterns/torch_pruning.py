"""Torch-Pruning on the same models, judged by the same rule.

Its pruner gets the model, the example, half of the channels to remove, and, as its documentation says, the output
layers to leave alone, and the number of heads of each projection. What it removed is read off the numbers that are
left in its parameters: before, no two of a tensor are equal.
"""

from __future__ import annotations

import copy
import signal
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from benchmarks.patterns.judge import TOLERANCE, Verdict, dead_channels, largest_error, parameters
from benchmarks.patterns.model import Pattern, build

__all__ = ["available", "theirs"]


LIMIT = 15
"""Seconds for one small model; some never come to an end."""


@contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def available() -> bool:
    """Whether Torch-Pruning is installed."""
    try:
        import torch_pruning  # noqa: F401
    except ImportError:
        return False
    return True


def theirs(chain: Sequence[Pattern], ratio: float = 0.5) -> Verdict:
    """Prune with ``tp.pruner.BasePruner`` and magnitude importance, and judge."""
    model = build(*chain)
    shape = chain[0].shape
    _distinct(model)
    pruned = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with _at_most(LIMIT):
                _prune(pruned, torch.randn(2, *shape), ratio)
        except Exception as error:  # noqa: BLE001 whatever it raises is its result
            return Verdict("crash", reason=_first_line(error))
        kept = _kept(model, pruned)
        if kept is None:
            return Verdict("wrong", reason="parameters cannot be told apart any more")
        if not kept:
            return Verdict("nothing")
        x = torch.randn(3, *shape)
        try:
            with torch.no_grad():
                actual = pruned(x)
        except Exception as error:  # noqa: BLE001
            return Verdict("crash", reason=_first_line(error))
    with torch.no_grad():
        try:
            error = largest_error(dead_channels(model, kept)(x), actual)
        except ValueError:
            error = float("inf")
    share = 1 - parameters(pruned) / parameters(model)
    return Verdict("exact" if error <= TOLERANCE else "wrong", error, share)


def _prune(model: Any, example: torch.Tensor, ratio: float) -> None:
    import torch_pruning as tp

    pruner = tp.pruner.BasePruner(
        model,
        example,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=[_named(model, name) for name in model.outputs],
        num_heads=_heads(model),
    )
    pruner.step()


def _named(model: Any, name: str) -> nn.Module:
    last = model.bodies[-1]
    found = getattr(last, name, None)
    return found if isinstance(found, nn.Module) else getattr(model, name)


def _heads(model: nn.Module) -> dict[nn.Module, int]:
    """Its documentation asks for the number of heads of each projection; a head has 8 features in all patterns."""
    found: dict[nn.Module, int] = {}
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.MultiheadAttention):
            found[module] = module.num_heads
        elif isinstance(module, nn.Linear) and last in ("q", "k", "v", "qkv"):
            found[module] = module.out_features // 8 // (3 if last == "qkv" else 1)
    return found


def _distinct(model: nn.Module) -> None:
    """Let no two numbers of a tensor be equal, so that each can be found again after pruning."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point() and tensor.numel() != tensor.unique().numel():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)


def _kept(before: nn.Module, after: nn.Module) -> dict[str, dict[int, list[int]]] | None:
    """What is left of every parameter and buffer, by where its numbers were before; None if they are new ones."""
    old, new = _floats(before), _floats(after)
    kept: dict[str, dict[int, list[int]]] = {}
    for name, tensor in new.items():
        if name not in old or old[name].dim() != tensor.dim():
            return None
        if tensor.shape == old[name].shape and bool(torch.equal(tensor, old[name])):
            continue
        values, order = old[name].flatten().sort()
        place = torch.searchsorted(values, tensor.flatten()).clamp(max=len(values) - 1)
        if not bool(torch.equal(values[place], tensor.flatten())):
            return None
        coordinates = torch.unravel_index(order[place], old[name].shape)
        for dim, found in enumerate(coordinates):
            indices = found.unique().tolist()
            if len(indices) < old[name].shape[dim]:
                kept.setdefault(name, {})[dim] = indices
    return kept


def _floats(model: nn.Module) -> dict[str, torch.Tensor]:
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach() for name, tensor in named if tensor.is_floating_point()}


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160]
