"""How much each index of a weight matters, read off the weights alone.

A criterion is asked for every dimension of every weight from which something could go, and answers with one number
per index, or None where it has no say. The numbers of a class (one channel and everything tied to it) are summed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx, nn

from fxcompress.errors import OptionError, PreconditionError

__all__ = ["WEIGHT_CRITERIA", "Criterion", "UserScore", "of_user", "weight_criterion"]

Criterion = Callable[[str, torch.Tensor, int], torch.Tensor | None]
"""``(path, weight, dim)`` → scores of shape ``[weight.shape[dim]]``."""

UserScore = Callable[[torch.Tensor, int], torch.Tensor]
"""``(weight, dim)`` → scores of shape ``[weight.shape[dim]]``: what a user may give as ``importance``."""

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def weight_criterion(name: str, graph_module: fx.GraphModule, seed: int) -> Criterion:
    """The criterion of that name; ``name`` is one of :data:`WEIGHT_CRITERIA`."""
    if name == "random":
        generator = torch.Generator().manual_seed(seed)
        return lambda _, weight, dim: torch.rand(weight.shape[dim], generator=generator)
    scales = {
        f"{path}.weight"
        for path, layer in graph_module.named_modules(remove_duplicate=False)
        if isinstance(layer, _NORMS)
    }
    score = _OF_MATRICES.get(name)
    of_scales = _OF_SCALES.get(name)

    def criterion(path: str, weight: torch.Tensor, dim: int) -> torch.Tensor | None:
        if weight.dim() > 1:
            return score(weight, dim) if score is not None else None
        return of_scales(weight.float()) if of_scales is not None and path in scales else None

    return criterion


def of_user(score: UserScore) -> Criterion:
    """A user's function as a criterion: asked about matrices and kernels; what it answers is checked."""

    def checked(path: str, weight: torch.Tensor, dim: int) -> torch.Tensor | None:
        if weight.dim() < 2:
            return None
        found = score(weight, dim)
        if not isinstance(found, torch.Tensor) or found.shape != (weight.shape[dim],):
            got = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise OptionError(
                f"the importance function gave {got} for {path!r} of shape {tuple(weight.shape)} along {dim}",
                where="importance",
                remedy=f"return a tensor of shape ({weight.shape[dim]},)",
            )
        if not bool(torch.isfinite(found).all()):
            raise PreconditionError(f"the importance function gave a score that is not finite for {path!r}")
        return found

    return checked


def rows(weight: torch.Tensor, dim: int) -> torch.Tensor:
    """The weight as a matrix with one row per index of ``dim``."""
    return weight.float().movedim(dim, 0).flatten(1)


def _l1(weight: torch.Tensor, dim: int) -> torch.Tensor:
    return rows(weight, dim).abs().sum(1)


def _l2(weight: torch.Tensor, dim: int) -> torch.Tensor:
    """Squared, so that the sum over a group is the squared norm of all that would go."""
    if dim == 0:
        return torch.linalg.vector_norm(weight.float().reshape(len(weight), -1), dim=1).square()
    squares = weight.float().square()
    if dim + 1 < weight.dim():  # what lies together in memory first: several times faster than all at once
        squares = squares.flatten(dim + 1).sum(-1)
    return squares.flatten(0, dim - 1).sum(0)


def _fpgm(weight: torch.Tensor, dim: int) -> torch.Tensor:
    """Sum of distances to all others (He et al. 2019): what lies near the geometric median is replaceable."""
    flat = rows(weight, dim)
    return torch.cdist(flat, flat).sum(1)


def _lamp(weight: torch.Tensor, dim: int) -> torch.Tensor:
    """w² over the sum of all w'² that are not smaller (Lee et al. 2021), on the norms of the indices."""
    norms = _l2(weight, dim)
    order = norms.argsort(descending=True)
    scores = torch.empty_like(norms)
    scores[order] = norms[order] / norms[order].cumsum(0).clamp_min(1e-30)
    return scores


_OF_MATRICES: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "l1": _l1,
    "l2": _l2,
    "fpgm": _fpgm,
    "lamp": _lamp,
}

# A norm's scale is a weight of its channel like any other, the only one that an affine map between them leaves.
_OF_SCALES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "l1": torch.abs,
    "l2": torch.square,
    "bn_scale": torch.abs,
}

WEIGHT_CRITERIA = (*_OF_MATRICES, "bn_scale", "random")
