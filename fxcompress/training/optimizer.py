"""An optimizer carried over to a pruned model: its state is cut where the weights were."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.optim import Optimizer

from fxcompress.errors import PreconditionError
from fxcompress.graph.names import original_name

__all__ = ["kept_channels", "prune_optimizer"]

Kept = Mapping[str, Mapping[int, Sequence[int]]]


def kept_channels(rewrites: Iterable[Any]) -> dict[str, dict[int, list[int]]]:
    """What the rewrites of ``PruneChannels`` kept: original name → dimension → indices.

    A second pass counts in what the first one kept; the result counts in the original.
    """
    found: dict[str, dict[int, list[int]]] = {}
    for rewrite in rewrites:
        for name, dims in rewrite.detail.get("kept", {}).items():
            known = found.setdefault(name, {})
            for key, indices in dims.items():
                dim = int(key)
                known[dim] = [known[dim][index] for index in indices] if dim in known else list(indices)
    return found


def prune_optimizer(
    optimizer: Optimizer, model: nn.Module, pruned: fx.GraphModule, rewrites: Iterable[Any]
) -> Optimizer:
    """A copy of ``optimizer`` for the parameters of ``pruned``: same groups, same options, same history.

    State that has the shape of its parameter (momenta, second moments) keeps the indices that the parameter kept;
    scalars are copied. A parameter that ``pruned`` no longer has is left out. The given optimizer stays as it is. A
    schedule goes on with ``schedule.optimizer = prune_optimizer(...)``.

    Args:
        optimizer: of ``model``.
        model: as it was before compilation.
        pruned: ``compiled.module``.
        rewrites: of ``PruneChannels``: ``compiled.report.passes[i].rewrites``.

    Raises:
        PreconditionError: the optimizer holds parameters that are not the model's, or state in a form that cannot be
            cut, such as the factored moments of Adafactor.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    fresh = {original_name(pruned, path): parameter for path, parameter in pruned.named_parameters()}
    kept = kept_channels(rewrites)
    made = copy.copy(optimizer)
    groups, state = [], defaultdict(dict)  # type: ignore[var-annotated]
    for number, group in enumerate(optimizer.param_groups):
        parameters = []
        for old in group["params"]:
            name = names.get(id(old))
            if name is None:
                raise PreconditionError(
                    f"a parameter of shape {tuple(old.shape)} in the optimizer's group {number} is not the model's",
                    where="optimizer",
                    remedy="give the model that the optimizer was made for",
                )
            new = fresh.get(name)
            if new is None:
                continue
            parameters.append(new)
            if old in optimizer.state:
                state[new] = {
                    key: _cut(value, old, new, kept.get(name, {}), f"{name}: {key}")
                    for key, value in optimizer.state[old].items()
                }
        groups.append({**group, "params": parameters})
    made.param_groups, made.state = groups, state
    return made


def _cut(value: Any, old: torch.Tensor, new: torch.Tensor, kept: Mapping[int, Sequence[int]], where: str) -> Any:
    if not isinstance(value, torch.Tensor):
        return copy.deepcopy(value)
    if value.dim() == 0:
        return value.clone()
    if value.shape != old.shape:
        if not kept:
            return value.clone()
        raise PreconditionError(
            f"state of shape {tuple(value.shape)} of a parameter of shape {tuple(old.shape)} cannot be cut",
            where=where,
            remedy="start this optimizer anew on the pruned model",
        )
    result = value
    for dim, indices in kept.items():
        result = result.index_select(dim, torch.as_tensor(indices, device=value.device))
    if result.shape != new.shape:
        raise PreconditionError(
            f"the state would be of shape {tuple(result.shape)}, the parameter is of {tuple(new.shape)}",
            where=where,
            remedy="give all rewrites of PruneChannels, and no other pass that changes shapes in between",
        )
    return result.clone()
