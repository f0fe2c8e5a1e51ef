"""Cross-layer equalization: channels with small weights trade their scale with the layers that read them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from fxcompress.analysis.scaling import Factors, Group, Scaling, apply_factors, scaling
from fxcompress.passes.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from fxcompress.quantization.equalization import equalize

__all__ = ["EqualizeCrossLayers"]

_LEAST = 0.01  # logarithm of a factor that is worth a change


@dataclass(frozen=True)
class EqualizeCrossLayers(Pass):
    """W₁ → W₁ / s, b₁ → b₁ / s, W₂ → W₂ · s for each channel, s = √(r₁ / r₂) of the ranges of its weights.

    Data-free quantization, Nagel et al. 2019 (arXiv:1906.04721). It serves grids that are shared by all channels:
    weights with one scale, and activations. Run it after ``FuseModules`` and before ``Quantize``. Everything between
    the layers must be homogeneous: relu, leaky relu, pooling, means, reshapes, residual additions (all layers of the
    stream then share a factor). A clip to an upper limit (relu6) is not, and its channels stay as they are.

    Attributes:
        clips: ``keep``, or ``per_channel`` lets the factors through clips, which get limits 6 / s for each channel.
    """

    name: ClassVar[str] = "equalize_cross_layers"
    numerics: ClassVar[Numerics] = Numerics.REASSOCIATED
    clips: Literal["keep", "per_channel"] = "keep"

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """Find the channels, iterate the factors until they stand, write them."""
        found = scaling(graph_module, clips=self.clips == "per_channel")
        skipped = [
            Skip(path, "scale_fixed", f"{reason}.", (node,) if node else ())
            for path, (reason, node) in found.fixed.items()
        ]
        factors = Factors(graph_module, found)
        sweeps, _ = equalize(factors, found.groups)
        for group in found.groups:
            if bool(factors.values[group.classes].log().abs().max() < _LEAST):
                factors.values[group.classes] = 1.0
                skipped.append(Skip(group.makers[0].path, "equal", "the ranges of its channels are equalized already."))
        changed = [group for group in found.groups if bool((factors.values[group.classes] != 1).any())]
        if not changed:
            skipped.append(Skip("all", "nothing_to_equalize", "no channels of this graph can trade their scale."))
            return PassResult(graph_module, (), tuple(skipped))
        apply_factors(graph_module, found, factors.values)
        rewrites = tuple(_told(changed, found, factors.values))
        return PassResult(graph_module, rewrites, tuple(skipped), f"settled after {sweeps} sweeps over the layers")


def _told(groups: list[Group], found: Scaling, factors: torch.Tensor) -> Iterator[Rewrite]:
    told: set[str] = set()
    for group in groups:
        for maker in group.makers:
            own = factors[maker.classes]
            if maker.path in told or not bool((own != 1).any()):
                continue
            told.add(maker.path)
            detail: dict[str, Any] = {
                "with": [reader.path for reader in group.readers],
                "least_factor": float(own.min()),
                "greatest_factor": float(own.max()),
            }
            if group.clips:
                detail["clips"] = [node.name for node in group.clips]
            yield Rewrite(maker.path, "equalized with what reads it", detail)
