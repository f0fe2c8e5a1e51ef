"""How much of a quantized graph's outputs hangs on roundings that may fall either way.

Integer kernels and the rounding graph in PyTorch agree on what is computed, not on the last bit before a value is
rounded: a kernel adds a bias that was itself rounded, or scales in another order. A value on the border of two integers
then goes the other way, one step of its grid, and everything behind it moves a little. How much is a property of the
graph, and can be measured without an engine: a network that multiplies such steps cannot be told from a wrong one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxcompress.graph.running import max_relative_error
from fxcompress.quantization.calibrate import stubs_of
from fxcompress.quantization.fake_quant import Quantizer

__all__ = ["border_noise"]

_SHARE = 1e-2  # of a step: what kernels differ by before they round, as seen on ONNX Runtime and OpenVINO
_SEEDS = 2


def border_noise(graph_module: fx.GraphModule, outputs: Sequence[Any], run: Callable[[], Sequence[Any]]) -> float:
    """Largest relative change of the outputs when every value may move by a hundredth of a step before it is rounded.

    Args:
        graph_module: quantized and calibrated; it is not changed.
        outputs: of ``run`` on the graph as it is.
        run: runs the graph; called twice, with hooks in place.

    Returns:
        max|moved − outputs| / max|outputs|, over two draws; 0 for a graph without stubs.
    """
    stubs = [graph_module.get_submodule(path) for path in stubs_of(graph_module)]
    worst = 0.0
    for seed in range(_SEEDS if stubs else 0):
        generator = torch.Generator().manual_seed(seed)

        def moved(stub: nn.Module, args: tuple[Any, ...], generator: torch.Generator = generator) -> tuple[Any, ...]:
            assert isinstance(stub, Quantizer)
            values, scale = args[0], stub.grid(args[0])[0]
            draw = torch.rand(values.shape, generator=generator).to(values)
            return ((values + (2 * draw - 1) * _SHARE * scale).to(values.dtype),) if stub.enabled else args

        hooks = [stub.register_forward_pre_hook(moved) for stub in stubs]
        try:
            worst = max(worst, max_relative_error(list(outputs), list(run()))[0])
        finally:
            for hook in hooks:
                hook.remove()
    return worst
