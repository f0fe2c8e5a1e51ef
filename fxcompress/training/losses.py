"""Losses by name, and which of a model's outputs and which part of a batch they are of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxcompress.errors import PreconditionError
from fxcompress.graph.batches import Batch

__all__ = ["LOSSES", "Loss", "classes_last", "has_class_labels", "labels_of", "loss_of", "main_output"]

Loss: TypeAlias = Callable[[Any, Any], Any]
"""``(outputs, batch) -> scalar``; the batch as the loader gave it."""

functional = nn.functional
_NO_LABEL = -100  # marks tokens and pixels that are no targets, as in torch.nn.CrossEntropyLoss
_LABELS = ("labels", "label", "targets", "target", "y")


def loss_of(loss: str | Loss, outputs: Any, batch: Batch) -> torch.Tensor:
    """The loss of one batch: a scalar tensor.

    Raises:
        PreconditionError: there are no labels, they do not fit, or a function of the user's returns no scalar.
    """
    if callable(loss):
        value = loss(outputs, batch.whole)
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            raise PreconditionError(
                "the loss is no scalar tensor", where="loss", remedy="return a tensor with one element"
            )
        return value.reshape(())
    output, labels = main_output(outputs), labels_of(batch)
    if labels is None:
        raise PreconditionError(
            f"the loss {loss!r} needs labels, and a batch has {_instead(batch)}",
            where="loss",
            remedy="give batches of (inputs, labels), or a function (outputs, batch) -> scalar",
        )
    if loss == "auto":
        if not has_class_labels(output, labels):
            raise PreconditionError(
                f"outputs {list(output.shape)} and labels {labels.dtype} {list(labels.shape)} do not tell the loss",
                where="loss",
                remedy=f"name one of {', '.join(LOSSES)}, or give a function (outputs, batch) -> scalar",
            )
        loss = "cross_entropy"
    try:
        return LOSSES[loss](output, labels)
    except (RuntimeError, ValueError, IndexError) as error:
        raise PreconditionError(
            f"the loss {loss!r} cannot be computed from outputs {list(output.shape)} and labels {labels.dtype} "
            f"{list(labels.shape)}: {str(error).splitlines()[0]}",
            where="loss",
            remedy="check the labels; a function (outputs, batch) -> scalar can take any",
        ) from error


def main_output(outputs: Any) -> torch.Tensor:
    """The output that losses and metrics are of: ``logits`` where outputs have names, else the first float tensor.

    Raises:
        PreconditionError: there is none.
    """
    if isinstance(outputs, torch.Tensor):
        return outputs
    if isinstance(outputs, Mapping) and isinstance(outputs.get("logits"), torch.Tensor):
        return outputs["logits"]
    for leaf in pytree.tree_leaves(outputs):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            return leaf
    raise PreconditionError("the model has no output of floating-point numbers", where="outputs")


def labels_of(batch: Batch) -> torch.Tensor | None:
    """What a batch holds beside the inputs: in a dict the tensor under ``labels`` or a name like it, else the first.

    A dict may hold much that is neither input nor label, a mask or a number of the sample.
    """
    whole, rest = batch.whole, batch.rest
    named = whole if isinstance(whole, Mapping) else whole[0] if isinstance(whole, (tuple, list)) and whole else None
    if not isinstance(named, Mapping):
        return next((leaf for leaf in pytree.tree_leaves(rest) if isinstance(leaf, torch.Tensor)), None)
    inside = list(named.values())
    beside = [item for item in rest if not any(item is value for value in inside)]
    found = next((leaf for leaf in pytree.tree_leaves(beside) if isinstance(leaf, torch.Tensor)), None)
    if found is not None:
        return found
    labels = (named.get(name) for name in _LABELS)
    return next((x for x in labels if isinstance(x, torch.Tensor) and any(x is item for item in rest)), None)


def _instead(batch: Batch) -> str:
    """What there is in place of labels."""
    if not batch.rest:
        return "nothing beside the inputs"
    if isinstance(batch.whole, Mapping):
        return f"none under {', '.join(map(repr, _LABELS))}, only {', '.join(map(repr, batch.whole))}"
    return "no tensor of them beside the inputs"


def has_class_labels(output: torch.Tensor, labels: torch.Tensor | None) -> bool:
    """Whether labels are class indices for these logits: int64, one dimension less."""
    if labels is None or labels.dtype != torch.int64 or output.dim() < 2:
        return False
    return labels.shape == output.shape[:-1] or labels.shape == (*output.shape[:1], *output.shape[2:])


def classes_last(output: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
    """Logits with the classes in the last dimension.

    They are there already in ``[batch, classes]`` and ``[batch, tokens, classes]``; in ``[batch, classes, height,
    width]`` they are second. Labels, where there are any, decide.
    """
    if labels is not None and labels.dtype == torch.int64 and labels.dim() == output.dim() - 1:
        last = labels.shape == output.shape[:-1]
    else:
        last = output.dim() < 4
    return output if last else output.movedim(1, -1)


def _cross_entropy(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    if labels.dtype != torch.int64:  # probabilities
        return functional.cross_entropy(output, labels)
    logits = classes_last(output, labels)
    if logits.shape[:-1] != labels.shape:
        raise ValueError("one label for each row of logits is needed")
    if logits.dim() > 2:
        logits, labels = logits.flatten(0, -2), labels.flatten()
    # A CPU knows at once that all labels count, as they mostly do; a GPU would have to be waited for.
    counts = labels != _NO_LABEL
    if labels.device.type == "cpu" and labels.numel() and bool(counts.all()):
        return functional.cross_entropy(logits, labels)
    # A mean that is 0, not NaN, where no label of the batch counts.
    counted = counts.sum().clamp_min(1)
    return functional.cross_entropy(logits, labels, ignore_index=_NO_LABEL, reduction="sum") / counted


def _same_shape(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Without it torch broadcasts ``[n, 1]`` against ``[n]`` to ``[n, n]``."""

    def checked(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if output.shape != labels.shape and output.squeeze(-1).shape == labels.shape:
            output = output.squeeze(-1)
        if output.shape != labels.shape:
            raise ValueError("both must have one shape")
        return function(output, labels.to(output.dtype))

    return checked


def _cosine(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return 1 - functional.cosine_similarity(output, labels, dim=-1).mean()


LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "bce": _same_shape(functional.binary_cross_entropy_with_logits),
    "cosine": _same_shape(_cosine),
    "cross_entropy": _cross_entropy,
    "l1": _same_shape(functional.l1_loss),
    "mse": _same_shape(functional.mse_loss),
    "smooth_l1": _same_shape(functional.smooth_l1_loss),
}
