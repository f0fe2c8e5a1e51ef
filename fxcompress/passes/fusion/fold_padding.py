"""Zero padding in front of a convolution.

pad(x, 0) → conv(padding=p)  ⇒  conv(padding=p + pad)

Exact. Legal where the padding is of zeros, only over the spatial dimensions, not negative and the same on both sides,
and the convolution alone reads it. Not legal before a transposed convolution, whose padding crops, nor before a
max pooling, which pads with −∞, nor an average pooling, whose divisor would change.
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
from fxcompress.passes.fusion.base import Rule, Site
from fxcompress.passes.fusion.facts import Facts

__all__ = ["FoldPadding", "zero_padding"]

aten = torch.ops.aten

_PADS = {aten.pad.default, aten.constant_pad_nd.default}
_POOLS = {getattr(aten, f"{kind}_pool{rank}d").default: kind for kind in ("max", "avg") for rank in (1, 2, 3)} | {
    getattr(aten, f"max_pool{rank}d_with_indices").default: "max" for rank in (2, 3)
}


@dataclass(frozen=True)
class PadSite(Site):
    """A padding, the call of the convolution that reads it, and the padding that takes its place."""

    pad: fx.Node
    call: fx.Node
    layer: Any
    padding: tuple[int, ...]


class FoldPadding(Rule[PadSite]):
    """See the module's text."""

    name: ClassVar[str] = "fold_padding"
    needs_shapes: ClassVar[bool] = False

    def match(self, facts: Facts) -> Iterator[PadSite | Skip]:
        for node in facts.nodes:
            if node.op == "call_function" and node.target in _PADS:
                found = self._match(facts, node)
                if found is not None:
                    yield found

    def _match(self, facts: Facts, pad: fx.Node) -> PadSite | Skip | None:
        readers = list(pad.users)
        kinds = (*layers.CONVS, *layers.TRANSPOSED)
        call = next((user for user in readers if facts.layer_of(user, *kinds) is not None), None)
        if call is None:
            pools = [user for user in readers if user.target in _POOLS]
            if not pools:
                return None  # nothing beside it that pads by itself
            reason = f"A {_POOLS[pools[0].target]} pooling does not pad with zeros that count like other elements."
            return Skip(pad.name, "not_convolution", reason, (pools[0].name,))
        layer: Any = facts.layer(call)
        if len(readers) > 1:
            others = tuple(user.name for user in readers if user is not call)
            return Skip(pad.name, "shared_value", "The padded value is also read elsewhere.", others)
        if type(layer) in layers.TRANSPOSED:
            reason = "The padding of a transposed convolution crops its output instead of padding its input."
            return Skip(pad.name, "transposed", reason, (call.name,))
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            reason = f"{call.target!r} itself pads by another rule than with a number of zeros."
            return Skip(pad.name, "not_zero_padding", reason, (call.name,))
        widths = zero_padding(pad)
        if widths is None:
            return Skip(pad.name, "not_zero_padding", "It pads with something other than zeros.", (pad.name,))
        if not all(isinstance(width, int) for width in widths):
            return Skip(pad.name, "dynamic_size", "How far it pads depends on the size of the input.", (pad.name,))
        spatial = len(layer.kernel_size)
        sides = [(widths[index], widths[index + 1]) for index in range(0, len(widths), 2)]
        if any(side != (0, 0) for side in sides[spatial:]):
            return Skip(pad.name, "channel_padding", "It also pads the channels or the batch.", (pad.name,))
        if any(near != far or near < 0 for near, far in sides):
            reason = "It pads the two sides of a dimension differently, or crops."
            return Skip(pad.name, "asymmetric_padding", reason, (pad.name,))
        refused = self._shared(facts, pad, call)
        if refused is not None:
            return refused
        widest = [near for near, _ in sides[:spatial]] + [0] * (spatial - len(sides))
        padding = tuple(own + more for own, more in zip(layer.padding, reversed(widest), strict=True))
        return PadSite(pad.name, (pad, call), pad, call, layer, padding)

    def _shared(self, facts: Facts, pad: fx.Node, call: fx.Node) -> Skip | None:
        others = tuple(other.name for other in facts.calls[str(call.target)] if other is not call)
        reason = f"The convolution {call.target!r} is called {len(others) + 1} times; its padding serves every call."
        return Skip(pad.name, "shared_layer", reason, others) if others else None

    def rewrite(self, editor: GraphEditor, site: PadSite) -> Rewrite:
        into = str(site.call.target)
        editor.set_module(into, layers.with_padding(site.layer, site.padding))
        editor.set_args(site.call, (site.pad.args[0],))
        detail = {"rule": self.name, "layers": [into], "padding": list(site.padding)}
        return Rewrite(site.name, f"folded into {into}", detail)


def zero_padding(pad: fx.Node) -> list[Any] | None:
    """The widths, last dimension first, of a padding with zeros; None where it pads with something else."""
    arguments = [*pad.args, *([None] * 4)][:4]
    widths: Any = pad.kwargs.get("pad", arguments[1])
    mode: Any = "constant"
    value: Any = pad.kwargs.get("value", arguments[2])
    if pad.target is aten.pad.default:
        mode, value = pad.kwargs.get("mode", arguments[2] or "constant"), pad.kwargs.get("value", arguments[3])
    return list(widths) if mode == "constant" and value in (None, 0, 0.0) else None
