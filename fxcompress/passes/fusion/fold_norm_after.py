"""Batch norm after a linear layer.

conv → norm  ⇒  conv      W' = W·γ/σ,  b' = (b − μ)·γ/σ + β,  σ = √(running variance + ε)

Holds for linear layers, convolutions and transposed convolutions of any rank and grouping, and through permutations
and reshapes between the two that leave the channels whole. Not legal when anybody else reads the value between them,
when the layer's weights serve another call or another reader, when the norm uses the statistics of the batch, or when
it normalises another dimension than the layer's channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxcompress.graph.edit import GraphEditor
from fxcompress.passes.base import Rewrite, Skip
from fxcompress.passes.fusion import layers
from fxcompress.passes.fusion.affine import BATCH_NORMS, Affine, norm_affine
from fxcompress.passes.fusion.base import Rule, Site
from fxcompress.passes.fusion.channels import trace_back
from fxcompress.passes.fusion.facts import Facts, first_input, tensor_value

__all__ = ["FoldNormAfter", "foldable_norm"]


@dataclass(frozen=True)
class NormSite(Site):
    """A norm, the call of the layer it goes into, and that layer."""

    norm: fx.Node
    call: fx.Node
    layer: Any
    affine: Affine


class FoldNormAfter(Rule[NormSite]):
    """See the module's text."""

    name: ClassVar[str] = "fold_norm_after"
    needs_shapes: ClassVar[bool] = False

    def match(self, facts: Facts) -> Iterator[NormSite | Skip]:
        for node in facts.nodes:
            if facts.layer_of(node, *BATCH_NORMS) is not None:
                found = self._match(facts, node)
                if found is not None:
                    yield found

    def _match(self, facts: Facts, norm: fx.Node) -> NormSite | Skip | None:
        data = first_input(norm)
        if data is None:
            return None
        origin = trace_back(norm, data, 1)
        call, site = origin.node, str(norm.target)
        layer: Any = facts.layer_of(call, *layers.LINEARS)
        if layer is None:
            return None  # no linear layer before it: fold_norm_before tells where a norm stands alone
        if origin.dim != layers.channel_dim(layer, tensor_value(call)):
            reason = f"The norm runs over another dimension than the channels that {call.target!r} produces."
            return Skip(site, "channel_mismatch", reason, (call.name,))
        if origin.others:
            reason = f"What {call.target!r} produces is also read without the norm."
            return Skip(site, "shared_value", reason, tuple(other.name for other in origin.others))
        affine = foldable_norm(facts, norm, layer.weight.dtype)
        if isinstance(affine, Skip):
            return affine
        refused = facts.unshared(site, call)
        if refused is not None:
            return refused
        if not layers.representable(layer, affine):
            return not_finite(site, call)
        return NormSite(site, (norm, call), norm, call, layer, affine)

    def rewrite(self, editor: GraphEditor, site: NormSite) -> Rewrite:
        editor.set_module(str(site.call.target), layers.after(site.layer, site.affine), reshaped=False)
        editor.replace(site.norm, site.norm.args[0])  # type: ignore[arg-type]
        into = str(site.call.target)
        detail = {"rule": self.name, "layers": [into, site.name], "weight": list(site.layer.weight.shape)}
        return Rewrite(site.name, f"folded into {into}", detail)


def foldable_norm(facts: Facts, norm: fx.Node, dtype: torch.dtype) -> Affine | Skip:
    """The norm as an affine map, or why it may not go into weights of ``dtype``."""
    site, held = str(norm.target), facts.layer(norm)
    others = tuple(other.name for other in facts.calls[site] if other is not norm)
    if others:
        reason = f"The norm {site!r} is called {len(others) + 1} times; its weights serve every call."
        return Skip(site, "shared_layer", reason, others)
    if held.running_mean is None:
        reason = "The norm has no running statistics: it normalises by those of the batch, which no weight can hold."
        return Skip(site, "batch_statistics", reason, (norm.name,))
    if not layers.dtype_fits(held, dtype):
        return Skip(site, "mixed_dtype", f"Not every tensor of the norm is {dtype}, as the weights are.", (norm.name,))
    tied = facts.tied(site, norm)
    if tied is not None:
        return tied
    affine = norm_affine(held)
    return not_finite(site, norm) if affine is None else affine


def not_finite(site: str, node: fx.Node) -> Skip:
    """The folded weights would not be numbers."""
    reason = "A weight is NaN or infinite, or a variance is not positive; folding would spread that over the layer."
    return Skip(site, "not_finite", reason, (node.name,))
