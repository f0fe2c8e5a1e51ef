"""Groups of channels that compete with each other, and the importance of each removable class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fxcompress.analysis.dependency.builder import Builder
from fxcompress.analysis.dependency.labels import Solution
from fxcompress.analysis.dependency.layout import Dim, blocks

__all__ = ["Group", "find_groups", "importance"]


@dataclass(frozen=True)
class Group:
    """Channels that are chosen among each other: the ones that a set of tied layers makes.

    Attributes:
        classes: removable classes of the group, ascending.
        layers: the weights that make them: ``("layer1.0.conv2.weight", "layer1.0.downsample.0.weight")``.
        width: channels of the first of these layers that belong to the group.
        multiplicity: how many of them one class stands for.
    """

    classes: NDArray[np.int64]
    layers: tuple[str, ...]
    width: int
    multiplicity: int


def find_groups(builder: Builder, solution: Solution) -> list[Group]:
    """All groups with anything to remove, in the order in which the graph makes them.

    Classes compete if the same layers make them. Where halves of one layer's channels go to different sums, they are
    two groups: a ratio holds for each half, whatever the sums are made of.
    """
    made: list[tuple[str, NDArray[np.int64], NDArray[np.int64]]] = []  # weight, classes, channels that each stands for
    for path, layout in builder.weights.items():
        for number in builder.makes.get(path, ()):
            classes, counts = _counted(layout[number], solution)
            if classes.size:
                made.append((path, classes, counts))
    if not made:
        return []
    # One number per layer, added up over the layers that make a class: equal sums mean equal sets.
    marks = np.random.default_rng(0).integers(1, 1 << 62, len(made), dtype=np.uint64)
    total = np.zeros(len(solution.class_of), dtype=np.uint64)
    for mark, (_, classes, _) in zip(marks, made, strict=True):
        total[classes] += mark
    members: dict[int, list[int]] = {}
    own: dict[int, NDArray[np.int64]] = {}
    for index, (_, classes, _) in enumerate(made):
        sums = total[classes]
        for value in np.unique(sums).tolist():
            members.setdefault(value, []).append(index)
            own.setdefault(value, classes[sums == value])
    groups: list[Group] = []
    for value, indices in members.items():
        path, classes, counts = made[indices[0]]
        width = int(counts[total[classes] == value].sum())
        layers = tuple(dict.fromkeys(made[index][0] for index in indices))
        groups.append(Group(own[value], layers, width, max(1, width // len(own[value]))))
    return groups


def _counted(dim: Dim, solution: Solution) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Removable classes of a dimension, ascending, and how many of its indices each stands for."""
    size = int(np.prod([factor.size for factor in dim]))
    labels = [solution.class_of[block.labels.reshape(-1)] for block in blocks(dim)]
    if not labels:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    shares = np.concatenate([np.full(len(own), size // max(len(own), 1)) for own in labels])
    found, place = np.unique(np.concatenate(labels), return_inverse=True)
    counts = np.bincount(place, shares, minlength=len(found)).astype(np.int64)
    free = solution.removable[found]
    return found[free], counts[free]


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
