"""How many second moments are held at once: as many as leave the peak at a few times the largest layer."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["LARGE", "LEAST", "PEAK", "eigenvectors", "largest_layer", "working"]

LARGE = 512  # rows of a matrix from which on rounding, time and memory are worth a thought
PEAK = 3  # times the largest layer: what may live beside the model, and beside the factors of other layers
LEAST = 1 << 20  # bytes of moments that may always be held: in tiny models a reading costs more than they do
_PIECES = 1 << 20  # of what is taken into float64 a piece at a time


def largest_layer(model: nn.Module) -> int:
    """Bytes of the layer that has the most weights."""
    return max(
        (sum(p.numel() * p.element_size() for p in module.parameters(recurse=False)) for module in model.modules()),
        default=0,
    )


def eigenvectors(size: int, item: int) -> int:
    """Bytes of all eigenvectors of a matrix with the work space of LAPACK; the matrix itself is overwritten.

    Args:
        size: rows of the matrix.
        item: bytes of an element.
    """
    return item * size * (3 * size + 9)


def working(layer: Any, rank: int | None) -> int:
    """Bytes that factoring a layer on data takes at most, beside its packed moment.

    That is all eigenvectors of the smaller Gram matrix with the work space of LAPACK, or at the end a basis in float64
    and the factors.

    Args:
        layer: with a weight that is taken as a matrix.
        rank: of the factors; None where it is not known yet.
    """
    rows, width = layer.weight.shape[0], layer.weight[0].numel()
    small = min(rows, width)
    if rank is None:
        rank = small * max(rows, width) // (rows + width)
    factors = (8 + layer.weight.element_size()) * (rows + width) + 8 * small
    return max(eigenvectors(small, 8), factors * min(rank, small)) + _PIECES
