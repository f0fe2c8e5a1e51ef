"""Losses between what a student and a teacher compute inside, ``[batch, channels, places …]``.

``fitnets`` (Romero et al. 2015), ``attention`` (Zagoruyko & Komodakis 2017), ``relational`` (Park et al. 2019).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fxcompress.errors import PreconditionError

__all__ = ["FEATURE_LOSSES", "adapter_for", "attention", "fitnets", "relational"]

functional = nn.functional

_MAPS: dict[int, Callable[[int, int], nn.Module]] = {
    2: lambda ours, theirs: nn.Linear(ours, theirs, bias=False),
    3: lambda ours, theirs: nn.Conv1d(ours, theirs, 1, bias=False),
    4: lambda ours, theirs: nn.Conv2d(ours, theirs, 1, bias=False),
    5: lambda ours, theirs: nn.Conv3d(ours, theirs, 1, bias=False),
}
_POOLS: dict[int, Any] = {4: functional.adaptive_avg_pool2d, 5: functional.adaptive_avg_pool3d}


def adapter_for(student: torch.Tensor, teacher: torch.Tensor) -> nn.Module:
    """A linear map of the student's channels to the teacher's, the same at all places; none where both are as wide.

    Raises:
        PreconditionError: the two have different numbers of dims, or more than five.
    """
    if student.dim() != teacher.dim() or student.dim() not in _MAPS:
        raise PreconditionError(
            f"a student's feature {list(student.shape)} and a teacher's {list(teacher.shape)} do not correspond",
            where="features",
            remedy="name layers whose outputs have as many dims",
        )
    ours, theirs = student.shape[1], teacher.shape[1]
    return nn.Identity() if ours == theirs else _MAPS[student.dim()](ours, theirs)


def fitnets(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared difference; the larger image is averaged down to the smaller."""
    student, teacher = _same_places(student, teacher)
    if student.shape != teacher.shape:
        raise PreconditionError(
            f"a student's feature {list(student.shape)} and a teacher's {list(teacher.shape)} do not match",
            where="features",
            remedy="name layers at the same place of both models",
        )
    return functional.mse_loss(student, teacher)


def attention(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Squared distance of the maps ``Σ_c a²`` of places, each of length 1; widths may differ."""
    ours, theirs = _same_places(_map(student), _map(teacher))
    if ours.shape != theirs.shape:
        raise PreconditionError(
            f"features {list(student.shape)} and {list(teacher.shape)} do not have the same places",
            where="features",
            remedy="name layers at the same place of both models",
        )
    difference = functional.normalize(ours.flatten(1), dim=1) - functional.normalize(theirs.flatten(1), dim=1)
    return difference.square().sum(1).mean()


def relational(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Distances between the samples of a batch, relative to their mean, and twice the angles of all triples.

    Images and sequences are averaged over places first. Memory grows with the square of the batch times the width.
    """
    ours, theirs = _embedding(student), _embedding(teacher)
    distances = functional.smooth_l1_loss(_distances(ours), _distances(theirs))
    return distances + 2 * functional.smooth_l1_loss(_angles(ours), _angles(theirs))


FEATURE_LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "attention": attention,
    "fitnets": fitnets,
    "relational": relational,
}


def _same_places(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and volumes averaged down to the smaller size in each direction; tokens are not averaged."""
    pool = _POOLS.get(a.dim())
    if a.dim() != b.dim() or a.shape[2:] == b.shape[2:] or pool is None:
        return a, b
    size = [min(ours, theirs) for ours, theirs in zip(a.shape[2:], b.shape[2:], strict=True)]
    return pool(a, size), pool(b, size)


def _map(value: torch.Tensor) -> torch.Tensor:
    """``[batch, 1, places …]``."""
    if value.dim() < 3:
        raise PreconditionError(
            f"a feature of shape {list(value.shape)} has no places to attend to",
            where="features",
            remedy="name layers with images or sequences, or use feature_loss='relational'",
        )
    return value.square().sum(1, keepdim=True)


def _embedding(value: torch.Tensor) -> torch.Tensor:
    return value.flatten(2).mean(2) if value.dim() > 2 else value


def _distances(rows: torch.Tensor) -> torch.Tensor:
    """``[batch, batch]``, with mean 1 off the diagonal; the root is taken where its derivative exists."""
    squares = (rows.unsqueeze(0) - rows.unsqueeze(1)).square().sum(-1)
    distances = squares.clamp_min(1e-12).sqrt() * (1 - torch.eye(len(rows), device=rows.device))
    count = max(len(rows) * (len(rows) - 1), 1)
    return distances / (distances.sum() / count).clamp_min(1e-12)


def _angles(rows: torch.Tensor) -> torch.Tensor:
    """Cosines ``[batch, batch, batch]`` of the angles at the first sample between the two others."""
    directions = functional.normalize(rows.unsqueeze(0) - rows.unsqueeze(1), dim=-1, eps=1e-6)
    return directions @ directions.transpose(1, 2)
