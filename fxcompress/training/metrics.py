"""Figures of merit on validation data: by name, or a function of outputs and batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import fx, nn

from fxcompress.errors import OptionError, PreconditionError
from fxcompress.graph.batches import Batch
from fxcompress.graph.running import nested_inputs
from fxcompress.training.losses import Loss, classes_last, labels_of, loss_of, main_output

__all__ = ["METRICS", "Metric", "evaluate", "higher_is_better"]

Metric: TypeAlias = Callable[[Any, Any], Any]
"""``(outputs, batch) -> mean over the batch``; the batch as the loader gave it."""

METRICS = ("accuracy", "cosine", "loss", "mse", "top5")
_HIGHER = {"accuracy": True, "cosine": True, "loss": False, "mse": False, "top5": True}


def higher_is_better(metric: str | Metric, told: str | None) -> bool:
    """Which way is up.

    Raises:
        OptionError: the metric is a function and nobody said.
    """
    if told is not None:
        return told == "higher"
    if callable(metric):
        raise OptionError(
            "nobody knows which way this metric is better", where="better", remedy="give better='higher' or 'lower'"
        )
    return _HIGHER[metric]


def evaluate(
    graph_module: fx.GraphModule,
    data: Iterable[Batch],
    metric: str | Metric,
    *,
    loss: str | Loss = "auto",
    total: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums,
) -> float:
    """The mean of a metric over data, each batch counted by its size (accuracy and top5 by their labels).

    Args:
        graph_module: run in eval mode; modes are as before afterwards.
        data: batches of the graph.
        metric: a name or a function.
        loss: of the metric ``loss``.
        total: adds ``[sum, count]`` up over processes.

    Raises:
        PreconditionError: the data is empty, or lacks what the metric needs.
    """
    modes = {module: module.training for module in graph_module.modules()}
    graph_module.eval()
    sums: torch.Tensor | None = None
    try:
        with torch.no_grad():
            for batch in data:
                args, kwargs = nested_inputs(graph_module, batch.leaves)
                value, count = _measured(metric, graph_module(*args, **kwargs), batch, loss)
                found = torch.stack([value.double() * count, torch.as_tensor(count, device=value.device).double()])
                sums = found if sums is None else sums + found
    finally:
        for module, mode in modes.items():
            module.training = mode
    added = total(sums if sums is not None else torch.zeros(2, dtype=torch.float64))
    if added[1] == 0:
        raise PreconditionError("the validation data holds nothing to measure", where="validation")
    return float(added[0] / added[1])


def _measured(metric: str | Metric, outputs: Any, batch: Batch, loss: str | Loss) -> tuple[torch.Tensor, int]:
    """Mean over the batch, and over how many it is."""
    if callable(metric):
        return torch.as_tensor(metric(outputs, batch.whole)).detach().reshape(()), batch.size
    if metric == "loss":
        return loss_of(loss, outputs, batch).detach(), batch.size
    output, labels = main_output(outputs), labels_of(batch)
    if labels is None:
        raise PreconditionError(
            f"the metric {metric!r} needs labels",
            where="validation",
            remedy="give batches of (inputs, labels), or a metric (outputs, batch) -> mean of the batch",
        )
    if metric in ("accuracy", "top5"):
        logits = classes_last(output, labels)
        classes = not labels.is_floating_point() and logits.shape[-1] > 1
        if logits.shape[:-1] != labels.shape or not classes:
            raise PreconditionError(
                f"labels {labels.dtype} {list(labels.shape)} are no classes for outputs {list(output.shape)}",
                where="validation",
                remedy="name another metric, or give a function (outputs, batch) -> mean of the batch",
            )
        wanted = labels >= 0  # tokens that do not count are marked by -100
        best = logits.topk(min(5, logits.shape[-1]) if metric == "top5" else 1, dim=-1).indices
        hits = (best == labels.unsqueeze(-1)).any(-1) & wanted
        count = int(wanted.sum())
        return hits.sum().double() / max(count, 1), count
    if output.shape != labels.shape:
        output = output.squeeze(-1)
    if output.shape != labels.shape:
        raise PreconditionError(
            f"labels {list(labels.shape)} and outputs {list(output.shape)} differ in shape", where="validation"
        )
    if metric == "mse":
        return nn.functional.mse_loss(output.float(), labels.float()), batch.size
    return nn.functional.cosine_similarity(output.float(), labels.float(), dim=-1).mean(), batch.size
