"""Groups of channels that compete with each other, and the importance of each removable class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fxcompress.analysis.dependency.builder import Builder
from fxcompress.analysis.dependency.labels import Solution, connected_components
from fxcompress.analysis.dependency.layout import Dim, blocks

__all__ = ["Group", "find_groups", "importance"]


@dataclass(frozen=True)
class Group:
    """Channels that are chosen among each other: the ones that a set of tied layers makes.

    Attributes:
        classes: removable classes of the group, ascending.
        layers: the weights that make them: ``("layer1.0.conv2.weight", "layer1.0.downsample.0.weight")``.
        width: channels along the layers' dimension.
        multiplicity: channels of that dimension that one class stands for.
    """

    classes: NDArray[np.int64]
    layers: tuple[str, ...]
    width: int
    multiplicity: int


def find_groups(builder: Builder, solution: Solution) -> list[Group]:
    """All groups with anything to remove, in the order in which the graph makes them."""
    made: list[tuple[str, Dim, NDArray[np.int64]]] = []
    for path, layout in builder.weights.items():
        for number, dim in enumerate(layout):
            if number not in builder.makes.get(path, ()):
                continue
            classes = [np.unique(solution.class_of[block.labels]) for block in blocks(dim)]
            found = np.unique(np.concatenate(classes)) if classes else np.zeros(0, dtype=np.int64)
            found = found[solution.removable[found]]
            if found.size:
                made.append((path, dim, found))
    # Two dimensions with a class in common compete together.
    member = np.concatenate([np.full(len(item[2]), index) for index, item in enumerate(made)] or [np.zeros(0, int)])
    cls = np.concatenate([item[2] for item in made] or [np.zeros(0, int)])
    order = np.argsort(cls, kind="stable")
    same = cls[order][1:] == cls[order][:-1]
    left, right = member[order][1:][same], member[order][:-1][same]
    component = connected_components(len(made), left, right)
    groups: list[Group] = []
    for root in np.unique(component).tolist():
        members = [made[index] for index in np.flatnonzero(component == root).tolist()]
        classes_ = np.unique(np.concatenate([item[2] for item in members]))
        path, dim, own = members[0]
        width = int(np.prod([factor.size for factor in dim]))
        groups.append(Group(classes_, tuple(item[0] for item in members), width, max(1, width // len(own))))
    return groups


def importance(
    builder: Builder,
    solution: Solution,
    weights: Mapping[str, torch.Tensor],
    score: Callable[[str, torch.Tensor, int], torch.Tensor | None],
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Importance of each class, summed over all its indices in all weights.

    Args:
        builder: the walk over the graph.
        solution: its labels solved.
        weights: the tensors, by path.
        score: ``(path, weight, dim)`` → one number per index along ``dim``, or None where it has no say.

    Returns:
        ``[classes]`` sums, and whether any weight had a say in a class.
    """
    total, heard = np.zeros(len(solution.class_of)), np.zeros(len(solution.class_of), dtype=bool)
    for path, layout in builder.weights.items():
        tensor = weights[path]
        if not tensor.is_floating_point():
            continue
        for number, dim in enumerate(layout):
            found = blocks(dim)
            if not found or not any(solution.removable[solution.class_of[b.labels]].any() for b in found):
                continue
            scores = score(path, tensor.detach(), number)
            if scores is None:
                continue
            values = scores.double().cpu().numpy().reshape([f.size for f in dim])
            for block in found:
                places = [i for i, factor in enumerate(dim) if factor.block is block]
                axes = [dim[i].axis for i in places]
                rest = tuple(i for i in range(len(dim)) if i not in places)
                per_label = values.sum(axis=rest) if rest else values
                classes = solution.class_of[block.labels.transpose(axes)].reshape(-1)
                total += np.bincount(classes, per_label.reshape(-1), minlength=len(total))
                heard[classes] = True
    return total, heard
