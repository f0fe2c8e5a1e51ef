"""SmoothQuant: outliers of what linear layers read move into their weights, before quantization."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import fx, nn

from fxcompress.analysis.scaling import Factors, Scaling, apply_factors, scaling
from fxcompress.analysis.statistics import MeanSquare, Range, Statistics, collect
from fxcompress.errors import OptionError
from fxcompress.graph.batches import check_limit
from fxcompress.graph.edit import GraphEditor
from fxcompress.passes.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from fxcompress.quantization.equalization import ALPHAS, SiteRange, expected_noise, smooth
from fxcompress.quantization.layer_choice import linear_sites

__all__ = ["SmoothActivations"]

_RANGE, _SQUARE = Range("input", -1), MeanSquare("input", -1)
_GAIN = 0.95  # of the expected noise that a searched exponent has to stay under
_LEAST = 0.01  # logarithm of a factor that is worth a change


@dataclass
class _Site:
    """Linear layers whose inputs share factors. ``classes``: of the factors; empty where nothing absorbs them."""

    classes: torch.Tensor
    layers: dict[str, list[fx.Node]] = field(default_factory=dict)
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)  # place of each input among the factors; -1: none


@dataclass(frozen=True)
class SmoothActivations(Pass):
    """x → x / s, W → W · s for linear layers, s = max|x|^α / max|w|^(1−α) (Xiao et al. 2022, arXiv:2211.10438).

    1 / s goes into whatever makes x, exactly: the norm or the linear layer before, through all that keeps scales. Where
    nothing can take it, a product is put before the layer. Run it after ``FuseModules`` and before ``Quantize``.

    Attributes:
        data: batches for calibration: what the model takes, or that and labels.
        alpha: how much of the outliers moves, from 0 to 1; ``search`` takes for each site the one with the least
            expected noise of 8-bit rounding.
        insert: put a product where nothing can absorb the factors; else such layers are left.
        batches: how many to read at most; None reads all.
        ignore: name patterns of layers that stay as they are.
    """

    name: ClassVar[str] = "smooth_activations"
    numerics: ClassVar[Numerics] = Numerics.REASSOCIATED
    data: Iterable[Any]
    alpha: float | Literal["search"] = "search"
    insert: bool = True
    batches: int | None = None
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_limit(self.batches)
        if not isinstance(self.alpha, str) and not 0 <= self.alpha <= 1:
            raise OptionError(f"alpha={self.alpha} is outside [0, 1]", where="alpha", remedy="0.5 is usual")

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """Sites from the flow of scales, ranges from one pass over the data, then all factors at once."""
        found = scaling(graph_module)
        skipped: list[Skip] = []
        calls = _calls(graph_module, found, self.ignore, skipped)
        sites = [*_absorbed(found, calls), *_loose(found, calls, self.insert, skipped)]
        sites.sort(key=lambda site: min(node for nodes in site.layers.values() for node in nodes))
        if not sites:
            skipped.append(Skip("all", "nothing_to_smooth", "no linear layer of this graph can be smoothed."))
            return PassResult(graph_module, (), tuple(skipped))
        requests = {node.name: (_RANGE, _SQUARE) for site in sites for nodes in site.layers.values() for node in nodes}
        statistics = collect(
            graph_module, self.data, requests, limit=self.batches, progress=context.progress, padding=False
        )
        factors = Factors(graph_module, found)
        rewrites: list[Rewrite] = []
        loose: list[tuple[_Site, torch.Tensor]] = []
        for site in reversed(sites):  # what a layer makes is scaled before its weights are looked at
            s, detail = self._factors(graph_module, site, statistics, factors)
            first, *others = site.layers
            if bool(s.log().abs().max() < _LEAST):
                skipped.append(Skip(first, "no_gain", "factors of 1 serve it best."))
                continue
            if len(site.classes):
                factors.values[site.classes] = s
            else:
                loose.append((site, s))
            result = "smoothed" if len(site.classes) else "smoothed by a product before it"
            rewrites.append(Rewrite(first, result, detail | ({"with": others} if others else {})))
        apply_factors(graph_module, found, factors.values)
        with GraphEditor(graph_module) as editor:
            for site, s in loose:
                _insert(editor, site, s)
        return PassResult(graph_module, tuple(reversed(rewrites)), tuple(skipped))

    def _factors(
        self, graph_module: fx.GraphModule, site: _Site, statistics: Statistics, factors: Factors
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        weights = {path: _weight(graph_module, path, factors) for path in site.layers}
        ranges = _ranges(site, weights, statistics)
        full = {path: _gathered(site, path, ranges) for path in weights}

        def noise(s: torch.Tensor) -> float:
            return sum(
                expected_noise(full[path], _at(s, site.inputs[path]), {path: weight})
                for path, weight in weights.items()
            )

        before = noise(torch.ones_like(ranges.reach))
        alphas: Sequence[float] = ALPHAS if isinstance(self.alpha, str) else (self.alpha,)
        tried = [(noise(smooth(ranges, alpha)), alpha) for alpha in alphas]
        after, alpha = min(tried)
        if isinstance(self.alpha, str) and after > _GAIN * before:
            return torch.ones_like(ranges.reach), {}
        s = smooth(ranges, alpha)
        return s, {
            "alpha": alpha,
            "least_factor": float(s.min()),
            "greatest_factor": float(s.max()),
            "expected_noise": after / before if before > 0 else 1.0,
        }


def _calls(
    graph_module: fx.GraphModule, found: Scaling, ignore: tuple[str, ...], skipped: list[Skip]
) -> dict[str, list[fx.Node]]:
    """Linear layers that may be smoothed → the nodes that call them."""
    paths, left = linear_sites(graph_module, ignore)
    skipped += [Skip(path, code, f"{reason}.") for path, (code, reason) in left.items()]
    nodes = {node.name: node for node in graph_module.graph.nodes}
    calls: dict[str, list[fx.Node]] = {}
    for path, names in paths.items():
        if path in found.readers:
            calls[path] = [nodes[name] for name in names]
        else:
            skipped.append(Skip(path, "tied_bias", "its bias is tied to another layer's."))
    return calls


def _absorbed(found: Scaling, calls: dict[str, list[fx.Node]]) -> list[_Site]:
    """One site for each group of channels that linear layers read."""
    sites = []
    for group in found.groups:
        readers = [reader for reader in group.readers if reader.path in calls]
        # A layer of another kind among the readers is scaled along with them.
        if not readers:
            continue
        place = torch.full((found.count,), -1)
        place[group.classes] = torch.arange(len(group.classes))
        site = _Site(group.classes)
        for reader in readers:
            site.layers[reader.path] = calls[reader.path]
            site.inputs[reader.path] = place[reader.classes]
        sites.append(site)
    return sites


def _loose(found: Scaling, calls: dict[str, list[fx.Node]], insert: bool, skipped: list[Skip]) -> list[_Site]:
    """Layers whose input nothing can scale; those that read the same value are one site."""
    by_value: dict[fx.Node, _Site] = {}
    for path, nodes in calls.items():
        if bool(found.readers[path].any()):
            continue
        if not insert:
            reason = "nothing before it can absorb the factors, and insert=False."
            skipped.append(Skip(path, "not_absorbed", reason))
        elif len(nodes) > 1:
            skipped.append(Skip(path, "several_calls", "it is called several times, on values of different ranges."))
        else:
            value: Any = nodes[0].args[0]
            site = by_value.setdefault(value, _Site(torch.zeros(0, dtype=torch.int64)))
            site.layers[path] = nodes
            site.inputs[path] = torch.arange(len(found.readers[path]))
    return list(by_value.values())


def _weight(graph_module: fx.GraphModule, path: str, factors: Factors) -> torch.Tensor:
    """``[outputs, inputs]``, float64, with the factors of its outputs."""
    layer: Any = graph_module.get_submodule(path)
    assert isinstance(layer, nn.Linear)
    return layer.weight.detach().double() / factors.values[factors.scaling.makers[path], None]


def _ranges(site: _Site, weights: dict[str, torch.Tensor], statistics: Statistics) -> SiteRange:
    """What is known of each factor of a site: the widest over the layers and inputs that it stands for."""
    count = len(site.classes) or len(next(iter(site.inputs.values())))
    low, high, square, columns = (torch.zeros(count, dtype=torch.float64) for _ in range(4))
    for path, nodes in site.layers.items():
        place = site.inputs[path]
        own = place >= 0
        columns.scatter_reduce_(0, place[own], weights[path].abs().amax(0)[own], "amax")
        for node in nodes:
            least, most = statistics[node.name, _RANGE]
            low.scatter_reduce_(0, place[own], least.cpu()[own], "amin")
            high.scatter_reduce_(0, place[own], most.cpu()[own], "amax")
            square.scatter_reduce_(0, place[own], statistics[node.name, _SQUARE].cpu()[own], "amax")
    return SiteRange(low, high, square, columns)


def _gathered(site: _Site, path: str, ranges: SiteRange) -> SiteRange:
    """The ranges of a site as one layer reads them. Inputs without a factor count as the mean of the others."""
    place = site.inputs[path].clamp_min(0)
    return SiteRange(ranges.low[place], ranges.high[place], ranges.square[place], ranges.columns[place])


def _at(s: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    return torch.where(place >= 0, s[place.clamp_min(0)], torch.ones((), dtype=s.dtype))


def _insert(editor: GraphEditor, site: _Site, s: torch.Tensor) -> None:
    """A product with 1 / s before the layers, and s in their weights."""
    nodes = [node for calls in site.layers.values() for node in calls]
    first = min(nodes)
    value: Any = first.args[0]
    inverse = (1 / s).to(value.meta["val"].dtype)
    path = editor.add_tensor(f"{first.name}_smoothing", inverse)
    factor = editor.insert_get(path, before=first, like=first)
    product = editor.insert_call(torch.ops.aten.mul.Tensor, (value, factor), before=first, like=first)
    for node in nodes:
        editor.set_args(node, (product, *node.args[1:]))
    for layer_path in site.layers:
        layer: Any = editor.graph_module.get_submodule(layer_path)
        weight = layer.weight.detach()
        editor.set_tensor(f"{layer_path}.weight", (weight.double() / inverse.double()).to(weight.dtype))
