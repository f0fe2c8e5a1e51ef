"""The dead-channel rule, applied from outside to whoever removed channels."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from benchmarks.patterns.model import Pattern, build
from fxcompress.capture import capture
from fxcompress.graph.edit import copy_graph
from fxcompress.graph.verify import verify
from fxcompress.passes.base import PassContext
from fxcompress.passes.prune_channels import PruneChannels

__all__ = ["Verdict", "dead_channels", "largest_error", "ours"]

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Verdict:
    """What became of one model.

    Attributes:
        outcome: ``exact``, ``refused``, ``nothing`` (removed), ``wrong`` or ``crash``.
        error: largest relative difference from the model with dead channels.
        removed: share of the parameters that went.
        reason: of a refusal or a crash.
    """

    outcome: str
    error: float | None = None
    removed: float = 0.0
    reason: str = ""


def dead_channels(model: nn.Module, kept: Mapping[str, Mapping[int, Sequence[int]]]) -> nn.Module:
    """A copy of ``model`` with every index zeroed that ``kept`` (name → dimension → indices) does not list."""
    model = copy.deepcopy(model)
    state = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    with torch.no_grad():
        for name, dims in kept.items():
            for dim, indices in dims.items():
                gone = torch.ones(state[name].shape[dim], dtype=torch.bool)
                gone[list(indices)] = False
                state[name].index_fill_(dim, gone.nonzero().flatten(), 0)
    return model


def largest_error(expected: Any, actual: Any) -> float:
    """Largest difference of two nested outputs, relative to the largest value of each tensor; infinite for NaN."""
    worst = 0.0
    for one, other in zip(pytree.tree_leaves(expected), pytree.tree_leaves(actual), strict=True):
        if one.shape != other.shape or not bool(other.isfinite().all()):
            return float("inf")
        error = float((one - other).abs().max() / one.abs().max().clamp_min(1e-6))
        if not error <= worst:
            worst = error if error == error else float("inf")
    return worst


def parameters(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def ours(chain: Sequence[Pattern], importance: str, ratio: float = 0.5) -> Verdict:
    """Remove channels with :class:`PruneChannels`, judge, train a step, and run at another batch size."""
    model = build(*chain)
    shape = chain[0].shape
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(1)
    captured = capture(model, (torch.randn(2, *shape),))
    result = PruneChannels(ratio=ratio, importance=importance, seed=1).run(copy_graph(captured), PassContext())
    pruned = result.graph_module
    verify(pruned, shapes=True)
    reasons = "; ".join(dict.fromkeys(skip.reason for skip in result.skipped))
    if not result.changed:
        return Verdict("refused", reason=reasons)
    kept: dict[str, dict[int, list[int]]] = {}
    for rewrite in result.rewrites:
        kept.update(rewrite.detail["kept"])
    dead = dead_channels(model, kept)
    errors = []
    with torch.no_grad():
        for batch in (3, 1):
            x = torch.randn(batch, *shape)
            errors.append(largest_error(dead(x), pruned(x)))
    if any(not torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items()):
        return Verdict("wrong", reason="the user's model was changed")
    _train(pruned, torch.randn(3, *shape))
    share = 1 - parameters(pruned) / parameters(model)
    return Verdict("exact" if max(errors) <= TOLERANCE else "wrong", max(errors), share, reasons)


def _train(module: nn.Module, x: Tensor) -> None:
    """One step; every parameter that can learn gets a gradient."""
    module.train()
    loss: Any = sum(leaf.float().square().mean() for leaf in pytree.tree_leaves(module(x)))
    loss.backward()
    missing = [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing, f"no gradient for {missing}"
    torch.optim.SGD(module.parameters(), 1e-3).step()
    module.eval()
