"""Linear layers as two thinner ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import fx, nn

from fxcompress.analysis.statistics import Moments, PackedMoments
from fxcompress.errors import OptionError
from fxcompress.graph.edit import GraphEditor, copy_graph
from fxcompress.passes.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from fxcompress.passes.low_rank.account import costs, errors, lost_mean, macs_of
from fxcompress.passes.low_rank.budget import LEAST, PEAK, largest_layer, working
from fxcompress.passes.low_rank.data import fits, site_metrics, too_wide
from fxcompress.passes.low_rank.latency import slower
from fxcompress.passes.low_rank.linear_sites import (
    factor_layers,
    linear_sites,
    matrix_of,
    price_of,
    put_factors,
    with_bias,
)
from fxcompress.passes.low_rank.metric import Metric, plain_metric
from fxcompress.passes.low_rank.options import check_common, check_latency, goal_of, patterns
from fxcompress.passes.low_rank.ranks import share_budget
from fxcompress.passes.low_rank.refit import refit_outer
from fxcompress.passes.low_rank.sites import Site
from fxcompress.passes.low_rank.spectra import spectra
from fxcompress.passes.low_rank.truncate import Factors, truncate

__all__ = ["FactorizeLinear"]

Group = tuple[Site, ...]
"""A layer, or several whose weights are one tied matrix."""


@dataclass(frozen=True)
class FactorizeLinear(Pass):
    """y = W x + b  ⇒  y = A (B x) + b      A B of the least error among all of that rank

    Linear layers (attention projections and fused ones among them) and 1×1 convolutions; embeddings on request. The
    layer ``fc`` becomes ``fc.0`` and ``fc.1``, which carries the bias. Without data the error is that of the weight
    (truncated SVD, Eckart–Young). With ``calibration`` it is that of the layer's output on the data: the whitened SVD
    of SVD-LLM (Wang et al. 2024, arXiv:2403.07378), or ASVD (Yuan et al. 2023, arXiv:2312.05821).

    Not legal, and told as skips: a tied weight (``tied_weight``), weights that are not numbers (``not_finite``), groups
    (``grouped``), a rank that approximates nothing (``full_rank``), two layers that would cost no less
    (``does_not_pay``), a layer that is one of two factors already (``already_factorized``).

    Give one of ``rank``, ``ratio``, ``energy`` and ``error``; with none the ratio is 0.5.

    Attributes:
        rank: components to keep in every layer.
        ratio: share of the parameters to keep, in (0, 1): of every layer, or with ``scope="global"`` of all together.
        energy: share of the squared singular values to keep, in (0, 1).
        error: bound of the relative error of the weight, with ``calibration`` of the output on the data, in [0, 1).
        scope: ``global`` shares the ratio out over all layers so that the sum of their relative losses is least.
        calibration: batches: what the model takes, or that and labels.
        method: ``auto`` is ``svd`` without data and ``whitened`` with it; or ``asvd``.
        alpha: of ASVD: inputs are weighted with their mean absolute value to this power.
        batches: most batches to read; None reads all.
        moments_mib: of second moments that may be held at once (those of one layer at least); where more are needed the
            data is read again. None holds as many as keep what lives beside the model within three times its largest
            layer, or 1 MiB.
        correct_bias: let the bias take up the mean of the error, which allows a smaller one.
        refit: fit ``fc.1`` of each layer in turn, by least squares on the data, to the original output from the inputs
            that the layers changed before it produce, as far as that holds on samples that were not fitted.
        round_to: ranks are multiples of this.
        cost: what has to fall for a site to be rewritten: ``parameters``, ``macs``, or ``latency`` measured on
            ``backend`` (inside ``compile()``).
        backend: that latency is measured on.
        force: rewrite even where it does not pay.
        embeddings: also take embeddings, and those tied to a linear layer together with it: the large factor stays
            tied.
        randomized: allow the randomized SVD where it proves accurate.
        ignore: name patterns of layers to leave alone.
        only: name patterns of the layers to look at; empty means all.
    """

    name: ClassVar[str] = "factorize_linear"
    numerics: ClassVar[Numerics] = Numerics.LOSSY
    rank: int | None = None
    ratio: float | None = None
    energy: float | None = None
    error: float | None = None
    calibration: Iterable[Any] | None = None
    scope: Literal["local", "global"] = "local"
    method: Literal["auto", "svd", "whitened", "asvd"] = "auto"
    alpha: float = 0.5
    batches: int | None = None
    moments_mib: int | None = None
    correct_bias: bool = False
    refit: bool = False
    round_to: int = 1
    cost: Literal["parameters", "macs", "latency"] = "parameters"
    backend: str = "onnxruntime"
    force: bool = False
    embeddings: bool = False
    randomized: bool = True
    ignore: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        patterns(self, "ignore", "only")
        super().__post_init__()
        check_common(self)
        if self.method in ("whitened", "asvd") and self.calibration is None:
            raise OptionError(f"method={self.method!r} needs data", where="method", remedy="give calibration=<batches>")
        if self.scope == "global" and any(amount is not None for amount in (self.rank, self.energy, self.error)):
            raise OptionError("scope='global' shares out a ratio", where="scope", remedy="give ratio=0.5")

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """Find the sites, then take their weights one at a time."""
        check_latency(self, context)
        found = list(linear_sites(graph_module, embeddings=self.embeddings, ignore=self.ignore, only=self.only))
        skipped = [item for item in found if isinstance(item, Skip)]
        groups = {item[0]: item for item in found if not isinstance(item, Skip)}
        if not found:
            skipped.append(Skip("all", "nothing_to_factorize", "The graph has no linear layer or 1×1 convolution."))
        # Statistics and latencies are of the graph as it is now, while sites change one by one.
        again = self.calibration is not None or self.cost == "latency"
        original = copy_graph(graph_module) if again else graph_module
        rewrites: list[Rewrite] = []
        with GraphEditor(graph_module) as editor:
            for site, metric, moments, result in self._factors(original, list(groups.values()), context):
                change = result
                if isinstance(result, Factors):
                    change = self._check_latency(original, site, result, context) or result
                if isinstance(change, Skip):
                    skipped.append(change)
                else:
                    rewrites += self._put(editor, groups[site], change, metric, moments)
                del metric, moments, result, change  # before the next one's are made
        if self.refit and rewrites:
            assert self.calibration is not None
            held = max(LEAST, largest_layer(original)) if self.moments_mib is None else self.moments_mib << 20
            rewrites = refit_outer(original, graph_module, rewrites, self.calibration, self.batches, context, held=held)
        note = too_wide([group[0] for group in groups.values()], linear=True) if self.calibration is not None else ""
        return PassResult(graph_module, tuple(rewrites), tuple(skipped), note)

    # --- which factors -----------------------------------------------------------------------------------------

    def _factors(self, original: fx.GraphModule, groups: Sequence[Group], context: PassContext) -> Any:
        """Each site with its metric and its factors, or the reason why it has none; one at a time if it can be."""
        goal, room = goal_of(self), PEAK * largest_layer(original)
        data = None if self.method == "svd" and not (self.correct_bias or self.refit) else self.calibration
        sites = [group[0] for group in groups]
        ranks: list[Any] = [goal.of_spectrum if goal.needs_spectrum else goal.fixed(price_of(s.layer)) for s in sites]

        def read(held: int | list[int], room: int | None = None) -> Any:
            return site_metrics(
                original,
                sites,
                data,
                context,
                batches=self.batches,
                centred=[self._centred(site) for site in sites],
                alpha=self.alpha if self.method == "asvd" else None,
                held=held,
                linear=True,
                room=room,
            )

        held = self._held(sites, ranks, room)
        shared = self.scope == "global"
        metrics = read(held, room if shared else None)
        if shared:
            # Once for the spectra, once for the factors; both from the same moments where they can all be held.
            once = isinstance(data, Iterator) or fits(sites, held, linear=True, room=room)
            if self.method == "svd" and not once:  # the data only measures
                metrics = ((site, plain_metric(), None) for site in sites)
            metrics = list(metrics) if once else metrics
            found = spectra(metrics, lambda site: matrix_of(site.layer), room, self._root, spend=not once)
            ranks = self._shared_out(sites, [found[site] for site in sites])
            metrics = metrics if once else read(self._held(sites, ranks, room))
        done = 0
        for site, metric, moments in metrics:
            yield site, metric, moments, self._factored(site, metric, ranks[done], context, room)
            del metric, moments
            done += 1  # noqa: SIM113 - enumerate and zip would hold the last metric while the next is made
            if context.progress is not None:
                context.progress(done, len(groups), site.path)

    def _factored(self, site: Site, metric: Metric, rank: Any, context: PassContext, room: int) -> Factors | Skip:
        if rank is None:
            return Skip(site.path, "kept_whole", "Within the budget for all layers this one is worth its whole size.")
        if isinstance(rank, int) and (reason := self._refused(site, rank)) is not None:
            return reason
        made = truncate(
            matrix_of(site.layer),
            self._root(metric),
            rank,
            randomized=self.randomized,
            seed=context.seed,
            room=room,
            limit=None if self.force else price_of(site.layer).break_even,
        )
        reason = self._refused(site, made if isinstance(made, int) else made.rank)
        assert reason is not None or isinstance(made, Factors)
        return reason or made  # type: ignore[return-value]

    def _shared_out(self, sites: Sequence[Site], spectra: Sequence[torch.Tensor]) -> list[int | None]:
        """Ranks that share out the ratio, from the spectra; None for a site that stays as it is."""
        return share_budget(spectra, [price_of(site.layer) for site in sites], self.ratio or 0.5, self.round_to)

    def _root(self, metric: Metric) -> Metric:
        return replace(metric, weighs=False) if self.method == "svd" else metric

    def _held(self, sites: Sequence[Site], ranks: Sequence[Any], room: int) -> int | list[int]:
        """Bytes of second moments that may be held while each site is factored."""
        if self.moments_mib is not None:
            return self.moments_mib << 20
        known = [rank if isinstance(rank, int) else None for rank in ranks]
        return [max(LEAST, room - working(site.layer, rank)) for site, rank in zip(sites, known, strict=True)]

    def _centred(self, site: Site) -> bool:
        return self.correct_bias and getattr(site.layer, "bias", None) is not None

    def _refused(self, site: Site, rank: int) -> Skip | None:
        price = price_of(site.layer)
        if rank >= price.full:
            return Skip(site.path, "full_rank", f"Rank {rank} is not below its full rank, {price.full}.")
        if self.force:
            return None
        if self.cost == "macs" and type(site.layer) is nn.Embedding:
            return Skip(site.path, "does_not_pay", "A look-up multiplies nothing; factors would.")
        if not price.pays(rank):
            spent = f"At rank {rank} two layers have {rank * price.unit} weights, this one has {price.dense}."
            return Skip(site.path, "does_not_pay", spent)
        return None

    def _check_latency(self, original: fx.GraphModule, site: Site, made: Factors, context: PassContext) -> Skip | None:
        if self.cost != "latency" or self.force:
            return None
        outer = nn.Parameter(made.outer[0], site.layer.weight.requires_grad)
        pair = factor_layers(site.layer, outer, made.inner[0], getattr(site.layer, "bias", None))
        return slower(original, site, pair, context, self.backend)

    # --- the rewrite -------------------------------------------------------------------------------------------

    def _put(
        self,
        editor: GraphEditor,
        group: Group,
        made: Factors,
        metric: Metric,
        moments: Moments | PackedMoments | None,
    ) -> list[Rewrite]:
        first = group[0]
        weight = matrix_of(first.layer)
        outer = nn.Parameter(made.outer[0].contiguous(), first.layer.weight.requires_grad)
        inner = made.inner[0]
        shift: torch.Tensor | None = None
        if self._centred(first) and moments is not None:
            shift = lost_mean(weight, (made.outer, made.inner), moments, metric)
        norm = float(made.total.sum()) if metric.plain else 0.0
        measured = errors(weight, (made.outer, made.inner), metric, norm=norm)
        if self._method == "whitened" and metric.measures:
            measured["tail"] = made.tail  # what the spectrum says that the loss must be
        rewrites: list[Rewrite] = []
        for site in group:
            layer = site.layer
            before = macs_of(editor.graph_module, site.nodes)
            bias = with_bias(layer, shift)
            count = sum(p.numel() for p in layer.parameters()) if site is first else 0
            nodes = put_factors(editor, site, outer, inner, bias)
            after = macs_of(editor.graph_module, nodes)
            own = inner.numel() + (outer.numel() if site is first else 0) + (0 if bias is None else bias.numel())
            told = len(site.nodes)
            detail: dict[str, Any] = {
                "method": self._method if metric.measures or self.method == "svd" else "svd",
                "rank": made.rank,
                "shape": list(weight.shape[1:]),
                **costs(count, own, before, None if after is None else after * told),
                **measured,
                "randomized": made.randomized,
                "layers": [f"{site.path}.0", f"{site.path}.1"],
            }
            if type(layer) is nn.Embedding:
                detail["embedding"] = True
            if len(group) > 1:
                detail["tied_with"] = [other.path for other in group if other is not site]
            rewrites.append(Rewrite(site.path, f"two layers of rank {made.rank}", detail))
        return rewrites

    @property
    def _method(self) -> str:
        if self.method != "auto":
            return self.method
        return "svd" if self.calibration is None else "whitened"
