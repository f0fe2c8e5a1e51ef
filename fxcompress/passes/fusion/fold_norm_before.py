"""Batch norm before a linear layer.

norm → conv  ⇒  conv      W' = W·s over input channels,  b' = b + Σ W·t,  s = γ/σ,  t = β − μ·γ/σ

The shift t is a constant the kernel must see everywhere: legal for a convolution without padding (zero padding is not
shifted), for a linear layer over the normalised dimension, and for a transposed convolution only of kernel and
stride 1. Where every shift is zero, it is always legal. Norms that stand alone are told, so that none is forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from torch import fx

from fxcompress.graph.edit import GraphEditor
from fxcompress.passes.base import Rewrite, Skip
from fxcompress.passes.fusion import layers
from fxcompress.passes.fusion.affine import BATCH_NORMS
from fxcompress.passes.fusion.base import Rule
from fxcompress.passes.fusion.channels import trace_back
from fxcompress.passes.fusion.facts import Facts, first_input, tensor_value
from fxcompress.passes.fusion.fold_norm_after import NormSite, foldable_norm, not_finite

__all__ = ["FoldNormBefore"]


class FoldNormBefore(Rule[NormSite]):
    """See the module's text."""

    name: ClassVar[str] = "fold_norm_before"
    needs_shapes: ClassVar[bool] = False

    def match(self, facts: Facts) -> Iterator[NormSite | Skip]:
        for node in facts.nodes:
            if facts.layer_of(node, *BATCH_NORMS) is not None:
                found = self._match(facts, node)
                if found is not None:
                    yield found

    def _match(self, facts: Facts, norm: fx.Node) -> NormSite | Skip | None:
        site = str(norm.target)
        calls = [user for user in norm.users if facts.layer_of(user, *layers.LINEARS) is not None]
        if not calls:
            return self._alone(facts, norm)
        call = calls[0]
        layer: Any = facts.layer(call)
        others = tuple(user.name for user in norm.users if user is not call)
        if others:
            return Skip(site, "shared_value", "What the norm produces is read by more than one layer.", others)
        if layers.channel_dim(layer, tensor_value(norm)) != 1:
            reason = f"The norm runs over another dimension than the channels that {call.target!r} reads."
            return Skip(site, "channel_mismatch", reason, (call.name,))
        affine = foldable_norm(facts, norm, layer.weight.dtype)
        if isinstance(affine, Skip):
            return affine
        obstacle = layers.no_shift_before(layer) if affine.shifts() else None
        if obstacle is not None:
            return Skip(site, "padded_shift", f"The norm shifts its input, and {obstacle}.", (call.name,))
        refused = facts.unshared(site, call)
        if refused is not None:
            return refused
        if not layers.representable(layer, affine, ahead=True):
            return not_finite(site, call)
        return NormSite(site, (norm, call), norm, call, layer, affine)

    def _alone(self, facts: Facts, norm: fx.Node) -> Skip | None:
        data = first_input(norm)
        if data is not None and facts.layer_of(trace_back(norm, data, 1).node, *layers.LINEARS) is not None:
            return None  # fold_norm_after tells why it may not go into the layer before it
        reason = "No linear layer stands directly before or after it, so there are no weights it could go into."
        beside = [item for item in (data, *norm.users) if item is not None]
        return Skip(str(norm.target), "no_neighbour", reason, tuple(item.name for item in beside))

    def rewrite(self, editor: GraphEditor, site: NormSite) -> Rewrite:
        into = str(site.call.target)
        editor.set_module(into, layers.before(site.layer, site.affine), reshaped=False)
        editor.replace(site.norm, site.norm.args[0])  # type: ignore[arg-type]
        detail = {"rule": self.name, "layers": [site.name, into], "weight": list(site.layer.weight.shape)}
        return Rewrite(site.name, f"folded into {into}", detail)
