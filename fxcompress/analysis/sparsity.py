"""Sparse weights of a graph: which zeros are meant to stay, in which pattern, and what they save in a file.

The zeros are the mask. Beside them a graph only knows which weights were made sparse (:attr:`GraphInfo.sparse`), so
that copies, saved graphs, folded norms and removed channels keep their masks without anybody carrying them along, and
a weight that merely starts at zero is not held there.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxcompress.errors import OptionError
from fxcompress.graph.info import info
from fxcompress.graph.raw_bytes import raw_bytes

__all__ = [
    "UNSTRUCTURED",
    "Sparsity",
    "blocks",
    "compressed_bytes",
    "follows",
    "input_dim",
    "mark_sparse",
    "masks",
    "pattern_of",
    "sparse_layers",
    "sparse_weights",
    "sparsity",
]

UNSTRUCTURED = "unstructured"

_SAMPLE = 1 << 20  # bytes of a weight that are compressed; more are extrapolated
_PIECES = 16


@dataclass(frozen=True)
class Sparsity:
    """Zeros among the weights of linear layers and convolutions.

    Attributes:
        zeros: how many weights are zero.
        weights: how many there are.
        layers: path of a layer → share of its weights that is zero.
    """

    zeros: int
    weights: int
    layers: Mapping[str, float]

    @property
    def share(self) -> float:
        """Zeros among all of these weights, in [0, 1]."""
        return self.zeros / self.weights if self.weights else 0.0


def sparsity(graph_module: fx.GraphModule) -> Sparsity:
    """The share of zeros in every linear layer and convolution of the graph; a tied weight counts once."""
    zeros = count = 0
    layers: dict[str, float] = {}
    seen: set[int] = set()
    for path in dict.fromkeys(str(node.target) for node in graph_module.graph.find_nodes(op="call_module")):
        layer = graph_module.get_submodule(path)
        if not isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)) or not layer.weight.numel():
            continue
        found = int((layer.weight.detach() == 0).sum())
        layers[path] = found / layer.weight.numel()
        if id(layer.weight) not in seen:
            seen.add(id(layer.weight))
            zeros, count = zeros + found, count + layer.weight.numel()
    return Sparsity(zeros, count, layers)


# --- masks ------------------------------------------------------------------------------------------------------


def mark_sparse(graph_module: fx.GraphModule, paths: Iterable[str], pattern: str) -> None:
    """Remember that the zeros of these weights are meant to stay.

    Args:
        graph_module: holds the weights.
        paths: of weights: ``layer1.0.conv1.weight``.
        pattern: ``unstructured``, or ``n:m``.
    """
    info(graph_module).sparse.update((path, pattern) for path in paths)


def sparse_weights(graph_module: fx.GraphModule) -> dict[str, str]:
    """Path of every weight that was made sparse and that the graph still holds → its pattern."""
    known = dict(graph_module.named_parameters(remove_duplicate=False))
    return {path: pattern for path, pattern in info(graph_module).sparse.items() if path in known}


def masks(graph_module: fx.GraphModule) -> dict[str, torch.Tensor]:
    """For every weight that was made sparse, where it is not zero: bool, of the weight's shape.

    Training multiplies by these, so that zeros stay zeros.
    """
    known: dict[str, Any] = dict(graph_module.named_parameters(remove_duplicate=False))
    return {path: known[path].detach() != 0 for path in sparse_weights(graph_module)}


# --- n:m --------------------------------------------------------------------------------------------------------


def pattern_of(text: str) -> tuple[int, int]:
    """``(2, 4)`` of ``"2:4"``: at most two of every four are not zero.

    Raises:
        OptionError: it is no such pattern.
    """
    n, colon, m = text.partition(":")
    if not colon or not n.isdecimal() or not m.isdecimal() or not 0 < int(n) < int(m):
        raise OptionError(f"{text!r} is no pattern", where="pattern", remedy="write '2:4': 2 of every 4 inputs remain")
    return int(n), int(m)


def input_dim(layer: nn.Module) -> int:
    """The dimension of a layer's weight along which it adds up its inputs, and along which n:m patterns lie.

    TensorRT's sparse kernels ask for zeros along the input channels, for each output channel and each position of the
    kernel; the same for the inputs of a matrix product.
    """
    return 0 if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 1


def blocks(weight: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """The weight as ``[everything else, size]``: neighbours along ``dim`` in one row. ``size`` divides that dim."""
    return weight.movedim(dim, -1).reshape(-1, size)


def follows(weight: torch.Tensor, dim: int, n: int, m: int) -> bool:
    """Whether at most ``n`` of every ``m`` neighbours along ``dim`` are not zero."""
    if weight.shape[dim] % m:
        return False
    return not bool(((blocks(weight.detach(), dim, m) != 0).sum(1) > n).any())


def sparse_layers(graph_module: fx.GraphModule, n: int, m: int) -> list[str]:
    """Layers that were made sparse and whose weight has the pattern now, whatever passes have run since."""
    found: list[str] = []
    for path in sparse_weights(graph_module):
        owner, _, name = path.rpartition(".")
        layer = graph_module.get_submodule(owner)
        if name == "weight" and isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
            if follows(layer.weight, input_dim(layer), n, m):
                found.append(owner)
    return found


# --- size -------------------------------------------------------------------------------------------------------


def compressed_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors after deflate (as in gzip and zip); of a large tensor pieces are compressed and extrapolated."""
    total = 0.0
    for tensor in tensors:
        data = torch.from_numpy(raw_bytes(tensor))
        if len(data) <= _SAMPLE:
            total += len(zlib.compress(data.numpy().data))
            continue
        width = _SAMPLE // _PIECES
        starts = torch.arange(_PIECES) * (len(data) - width) // (_PIECES - 1) // 16 * 16
        sample = torch.stack([data[start : start + width] for start in starts.tolist()])
        total += len(zlib.compress(sample.reshape(-1).numpy().data)) * len(data) / sample.numel()
    return round(total)
