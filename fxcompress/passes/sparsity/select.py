"""Which weights become zero: the least important of a layer, of a row, of a block, or of all layers together.

A weight that is zero already ranks below all others, so that a second run with a greater share keeps the zeros of the
first, and with the same share changes nothing. Counts are exact, ties go to the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fxcompress.analysis.sparsity import blocks

__all__ = ["importance", "in_blocks", "of_all", "of_layer", "of_rows"]


def importance(weight: torch.Tensor, norms: torch.Tensor | None = None) -> torch.Tensor:
    """|w|, or |w|·‖x‖ with the norm of each input (Wanda, Sun et al. 2023); -1 where w is zero.

    Args:
        weight: of any shape.
        norms: of a shape that broadcasts to it.
    """
    scores = weight.abs() if norms is None else weight.abs() * norms.to(weight.dtype)
    return scores.masked_fill(weight == 0, -1)


def of_layer(scores: torch.Tensor, share: float) -> torch.Tensor:
    """Where the least ``share`` of all elements are: bool, of the shape of ``scores``."""
    return _least(scores.reshape(1, -1), round(share * scores.numel())).reshape(scores.shape)


def of_rows(scores: torch.Tensor, share: float, dim: int) -> torch.Tensor:
    """Likewise for each index of ``dim`` on its own."""
    rows = scores.movedim(dim, 0)
    chosen = _least(rows.reshape(len(rows), -1), round(share * rows[0].numel()))
    return chosen.reshape(rows.shape).movedim(0, dim)


def in_blocks(scores: torch.Tensor, dim: int, n: int, m: int) -> torch.Tensor:
    """Where all but the ``n`` greatest of every ``m`` neighbours along ``dim`` are."""
    moved = scores.movedim(dim, -1)
    return _least(blocks(scores, dim, m), m - n).reshape(moved.shape).movedim(-1, dim)


def of_all(scores: Sequence[torch.Tensor], share: float, fixed: Mapping[int, float], most: float) -> list[torch.Tensor]:
    """The least ``share`` of all elements of all tensors, by one ranking.

    Args:
        scores: one tensor per layer.
        share: of the elements of those that are not fixed.
        fixed: index of a tensor → a share of its own.
        most: share of a single tensor that may go at most; its best elements are out of the ranking.
    """
    free = [index for index in range(len(scores)) if index not in fixed]
    made = {index: of_layer(scores[index], own) for index, own in fixed.items()}
    if free:
        flat = []
        for index in free:
            own = scores[index].reshape(1, -1).float()
            if most < 1:
                spared = _least(-own, own.numel() - int(most * own.numel()))
                own = own.masked_fill(spared, torch.inf)
            flat.append(own)
        together = torch.cat(flat, 1)
        wanted = min(round(share * together.numel()), int(torch.isfinite(together).sum()))
        parts = _least(together, wanted)[0].split([part.numel() for part in flat])
        made |= {index: part.reshape(scores[index].shape) for index, part in zip(free, parts, strict=True)}
    return [made[index] for index in range(len(scores))]


def _least(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Where the ``count`` least elements of each row are."""
    chosen = torch.zeros_like(rows, dtype=torch.bool)
    if count <= 0:
        return chosen
    order = rows.argsort(dim=1, stable=True)[:, :count]
    return chosen.scatter_(1, order, True)
