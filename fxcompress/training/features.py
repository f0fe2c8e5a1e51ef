"""Losses between what a student and a teacher compute inside.

``fitnets`` (Romero et al. 2015), ``attention`` (Zagoruyko & Komodakis 2017), ``relational`` (Park et al. 2019).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fxcompress.errors import PreconditionError

__all__ = ["FEATURE_LOSSES", "adapter_for", "attention", "fitnets", "relational"]

functional = nn.functional


def adapter_for(student: torch.Tensor, teacher: torch.Tensor) -> nn.Module:
    """A linear map of the student's channels to the teacher's: 1 x 1 for images, the last dim elsewhere; none where
    both are as wide.

    Raises:
        PreconditionError: the two have different numbers of dims.
    """
    if student.dim() != teacher.dim() or student.dim() < 2:
        raise PreconditionError(
            f"a student's feature {list(student.shape)} and a teacher's {list(teacher.shape)} do not correspond",
            where="features",
            remedy="name layers whose outputs have as many dims",
        )
    axis = _channels(student)
    ours, theirs = student.shape[axis], teacher.shape[axis]
    if ours == theirs:
        return nn.Identity()
    return nn.Conv2d(ours, theirs, 1, bias=False) if student.dim() == 4 else nn.Linear(ours, theirs, bias=False)


def fitnets(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared difference; the larger image is averaged down to the smaller."""
    if student.dim() == teacher.dim() == 4 and student.shape[2:] != teacher.shape[2:]:
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
    ours, theirs = _map(student), _map(teacher)
    if ours.dim() == theirs.dim() == 4 and student.shape[2:] != teacher.shape[2:]:
        ours, theirs = _same_places(ours, theirs)
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


def _channels(value: torch.Tensor) -> int:
    return 1 if value.dim() == 4 else -1


def _same_places(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Images averaged down to the smaller height and width of the two."""
    size = min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3])
    return functional.adaptive_avg_pool2d(a, size), functional.adaptive_avg_pool2d(b, size)


def _map(value: torch.Tensor) -> torch.Tensor:
    """``[batch, 1, height, width]`` or ``[batch, places]``."""
    if value.dim() < 3:
        raise PreconditionError(
            f"a feature of shape {list(value.shape)} has no places to attend to",
            where="features",
            remedy="name layers with images or sequences, or use feature_loss='relational'",
        )
    axis = _channels(value)
    return value.square().sum(axis, keepdim=value.dim() == 4)


def _embedding(value: torch.Tensor) -> torch.Tensor:
    if value.dim() == 4:
        return value.mean((2, 3))
    return value.mean(1) if value.dim() == 3 else value.flatten(1)


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
