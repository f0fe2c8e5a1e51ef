"""From a set of removed classes to smaller weights and to the constants that views, splits and slices carry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fxcompress.analysis.dependency.builder import Builder
from fxcompress.analysis.dependency.labels import Solution
from fxcompress.analysis.dependency.layout import Dim, blocks, size_of

__all__ = ["Removal"]


@dataclass(frozen=True)
class Removal:
    """What goes, in terms of every dimension of every value and weight.

    Attributes:
        builder: the walk over the graph.
        solution: its labels solved.
        removed: by label: whether it goes.
    """

    builder: Builder
    solution: Solution
    removed: NDArray[np.bool_]

    @classmethod
    def of_classes(cls, builder: Builder, solution: Solution, classes: NDArray[np.int64]) -> Removal:
        """The removal of all labels of the given classes."""
        gone = np.zeros(len(solution.class_of), dtype=bool)
        gone[classes] = True
        return cls(builder, solution, gone[solution.class_of])

    def kept_mask(self, dim: Dim) -> NDArray[np.bool_]:
        """Which indices of a static dimension stay."""
        shape = tuple(factor.size for factor in dim)
        keep = np.ones(shape, dtype=bool)
        for block in blocks(dim):
            places = [index for index, factor in enumerate(dim) if factor.block is block]
            axes = [dim[index].axis for index in places]
            gone = self.removed[block.labels].transpose(axes)
            keep &= ~gone.reshape(tuple(dim[i].size if i in places else 1 for i in range(len(dim))))
        return keep.reshape(-1)

    def kept(self, dim: Dim) -> Any:
        """How many indices of a dimension stay: an int, or an expression where the size is symbolic."""
        if not self.touches(dim):
            return size_of(dim)
        size: Any = 1
        counted: list[Any] = []
        for factor in dim:
            if factor.block is None:
                size = size * factor.size
            elif all(factor.block is not known for known in counted):
                counted.append(factor.block)
                size = size * int((~self.removed[factor.block.labels]).sum())
        return size

    def touches(self, dim: Dim) -> bool:
        """Whether anything goes from this dimension."""
        return any(bool(self.removed[block.labels].any()) for block in blocks(dim))

    def kept_indices(self, path: str) -> dict[int, torch.Tensor]:
        """For a weight: dimension → the indices that stay, for the dimensions that lose any."""
        return {
            number: torch.from_numpy(np.flatnonzero(self.kept_mask(dim)))
            for number, dim in enumerate(self.builder.weights[path])
            if self.touches(dim)
        }
