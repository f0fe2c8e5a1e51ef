"""Quantization-aware training: the graph learns to live with its stubs, and its grids learn too."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import fx

from fxcompress.errors import OptionError, PreconditionError
from fxcompress.graph.edit import GraphEditor
from fxcompress.passes.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from fxcompress.quantization.fake_quant import Quantizer
from fxcompress.quantization.observers import weight_range
from fxcompress.quantization.types import QuantType, parameters_of_range
from fxcompress.training.account import frozen_layers
from fxcompress.training.distillation import Match, Weights, distillation
from fxcompress.training.loop import train
from fxcompress.training.objective import Objective
from fxcompress.training.options import TrainingOptions, unread
from fxcompress.training.quantized import (
    QuantizedTraining,
    norms_of,
    quantized_layers,
    quantizers_of,
    reestimate_norms,
    settle,
)

__all__ = ["TrainQuantized"]


@dataclass(frozen=True)
class TrainQuantized(TrainingOptions, Pass):
    """Train through the stubs of ``Quantize``, rounding as the engine does; gradients pass straight through.

    Run ``FuseModules`` and ``Quantize`` before it. The result lowers to the same integer engine as without training:
    weights end on their grids, and grids are plain numbers again. The graph is near its best already, so the rate is
    low and rises from 0: Adam's first steps are as long as all others, whatever the gradient.

    Attributes:
        loader: batches: what the model takes, with labels, or without where ``alpha`` is 1.
        lr: learning rate of weights, and relative one of learned scales.
        warmup: as of ``FineTune``.
        grids: ``learned`` trains the scales (LSQ, Esser et al. 2020; relative to their size, as in TQT, Jain et al.
            2020), ``observed`` lets them follow the values.
        freeze_grids: share of the run after which grids stand still; by default 1 if learned, 0.5 if observed.
        freeze_norms: share after which the batch norms that are left keep their statistics.
        reestimate: batches on which the statistics of these norms are taken anew at the end; 0 leaves them.
        weight_bits: of the weights, 2 to 8; None keeps what ``Quantize`` gave them. Engines store fewer than 8 bits in
            8: a compressed file becomes smaller, latency stays.
        ends: ``keep`` leaves the bits of the first and the last layer as they are, ``same`` gives all ``weight_bits``.
        teacher: as of ``Distill``; None takes the model as given to ``compile``.
        alpha: share of the teacher in the loss; 0 learns from labels alone.
        temperature: of ``soft_targets``.
        match: what of the answers is compared, as of ``Distill``: ``soft_targets``, ``mse`` or ``cosine``.
    """

    name: ClassVar[str] = "train_quantized"
    numerics: ClassVar[Numerics] = Numerics.LOSSY
    loader: Iterable[Any]
    lr: float = field(default=1e-4, kw_only=True)
    warmup: float = field(default=0.1, kw_only=True)
    grids: Literal["learned", "observed"] = field(default="learned", kw_only=True)
    freeze_grids: float | None = field(default=None, kw_only=True)
    freeze_norms: float = field(default=0.5, kw_only=True)
    reestimate: int = field(default=0, kw_only=True)
    weight_bits: int | None = field(default=None, kw_only=True)
    ends: Literal["keep", "same"] = field(default="keep", kw_only=True)
    teacher: Any = field(default=None, kw_only=True)
    alpha: float = field(default=0.0, kw_only=True)
    temperature: float = field(default=4.0, kw_only=True)
    match: Match = field(default="soft_targets", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("freeze_grids", "freeze_norms", "alpha"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise OptionError(f"{name}={value} is outside [0, 1]", where=name)
        if self.weight_bits is not None and not 2 <= self.weight_bits <= 8:
            raise OptionError(f"weight_bits={self.weight_bits} is outside 2 to 8", where="weight_bits", remedy="8 or 4")
        if self.reestimate < 0:
            raise OptionError(f"reestimate={self.reestimate} is below 0", where="reestimate")
        if not self.temperature > 0:
            raise OptionError(f"temperature={self.temperature} is not above 0", where="temperature")
        if self.alpha == 0:
            for name in ("teacher", "temperature", "match"):
                unread(self, name, "has no part in the loss where alpha is 0; 0.9 is usual with a teacher")
        if self.match != "soft_targets":
            unread(self, "temperature", "is of match='soft_targets'")
        if self.weight_bits is None:
            unread(self, "ends", "is of weight_bits")

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """Set the stubs up, train, settle the grids."""
        stubs = quantizers_of(graph_module)
        if not stubs:
            raise PreconditionError(
                "the graph has no quantization stubs", where=self.name, remedy="run Quantize(data) before this pass"
            )
        idle = [path for path, stub in stubs.items() if not stub.enabled]
        if idle:
            raise PreconditionError(
                f"{len(idle)} quantization stubs were not calibrated",
                where=idle[0],
                remedy="run Quantize(data), or Calibrate(data) after InsertQuantStubs",
            )
        skipped = [Skip(path, code, reason) for path, code, reason in frozen_layers(graph_module)]
        bits = self._set_bits(graph_module)
        self._set_up(graph_module)
        rounded = QuantizedTraining(
            self.grids,
            freeze_grids=(1.0 if self.grids == "learned" else 0.5) if self.freeze_grids is None else self.freeze_grids,
            freeze_norms=self.freeze_norms,
        )
        hooks = (*context.hooks, rounded)
        with ExitStack() as stack:
            objective: Any = Objective(self.loss)
            if self.alpha > 0:
                teachers = self.teacher if isinstance(self.teacher, (tuple, list)) else (self.teacher,)
                known = [context.original if teacher is None else teacher for teacher in teachers]
                if any(teacher is None for teacher in known):
                    raise PreconditionError("there is no teacher", where="teacher", remedy="give teacher=, or alpha=0")
                weights = Weights(self.alpha, self.temperature, self.match, 0.0, "fitnets")
                objective = stack.enter_context(distillation(graph_module, known, self.loss, weights, {}))
            history = train(graph_module, self.loader, objective, self, hooks=hooks, progress=context.progress)
        read = reestimate_norms(graph_module, self.loader, self.reestimate)
        with GraphEditor(graph_module) as editor:
            for path, weight in settle(graph_module).items():
                editor.set_tensor(path, weight)
        facts = {"grids": self.grids, "weight_bits": bits, "norms": len(norms_of(graph_module)), "reestimated_on": read}
        rewrite = Rewrite("all", f"trained in {history.steps} steps", {**history.detail(), **facts})
        return PassResult(graph_module, (rewrite,), tuple(skipped), history.summary())

    def _set_bits(self, graph_module: fx.GraphModule) -> dict[str, int]:
        """Give weights their bits, on grids that err least; tells the bits of every layer."""
        layers = quantized_layers(graph_module)
        order = [str(node.target) for node in graph_module.graph.find_nodes(op="call_module")]
        paths = list(dict.fromkeys(path for path in order if path in layers))
        kept = {paths[0], paths[-1]} if self.ends == "keep" and paths else set()
        for path in paths:
            layer, old = layers[path], layers[path].weight_quantizer
            if self.weight_bits is None or path in kept or old.kind.bits == self.weight_bits:
                continue
            kind = QuantType(self.weight_bits, old.kind.signed, old.kind.symmetric, old.kind.narrow)
            stub = Quantizer(kind, old.axis, old.scale.numel() if old.axis is not None else None)
            low, high = weight_range(layer.weight.detach(), stub.axis, kind, "mse")
            stub.set(*parameters_of_range(low, high, kind))
            layer.add_module("weight_quantizer", stub)
        return {path: layers[path].weight_quantizer.kind.bits for path in paths}

    def _set_up(self, graph_module: fx.GraphModule) -> None:
        """Scales of this graph's own, which train where they are to."""
        for stub in quantizers_of(graph_module).values():
            stub.scale = stub.scale.clone()
            if self.grids == "learned":
                stub.learn()
