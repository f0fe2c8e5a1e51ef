"""Operations that return their argument.

f(x) = x  ⇒  x

Dropout in eval mode; ``x·1``, ``x/1``, ``x + 0``, ``x − 0``; ``clone``, ``contiguous``, ``alias``, ``to`` of the same
dtype and device; reshapes, expansions, repetitions, slices and resizings to the same shape; permutations and rolls by
nothing; a concatenation of one; a padding by nothing. Exact, where shape and dtype stay.

Removing dropout also takes it from training that follows: leave this rule out to keep it. A ``detach`` of something
that is trained stays, because it says where gradients stop. A copy that changes the memory layout goes where its
readers do not depend on that; a ``view`` of it becomes a ``reshape``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from fxcompress.graph.edit import GraphEditor
from fxcompress.graph.shapes import same_value
from fxcompress.passes.base import Rewrite, Skip
from fxcompress.passes.fusion.base import Rule, Site
from fxcompress.passes.fusion.channels import PERMUTES, RESHAPES, permutation
from fxcompress.passes.fusion.constants import draws_random_numbers
from fxcompress.passes.fusion.facts import Facts, first_input, tensor_value
from fxcompress.passes.fusion.layout import kept_for_layout

__all__ = ["RemoveIdentities"]

aten = torch.ops.aten

_DROPOUTS = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
_COPIES = {
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
    aten.positive.default,
    aten.resolve_conj.default,
    aten.resolve_neg.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
}
# The same shape can only mean the same elements in the same order.
_RESIZES = RESHAPES | {
    aten.expand.default,
    aten.expand_as.default,
    aten.broadcast_to.default,
    aten.repeat.default,
    aten.slice.Tensor,
    aten.narrow.default,
}
_RANDOM_OFF = {
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
}


def _number(value: Any, wanted: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == wanted


def _by_one(node: fx.Node) -> bool:
    return _number(node.args[1], 1)


def _plus_zero(node: fx.Node) -> bool:
    return _number(node.args[1], 0)


def _nothing(node: fx.Node) -> bool:
    widths: Any = node.args[1]
    return all(_number(width, 0) for width in widths)


def _is_resized_by_one(node: fx.Node) -> bool:
    """An interpolation to the same size, told by size or by a factor of one: every weight is 1 or 0."""
    if node.kwargs:
        return False
    factors = node.args[-1]
    return factors is None or (isinstance(factors, (list, tuple)) and all(_number(item, 1) for item in factors))


_CHECKS: dict[Any, Callable[[fx.Node], bool]] = {
    aten.mul.Tensor: _by_one,
    aten.mul.Scalar: _by_one,
    aten.div.Tensor: _by_one,
    aten.div.Scalar: _by_one,
    aten.pow.Tensor_Scalar: _by_one,
    aten.add.Tensor: _plus_zero,
    aten.add.Scalar: _plus_zero,
    aten.sub.Tensor: _plus_zero,
    aten.sub.Scalar: _plus_zero,
    aten.pad.default: _nothing,
    aten.constant_pad_nd.default: _nothing,
    aten.roll.default: _nothing,
    aten.upsample_nearest1d.vec: _is_resized_by_one,
    aten.upsample_nearest2d.vec: _is_resized_by_one,
    aten.upsample_nearest3d.vec: _is_resized_by_one,
    aten.upsample_linear1d.vec: _is_resized_by_one,
    aten.upsample_bilinear2d.vec: _is_resized_by_one,
    aten.upsample_trilinear3d.vec: _is_resized_by_one,
}


@dataclass(frozen=True)
class IdentitySite(Site):
    """A node that returns one of its arguments, and what it is."""

    kind: str


class RemoveIdentities(Rule[IdentitySite]):
    """See the module's text."""

    name: ClassVar[str] = "remove_identities"
    needs_shapes: ClassVar[bool] = False

    def match(self, facts: Facts) -> Iterator[IdentitySite | Skip]:
        trained: set[fx.Node] | None = None
        for node in facts.nodes:
            source = _source(node)
            value, made = tensor_value(source), tensor_value(node)
            if source is None or not _is_identity(facts, node):
                continue  # computes something
            if node.op == "call_module":
                yield IdentitySite(str(node.target), (node,), type(facts.layer(node)).__name__)
                continue
            if value is None or made is None or not same_value(value, made) or value.device != made.device:
                continue  # computes something
            site = node.name
            if node.target is aten.detach.default:
                trained = _trained(facts) if trained is None else trained
                if source in trained:
                    yield Skip(site, "blocks_gradient", "It says where gradients stop in training.", (source.name,))
                    continue
            kept = kept_for_layout(facts, node)
            yield IdentitySite(site, (node,), str(node.target)) if kept is None else kept

    def rewrite(self, editor: GraphEditor, site: IdentitySite) -> Rewrite:
        node = site.nodes[0]
        source = _source(node)
        assert source is not None
        editor.replace(node, source)
        return Rewrite(site.name, "removed: it returns its argument", {"rule": self.name, "operation": site.kind})


def _source(node: fx.Node) -> fx.Node | None:
    if node.target is aten.cat.default:
        items: Any = node.args[0]
        return items[0] if len(items) == 1 else None
    return first_input(node)


def _is_identity(facts: Facts, node: fx.Node) -> bool:
    """Whether the operation returns its argument, if it turns out to keep shape and dtype."""
    if node.op == "call_module":
        return facts.layer_of(node, *_DROPOUTS) is not None
    if node.op != "call_function":
        return False
    if node.target in _COPIES or node.target in _RESIZES or node.target in (aten.cat.default, aten.detach.default):
        return True
    if node.target in PERMUTES:
        value = tensor_value(node)
        return value is not None and permutation(node, value.dim()) == list(range(value.dim()))
    if node.target in _RANDOM_OFF:
        return not draws_random_numbers(node)
    return node.target in _CHECKS and len(node.args) > 1 and _CHECKS[node.target](node)


def _trained(facts: Facts) -> set[fx.Node]:
    """Nodes whose value depends on something that is trained."""
    trained: set[fx.Node] = set()
    for node in facts.nodes:
        own = any(tensor.requires_grad for _, tensor in facts.held(node))
        if own or not trained.isdisjoint(node.all_input_nodes):
            trained.add(node)
    return trained
