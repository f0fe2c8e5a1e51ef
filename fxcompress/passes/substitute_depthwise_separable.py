"""Standard convolutions as depthwise and pointwise ones."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import fx, nn

from fxcompress.analysis.sizes import GraphSizes
from fxcompress.analysis.statistics import Moments, PackedMoments
from fxcompress.errors import OptionError
from fxcompress.graph.edit import GraphEditor, copy_graph
from fxcompress.passes.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from fxcompress.passes.low_rank.account import costs, errors, macs_of
from fxcompress.passes.low_rank.data import site_metrics, too_wide
from fxcompress.passes.low_rank.decouple import Decoupled, channel_energies, decouple
from fxcompress.passes.low_rank.kernels import kernel_of, pointwise, refuse_conv
from fxcompress.passes.low_rank.latency import slower
from fxcompress.passes.low_rank.metric import Metric
from fxcompress.passes.low_rank.options import check_common, check_latency, patterns
from fxcompress.passes.low_rank.ranks import Goal, Price, first_that
from fxcompress.passes.low_rank.refit import refit_outer
from fxcompress.passes.low_rank.separable_block import ACTIVATIONS, block_norm, depthwise
from fxcompress.passes.low_rank.sites import CONVS, TRANSPOSED, Site, find_sites
from fxcompress.passes.low_rank.splice import splice

__all__ = ["SubstituteDepthwiseSeparable"]

_UNPROVEN = 0.1  # ridge, of the mean variance: of a fit to one sample


@dataclass(frozen=True)
class SubstituteDepthwiseSeparable(Pass):
    """conv k×k  ⇒  depthwise k×k with multiplier T, then 1×1      W_c ≈ Σ_t p_ct d_ctᵀ for each input channel c

    Network Decoupling (Guo et al. 2018, arXiv:1808.05517), of convolutions in one, two and three dimensions, strided,
    dilated, grouped and transposed. ``conv`` becomes ``conv.0`` and ``conv.1``, which carries the bias. Exact at
    T = min(k², output channels); cheaper where T·(1/out + 1/k²) < 1.

    Not legal, and told as skips: a tied weight (``tied_weight``), weights that are not numbers (``not_finite``), what
    is depthwise or 1×1 already (``depthwise``, ``pointwise``), what would not become cheaper (``does_not_pay``), a
    layer that is one of two factors (``already_factorized``).

    Give one of ``terms``, ``ratio`` and ``error``; with none the ratio is 0.5.

    Attributes:
        terms: depthwise kernels for each input channel, T.
        ratio: share of the cost to keep, in (0, 1): the most terms that cost no more (one at least).
        error: bound of the relative error of the weight, with ``calibration`` of the output on the data: the fewest
            terms that keep it.
        calibration: batches: what the model takes, or that and labels. The pointwise part is fitted to the original
            output by least squares, as far as what is fitted to one half of the samples holds on the other.
        batches: most batches to read; None reads all.
        cost: what has to fall: ``macs`` or ``parameters``; ``latency`` counts multiply-accumulates, and leaves a site
            that is no faster by measurement on ``backend`` (inside ``compile()``).
        backend: that latency is measured on.
        force: rewrite even where it does not pay.
        norm: put a batch norm between the two, for training. With ``calibration`` it has the statistics of the data;
            it changes nothing until it is trained.
        activation: put an activation after that norm (the block of MobileNet), which makes the result one to train.
            With ``calibration`` the pointwise part is fitted to what comes through it.
        ignore: name patterns of layers to leave alone.
        only: name patterns of the layers to look at; empty means all.
    """

    name: ClassVar[str] = "substitute_depthwise_separable"
    numerics: ClassVar[Numerics] = Numerics.LOSSY
    terms: int | None = None
    ratio: float | None = None
    error: float | None = None
    calibration: Iterable[Any] | None = None
    batches: int | None = None
    cost: Literal["macs", "parameters", "latency"] = "macs"
    backend: str = "onnxruntime"
    force: bool = False
    norm: bool = False
    activation: Literal["relu", "relu6", "silu", "hardswish"] | None = None
    ignore: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        patterns(self, "ignore", "only")
        super().__post_init__()
        check_common(self, ("terms", "ratio", "error"))
        if self.activation is not None and not self.norm:
            raise OptionError("an activation without a norm before it", where="activation", remedy="give norm=True")

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """Find the sites, then take their weights one at a time."""
        check_latency(self, context)
        found = list(find_sites(graph_module, (*CONVS, *TRANSPOSED), refuse_conv, ignore=self.ignore, only=self.only))
        skipped = [item for item in found if isinstance(item, Skip)]
        sites = [item for item in found if isinstance(item, Site)]
        if not found:
            skipped.append(Skip("all", "nothing_to_substitute", "The graph has no convolution."))
        original = copy_graph(graph_module)
        rewrites: list[Rewrite] = []
        with GraphEditor(graph_module) as editor:
            metrics = site_metrics(original, sites, self.calibration, context, batches=self.batches, folds=True)
            for done, (site, metric, moments) in enumerate(metrics):
                assert not isinstance(moments, PackedMoments)  # of matrices alone
                made = self._decoupled(graph_module, site, metric, moments)
                if self.cost == "latency" and not self.force and isinstance(made, Decoupled):
                    made = (
                        slower(original, site, self._layers(site.layer, made, moments), context, self.backend) or made
                    )
                if isinstance(made, Skip):
                    skipped.append(made)
                else:
                    rewrites.append(self._put(editor, site, made, metric, moments))
                if context.progress is not None:
                    context.progress(done + 1, len(sites), site.path)
        if self.activation is not None and self.calibration is not None and rewrites:
            # What was there before serves other layers than these: one sample tells more.
            rewrites = refit_outer(
                original, graph_module, rewrites, self.calibration, self.batches, context, unproven=_UNPROVEN
            )
        note = "The new norms and activations are there to be trained." if self.activation and rewrites else ""
        if self.calibration is not None:
            note = " ".join(filter(None, (note, too_wide(sites, folds=True))))
        return PassResult(graph_module, tuple(rewrites), tuple(skipped), note)

    def _decoupled(
        self, graph_module: fx.GraphModule, site: Site, metric: Metric, moments: Moments | None
    ) -> Decoupled | Skip:
        kernel = kernel_of(site.layer).flatten(3)
        price = self._price(graph_module, site)
        made: Decoupled | None = None
        if self.error is None:
            wanted = self.terms if self.terms is not None else Goal(ratio=self.ratio or 0.5).fixed(price)
            terms = min(wanted, price.full)
        elif moments is None:
            total = channel_energies(kernel).sum(0, keepdim=True)  # errors of channels add up
            terms = Goal(error=self.error).of_spectrum(total)
        else:
            bound, tried = self.error, {}

            def enough(terms: int) -> bool:
                tried[terms] = decouple(kernel, terms, metric, moments)
                return bool(errors(kernel.flatten(2), tried[terms].matrix(), metric)["output_error"] <= bound)

            terms = first_that(price.full - 1, enough) or price.full  # exact with all
            made = tried.get(terms)
        if not self.force and not price.pays(terms):
            what = "weights" if self.cost == "parameters" else "multiply-accumulates"
            told = f"With {terms} terms it takes {terms * price.unit} {what}, as it is {price.dense}."
            return Skip(site.path, "does_not_pay", told)
        return made or decouple(kernel, terms, metric, moments)

    def _price(self, graph_module: fx.GraphModule, site: Site) -> Price:
        """Of the layer as it is, and of each term."""
        groups, outputs, inputs, *spatial = kernel_of(site.layer).shape
        size = math.prod(spatial)
        full = min(outputs, size)
        sizes = GraphSizes(graph_module)
        if self.cost == "parameters" or not sizes.known:
            return Price(groups * outputs * inputs * size, groups * inputs * (size + outputs), full)
        node = site.nodes[0]
        before, after = (sizes.of(item.meta["val"]) for item in (node.args[0], node))  # type: ignore[union-attr]
        rank = len(spatial)
        moved, mixed = (math.prod(shape[-rank:]) for shape in (before if site.layer.transposed else after, after))
        unit = groups * inputs * (moved * size + mixed * outputs)
        return Price(moved * groups * outputs * inputs * size, unit, full)

    def _layers(self, layer: Any, made: Decoupled, moments: Moments | None) -> list[nn.Module]:
        chain: list[nn.Module] = [depthwise(layer, made.depthwise), pointwise(layer, made.pointwise, layer.bias)]
        if self.norm:
            chain.insert(1, block_norm(layer, made.depthwise, moments, trains=self.activation is not None))
        return chain

    def _put(
        self, editor: GraphEditor, site: Site, made: Decoupled, metric: Metric, moments: Moments | None
    ) -> Rewrite:
        layer = site.layer
        terms = made.depthwise.shape[2]
        chain = self._layers(layer, made, moments)
        before = macs_of(editor.graph_module, site.nodes)
        calls: dict[int, Any] = {} if self.activation is None else {1: ACTIVATIONS[self.activation]}
        measured = errors(kernel_of(layer).flatten(2), made.matrix(), metric)
        if self.activation is not None:
            measured["output_error"] = None  # that of the two layers alone would be another's
            measured.pop("loss", None)
        nodes = splice(editor, site, chain, calls)
        after = macs_of(editor.graph_module, nodes)
        count, own = (sum(p.numel() for p in nn.ModuleList(layers).parameters()) for layers in ([layer], chain))
        detail: dict[str, Any] = {
            "terms": terms,
            "kernel": list(layer.kernel_size),
            "channels": [layer.in_channels, layer.out_channels],
            **costs(count, own, before, None if after is None else after * len(site.nodes)),
            **measured,
            **({} if made.fit is None or self.activation is not None else made.fit.detail),
            "layers": [f"{site.path}.{index}" for index in range(len(chain))],
        }
        return Rewrite(site.path, f"depthwise and pointwise with {terms} terms", detail)
