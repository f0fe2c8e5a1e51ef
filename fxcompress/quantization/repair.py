"""Biases and roundings of quantized layers, fitted to what each layer gives in floating point."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxcompress.analysis.statistics.padding import real_positions, without_padding
from fxcompress.analysis.statistics.patches import patches
from fxcompress.errors import PreconditionError
from fxcompress.graph.batches import batches
from fxcompress.graph.edit import GraphEditor
from fxcompress.quantization.adaptive_rounding import RoundingProblem, learn_rounding
from fxcompress.quantization.layers import QUANTIZED
from fxcompress.quantization.walk import Site, channel_dim, walk

__all__ = ["Repaired", "Rounding", "repair", "repairable"]

aten = torch.ops.aten

_CLIPS = {aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.clamp.default, aten.clamp_min.default}
_ROWS = 1 << 26  # elements of the rows that learned rounding holds of one layer
_USUAL, _TRIMS = 3.0, 4  # standard deviations within which an error is usual; rounds of leaving the others out


@dataclass(frozen=True)
class Rounding:
    """How roundings are learned.

    Attributes:
        iterations: steps of Adam for each layer.
        rows: positions of the layer's input that are drawn from the data.
        batch: of them in each step.
        seed: for the draws.
    """

    iterations: int
    rows: int
    batch: int
    seed: int


@dataclass(frozen=True)
class Repaired:
    """What became of one layer.

    Attributes:
        bias_shift: what the bias gets more, float64 ``[channels]``.
        weight: new, on its grid; None where roundings were not learned.
        signal: mean square of the layer's output in floating point.
        noise: mean square of its error before.
        left: mean square of its error after.
        shift: largest mean error of a channel before, relative to the root of ``signal``.
        flipped: share of the weights that are no longer rounded to nearest.
    """

    bias_shift: torch.Tensor
    weight: torch.Tensor | None
    signal: float
    noise: float
    left: float
    shift: float
    flipped: float = 0.0


def repairable(graph_module: fx.GraphModule) -> tuple[list[str], dict[str, tuple[str, str]]]:
    """Calibrated quantized layers in graph order; and of those that cannot be repaired, path → code and reason."""
    calls: dict[str, int] = {}
    for node in graph_module.graph.find_nodes(op="call_module"):
        if isinstance(graph_module.get_submodule(str(node.target)), tuple(QUANTIZED.values())):
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
    holders: dict[int, int] = {}
    for _, parameter in graph_module.named_parameters(remove_duplicate=False):
        holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    left: dict[str, tuple[str, str]] = {}
    for path, count in calls.items():
        layer: Any = graph_module.get_submodule(path)
        if not layer.weight_quantizer.enabled:
            raise PreconditionError("its stub was not calibrated", where=path, remedy="run Calibrate(data) first")
        if count > 1:
            left[path] = ("several_calls", "it is called several times: one bias cannot repair each of them")
        elif layer.bias is not None and holders[id(layer.bias)] > 1:
            left[path] = ("tied_bias", "its bias is tied to another layer's")
        elif bool((layer.weight_quantizer(layer.weight.detach()) == layer.weight).all()):
            left[path] = ("on_grid", "its weight is on its grid: it was repaired before, or nothing is to be gained")
    return [path for path in calls if path not in left], left


def repair(
    graph_module: fx.GraphModule,
    data: Iterable[Any],
    paths: list[str],
    *,
    samples: int,
    rounding: Rounding | None = None,
    limit: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Repaired]:
    """Layer after layer: learn its roundings, if asked for, then move its bias by the mean error that is left.

    What linear layers give at positions that a batch's mask says are padding does not count.

    Args:
        graph_module: with calibrated stubs; layers are changed in place, tensors are not written to.
        data: batches; so many are read as hold ``samples`` samples, and kept in memory.
        paths: from :func:`repairable`.
        samples: most to read, the last batch whole.
        rounding: None corrects biases alone.
        limit: most batches to read.
        progress: called with (done, total, what) after each layer.

    Raises:
        PreconditionError: the data is empty or does not fit, or an output is not finite.
    """
    held: list[list[Any]] = []
    seen = 0
    for batch in batches(graph_module, data, limit=limit):
        held.append(batch.leaves)
        seen += batch.size
        if seen >= samples:
            break
    masks = [real_positions(graph_module, leaves) for leaves in held]
    found: dict[str, Repaired] = {}

    def visit(site: Site) -> list[torch.Tensor]:
        real = masks if isinstance(site.layer, nn.Linear) else [None] * len(masks)
        targets = _counted(site.targets, real)
        outputs = [site.layer(x) for x in site.inputs]
        signal = _mean_square(targets)
        noise = _mean_square([a - b for a, b in zip(_counted(outputs, real), targets, strict=True)])
        if not math.isfinite(signal):
            raise PreconditionError("its output is not finite on the data", where=site.path)
        weight, flipped = None, 0.0
        if rounding is not None:
            weight, flipped = _learned(site, rounding, real)
            site.layer.weight = nn.Parameter(weight, requires_grad=site.layer.weight.requires_grad)
            outputs = [site.layer(x) for x in site.inputs]
        shift = _mean_error(site.layer, _counted(outputs, real), targets)
        shape = [1] * outputs[0].dim()
        shape[channel_dim(site.layer, outputs[0])] = -1
        outputs = [output + shift.reshape(shape).to(output.dtype) for output in outputs]
        left = _mean_square([a - b for a, b in zip(_counted(outputs, real), targets, strict=True)])
        largest = float(shift.abs().max()) / max(math.sqrt(signal), 1e-30)
        found[site.path] = Repaired(shift, weight, signal, noise, left, largest, flipped)
        if progress is not None:
            progress(len(found), len(paths), "repairing layers")
        return outputs

    walk(graph_module, held, visit, paths)
    with GraphEditor(graph_module) as editor:
        for path, item in found.items():
            layer: Any = graph_module.get_submodule(path)
            if item.weight is not None:
                editor.set_tensor(f"{path}.weight", item.weight)
            layer.move_bias(item.bias_shift)
            editor.set_module(path, layer, reshaped=False)
    return found


def _counted(tensors: Sequence[torch.Tensor], real: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    """What a layer reads or gives on each batch, without padding."""
    return [without_padding(tensor, mask) for tensor, mask in zip(tensors, real, strict=True)]


def _mean_error(layer: Any, outputs: list[torch.Tensor], targets: list[torch.Tensor]) -> torch.Tensor:
    """``[channels]``, float64: how much the outputs are too low at a usual position.

    Positions that err far more than the others, such as a token whose outliers the grid clips, count as if they erred
    by three standard deviations, these taken without them: their error is no bias, and would be put on everybody.
    """
    pairs = zip(outputs, targets, strict=True)
    rows = [((b - a).movedim(channel_dim(layer, a), 0), a.shape[channel_dim(layer, a)]) for a, b in pairs]
    errors = torch.cat([row.reshape(channels, -1) for row, channels in rows], 1)
    mean, deviation = _moments(errors)
    for _ in range(_TRIMS):
        reach = _USUAL * deviation
        mean, deviation = _moments(errors.clamp((mean - reach).to(errors)[:, None], (mean + reach).to(errors)[:, None]))
    return mean


def _moments(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each row, float64 ``[rows]``."""
    count = max(1, rows.shape[1])
    mean = rows.sum(1, dtype=torch.float64) / count
    square = rows.square().sum(1, dtype=torch.float64) / count
    return mean, (square - mean.square()).clamp_min(0).sqrt()


def _mean_square(tensors: list[torch.Tensor]) -> float:
    total = sum(float(tensor.double().square().sum()) for tensor in tensors)
    return total / max(1, sum(tensor.numel() for tensor in tensors))


# --- learned rounding -------------------------------------------------------------------------------------------


def _learned(site: Site, rounding: Rounding, real: Sequence[torch.Tensor | None]) -> tuple[torch.Tensor, float]:
    """The weight on its grid, and the share that is not rounded to nearest."""
    layer, weight = site.layer, site.layer.weight.detach()
    groups = getattr(layer, "groups", 1)
    matrix = weight.reshape(groups, len(weight) // groups, -1)
    per_batch = max(1, min(rounding.rows, _ROWS // max(1, groups * matrix.shape[-1])) // len(site.inputs))
    rows, targets = [], []
    for x, target in zip(_counted(site.inputs, real), _counted(site.targets, real), strict=True):
        rows.append(torch.cat(list(patches(layer, x, per_batch, 1 << 24)), 1))
        flat = target.movedim(channel_dim(layer, target), -1).reshape(-1, groups, matrix.shape[1]).transpose(0, 1)
        count = flat.shape[1]
        if count > per_batch:  # the same positions
            flat = flat[:, torch.arange(per_batch, device=flat.device) * count // per_batch]
        targets.append(flat)
    bias = layer.bias.detach().reshape(groups, 1, -1) if layer.bias is not None else None
    problem = RoundingProblem(matrix, bias, torch.cat(rows, 1), torch.cat(targets, 1), _activation(site.node))
    learned, _, _ = learn_rounding(
        problem, layer.weight_quantizer, iterations=rounding.iterations, batch=rounding.batch, seed=rounding.seed
    )
    made = learned.reshape(weight.shape)
    nearest = layer.weight_quantizer(weight)
    scale = layer.weight_quantizer.scale.reshape(-1, *[1] * (weight.dim() - 1))
    return made, float(((made - nearest).abs() > scale / 2).double().mean())


def _activation(node: fx.Node) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The clip that alone reads a layer: errors that it cuts off do not count."""
    (user, *others) = node.users or (None,)
    if others or user is None or user.op != "call_function" or user.target not in _CLIPS:
        return None
    target: Any = user.target
    args, kwargs = user.args[1:], user.kwargs
    if any(isinstance(item, fx.Node) for item in (*args, *kwargs.values())):
        return None
    return lambda x: target(x, *args, **kwargs)
