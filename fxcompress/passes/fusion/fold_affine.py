"""Chains of per-channel arithmetic with constants: ``mul``, ``div``, ``add``, ``sub``, ``neg``, ``addcmul``.

layer → ·s → +t  ⇒  layer      W' = s·W,  b' = s·b + t                 (layer scale, frozen batch norm, gains)
·s → +t → layer  ⇒  layer      W' = W·s,  b' = b + Σ W·t               (input normalisation)

The first also for the learned scale and shift of a batch, layer, group or RMS norm, the second for the statistics of a
batch norm. A constant may be a number, a buffer or a parameter, along one dimension (or none). Not legal when the
dimension is not that of the layer's channels, when somebody reads the value in between, when a weight or a learned
constant is tied, for a shift into a norm without bias, and for a shift before a layer that pads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from fxcompress.graph.edit import GraphEditor
from fxcompress.passes.base import Rewrite, Skip
from fxcompress.passes.fusion import layers
from fxcompress.passes.fusion.affine import BATCH_NORMS, Affine, Step, read_step
from fxcompress.passes.fusion.base import Rule, Site
from fxcompress.passes.fusion.channels import Origin, trace_back
from fxcompress.passes.fusion.facts import Facts, tensor_value
from fxcompress.passes.fusion.fold_norm_after import not_finite

__all__ = ["FoldAffine"]

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_NORMS: tuple[type[nn.Module], ...] = (*BATCH_NORMS, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True)
class AffineSite(Site):
    """A chain of steps, the call of the layer it goes into, and that layer; ``ahead`` when the chain comes first."""

    steps: tuple[Step, ...]
    call: fx.Node
    layer: Any
    affine: Affine
    ahead: bool


class FoldAffine(Rule[AffineSite]):
    """See the module's text."""

    name: ClassVar[str] = "fold_affine"

    def match(self, facts: Facts) -> Iterator[AffineSite | Skip]:
        read = ((node, read_step(facts, node)) for node in facts.nodes)
        steps = {node: step for node, step in read if step is not None}
        linked: set[fx.Node] = set()
        for node, step in steps.items():
            if node in linked:
                continue  # part of an earlier step's chain
            chain, affine, dim = [step], step.affine, step.dim
            while len(chain[-1].node.users) == 1:
                after = steps.get(next(iter(chain[-1].node.users)))
                if after is None or (after.dim != dim and None not in (after.dim, dim)):
                    break
                linked.add(after.node)
                chain.append(after)
                affine, dim = affine.then(after.affine), dim if dim is not None else after.dim
            yield from self._sites(facts, tuple(chain), affine, dim)

    def _sites(
        self, facts: Facts, steps: tuple[Step, ...], affine: Affine, dim: int | None
    ) -> Iterator[AffineSite | Skip]:
        """The chain goes into the layer before it; where it may not, into the layer after it."""
        refused: list[Skip] = []
        origin = trace_back(steps[0].node, steps[0].data, dim)
        for ahead in (False, True):
            call = origin.node if not ahead else next(iter(steps[-1].node.users), None)
            layer = facts.layer_of(call, *layers.LINEARS, *(_BATCH_NORMS if ahead else _NORMS))
            if call is None or layer is None:
                continue  # no such neighbour
            found = self._check(facts, steps, affine, dim, call, layer, origin if not ahead else None)
            if isinstance(found, AffineSite):
                yield found
                return
            refused.append(found)
        yield from refused

    def _check(
        self,
        facts: Facts,
        steps: tuple[Step, ...],
        affine: Affine,
        dim: int | None,
        call: fx.Node,
        layer: Any,
        origin: Origin | None,
    ) -> AffineSite | Skip:
        site, last = steps[0].node.name, steps[-1].node
        others = origin.others if origin is not None else tuple(user for user in last.users if user is not call)
        if others:
            reason = f"The value between it and {call.target!r} is read elsewhere too."
            return Skip(site, "shared_value", reason, tuple(other.name for other in others))
        value = tensor_value(call if origin is not None else last)
        dim = origin.dim if origin is not None and dim is not None else dim
        if value is None or (dim is not None and dim != _channel_dim(layer, value)):
            reason = f"It varies along another dimension than the channels of {call.target!r}."
            return Skip(site, "channel_mismatch", reason, (call.name,))
        if not layers.dtype_fits(layer, value.dtype):
            return Skip(site, "mixed_dtype", f"Not every weight of {call.target!r} is {value.dtype}.", (call.name,))
        obstacle = _no_room(layer, affine, ahead=origin is None)
        if obstacle is not None:
            return Skip(site, obstacle[0], obstacle[1], (call.name,))
        refused = facts.unshared(site, call)
        for constant in (item for step in steps for item in step.constants):
            refused = refused or facts.tied(site, constant)
        if refused is not None:
            return refused
        if not layers.representable(layer, affine, ahead=origin is None):
            return not_finite(site, call)
        nodes = (*(step.node for step in steps), call)
        return AffineSite(site, nodes, steps, call, layer, affine, origin is None)

    def rewrite(self, editor: GraphEditor, site: AffineSite) -> Rewrite:
        into = str(site.call.target)
        fold: Any = layers.after
        if site.ahead:
            fold = layers.before_norm if type(site.layer) in _BATCH_NORMS else layers.before
        editor.set_module(into, fold(site.layer, site.affine), reshaped=False)
        editor.replace(site.steps[-1].node, site.steps[0].data)
        detail = {
            "rule": self.name,
            "layers": [into],
            "operations": [step.node.name for step in site.steps],
            "weight": list(site.layer.weight.shape),
        }
        return Rewrite(site.name, f"folded into {into}", detail)


def _channel_dim(layer: Any, value: torch.Tensor) -> int | None:
    if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        return value.dim() - 1
    return 1 if isinstance(layer, (*BATCH_NORMS, nn.GroupNorm)) else layers.channel_dim(layer, value)


def _no_room(layer: Any, affine: Affine, *, ahead: bool) -> tuple[str, str] | None:
    """Code and sentence when the layer has no place for the map."""
    if layer.weight is None:
        return "no_affine", "The norm has no learned scale that the arithmetic could go into."
    if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)) and len(layer.normalized_shape) != 1:
        return "channel_mismatch", "The norm runs over several dimensions."
    if ahead and type(layer) in _BATCH_NORMS:
        if layer.running_mean is None:
            return "batch_statistics", "The norm uses the statistics of the batch, so the scale cancels but for ε."
        if layers.before_norm(layer, affine) is None:
            return "not_finite", "Undone in the statistics of the norm, the map would leave no positive variance."
    if not affine.shifts():
        return None
    if isinstance(layer, nn.RMSNorm):
        return "no_bias", "An RMS norm has no bias that could take up the shift."
    obstacle = layers.no_shift_before(layer) if ahead and type(layer) not in _BATCH_NORMS else None
    return None if obstacle is None else ("padded_shift", f"The chain shifts its input, and {obstacle}.")
