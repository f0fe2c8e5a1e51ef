"""Static quantization in one pass: stubs, calibration, and what it costs layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, Literal

from torch import fx

from fxcompress.errors import OptionError, PreconditionError
from fxcompress.graph.batches import check_limit
from fxcompress.graph.copying import copy_graph
from fxcompress.graph.shapes import require_shapes
from fxcompress.passes.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from fxcompress.quantization.account import layer_details, unusual
from fxcompress.quantization.calibrate import Calibration, calibrate, stubs_of
from fxcompress.quantization.damage import measure_damage
from fxcompress.quantization.depthwise import equalize_depthwise
from fxcompress.quantization.insert import insert_stubs
from fxcompress.quantization.layer_choice import ignored_by
from fxcompress.quantization.mixed_precision import fewest, output_error
from fxcompress.quantization.noise import layer_noise
from fxcompress.quantization.observers import check_observer
from fxcompress.quantization.placement import Placement
from fxcompress.quantization.repair import Repaired, repair, repairable
from fxcompress.quantization.schemes import Scheme, scheme_of
from fxcompress.quantization.speed import kinds_of, quickest

__all__ = ["Quantize"]

_NOISE_BATCHES = 4  # that the signal-to-noise ratios are measured on
_SAMPLES = 128  # that the error of the outputs is measured on
_REPAIR_SAMPLES = 64  # that biases are corrected on


@dataclass(frozen=True)
class Quantize(Pass):
    """Quantize weights and activations to 8 bits, placed as the engine wants them, calibrated on data.

    Run ``FuseModules`` first: a convolution with a batch norm behind it is left as it is.

    Attributes:
        data: batches for calibration: what the model takes, or that and labels.
        scheme: ``onnxruntime``, ``openvino`` or ``tensorrt``.
        observer: of activations: ``minmax``, ``moving_average``, ``percentile``, ``mse``, ``histogram``, ``entropy``;
            ``damage`` takes for each the one that moves the outputs least, told once by gradients on 32 samples.
        weights: observer of weights: ``minmax`` or ``mse``.
        percentile: share of values that ``percentile`` covers.
        batches: how many to read at most; None reads all.
        ignore: name patterns of layers that stay in floating point.
        ignore_kinds: class names of such layers: ``("Linear",)``.
        ends: ``float`` leaves the first and the last layer.
        weight_bits: 8, or 7 for x64 processors without VNNI; 4 for a float kernel on small weights.
        equalize: bring the channels that depthwise convolutions read to one range first, where that leaves the
            function as it is.
        correct_bias: take the mean error of each channel off, as ``CorrectBias`` does, on at most 64 samples.
        max_drop: leave the fewest layers in floating point that keep the drop of ``metric`` at this at most. The order
            is that of the damage which the rounding around each layer does to the outputs, to first order.
        metric: a figure of a graph, higher is better: accuracy on your validation data. Without one the drop is the
            relative error of the outputs on ``data``, ‖quantized − float‖ / ‖float‖.
        min_speedup: how many times faster the engine of ``scheme`` has to get, measured inside ``compile()`` on the
            example inputs; 1.0 asks for one that is not slower. Where it is missed, kinds of layers (convolutions,
            grouped, depthwise, linear) stay in floating point for which that is faster; if that is not enough, all.
    """

    name: ClassVar[str] = "quantize"
    numerics: ClassVar[Numerics] = Numerics.LOSSY
    data: Iterable[Any]
    scheme: str = "onnxruntime"
    observer: str = "damage"
    weights: Literal["minmax", "mse"] = "minmax"
    percentile: float = 99.99
    batches: int | None = None
    ignore: tuple[str, ...] = ()
    ignore_kinds: tuple[str, ...] = ()
    ends: Literal["quantize", "float"] = "quantize"
    weight_bits: Literal[4, 7, 8] = 8
    equalize: bool = True
    correct_bias: bool = True
    max_drop: float | None = None
    metric: Callable[[fx.GraphModule], float] | None = None
    min_speedup: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_limit(self.batches)
        scheme_of(self.scheme)
        check_observer(self.observer)
        if not 50 < self.percentile <= 100:
            raise OptionError(f"percentile={self.percentile} is outside (50, 100]", where="percentile")
        if self.max_drop is not None and not self.max_drop >= 0:
            raise OptionError(f"max_drop={self.max_drop} is below 0", where="max_drop")
        if self.min_speedup is not None and not self.min_speedup > 0:
            raise OptionError(
                f"min_speedup={self.min_speedup} is not above 0", where="min_speedup", remedy="1.0 is usual"
            )
        if self.metric is not None and self.max_drop is None:
            raise OptionError("metric needs max_drop: how much of it may be lost", where="max_drop")

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """Stubs, grids, the layers that stay in floating point, and the noise of each of the others."""
        require_shapes(graph_module, self.name)
        if self.min_speedup is not None and context.latency is None:
            raise PreconditionError(
                "latency can only be measured inside compile(), with example inputs", where="min_speedup"
            )
        if stubs_of(graph_module):
            skip = Skip("all", "already_quantized", "the graph has quantization stubs; Calibrate sets them anew")
            return PassResult(graph_module, (), (skip,))
        data = self.data if hasattr(self.data, "__len__") else list(islice(self.data, self.batches))
        floating, known = copy_graph(graph_module), dict[Any, Any]()
        equalized: list[str] = []
        if self.equalize:
            equalized = equalize_depthwise(floating, data, limit=self.batches, progress=context.progress)
        made = self._made(floating, data, context, known, ())
        if not made.placement.layers:
            skip = Skip("all", "nothing_to_quantize", "no layer of this graph can be quantized")
            return PassResult(graph_module, (), (*_left(made.placement, {}), skip))
        cost = str(made.calibration)  # what is made later finds all of it known
        kept: dict[str, tuple[str, str]] = {}
        note = ""
        if self.max_drop is not None:
            kept, note, made = self._mixed(floating, made, data, context, known)
        if not made.placement.layers:
            return PassResult(graph_module, (), tuple(_left(made.placement, kept)), note)
        if self.min_speedup is not None:
            before, after = self._milliseconds((graph_module, made.graph_module), context)
            told_speed = f"{after:.3g} ms in integers"
            if before < self.min_speedup * after:
                slow, told_speed, after, made = self._paced(floating, made, kept, data, context, known)
                kept |= slow
            told_speed += f", {before:.3g} ms in floating point"
            if before < self.min_speedup * after:
                reason = f"it takes {told_speed}: {before / after:.2f} times faster, {self.min_speedup:g} was asked for"
                skipped = (*_left(made.placement, kept), Skip("all", "not_faster", reason))
                return PassResult(graph_module, (), skipped, note)
            note = "; ".join(filter(None, (note, f"{told_speed} on {self.scheme}")))
        noise = layer_noise(floating, made.graph_module, made.placement.layers, data, limit=_NOISE_BATCHES)
        details = layer_details(made.placement, made.scheme, made.calibration.grids, noise, made.repaired)
        order = sorted(details, key=lambda path: noise[path].decibels)
        rewrites = [Rewrite(path, f"{noise[path].decibels:.1f} dB", details[path]) for path in order]
        others = len(made.placement.operations) - len(order)
        told = (
            f"{_counted(len(order), 'layer')} and {_counted(others, 'other operation')} "
            f"for {made.scheme.name}; the noisiest is {order[0]!r} with {noise[order[0]].decibels:.1f} dB"
        )
        if equalized:
            told += f"; the channels that {len(equalized)} depthwise convolutions read have one range"
        told = "; ".join([told, *unusual(made.calibration.grids), cost])
        left = tuple(_left(made.placement, kept))
        return PassResult(made.graph_module, tuple(rewrites), left, "; ".join(filter(None, (told, note))))

    def _made(
        self,
        floating: fx.GraphModule,
        data: Iterable[Any],
        context: PassContext,
        known: dict[Any, Any],
        kept: Collection[str],
    ) -> _Made:
        """Quantized, with these layers beside the ignored ones in floating point."""
        made = copy_graph(floating)
        scheme = scheme_of(self.scheme, weight_bits=self.weight_bits)
        ignored = ignored_by(made, self.ignore, self.ignore_kinds, self.ends)
        placement = insert_stubs(made, scheme, lambda path: "it loses too much" if path in kept else ignored(path))
        calibration = Calibration([], 0, 0.0, 0, 0.0)
        if placement.layers:
            calibration = calibrate(
                made,
                data,
                observer=self.observer,
                weight_observer=self.weights,
                percentile=self.percentile,
                limit=self.batches,
                progress=context.progress,
                known=known,
            )
        repaired: dict[str, Repaired] = {}
        if placement.layers and self.correct_bias:
            paths, _ = repairable(made)
            repaired = repair(made, data, paths, samples=_REPAIR_SAMPLES, limit=self.batches, progress=context.progress)
        return _Made(made, placement, scheme, calibration, repaired)

    def _milliseconds(self, graphs: Sequence[fx.GraphModule], context: PassContext) -> list[float]:
        """Latency of each on the engine: the lower of two medians, measured in turns."""
        assert context.latency is not None
        latency = context.latency
        rounds = [[latency(graph, self.scheme) for graph in graphs] for _ in range(2)]
        return [min(found) for found in zip(*rounds, strict=True)]

    def _paced(
        self,
        floating: fx.GraphModule,
        whole: _Made,
        kept: Mapping[str, tuple[str, str]],
        data: Iterable[Any],
        context: PassContext,
        known: dict[Any, Any],
    ) -> tuple[dict[str, tuple[str, str]], str, float, _Made]:
        """Kinds of layers in floating point that make the engine faster: which and why, its latency, the result."""
        kinds = kinds_of(floating, whole.placement.layers)
        made: dict[tuple[str, ...], _Made] = {(): whole}

        def measure(choices: Sequence[tuple[str, ...]]) -> list[float]:
            for choice in choices:
                if choice not in made:
                    more = [path for kind in choice for path in kinds[kind]]
                    made[choice] = self._made(floating, data, context, known, {*kept, *more})
            return self._milliseconds([made[choice].graph_module for choice in choices], context)

        best = quickest(list(kinds), measure)
        told = f"{best.milliseconds:.3g} ms in integers"
        if best.kinds:
            told += f" but for {' and '.join(best.kinds)}"
        slow = {
            path: ("not_faster", f"the engine takes less time with its {kind} in floating point")
            for kind in best.kinds
            for path in kinds[kind]
        }
        return slow, told, best.milliseconds, made[best.kinds]

    def _mixed(
        self, floating: fx.GraphModule, whole: _Made, data: Iterable[Any], context: PassContext, known: dict[Any, Any]
    ) -> tuple[dict[str, tuple[str, str]], str, _Made]:
        """The fewest layers in floating point that keep the drop in bounds: why each, a note, and the result."""
        assert self.max_drop is not None
        metric = self.metric
        if metric is None:
            measure = output_error(floating, data, samples=_SAMPLES)
            what = "the relative error of the outputs"
        else:
            given, reference = metric, float(metric(_in_eval(floating)))
            what = "the drop of the metric"

            def measure(graph_module: fx.GraphModule) -> float:
                return reference - float(given(_in_eval(graph_module)))

        damage = measure_damage(whole.graph_module, data).layers
        ranking = sorted(damage, key=lambda path: -damage[path])
        made = {0: whole}

        def drop(count: int) -> float:
            if count not in made:
                made[count] = self._made(floating, data, context, known, ranking[:count])
            if context.progress is not None:
                context.progress(count, len(ranking), "looking for layers to leave in floating point")
            return measure(made[count].graph_module) if made[count].placement.layers else 0.0

        chosen = fewest(len(ranking), drop, self.max_drop)
        if chosen.count not in made:
            made[chosen.count] = self._made(floating, data, context, known, ranking[: chosen.count])
        kept = {
            path: (
                "max_drop",
                f"rank {rank} of {len(ranking)} by damage: rounding around it alone moves the outputs by "
                f"{100 * damage[path] ** 0.5:.2g}%",
            )
            for rank, path in enumerate(ranking[: chosen.count], 1)
        }
        note = f"{chosen.count} of {len(ranking)} layers stay in floating point: {what} is {chosen.drop:.3g}"
        if chosen.count:
            note += f", {chosen.tried[0]:.3g} without them; {self.max_drop:.3g} is allowed"
        return kept, note, made[chosen.count]


@dataclass
class _Made:
    """A quantized graph, and the account of it."""

    graph_module: fx.GraphModule
    placement: Placement
    scheme: Scheme
    calibration: Calibration
    repaired: Mapping[str, Repaired]


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _left(placement: Placement, kept: Mapping[str, tuple[str, str]]) -> Iterator[Skip]:
    for path, told in placement.left.items():
        yield Skip(path, *kept.get(path, told))


def _in_eval(graph_module: fx.GraphModule) -> fx.GraphModule:
    copied = copy_graph(graph_module)
    for module in copied.modules():
        module.training = False
    return copied
