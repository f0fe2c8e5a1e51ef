"""What an engine is held against, and how far from it the engine may be."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import fx

from fxcompress.backends.engine import Engine
from fxcompress.backends.reference import Reference
from fxcompress.backends.verification import verify_engine
from fxcompress.capture.check import other_sizes
from fxcompress.errors import VerificationError
from fxcompress.graph.running import computed_outputs, nested_inputs, outputs_of
from fxcompress.quantization.borders import border_noise
from fxcompress.quantization.fake_quant import Quantizer
from fxcompress.quantization.integer_layers import DynamicLinear

__all__ = ["Proof"]

# Largest relative error that an engine may show against PyTorch, by the widest rounding among its outputs.
_ENGINE_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Of integers whose ranges are found while they run, so that all of them move with a last bit.
_DYNAMIC_TOLERANCE = 5e-2
_UNSTABLE = 0.1  # noise beyond which a network cannot be told from a wrong one


class Proof:
    """The graph's outputs in PyTorch at two sizes of the dynamic dims, which an engine is held against."""

    def __init__(
        self,
        graph_module: fx.GraphModule,
        leaves: Sequence[Any],
        outputs: list[Any] | None,
        computes_in: torch.dtype | None,
    ) -> None:
        self._graph_module = graph_module
        self._sets = [list(leaves)]
        self._made = {0: outputs} if outputs is not None else {}
        for other in other_sizes(graph_module, leaves):
            try:  # the first at which the model itself runs
                self._made[1] = outputs_of(graph_module, *nested_inputs(graph_module, other))
            except (RuntimeError, ValueError, IndexError):
                continue
            self._sets.append(other)
            break
        self._tensors = [[leaf for leaf in inputs if isinstance(leaf, torch.Tensor)] for inputs in self._sets]
        dtypes = {leaf.dtype for inputs in self._tensors for leaf in inputs if leaf.is_floating_point()}
        dtypes |= {p.dtype for p in graph_module.parameters() if p.is_floating_point()}
        dtypes |= {computes_in} if computes_in is not None else set()
        self._floating = max((_ENGINE_TOLERANCE.get(dtype, 1e-1) for dtype in dtypes), default=1e-4)

    @cached_property
    def noise(self) -> float | None:
        """What roundings on a border do to the outputs of a quantized graph; None where nothing is quantized."""
        if not any(isinstance(module, Quantizer) for module in self._graph_module.modules()):
            return None
        noise = 0.0
        for index, inputs in enumerate(self._sets):
            run = partial(outputs_of, self._graph_module, *nested_inputs(self._graph_module, inputs))
            noise = max(noise, border_noise(self._graph_module, self._all_expected(index), run))
        return noise

    @cached_property
    def allowed(self) -> float:
        """The largest relative error that an engine may have."""
        allowed = self._floating
        if any(isinstance(module, DynamicLinear) for module in self._graph_module.modules()):
            allowed = max(allowed, _DYNAMIC_TOLERANCE)
        return allowed if self.noise is None else max(allowed, _of_integers(self.noise))

    def of(self, engine: Engine) -> dict[str, Any]:
        """Compare, and give the figures.

        Raises:
            VerificationError: the engine differs by more than :attr:`allowed`.
        """
        runs = iter(range(len(self._sets)))
        try:
            errors = verify_engine(engine, lambda *_: self._expected(next(runs)), self._tensors, self.allowed)
        except VerificationError as error:
            if self.noise is None:
                raise
            raise VerificationError(
                error.problem, where=error.where, remedy=_advice(self.noise, error.remedy)
            ) from error
        shapes = [[list(leaf.shape) for leaf in inputs] for inputs in self._tensors]
        return {"relative_error": errors, "tolerance": self.allowed, "input_shapes": shapes}

    def reference(self) -> Reference:
        """The smaller of the two runs."""
        sizes = [sum(leaf.numel() for leaf in inputs) for inputs in self._tensors]
        index = sizes.index(min(sizes))
        outputs = [torch.as_tensor(leaf) for leaf in self._expected(index)]
        return Reference(tuple(self._tensors[index]), tuple(outputs), self.allowed)

    def _all_expected(self, index: int) -> list[Any]:
        if self._made.get(index) is None:
            self._made[index] = outputs_of(self._graph_module, *nested_inputs(self._graph_module, self._sets[index]))
        return self._made[index]

    def _expected(self, index: int) -> list[Any]:
        made = self._all_expected(index)
        return [leaf for leaf, computed in zip(made, computed_outputs(self._graph_module), strict=True) if computed]


def _of_integers(noise: float) -> float:
    """What may be lost between two right ways to run a quantized graph.

    Engines on ONNX Runtime and OpenVINO are between a quarter of the noise and one and a half times it away from
    PyTorch; sums of products that overflow were twice to thirty times it.
    """
    return max(1e-2, min(4 * noise, 5e-2), min(2 * noise, 2 * _UNSTABLE))


def _advice(noise: float, remedy: str | None) -> str:
    told = f"roundings on a border that fall the other way move these outputs by {noise:.2g} in PyTorch itself: "
    if noise > _UNSTABLE:
        return told + (
            "the network multiplies them, so calibrate on real data, or leave its noisiest layers in floating point "
            "with max_drop; verify=False gives the engine as it is"
        )
    return f"{told}the engine's kernels compute something else; {remedy}"
