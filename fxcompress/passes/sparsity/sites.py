"""The weights that may become sparse, and why others may not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import fx, nn

from fxcompress.analysis.sparsity import input_dim
from fxcompress.errors import OptionError, PreconditionError, nearest
from fxcompress.graph.queries import GraphIndex
from fxcompress.passes.base import Skip

__all__ = ["Site", "find_sites"]

_KINDS = (
    nn.Linear,
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


@dataclass(frozen=True)
class Site:
    """One weight, of one layer or of several that are tied.

    Attributes:
        layers: paths of the layers that hold it; the first names the site.
        nodes: names of the nodes that call them.
        layer: the first of them.
    """

    layers: tuple[str, ...]
    nodes: tuple[str, ...]
    layer: Any

    @property
    def path(self) -> str:
        return self.layers[0]

    @property
    def weight(self) -> torch.Tensor:
        """What the layer holds; not to be written into."""
        weight: torch.Tensor = self.layer.weight.detach()
        return weight

    @property
    def dim(self) -> int:
        """The dimension of the weight that counts inputs."""
        return input_dim(self.layer)


def find_sites(
    graph_module: fx.GraphModule, ignore: Sequence[str], sparsities: Mapping[str, float], ends: str
) -> tuple[list[Site], list[Skip]]:
    """Sites in the order of the graph, and what is left.

    Args:
        graph_module: with the layers.
        ignore: name patterns of layers that stay dense.
        sparsities: with name patterns as keys; each must match.
        ends: ``dense`` leaves the first and the last layer.

    Raises:
        OptionError: a pattern matches no layer.
        PreconditionError: a weight is not finite.
    """
    index = GraphIndex(graph_module)
    layers = {path: graph_module.get_submodule(path) for path in index.calls}
    held = [path for path, layer in layers.items() if isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd))]
    for option, patterns in (("ignore", ignore), ("sparsities", tuple(sparsities))):
        for pattern in patterns:
            if not any(fnmatchcase(path, pattern) for path in held):
                raise OptionError(
                    f"no linear layer or convolution matches {pattern!r}", where=option, remedy=nearest(pattern, held)
                )
    edge = {held[0], held[-1]} if ends == "dense" and held else set()
    sites: list[Site] = []
    skipped: list[Skip] = []
    done: set[str] = set()
    for path in held:
        if path in done:
            continue
        layer: Any = layers[path]
        together = [user.path for user in index.users_of(f"{path}.weight")]
        owners = [name.rpartition(".")[0] for name in together]
        done.update(owners)
        reason = _reason(path, layer, ignore, edge) or _tied(graph_module, index, together, layer)
        if reason is not None:
            skipped.append(Skip(path, *reason))
            continue
        if not bool(torch.isfinite(layer.weight).all()):
            raise PreconditionError("the weight is not finite", where=path, remedy="repair the checkpoint")
        nodes = tuple(node.name for owner in owners for node in index.calls.get(owner, ()))
        sites.append(Site(tuple(owners), nodes, layer))
    return sites, skipped


def _reason(path: str, layer: Any, ignore: Sequence[str], edge: set[str]) -> tuple[str, str] | None:
    if any(fnmatchcase(path, pattern) for pattern in ignore):
        return "ignored", "it matches a pattern of ignore."
    if path in edge:
        return "ends", "it is the first or the last layer, and ends='dense'."
    if type(layer) not in _KINDS:
        return "kind", f"a {type(layer).__name__} is not made sparse: run this pass before quantization."
    if not layer.weight.numel() or not layer.weight.is_floating_point():
        return "kind", f"its weight is {layer.weight.dtype} with {layer.weight.numel()} elements."
    return None


def _tied(graph_module: fx.GraphModule, index: GraphIndex, paths: Sequence[str], layer: Any) -> tuple[str, str] | None:
    """All holders must be layers of the same kind, for a zero to mean the same to each."""
    for path in paths:
        owner, _, name = path.rpartition(".")
        other: Any = graph_module.get_submodule(owner)
        same = name == "weight" and type(other) is type(layer) and other.weight is layer.weight
        if not same or owner not in index.calls:
            return "tied_weight", f"its weight is tied to {path!r}, which would be changed too."
    return None
