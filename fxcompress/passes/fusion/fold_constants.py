"""Everything that depends on weights alone, computed once.

f(weights) → op(x, ·)  ⇒  op(x, constant)

Weight standardisation and weight norm, position tables and their interpolation, masks built by ``arange`` and
``where``, gathered position biases: the part of the graph that no input reaches is run once, on the real tensors and
by the very operations of the model, and its results take its place. A result takes over the name of the weight it
came from, if nothing else came from it; it stays a parameter if that was one. A convolution or linear operation whose
weights have become constants is a layer again (``raise_layers``).

Not done while the graph trains (how a weight is computed would be frozen), for results much larger than what they are
made of, for random numbers, nor for a parameter that is also read as it is (it would come apart).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from fxcompress.graph.edit import GraphEditor
from fxcompress.passes.base import Rewrite, Skip
from fxcompress.passes.fusion.base import Rule, Site
from fxcompress.passes.fusion.constants import constant_nodes, evaluate
from fxcompress.passes.fusion.facts import Facts, tensor_value

__all__ = ["FoldConstants"]

aten = torch.ops.aten

_LARGE = 1 << 20
_GROWTH = 4
_INNER = "inner"  # the code of a refusal that no report needs to tell
_EMPTY = {aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default}


@dataclass(frozen=True)
class Origin:
    """What a constant is made of.

    Attributes:
        size: bytes of the weights.
        learned: whether a parameter is among them.
        trained: whether one of those is trained.
        kept: whether any of them is in ``state_dict()``.
        tied: a parameter among them that is also read as it is.
    """

    size: int = 0
    learned: bool = False
    trained: bool = False
    kept: bool = False
    tied: str | None = None

    def __or__(self, other: Origin) -> Origin:
        return Origin(
            self.size + other.size,
            self.learned or other.learned,
            self.trained or other.trained,
            self.kept or other.kept,
            self.tied or other.tied,
        )


@dataclass(frozen=True)
class ConstantSite(Site):
    """A constant node that others read, its value, and the weight whose name it takes over."""

    value: torch.Tensor
    origin: Origin
    heir_of: fx.Node | None


class FoldConstants(Rule[ConstantSite]):
    """See the module's text."""

    name: ClassVar[str] = "fold_constants"

    def match(self, facts: Facts) -> Iterator[ConstantSite | Skip]:
        constant = constant_nodes(facts)
        computed = [node for node in facts.nodes if node in constant and node.op != "get_attr"]
        if not computed:
            return
        if facts.graph_module.training:
            reason = "The graph is in training mode: folding would freeze how a weight is computed; call eval() first."
            yield Skip(computed[0].name, "training", reason)
            return
        origins = _origins(facts, constant)
        wanted: list[fx.Node] = []
        staying = set(facts.nodes) - constant
        for node in reversed(computed):
            if staying.isdisjoint(node.users):
                continue  # read by other constants only: goes with them
            refused = _refuse(node, origins[node])
            if refused is None:
                wanted.append(node)
                continue
            # It stays, and so do the nodes that it reads, unless they can be folded by themselves.
            if refused.code != _INNER and not constant.issuperset(node.users):
                yield refused
            staying.add(node)
        wanted.reverse()
        values = evaluate(facts, wanted)
        heirs = _heirs(facts, set(wanted), staying, origins)
        for node in wanted:
            yield ConstantSite(node.name, (node,), values[node], origins[node], heirs.get(node))

    def rewrite(self, editor: GraphEditor, site: ConstantSite) -> Rewrite:
        (node,) = site.nodes
        value, learned = site.value, _stays_parameter(site.value, site.origin)
        if learned:
            value = nn.Parameter(value, requires_grad=site.origin.trained)
        if site.heir_of is not None:
            path = str(site.heir_of.target)
            editor.set_tensor(path, value)
            editor.replace(node, site.heir_of, reshaped=True)
        else:
            path = editor.add_tensor(node.name, value, parameter=learned, persistent=site.origin.kept)
            editor.replace(node, editor.insert_get(path, before=node, like=node))
        detail = {"rule": self.name, "tensor": path, "shape": list(value.shape), "trainable": value.requires_grad}
        return Rewrite(site.name, f"computed once: {path}", detail)


def _origins(facts: Facts, constant: set[fx.Node]) -> dict[fx.Node, Origin]:
    """What each constant node is made of, by one scan."""
    origins: dict[fx.Node, Origin] = {}
    persistent = set(facts.graph_module.state_dict(keep_vars=True))
    for node in facts.nodes:
        if node in constant:
            origin = Origin()
            for source in node.all_input_nodes:
                origin |= origins.get(source, Origin())
            for path, tensor in facts.held(node):
                learned = isinstance(tensor, nn.Parameter)
                origin |= Origin(
                    tensor.nbytes,
                    learned,
                    learned and tensor.requires_grad,
                    learned or path in persistent,
                    path if learned and _read_as_is(facts, path, constant) else None,
                )
            origins[node] = origin
    return origins


def _read_as_is(facts: Facts, path: str, constant: set[fx.Node]) -> bool:
    return any(
        reader not in constant or (reader.op == "get_attr" and not constant.issuperset(reader.users))
        for reader in facts.readers(path)
    )


def _refuse(node: fx.Node, origin: Origin) -> Skip | None:
    value = tensor_value(node)
    if value is None or node.target in _EMPTY:
        return Skip(node.name, _INNER, "It has no value of its own to keep.")
    if origin.tied is not None:
        reason = f"It is made of {origin.tied!r}, which is also read as it is; folding would make two weights of one."
        return Skip(node.name, "tied_weight", reason, (node.name,))
    size = value.numel() * value.element_size()
    if size > _LARGE and size > _GROWTH * origin.size:
        reason = f"The result takes {size} bytes, made of {origin.size}: computing it anew is cheaper than storing it."
        return Skip(node.name, "too_large", reason, (node.name,))
    return None


def _heirs(
    facts: Facts, wanted: set[fx.Node], staying: set[fx.Node], origins: dict[fx.Node, Origin]
) -> dict[fx.Node, fx.Node]:
    """For each constant that is wanted, the largest weight that nothing but it is made of: it takes over that name."""
    owners: dict[fx.Node, fx.Node | None] = {}  # the one wanted constant that a node goes into
    for node in reversed(facts.nodes):
        if node not in staying:
            own = node if node in wanted else None
            found = {own if user in staying else owners[user] for user in node.users}
            owners[node] = found.pop() if len(found) == 1 else None
    heirs: dict[fx.Node, fx.Node] = {}
    sizes: dict[fx.Node, int] = {}
    for node, owner in owners.items():
        tensor, value = facts.constant(node), tensor_value(owner)
        if owner is None or tensor is None or value is None:
            continue  # not a weight, or one that more than one constant is made of
        fits = isinstance(tensor, nn.Parameter) == _stays_parameter(value, origins[owner])
        if facts.readers(str(node.target)) != [node]:
            continue  # a layer or another constant reads it under this name, too
        if fits and tensor.numel() > sizes.get(owner, 0):
            heirs[owner], sizes[owner] = node, tensor.numel()
    return heirs


def _stays_parameter(value: torch.Tensor, origin: Origin) -> bool:
    return origin.learned and value.is_floating_point()
