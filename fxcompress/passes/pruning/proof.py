"""Proof of a removal: the pruned graph computes what the original does once everything removed is zero there.

A channel whose weights are zero contributes nothing, so removing it may not change the outputs. Only a norm over the
removed channels tells zeros from absence: its mean and variance are over fewer values. There the reference takes its
statistics over the channels that stay, which is what the smaller norm does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxcompress.analysis.dependency.removal import Removal
from fxcompress.errors import VerificationError
from fxcompress.graph.casting import cast_graph, cast_leaves
from fxcompress.graph.running import max_relative_error, nested_inputs, outputs_of

__all__ = ["Proof", "dead_channel_proof"]

aten = torch.ops.aten

TOLERANCE = 1e-4
_TOLERANCE_WIDE = 1e-6  # weights that were rescaled keep the rounding of their own precision
_FUNCTIONAL_NORMS = (aten.layer_norm.default, aten.group_norm.default)


@dataclass(frozen=True)
class Proof:
    """What the proof found.

    Attributes:
        error: largest relative error between the two outputs.
        norms: norms over removed channels, whose statistics the reference takes over the channels that stay.
        reason: why there is no proof, if there is none; then ``error`` is None.
    """

    error: float | None
    norms: tuple[str, ...] = ()
    reason: str | None = None


class NormOfKept(nn.Module):
    """A layer or group norm whose statistics leave out the channels that are removed.

    Args:
        groups: groups of channels; 1 for a layer norm.
        keep: ``[channels]``, 1 where a channel stays, 0 where it goes (its input, weight and bias are zero there).
        dim: where the channels are: -1 for a layer norm, 1 for a group norm.
    """

    def __init__(self, norm: nn.LayerNorm | nn.GroupNorm, groups: int, keep: torch.Tensor, dim: int) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.groups, self.dim = groups, dim
        self.keep: torch.Tensor
        self.register_buffer("keep", keep.to(norm.weight) if norm.weight is not None else keep.float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the norm; float tensors of the norm's input shape."""
        # A layer norm treats each place on its own, a group norm all places of a sample together.
        flat = x.reshape(-1, x.shape[-1], 1) if self.dim == -1 else x.flatten(2)
        grouped = flat.reshape(flat.shape[0], self.groups, -1, flat.shape[2])
        keep = self.keep.to(x.dtype).reshape(1, self.groups, -1, 1)
        count = (keep.sum(2, keepdim=True) * flat.shape[2]).clamp_min(1)
        mean = (grouped * keep).sum((2, 3), keepdim=True) / count
        centred = (grouped - mean) * keep
        variance = centred.square().sum((2, 3), keepdim=True) / count
        normal = (centred * (variance + self.eps).rsqrt()).reshape(x.shape)
        shape = [1] * x.dim()
        shape[self.dim] = -1
        if self.weight is not None:
            normal = normal * self.weight.reshape(shape)
        return normal + self.bias.reshape(shape) if self.bias is not None else normal


def dead_channel_proof(
    original: fx.GraphModule, pruned: fx.GraphModule, removal: Removal, leaves: Sequence[Any], seed: int
) -> Proof:
    """Compare ``pruned`` with a copy of ``original`` in which all that was removed is zero.

    Args:
        original: the graph as it was; ``removal`` is of this graph. It is changed here: give a copy.
        pruned: what became of it.
        removal: what went.
        leaves: flat example inputs.
        seed: of operations that draw random numbers.

    Raises:
        VerificationError: the outputs differ; the removal is not what it claims to be.
    """
    norms, missing = _norms_over_removed(original, removal)
    if missing:
        return Proof(None, reason=f"{missing} normalises over removed channels without a layer")
    _silence(original, removal)
    for path, layer in norms.items():
        owner, _, name = path.rpartition(".")
        original.get_submodule(owner)._modules[name] = layer
    error = _error(original, pruned, leaves, seed)
    if not error <= TOLERANCE:  # a deep model may amplify rounding: in float64 a right removal still agrees
        wide = cast_leaves(list(leaves), torch.float64)
        exact = cast_graph(original, torch.float64), cast_graph(pruned, torch.float64)
        _recount_exactly(*exact, pruned, removal)
        precise = _error(*exact, wide, seed)
        if not precise <= _TOLERANCE_WIDE:
            raise VerificationError(
                f"removing the channels changes the outputs by {error:.3g} beyond what zeroing them does; "
                f"{TOLERANCE:.3g} is allowed",
                where="prune_channels",
                remedy="name the layers to leave in ignore, and report the model; yours is as it was",
            )
        error = precise
    return Proof(error, tuple(norms))


def _recount_exactly(
    expected: fx.GraphModule, actual: fx.GraphModule, pruned: fx.GraphModule, removal: Removal
) -> None:
    """Give the RMS norms of ``actual`` the weight ``w·√(N/k)`` unrounded, where ``pruned`` holds it rounded.

    That rounding is the only one which casting to a wider precision does not undo, and deep models amplify it.
    """
    for path, layer in actual.named_modules(remove_duplicate=False):
        before = expected.get_submodule(path) if isinstance(layer, nn.RMSNorm) else None
        if not isinstance(before, nn.RMSNorm) or before.weight is None or before.weight.shape == layer.weight.shape:
            continue
        assert isinstance(layer, nn.RMSNorm)
        ratio = before.normalized_shape[0] / layer.normalized_shape[0]
        rounded = torch.finfo(pruned.get_parameter(f"{path}.weight").dtype).eps
        meant = before.weight.detach()[removal.kept_indices(f"{path}.weight")[0]] * ratio**0.5
        if torch.allclose(layer.weight, meant, rtol=2 * rounded, atol=0):  # a shared weight is not rescaled
            layer.weight = nn.Parameter(meant, requires_grad=False)
        if before.eps is None and layer.eps is not None:
            before.eps = layer.eps / ratio


def _error(expected: fx.GraphModule, actual: fx.GraphModule, leaves: Sequence[Any], seed: int) -> float:
    runs = [outputs_of(graph, *nested_inputs(graph, leaves), seed) for graph in (expected, actual)]
    return max_relative_error(*runs)[0]


def _silence(graph_module: fx.GraphModule, removal: Removal) -> None:
    """Zero in every weight of the copy what was removed from it."""
    made: dict[int, torch.Tensor] = {}
    for path in removal.builder.weights:
        kept = removal.kept_indices(path)
        if not kept:
            continue
        owner, _, name = path.rpartition(".")
        module = graph_module.get_submodule(owner)
        store: Any = module._parameters if name in module._parameters else module._buffers
        tensor = store[name]
        if id(tensor) not in made:
            fresh = tensor.detach().clone()
            for dim, index in kept.items():
                gone = torch.ones(fresh.shape[dim], dtype=torch.bool)
                gone[index] = False
                fresh.index_fill_(dim, gone.nonzero().flatten().to(fresh.device), 0)
            made[id(tensor)] = nn.Parameter(fresh, False) if isinstance(tensor, nn.Parameter) else fresh
        store[name] = made[id(tensor)]
        if isinstance(module, nn.RNNBase):
            module._flat_weights = [getattr(module, item) for item in module._flat_weights_names]


def _norms_over_removed(graph_module: fx.GraphModule, removal: Removal) -> tuple[dict[str, nn.Module], str | None]:
    """Norms over channels of which some went, as norms over the rest; and one that cannot be written so, if any."""
    found: dict[str, nn.Module] = {}
    for node in removal.builder.values:  # of the pruned graph; the copy has the same layers
        if node.op == "call_function" and node.target in _FUNCTIONAL_NORMS:
            if any(removal.touches(dim) for dim in removal.builder.layout(node.args[0])):
                return found, node.name
        if node.op != "call_module":
            continue
        layer = graph_module.get_submodule(str(node.target))
        if not isinstance(layer, (nn.LayerNorm, nn.GroupNorm)):
            continue
        dim = -1 if isinstance(layer, nn.LayerNorm) else 1
        channels = removal.builder.layout(node.args[0])[dim]
        if removal.touches(channels):
            groups = layer.num_groups if isinstance(layer, nn.GroupNorm) else 1
            keep = torch.from_numpy(removal.kept_mask(channels))
            found[str(node.target)] = NormOfKept(layer, groups, keep, dim)
    return found, None
