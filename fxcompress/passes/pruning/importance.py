"""How much each index of a weight matters: one number per index along a dimension."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fxcompress.errors import OptionError, nearest

__all__ = ["Score", "score_of"]

Score = Callable[[torch.Tensor, int], torch.Tensor]


def score_of(name: str, seed: int) -> Score:
    """The criterion of that name.

    Raises:
        OptionError: there is none.
    """
    criteria: dict[str, Score] = {"l1": _l1, "l2": _l2, "fpgm": _fpgm, "lamp": _lamp}
    if name == "random":
        generator = torch.Generator().manual_seed(seed)
        return lambda weight, dim: torch.rand(weight.shape[dim], generator=generator)
    if name not in criteria:
        raise OptionError(f"there is no importance {name!r}", remedy=nearest(name, [*criteria, "random"]))
    return criteria[name]


def _rows(weight: torch.Tensor, dim: int) -> torch.Tensor:
    return weight.float().movedim(dim, 0).flatten(1)


def _others(weight: torch.Tensor, dim: int) -> list[int]:
    return [other for other in range(weight.dim()) if other != dim]


def _l1(weight: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.linalg.vector_norm(weight.float(), ord=1, dim=_others(weight, dim))


def _l2(weight: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.linalg.vector_norm(weight.float(), dim=_others(weight, dim)).square()


def _fpgm(weight: torch.Tensor, dim: int) -> torch.Tensor:
    """Sum of distances to all others (He et al. 2019): what lies near the geometric median is replaceable."""
    rows = _rows(weight, dim)
    return torch.cdist(rows, rows).sum(1)


def _lamp(weight: torch.Tensor, dim: int) -> torch.Tensor:
    """w² over the sum of all w'² that are not smaller (Lee et al. 2021), on the norms of the indices."""
    norms = _l2(weight, dim)
    order = norms.argsort(descending=True)
    scores = torch.empty_like(norms)
    scores[order] = norms[order] / norms[order].cumsum(0)
    return scores
