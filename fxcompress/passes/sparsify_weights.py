"""Zeros in weights: the least important ones, anywhere or in an n:m pattern, for good."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from fxcompress.analysis.sparsity import UNSTRUCTURED, mark_sparse, pattern_of, sparse_weights
from fxcompress.errors import OptionError
from fxcompress.graph.batches import check_limit
from fxcompress.graph.edit import GraphEditor
from fxcompress.passes.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from fxcompress.passes.registry import as_pass
from fxcompress.passes.sparsity.account import detail_of, note_of
from fxcompress.passes.sparsity.masks import gone_of, sparse_weights_of
from fxcompress.passes.sparsity.sites import Site, find_sites
from fxcompress.training.masks import GradualMasks, cubic
from fxcompress.training.options import TrainingOptions

__all__ = ["SparsifyWeights"]


@dataclass(frozen=True)
class SparsifyWeights(Pass):
    """Set the least important weights of linear layers and convolutions to zero; later training keeps them there.

    Zeros save nothing by themselves: a compressed file becomes smaller, and an engine that has kernels for the pattern
    (TensorRT for 2:4) faster. To make a model faster everywhere, remove channels.

    Attributes:
        sparsity: share of the weights to be zero, in (0, 1). A pattern has its own.
        method: ``magnitude`` (Han et al. 2015), ``wanda`` (Sun et al. 2023), or ``sparsegpt`` (Frantar & Alistarh
            2023), which adjusts the other weights. The last two need ``calibration``.
        scope: ``local`` gives every layer the same share, ``global`` ranks the weights of all layers together.
        pattern: ``"2:4"`` leaves 2 of every 4 neighbouring inputs of an output, at each position of a kernel.
        sparsities: shares of single layers by name pattern; 0 keeps one dense. The least counts where several match.
        max_sparsity: greatest share of one layer in global scope.
        ignore: name patterns of layers that stay as they are.
        ends: ``dense`` leaves the first and the last layer.
        calibration: batches: what the model takes, or that and labels.
        batches: how many to read at most; None reads all.
        training: a pass that trains, such as ``FineTune``; the zeros then come step by step while it runs (Zhu & Gupta
            2017), in place of all at once.
        ramp: how the share grows with the steps: ``cubic``, 1 − (1 − t)³, or ``linear``.
        every: most optimizer steps between two choices; at least ten are made where the ramp has as many steps.
        begin: share of the training after which the first weights go.
        end: share after which no more go, so that the rest can recover.
    """

    name: ClassVar[str] = "sparsify_weights"
    numerics: ClassVar[Numerics] = Numerics.LOSSY
    sparsity: float = 0.5
    method: Literal["magnitude", "wanda", "sparsegpt"] = "magnitude"
    scope: Literal["local", "global"] = "local"
    pattern: str | None = None
    sparsities: Mapping[str, float] = field(default_factory=dict)
    max_sparsity: float = 0.995
    ignore: tuple[str, ...] = ()
    ends: Literal["sparsify", "dense"] = "sparsify"
    calibration: Iterable[Any] | None = None
    batches: int | None = None
    training: Pass | None = None
    ramp: Literal["cubic", "linear"] = "cubic"
    every: int = 100
    begin: float = 0.0
    end: float = 0.75

    def __post_init__(self) -> None:
        if isinstance(self.ignore, (list, str)):
            object.__setattr__(self, "ignore", (self.ignore,) if isinstance(self.ignore, str) else tuple(self.ignore))
        if self.training is not None:
            object.__setattr__(self, "training", as_pass(self.training))
        super().__post_init__()
        if not 0 < self.sparsity < 1:
            raise OptionError(
                f"sparsity={self.sparsity} is outside (0, 1)", where="sparsity", remedy="0.9 leaves a tenth"
            )
        for pattern, share in self.sparsities.items():
            if not 0 <= share < 1:
                raise OptionError(f"the sparsity {share} of {pattern!r} is outside [0, 1)", where="sparsities")
        if not 0 < self.max_sparsity <= 1:
            raise OptionError(f"max_sparsity={self.max_sparsity} is outside (0, 1]", where="max_sparsity")
        check_limit(self.batches)
        if self.method != "magnitude" and self.calibration is None:
            raise OptionError(
                f"method={self.method!r} needs data", where="calibration", remedy="give calibration=<batches>"
            )
        if self.method == "magnitude" and self.calibration is not None:
            raise OptionError(
                "magnitude looks at no data", where="calibration", remedy="use method='wanda' or 'sparsegpt'"
            )
        if self.scope == "global" and self.method == "sparsegpt":
            raise OptionError(
                "sparsegpt weighs the weights of one layer against each other, not layers",
                where="scope",
                remedy="use scope='local' with sparsities={...}, or another method",
            )
        if self.pattern is not None:
            pattern_of(self.pattern)
            if self.scope == "global" or self.sparsities:
                raise OptionError(
                    f"pattern={self.pattern!r} says how many weights go everywhere",
                    where="scope" if self.scope == "global" else "sparsities",
                    remedy="leave it out; ignore=(...) keeps layers dense",
                )

        self._check_training()

    def _check_training(self) -> None:
        if not 0 <= self.begin < self.end <= 1:
            raise OptionError(
                f"begin={self.begin} and end={self.end} are no part of a training", where="end", remedy="0 and 0.75"
            )
        if self.every < 1:
            raise OptionError(f"every={self.every} is below 1", where="every")
        if self.training is None:
            for name, default in (("ramp", "cubic"), ("every", 100), ("begin", 0.0), ("end", 0.75)):
                if getattr(self, name) != default:
                    raise OptionError(
                        f"{name} is of zeros that come while training runs", where=name, remedy="give training="
                    )
            return
        if self.method != "magnitude" or self.pattern is not None:
            raise OptionError(
                "zeros that come while training runs are chosen by magnitude, without a pattern",
                where="method" if self.pattern is None else "pattern",
                remedy="leave out training=, and train after this pass: the zeros stay",
            )
        if not isinstance(self.training, TrainingOptions):
            raise OptionError(
                f"the pass {self.training.name!r} does not train", where="training", remedy="give FineTune(...)"
            )
        if self.training.keep_best or self.training.patience is not None:
            raise OptionError(
                "the best weights may be of an epoch in which they were not yet sparse",
                where="training",
                remedy="leave out keep_best and patience; train further after this pass",
            )

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """Choose on the graph as it is, then put all new weights in at once; or let them go while training runs."""
        sites, skipped = find_sites(graph_module, self.ignore, self.sparsities, self.ends)
        pattern = pattern_of(self.pattern) if self.pattern is not None else None
        chosen: list[Site] = []
        for site in sites:
            reason = self._unfit(site, pattern)
            if reason is None:
                chosen.append(site)
            else:
                skipped.append(Skip(site.path, *reason))
        if self.training is not None and chosen:
            return self._gradually(graph_module, context, chosen, skipped)
        rewrites: list[Rewrite] = []
        named, before = self.pattern or UNSTRUCTURED, sparse_weights(graph_module)
        weights: list[tuple[Site, torch.Tensor]] = []
        for site, weight, moment in sparse_weights_of(graph_module, chosen, self, pattern) if chosen else ():
            same, held = torch.equal(weight, site.weight), all(before.get(name) == named for name in _names_of(site))
            if same and held:
                skipped.append(Skip(site.path, "sparse_enough", "as many of its weights are zero already."))
                continue
            detail = detail_of(site, weight, moment, named, self.method)
            result = f"{detail['sparsity']:.1%} zeros" + (", held from now on" if same else "")
            rewrites.append(Rewrite(site.path, result, detail))
            weights.append((site, weight))
        with GraphEditor(graph_module) as editor:
            for site, weight in weights:
                parameter = torch.nn.Parameter(weight, requires_grad=site.layer.weight.requires_grad)
                for path in _names_of(site):
                    editor.set_tensor(path, parameter)
        if not chosen:
            skipped.append(Skip("all", "nothing_to_sparsify", "no weight of this graph can be made sparse."))
        mark_sparse(graph_module, (path for site, _ in weights for path in _names_of(site)), named)
        note = note_of(graph_module, [dict(rewrite.detail) for rewrite in rewrites], named) if rewrites else ""
        return PassResult(graph_module, tuple(rewrites), tuple(skipped), note)

    def _gradually(
        self, graph_module: fx.GraphModule, context: PassContext, sites: list[Site], skipped: list[Skip]
    ) -> PassResult:
        assert self.training is not None
        before = {site.path: site.weight for site in sites}

        def choose(way: float) -> dict[str, torch.Tensor]:
            gone = gone_of(sites, self, None, None, cubic(way) if self.ramp == "cubic" else way)
            return {path: ~zero for site, zero in zip(sites, gone, strict=True) for path in _names_of(site)}

        masks = GradualMasks(choose, every=self.every, begin=self.begin, end=self.end)
        trained = self.training.run(graph_module, replace(context, hooks=(*context.hooks, masks)))
        mark_sparse(trained.graph_module, (path for site in sites for path in _names_of(site)), UNSTRUCTURED)
        rewrites: list[Rewrite] = []
        for site in sites:
            detail = detail_of(site, site.weight, None, UNSTRUCTURED, self.method, before[site.path])
            rewrites.append(Rewrite(site.path, f"{detail['sparsity']:.1%} zeros", detail))
        details = [dict(rewrite.detail) for rewrite in rewrites]
        note = f"{trained.note}; {note_of(trained.graph_module, details, UNSTRUCTURED)}"
        return PassResult(
            trained.graph_module, (*trained.rewrites, *rewrites), (*trained.skipped, *skipped), note, trained.records
        )

    def _unfit(self, site: Site, pattern: tuple[int, int] | None) -> tuple[str, str] | None:
        if pattern is not None and site.weight.shape[site.dim] % pattern[1]:
            inputs = site.weight.shape[site.dim]
            return "indivisible", f"its {inputs} inputs do not come in blocks of {pattern[1]}."
        if self.method == "sparsegpt" and site.dim == 0:
            return "transposed", "sparsegpt has no form for transposed convolutions; magnitude and wanda have."
        return None


def _names_of(site: Site) -> list[str]:
    """Paths of the site's weight."""
    return [f"{path}.weight" for path in site.layers]
