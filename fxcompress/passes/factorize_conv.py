"""Convolutions as several thinner ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import fx, nn

from fxcompress.analysis.sizes import GraphSizes
from fxcompress.errors import OptionError
from fxcompress.graph.edit import GraphEditor, copy_graph
from fxcompress.passes.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from fxcompress.passes.low_rank.account import costs, errors, macs_of
from fxcompress.passes.low_rank.conv_methods import METHODS, Convs, Shape, applies, decompose, price, ranks_at, steps
from fxcompress.passes.low_rank.data import site_metrics, too_wide
from fxcompress.passes.low_rank.kernels import kernel_of, refuse_conv
from fxcompress.passes.low_rank.latency import slower
from fxcompress.passes.low_rank.metric import Metric
from fxcompress.passes.low_rank.options import check_common, check_latency, patterns
from fxcompress.passes.low_rank.ranks import first_that
from fxcompress.passes.low_rank.sites import CONVS, TRANSPOSED, Site, find_sites
from fxcompress.passes.low_rank.splice import splice
from fxcompress.passes.low_rank.tucker import vbmf_rank

__all__ = ["FactorizeConv"]


@dataclass(frozen=True)
class FactorizeConv(Pass):
    """conv k×k  ⇒  two or three thinner convolutions, one after another      W ≈ their product, of the least error

    Convolutions in one, two and three dimensions, strided, dilated, grouped and transposed. ``conv`` becomes
    ``conv.0``, ``conv.1`` and perhaps ``conv.2``; the last carries the bias. Methods:

    * ``channel``: k×k to r channels, then 1×1 (Zhang et al. 2016, arXiv:1505.06798).
    * ``spatial``: k×1 to r channels, then 1×k (Jaderberg et al. 2014, arXiv:1405.3866).
    * ``tucker2``: 1×1, k×k, 1×1, by HOSVD and HOOI (Kim et al. 2016, arXiv:1511.06530).
    * ``cp``: 1×1, depthwise k×k, 1×1, by alternating least squares (Lebedev et al. 2015, arXiv:1412.6553).
    * ``auto``: of the first three, per site, the one with the least error at equal cost (with a bound of the error,
      the cheapest that keeps it).

    Not legal, and told as skips: a tied weight (``tied_weight``), weights that are not numbers (``not_finite``), what
    is depthwise or 1×1 (``depthwise``, ``pointwise``), what would not become cheaper (``does_not_pay``), ranks that
    approximate nothing (``full_rank``), a method that does not apply (``method``), a layer that is one of several
    factors (``already_factorized``).

    Give one of ``rank``, ``ratio``, ``energy`` and ``error``; with none the ratio is 0.5.

    Attributes:
        method: as above.
        rank: of ``tucker2`` one number for both ranks, or (of the input, of the output channels); ``vbmf`` finds them
            by variational Bayesian matrix factorization (``channel`` and ``tucker2``). With ``auto`` it is that of
            ``channel``, and the others are compared at its cost.
        ratio: share of the cost to keep, in (0, 1).
        energy: share of the energy to keep: the relative error is at most sqrt(1 − energy).
        error: bound of the relative error of the weight, with ``calibration`` of the output on the data.
        calibration: batches: what the model takes, or that and labels. Errors are then those of the output.
        batches: most batches to read; None reads all.
        round_to: ranks are multiples of this.
        cost: what ``ratio`` counts and what has to fall: ``macs`` or ``parameters``; ``latency`` counts
            multiply-accumulates, and leaves a site that is no faster, measured on ``backend`` (inside ``compile()``).
        backend: that latency is measured on.
        force: rewrite even where it does not pay.
        ignore: name patterns of layers to leave alone.
        only: name patterns of the layers to look at; empty means all.
    """

    name: ClassVar[str] = "factorize_conv"
    numerics: ClassVar[Numerics] = Numerics.LOSSY
    method: Literal["auto", "channel", "spatial", "tucker2", "cp"] = "auto"
    rank: int | tuple[int, int] | Literal["vbmf"] | None = None
    ratio: float | None = None
    energy: float | None = None
    error: float | None = None
    calibration: Iterable[Any] | None = None
    batches: int | None = None
    round_to: int = 1
    cost: Literal["macs", "parameters", "latency"] = "macs"
    backend: str = "onnxruntime"
    force: bool = False
    ignore: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        patterns(self, "ignore", "only")
        super().__post_init__()
        check_common(self)
        if isinstance(self.rank, tuple) and self.method != "tucker2":
            raise OptionError("only tucker2 has two ranks", where="rank", remedy="give method='tucker2', or one rank")
        if self.rank == "vbmf" and self.method not in ("channel", "tucker2"):
            raise OptionError(
                f"vbmf finds no ranks for {self.method!r}", where="rank", remedy="give method='channel' or 'tucker2'"
            )

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """Find the sites, then take their weights one at a time."""
        check_latency(self, context)
        found = list(find_sites(graph_module, (*CONVS, *TRANSPOSED), refuse_conv, ignore=self.ignore, only=self.only))
        skipped = [item for item in found if isinstance(item, Skip)]
        sites = [item for item in found if isinstance(item, Site)]
        if not found:
            skipped.append(Skip("all", "nothing_to_factorize", "The graph has no convolution."))
        folds = self.method != "channel"  # which has nothing to fit
        original = copy_graph(graph_module)
        rewrites: list[Rewrite] = []
        with GraphEditor(graph_module) as editor:
            metrics = site_metrics(original, sites, self.calibration, context, batches=self.batches, folds=folds)
            for done, (site, metric, _) in enumerate(metrics):
                made = self._best(site, _shape(graph_module, site, self.cost), metric)
                if self.cost == "latency" and not self.force and isinstance(made, Convs):
                    made = slower(original, site, made.layers, context, self.backend) or made
                if isinstance(made, Skip):
                    skipped.append(made)
                else:
                    rewrites.append(self._put(editor, site, made, metric))
                if context.progress is not None:
                    context.progress(done + 1, len(sites), site.path)
        note = too_wide(sites, folds=folds) if self.calibration is not None else ""
        return PassResult(graph_module, tuple(rewrites), tuple(skipped), note)

    def _best(self, site: Site, shape: Shape, metric: Metric) -> Convs | Skip:
        """The decomposition of the least error, among the methods that apply and pay."""
        asked: tuple[str, ...] = METHODS[:3] if self.method == "auto" else (self.method,)
        names = [name for name in asked if applies(name, shape)]
        if not names:
            return Skip(site.path, "method", f"{self.method} does not apply to a kernel of {list(shape.kernel)}.")
        candidates: list[Convs] = []
        dear = full = 0
        for name in names:
            ranks = self._ranks(name, site, shape, metric)
            if ranks is None or (len(ranks) == 1 and ranks[0] > steps(name, shape)):
                full += 1
                continue
            if not self.force and price(name, shape, ranks) >= shape.dense:
                dear += 1
                continue
            candidates.append(decompose(name, site.layer, kernel_of(site.layer), ranks, metric))
        if candidates:
            bound = self.energy is not None or self.error is not None

            def order(made: Convs) -> tuple[float, float]:
                error, cost = self._error(site, made, metric), float(price(made.method, shape, made.ranks))
                return (cost, error) if bound else (error, cost)

            return min(candidates, key=order)
        what = "weights" if self.cost == "parameters" else "multiply-accumulates"
        if dear:
            return Skip(site.path, "does_not_pay", f"At those ranks it takes no fewer {what} than {shape.dense}.")
        return Skip(site.path, "full_rank", "Ranks that keep so much approximate nothing.")

    def _ranks(self, method: str, site: Site, shape: Shape, metric: Metric) -> tuple[int, ...] | None:
        """What the options mean for a method; None where no rank below the full one serves."""
        last = steps(method, shape)
        if self.method == "auto" and isinstance(self.rank, int) and self.rank > steps("channel", shape):
            return None  # what the others would be compared with approximates nothing
        kernel = kernel_of(site.layer)
        if self.rank == "vbmf":
            return self._by_noise(method, kernel, shape)
        if isinstance(self.rank, tuple):
            fits = self.rank[0] <= shape.inputs and self.rank[1] <= shape.outputs
            whole = self.rank == (shape.inputs, shape.outputs)
            return self.rank if fits and not whole else None
        if isinstance(self.rank, int) and (self.method != "auto" or method == "channel"):
            if method != "tucker2":
                return ranks_at(method, shape, self.rank, self.round_to)
            both = (min(self.rank, shape.inputs), min(self.rank, shape.outputs))
            return None if both == (shape.inputs, shape.outputs) else both
        if self.energy is not None or self.error is not None:
            bound = (1 - self.energy) ** 0.5 if self.energy is not None else float(self.error or 0.0)

            def enough(step: int) -> bool:
                ranks = ranks_at(method, shape, step, self.round_to)
                return self._error(site, decompose(method, site.layer, kernel, ranks, metric), metric) <= bound

            found = first_that(last, enough)
            return None if found is None else ranks_at(method, shape, found, self.round_to)
        budget = (self.ratio or 0.5) * shape.dense
        if isinstance(self.rank, int):
            budget = float(price("channel", shape, ranks_at("channel", shape, self.rank, self.round_to)))
        above = first_that(
            last, lambda step: price(method, shape, ranks_at(method, shape, step, self.round_to)) > budget
        )
        return ranks_at(method, shape, max(1, last if above is None else above - 1), self.round_to)

    def _by_noise(self, method: str, kernel: Any, shape: Shape) -> tuple[int, ...]:
        outer = max(vbmf_rank(group.flatten(1)) for group in kernel)
        if method == "channel":
            return ranks_at("channel", shape, outer, self.round_to)
        inner = max(vbmf_rank(group.transpose(0, 1).flatten(1)) for group in kernel)
        return inner, outer

    @staticmethod
    def _error(site: Site, made: Convs, metric: Metric) -> float:
        found = errors(kernel_of(site.layer).flatten(2), made.matrix, metric)
        error = found["output_error"] if found["output_error"] is not None else found["weight_error"]
        return float(error)

    def _put(self, editor: GraphEditor, site: Site, made: Convs, metric: Metric) -> Rewrite:
        layer = site.layer
        before = macs_of(editor.graph_module, site.nodes)
        nodes = splice(editor, site, made.layers)
        after = macs_of(editor.graph_module, nodes)
        count, own = (sum(p.numel() for p in nn.ModuleList(layers).parameters()) for layers in ([layer], made.layers))
        detail: dict[str, Any] = {
            "method": made.method,
            "rank": made.ranks[0] if len(made.ranks) == 1 else list(made.ranks),
            "kernel": list(layer.kernel_size),
            "channels": [layer.in_channels, layer.out_channels],
            **costs(count, own, before, None if after is None else after * len(site.nodes)),
            **errors(kernel_of(layer).flatten(2), made.matrix, metric),
            **({} if made.fit is None else made.fit.detail),
            "layers": [f"{site.path}.{index}" for index in range(len(made.layers))],
        }
        return Rewrite(site.path, f"{made.method} of rank {' and '.join(map(str, made.ranks))}", detail)


def _shape(graph_module: fx.GraphModule, site: Site, cost: str) -> Shape:
    groups, outputs, inputs, *kernel = kernel_of(site.layer).shape
    before = after = (1,) * len(kernel)
    sizes = GraphSizes(graph_module)
    if cost != "parameters" and sizes.known:
        node = site.nodes[0]
        values = (node.args[0].meta["val"], node.meta["val"])  # type: ignore[union-attr]
        before, after = (sizes.of(value)[-len(kernel) :] for value in values)
    return Shape(groups, outputs, inputs, tuple(kernel), before, after, type(site.layer) in TRANSPOSED)
