"""How much each index of a weight matters on data: by gradients of a loss, or by what it sends to its readers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxcompress.analysis.statistics import MeanSquare, collect
from fxcompress.errors import PreconditionError
from fxcompress.graph.batches import Batch, batches
from fxcompress.graph.running import nested_inputs
from fxcompress.passes.pruning.importance import Criterion, rows

__all__ = ["data_criterion"]

Loss = Callable[[Any, Any], Any]


def data_criterion(
    name: str, graph_module: fx.GraphModule, data: Iterable[Any], loss: Loss | None, limit: int | None
) -> Criterion:
    """``taylor``, ``obd`` or ``activation``, measured on at most ``limit`` batches.

    Raises:
        PreconditionError: the data does not fit, or the loss is no finite scalar that depends on the weights.
    """
    if name == "activation":
        return _activation(graph_module, data, limit)
    gradients, squares = _gradients(graph_module, data, loss, limit)
    source = gradients if name == "taylor" else squares

    def score(path: str, weight: torch.Tensor, dim: int) -> torch.Tensor | None:
        found = source.get(id(weight_of[path]))
        if weight.dim() < 2 or found is None:
            return None
        if name == "taylor":  # the first-order change of the loss when the index is zeroed
            return rows(weight * found, dim).sum(1).abs()
        return 0.5 * rows(weight.square() * found, dim).sum(1)

    weight_of: dict[str, torch.Tensor] = dict(graph_module.named_parameters(remove_duplicate=False))
    weight_of |= dict(graph_module.named_buffers(remove_duplicate=False))
    return score


def _gradients(
    graph_module: fx.GraphModule, data: Iterable[Any], loss: Loss | None, limit: int | None
) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]:
    """Mean of the loss's gradient, and of its square, over the batches: by id of the weight.

    The weights are the user's, perhaps frozen: the loss is computed on aliases, and no ``.grad`` is written.
    """
    own = {name: p for name, p in graph_module.named_parameters() if p.is_floating_point()}
    aliases = {name: p.detach().requires_grad_() for name, p in own.items()}
    total = {id(p): torch.zeros_like(p, dtype=torch.float32) for p in own.values()}
    square = {id(p): torch.zeros_like(p, dtype=torch.float32) for p in own.values()}
    training = {module: module.training for module in graph_module.modules()}
    count = 0
    try:
        graph_module.eval()
        for count, batch in enumerate(batches(graph_module, data, limit=limit), 1):  # noqa: B007
            args, kwargs = nested_inputs(graph_module, batch.leaves)
            with torch.enable_grad():
                outputs = torch.func.functional_call(graph_module, aliases, args, kwargs, tie_weights=True)
                value = _loss(loss, outputs, batch)
                found = torch.autograd.grad(value, list(aliases.values()), allow_unused=True)
            for parameter, gradient in zip(own.values(), found, strict=True):
                if gradient is not None:
                    total[id(parameter)] += gradient
                    square[id(parameter)] += gradient.float().square()
    finally:
        for module, mode in training.items():
            module.training = mode
    for store in (total, square):
        for tensor in store.values():
            tensor /= count
    return total, square


def _loss(loss: Loss | None, outputs: Any, batch: Batch) -> torch.Tensor:
    value = loss(outputs, batch.whole) if loss is not None else _default_loss(outputs, batch)
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.requires_grad:
        raise PreconditionError(
            "the loss is no scalar that depends on the weights",
            where="loss",
            remedy="return a tensor with one element, computed from the outputs",
        )
    if not bool(torch.isfinite(value)):
        raise PreconditionError(f"the loss is {value.item()}", where="loss", remedy="check the data and the labels")
    return value.reshape(())


def _default_loss(outputs: Any, batch: Batch) -> torch.Tensor:
    """Cross entropy of the first output with labels, where a batch has them; else the outputs' mean square."""
    leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    labels = [leaf for leaf in pytree.tree_leaves(batch.rest) if isinstance(leaf, torch.Tensor)]
    if leaves and len(labels) == 1 and labels[0].dtype == torch.int64 and labels[0].dim() == leaves[0].dim() - 1:
        return nn.functional.cross_entropy(leaves[0].movedim(-1, 1) if leaves[0].dim() == 3 else leaves[0], labels[0])
    return torch.stack([leaf.float().square().mean() for leaf in leaves]).sum() if leaves else torch.zeros(())


def _activation(graph_module: fx.GraphModule, data: Iterable[Any], limit: int | None) -> Criterion:
    """Energy of what an index sends through the weights that read it: ``Σ w² · E[x²]`` (as in Wanda, Sun et al. 2024).

    Only the weights that read channels have a say.
    """
    requests: dict[str, MeanSquare] = {}
    paths: dict[str, list[str]] = {}
    for node in graph_module.graph.find_nodes(op="call_module"):
        layer = graph_module.get_submodule(str(node.target))
        dense = isinstance(layer, nn.modules.conv._ConvNd) and layer.groups == 1 and not layer.transposed
        if isinstance(layer, nn.Linear) or dense:
            requests[node.name] = MeanSquare("input", dim=-1 if isinstance(layer, nn.Linear) else 1)
            paths.setdefault(f"{node.target}.weight", []).append(node.name)
    found = collect(graph_module, data, requests, limit=limit)
    energy = {path: sum(found[name, requests[name]] for name in names) for path, names in paths.items()}

    def score(path: str, weight: torch.Tensor, dim: int) -> torch.Tensor | None:
        squares = energy.get(path)
        if squares is None or dim != 1:
            return None
        assert isinstance(squares, torch.Tensor)
        return rows(weight.square(), 1).sum(1).double() * squares.to(weight.device)

    return score
