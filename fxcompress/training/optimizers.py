"""The optimizer of a run: which parameters train, in which groups, by which rule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx, nn

from fxcompress.errors import OptionError, PreconditionError
from fxcompress.training.options import TrainingOptions
from fxcompress.training.schedules import Schedule

__all__ = ["make_optimizer", "set_rates"]

_FUSED_ON = ("cpu", "cuda")


def make_optimizer(
    graph_module: fx.GraphModule, objective: nn.Module, options: TrainingOptions
) -> torch.optim.Optimizer:
    """Groups: what decays, and what does not (norms, biases, scalars). Frozen parameters stay out.

    Raises:
        PreconditionError: nothing trains, or a weight is float16, whose updates would be lost.
        OptionError: the optimizer function returns no optimizer.
    """
    named = dict(graph_module.named_parameters())
    rest = {name: p for name, p in named.items() if p.requires_grad and p.is_floating_point()}
    halves = [name for name, parameter in rest.items() if parameter.dtype == torch.float16]
    if halves:
        raise PreconditionError(
            f"{len(halves)} weights are float16, in which small updates are lost",
            where=halves[0],
            remedy="train before ConvertPrecision; precision='float16' computes in half with weights in float32",
        )
    rest |= {f"objective.{name}": parameter for name, parameter in objective.named_parameters()}
    matrices = [parameter for parameter in rest.values() if parameter.dim() > 1]
    vectors = [parameter for parameter in rest.values() if parameter.dim() <= 1]
    groups = [_group(matrices, options.lr, options.weight_decay), _group(vectors, options.lr, 0.0)]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise PreconditionError(
            "nothing trains: the graph has no parameter of floating-point numbers that requires a gradient",
            where="parameters",
            remedy="call model.requires_grad_() before compile(), and train before passes that make integers",
        )
    return _made(graph_module, groups, options)


def set_rates(optimizer: torch.optim.Optimizer, factor: Schedule, step: int) -> float:
    """Give every group its learning rate for a step; returns that of the first.

    Raises:
        PreconditionError: the schedule gives no number.
    """
    share = factor(step)
    if not math.isfinite(share):
        raise PreconditionError(f"the schedule gives {share} at step {step + 1}", where="schedule")
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * share
    return float(optimizer.param_groups[0]["lr"])


def _group(parameters: list[nn.Parameter], lr: float, weight_decay: float) -> dict[str, Any]:
    return {"params": parameters, "lr": lr, "initial_lr": lr, "weight_decay": weight_decay}


def _made(
    graph_module: fx.GraphModule, groups: list[dict[str, Any]], options: TrainingOptions
) -> torch.optim.Optimizer:
    # None leaves the choice to torch, which takes one kernel per parameter and operation on a CPU.
    fused = True if _fusible(graph_module, groups, options) else None
    if options.optimizer == "sgd":
        nesterov = options.momentum > 0
        return torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum, nesterov=nesterov, fused=fused)
    if options.optimizer == "adam":
        return torch.optim.Adam(groups, lr=options.lr, fused=fused)
    if options.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=options.lr, fused=fused)
    assert callable(options.optimizer)
    made = options.optimizer(groups)
    if not isinstance(made, torch.optim.Optimizer):
        raise OptionError(
            f"the optimizer function returned a {type(made).__name__}", where="optimizer", remedy="return an Optimizer"
        )
    for group in made.param_groups:
        group.setdefault("initial_lr", group["lr"])
    return made


def _fusible(graph_module: fx.GraphModule, groups: list[dict[str, Any]], options: TrainingOptions) -> bool:
    """Whether one kernel may do a whole step.

    It reads parameter, gradient and state by their places in memory, whatever their strides say. Autograd lays a
    gradient out like its parameter where that is dense. Sparse gradients it does not take, and of the scale of float16
    losses Accelerate knows only the other way.
    """
    if options.precision == "float16" or any(map(_has_sparse_gradient, graph_module.graph.nodes)):
        return False
    parameters = [parameter for group in groups for parameter in group["params"]]
    return all(parameter.device.type in _FUSED_ON and _is_dense(parameter) for parameter in parameters)


def _has_sparse_gradient(node: fx.Node) -> bool:
    """Whether it is an embedding that gives only those rows gradients that it read."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    names = [argument.name for argument in node.target._schema.arguments]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}.get("sparse") is True


def _is_dense(parameter: torch.Tensor) -> bool:
    if parameter.layout != torch.strided:
        return False
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(parameter.dim())
    return parameter.is_contiguous() or (last is not None and parameter.is_contiguous(memory_format=last))
