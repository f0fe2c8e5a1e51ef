"""AWQ: factors that give the weights of inputs with large activations finer steps (Lin et al. 2023, arXiv:2306.00978).

W x = (W · s)(x / s): a weight that is made larger before it is rounded to a step Δ errs by Δ / s instead of Δ, where
the step does not grow with it. s = mean|x|^α for the α that errs least; 1 / s goes into whatever makes x, exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from fxcompress.analysis.scaling import Group, Scaling

__all__ = ["Seen", "Site", "aware_sites", "choose_factors"]

_ALPHAS = tuple(step / 20 for step in range(21))
_GAIN = 0.98  # of the expected error, above which factors are not worth a change


@dataclass(frozen=True)
class Seen:
    """What one layer reads, for each input: float64 ``[inputs]``.

    Attributes:
        magnitude: mean of |x|.
        square: mean of x².
    """

    magnitude: torch.Tensor
    square: torch.Tensor


@dataclass(frozen=True)
class Site:
    """Linear layers that share factors.

    Attributes:
        classes: numbers of the factors in the analysis.
        inputs: path of a layer → for each of its inputs the place of its factor, or -1.
    """

    classes: torch.Tensor
    inputs: dict[str, torch.Tensor]


def aware_sites(found: Scaling, layers: Mapping[str, object]) -> list[Site]:
    """The groups of channels that linear layers read and something before them can scale.

    Args:
        found: the analysis of the graph.
        layers: paths of the linear layers to be quantized.
    """
    sites = []
    for group in found.groups:
        readers = [reader for reader in group.readers if reader.path in layers]
        if readers and not group.clips:
            place = _places(found, group)
            sites.append(Site(group.classes, {reader.path: place[reader.classes] for reader in readers}))
    return sites


def _places(found: Scaling, group: Group) -> torch.Tensor:
    place = torch.full((found.count,), -1)
    place[group.classes] = torch.arange(len(group.classes))
    return place


def choose_factors(
    site: Site,
    weights: Mapping[str, torch.Tensor],
    seen: Mapping[str, Seen],
    rounding: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, float, float]:
    """The factors with the least expected error of the layers' outputs.

    Rounding errors of different inputs are taken as independent, so that the error is Σ (Ŵ − W)² · E[x²].

    Args:
        site: the layers.
        weights: ``[outputs, inputs]`` of each.
        seen: what each reads.
        rounding: a weight, float32, as it is once it is stored.

    Returns:
        factors, float64 ``[classes]``; α; and the error in relation to that without factors. Factors are 1, and α is 0,
        where none gains.
    """
    count = len(site.classes)
    magnitude = torch.zeros(count, dtype=torch.float64)
    for path, place in site.inputs.items():
        own = place >= 0
        magnitude.scatter_reduce_(0, place[own], seen[path].magnitude[own], "amax")

    def error(s: torch.Tensor) -> float:
        total = 0.0
        for path, place in site.inputs.items():
            own = torch.where(place >= 0, s[place.clamp_min(0)], torch.ones((), dtype=s.dtype)).float()
            difference = rounding(weights[path] * own) / own - weights[path]
            total += float((difference.double().square().sum(0) * seen[path].square).sum())
        return total

    before = error(torch.ones(count, dtype=torch.float64))
    tried: Sequence[tuple[float, float]] = [(error(_factors(magnitude, alpha)), alpha) for alpha in _ALPHAS[1:]]
    after, alpha = min(tried)
    if before == 0 or after > _GAIN * before:
        return torch.ones(count, dtype=torch.float64), 0.0, 1.0
    return _factors(magnitude, alpha), alpha, after / before


def _factors(magnitude: torch.Tensor, alpha: float) -> torch.Tensor:
    """Mean|x|^α about 1; inputs that are always 0 count as the least of the others."""
    used = magnitude > 0
    if not bool(used.any()):
        return torch.ones_like(magnitude)
    s = magnitude.clamp_min(float(magnitude[used].min())).pow(alpha)
    return s / (s.max() * s.min()).sqrt()
