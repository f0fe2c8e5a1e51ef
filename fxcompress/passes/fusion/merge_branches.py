"""Parallel linear branches that are summed, as in RepVGG, MobileOne and ACNet.

Σ cᵢ·convᵢ(x) + c·norm(x) + c·x + rest  ⇒  conv(x) + rest

Convolutions of one input that share stride, dilation and groups are one convolution, whose kernel is the sum of
theirs, each laid into the largest around the common centre: a k×k kernel with padding p reads the same positions as the
middle of a larger one when 2p − d(k−1) agrees, and zeros beyond the input are zeros for both. A branch without a
convolution is a 1×1 kernel: the identity is δ(out, in), a batch norm alone its γ/σ on that diagonal. Linear layers
likewise: W' = Σ cᵢ·Wᵢ.

Not legal for a branch that somebody else reads, whose weights serve another call, or that lies on another grid. The
merged kernel is never larger than the largest of the branches: 1×7 and 7×1 stay apart rather than become 7×7.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from fxcompress.graph.edit import GraphEditor
from fxcompress.graph.shapes import same_value
from fxcompress.passes.base import Rewrite, Skip
from fxcompress.passes.fusion import layers
from fxcompress.passes.fusion.affine import BATCH_NORMS, Affine
from fxcompress.passes.fusion.base import Rule, Site
from fxcompress.passes.fusion.facts import Facts, tensor_value
from fxcompress.passes.fusion.fold_norm_after import foldable_norm, not_finite

__all__ = ["MergeBranches"]

aten = torch.ops.aten

_SUMS: dict[Any, float] = {aten.add.Tensor: 1.0, aten.sub.Tensor: -1.0}
_MERGED: tuple[type[nn.Module], ...] = (nn.Linear, *layers.CONVS)


@dataclass(frozen=True)
class Term:
    """One summand: ``factor`` times the value of ``node``; ``map`` is what a branch without a linear layer does."""

    node: fx.Node
    factor: float
    layer: Any = None
    map: Affine | None = None

    @property
    def linear(self) -> bool:
        """Whether it is a linear layer, not the identity or a norm."""
        return type(self.layer) in _MERGED

    def __str__(self) -> str:
        return str(self.node.target) if self.node.op == "call_module" else self.node.name


@dataclass(frozen=True)
class BranchSite(Site):
    """The last addition of a sum, the term whose layer takes up the others, and those."""

    root: fx.Node
    base: Term
    merged: tuple[Term, ...]


class MergeBranches(Rule[BranchSite]):
    """See the module's text."""

    name: ClassVar[str] = "merge_branches"

    def match(self, facts: Facts) -> Iterator[BranchSite | Skip]:
        for node in facts.nodes:
            if _is_sum(node) and not any(_is_inner(node, user) for user in node.users):
                yield from self._match(facts, node)

    def _match(self, facts: Facts, root: fx.Node) -> Iterator[BranchSite | Skip]:
        inner, leaves = _flatten(root)
        branches: dict[fx.Node, list[Term]] = {}
        inputs = {leaf.node.args[0] for leaf in leaves if facts.layer_of(leaf.node, *_MERGED) is not None}
        for leaf in leaves:
            # What other branches read is the identity beside them, even where a layer made it.
            layer = None if leaf.node in inputs else facts.layer_of(leaf.node, *_MERGED, *BATCH_NORMS)
            data = leaf.node.args[0] if layer is not None else leaf.node
            assert isinstance(data, fx.Node)
            branches.setdefault(data, []).append(Term(leaf.node, leaf.factor, layer))
        for terms in branches.values():
            if len(terms) < 2 or not any(term.linear for term in terms):
                continue  # nothing parallel here
            legal: list[Term] = []
            for term in terms:
                found = self._check(facts, root, term)
                if isinstance(found, Skip):
                    yield found
                else:
                    legal.append(found)
            base = max((term for term in legal if term.linear), key=lambda term: _area(term.layer), default=None)
            if base is None:
                continue  # told above, branch by branch
            merged = tuple(term for term in legal if term is not base and _same_grid(base.layer, term.layer))
            for term in legal:
                if term is not base and term not in merged:
                    name = base.node.target
                    reason = f"Its kernel is not on the grid of {name!r}: stride, dilation, groups, padding, channels."
                    yield Skip(str(term), "geometry", reason, (base.node.name,))
            if merged:
                called = (term.node for term in (base, *merged) if term.layer is not None)
                yield BranchSite(str(base), (root, *inner, *called), root, base, merged)

    def _check(self, facts: Facts, root: fx.Node, term: Term) -> Term | Skip:
        """The term, with what it does as a map if it is no linear layer; or why it may not merge with any other."""
        site, node, layer = str(term), term.node, term.layer
        value = tensor_value(node)
        if value is None or not same_value(value, root.meta.get("val")):
            return Skip(site, "broadcast", "The addition broadcasts or converts this branch.", (root.name,))
        if layer is None:
            return term
        if len(node.users) > 1:
            reason = "What this branch produces is also read outside the sum."
            return Skip(site, "shared_value", reason, tuple(user.name for user in node.users if user is not root))
        if not term.linear:
            affine = foldable_norm(facts, node, value.dtype)
            return affine if isinstance(affine, Skip) else Term(node, term.factor, layer, affine)
        if not value.is_floating_point() or not layers.dtype_fits(layer, value.dtype):
            return Skip(site, "mixed_dtype", f"Not every weight of the branch is {value.dtype}.", (node.name,))
        one = torch.ones((), dtype=torch.float64)
        if not layers.representable(layer, Affine(one, one - one)):
            return not_finite(site, node)
        return facts.unshared(site, node) or term

    def rewrite(self, editor: GraphEditor, site: BranchSite) -> Rewrite:
        base = site.base
        into = str(base.node.target)
        terms = (base, *site.merged)
        learns = any(p.requires_grad for term in terms if term.layer is not None for p in term.layer.parameters())
        weight, bias = _weight(base.layer, terms), _bias(base.layer, terms)
        merged = layers.with_tensors(base.layer, weight, bias, trainable=learns)
        editor.set_module(into, merged, reshaped=False)
        # What stays is read afresh: another site's rewrite may have replaced it, or the input of this one.
        done = {term.node if term.layer is not None else base.node.args[0] for term in terms}
        total = base.node
        for leaf in _flatten(site.root)[1]:
            if leaf.node not in done:
                args = (total, leaf.node)
                alpha = {} if leaf.factor == 1 else {"alpha": leaf.factor}
                total = editor.insert_call(aten.add.Tensor, args, alpha, before=site.root, like=site.root, name="add")
        editor.replace(site.root, total)
        detail = {
            "rule": self.name,
            "layers": [str(term) for term in terms],
            "identity": any(term.layer is None for term in terms),
            "weight": list(base.layer.weight.shape),
        }
        return Rewrite(into, f"{len(terms)} parallel branches became one", detail)


def _is_sum(node: fx.Node) -> bool:
    alpha = node.kwargs.get("alpha", 1)
    known = node.op == "call_function" and node.target in _SUMS and len(node.args) == 2
    return known and isinstance(alpha, (int, float)) and all(isinstance(item, fx.Node) for item in node.args)


def _is_inner(node: fx.Node, user: fx.Node) -> bool:
    """Whether the sum ``node`` is only a part of the sum ``user``."""
    if len(node.users) > 1 or not _is_sum(user) or user.args[0] is user.args[1]:
        return False
    return same_value(node.meta.get("val"), user.meta.get("val"))


def _flatten(root: fx.Node) -> tuple[list[fx.Node], list[Term]]:
    """The additions under ``root`` that only it reads, and the terms they add up, left to right."""
    inner: list[fx.Node] = []
    factors: dict[fx.Node, float] = {}
    stack = [(root, 1.0, root)]
    while stack:
        node, factor, user = stack.pop()
        if node is root or (_is_sum(node) and _is_inner(node, user)):
            if node is not root:
                inner.append(node)
            left, right = node.args[:2]
            alpha: Any = node.kwargs.get("alpha", 1)
            stack.append((right, factor * _SUMS[node.target] * float(alpha), node))  # type: ignore[arg-type]
            stack.append((left, factor, node))  # type: ignore[arg-type]
        else:
            factors[node] = factors.get(node, 0.0) + factor
    return inner, [Term(node, factor) for node, factor in factors.items()]


def _area(layer: Any) -> int:
    return 1 if type(layer) is nn.Linear else math.prod(layer.kernel_size)


def _same_grid(base: Any, layer: Any) -> bool:
    """Whether every position that ``layer`` reads is one that the kernel of ``base`` reads.

    What is no linear layer reads like a kernel of size 1, channel by channel.
    """
    linear = type(layer) in _MERGED
    if not linear and layers.input_channels(base) != layers.output_channels(base):
        return False
    if linear and (type(base) is not type(layer) or base.weight.shape[0] != layer.weight.shape[0]):
        return False
    if type(base) is nn.Linear:
        return True
    ones, zeros = (1,) * len(base.kernel_size), (0,) * len(base.kernel_size)
    if not linear:
        kernel, padding, dilation, stride, groups = ones, zeros, ones, ones, base.groups
    else:
        kernel, padding, dilation = layer.kernel_size, layer.padding, layer.dilation
        stride, groups = layer.stride, layer.groups
    if any(isinstance(item, str) for item in (base.padding, padding)) or base.padding_mode != "zeros":
        return False
    if base.stride != stride or base.groups != groups or (linear and layer.padding_mode != "zeros"):
        return False
    for size, pad, step, small, inset, own in zip(
        base.kernel_size, base.padding, base.dilation, kernel, padding, dilation, strict=True
    ):
        centred = 2 * pad - step * (size - 1) == 2 * inset - own * (small - 1)
        if small > size or not centred or (small > 1 and own != step) or (pad - inset) % step:
            return False
    return True


def _weight(base: Any, terms: tuple[Term, ...]) -> torch.Tensor:
    weight = torch.zeros(base.weight.shape, dtype=torch.float64, device=base.weight.device)
    groups = int(getattr(base, "groups", 1))
    for term in terms:
        if term.linear:
            theirs = term.layer.weight.detach()
            inset = [(large - small) // 2 for large, small in zip(weight.shape[2:], theirs.shape[2:], strict=True)]
            spans = [slice(at, at + size) for at, size in zip(inset, theirs.shape[2:], strict=True)]
            window: tuple[Any, ...] = (..., *spans)
            weight[window].add_(theirs.double(), alpha=term.factor)
        else:  # each channel reads itself, at the centre of the kernel
            middle: tuple[Any, ...] = (..., *(size // 2 for size in weight.shape[2:]))
            centre = weight[middle]
            diagonal = centre.view(groups, -1, centre.shape[1]).diagonal(dim1=1, dim2=2)
            scale = torch.ones(1) if term.map is None else term.map.scale
            diagonal.add_(scale.to(weight).expand(weight.shape[0]).reshape(groups, -1), alpha=term.factor)
    return weight


def _bias(base: Any, terms: tuple[Term, ...]) -> torch.Tensor | None:
    shifts = [(term.factor, term.map.shift) for term in terms if term.map is not None and term.map.shifts()]
    shifts += [(term.factor, term.layer.bias) for term in terms if term.linear and term.layer.bias is not None]
    if not shifts:
        return None
    total = torch.zeros(base.weight.shape[0], dtype=torch.float64, device=base.weight.device)
    for factor, shift in shifts:
        total += factor * shift.detach().to(total)
    return total
