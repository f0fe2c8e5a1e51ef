"""Padding given by name.

conv(padding="same")  ⇒  conv(padding=d·(k−1)/2)          conv(padding="valid")  ⇒  conv(padding=0)

Exact. Convolutions with numbers for padding are what every other rule, pass and engine understands. Not legal where
d·(k−1) is odd: then "same" pads one more on the far side, which no symmetric padding does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from fxcompress.graph.edit import GraphEditor
from fxcompress.passes.base import Rewrite, Skip
from fxcompress.passes.fusion.base import Rule, Site
from fxcompress.passes.fusion.facts import Facts
from fxcompress.passes.fusion.layers import CONVS, with_padding

__all__ = ["NormalizePadding"]


@dataclass(frozen=True)
class PaddingSite(Site):
    """A call of a convolution, and the padding it gets."""

    layer: Any
    padding: tuple[int, ...]


class NormalizePadding(Rule[PaddingSite]):
    """See the module's text."""

    name: ClassVar[str] = "normalize_padding"
    needs_shapes: ClassVar[bool] = False

    def match(self, facts: Facts) -> Iterator[PaddingSite | Skip]:
        seen: set[str] = set()
        for node in facts.nodes:
            layer: Any = facts.layer_of(node, *CONVS)
            if layer is not None and isinstance(layer.padding, str) and str(node.target) not in seen:
                seen.add(str(node.target))
                yield self._match(node, layer)

    def _match(self, node: fx.Node, layer: Any) -> PaddingSite | Skip:
        site = str(node.target)
        if layer.padding_mode != "zeros":
            return Skip(site, "not_zero_padding", f"It pads by {layer.padding_mode!r}.", (node.name,))
        total = [step * (size - 1) for step, size in zip(layer.dilation, layer.kernel_size, strict=True)]
        if layer.padding == "valid":
            total = [0] * len(total)
        if any(width % 2 for width in total):
            reason = "The even kernel pads one more element on the far side, which no symmetric padding does."
            return Skip(site, "asymmetric_padding", reason, (node.name,))
        return PaddingSite(site, (node,), layer, tuple(width // 2 for width in total))

    def rewrite(self, editor: GraphEditor, site: PaddingSite) -> Rewrite:
        editor.set_module(site.name, with_padding(site.layer, site.padding), reshaped=False)
        detail = {"rule": self.name, "layers": [site.name], "padding": list(site.padding)}
        return Rewrite(site.name, f"padding {site.layer.padding!r} became {site.padding}", detail)
