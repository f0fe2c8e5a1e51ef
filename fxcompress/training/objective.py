"""What training minimises: a module over outputs and batch; distillation is one with a teacher inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxcompress.graph.batches import Batch
from fxcompress.graph.running import nested_inputs
from fxcompress.training.losses import Loss, loss_of

__all__ = ["Objective", "Step"]


class Objective(nn.Module):
    """The loss of the labels. Parameters of an objective train with the model; buffers and parameters are saved.

    Args:
        loss: a name or a function of outputs and batch.
    """

    def __init__(self, loss: str | Loss = "auto") -> None:
        super().__init__()
        self.loss = loss

    def start(self, first: Callable[[], Batch], device: torch.device, seed: int) -> None:
        """Before the optimizer is made: the place to make parameters that depend on the data.

        Args:
            first: gives the first batch, on the device.
            device: where the graph is by now.
            seed: of the run.
        """

    def targets(self, batch: Batch) -> Any:
        """What is computed before the model runs, in the run's precision: a teacher's outputs."""
        return None

    def forward(self, outputs: Any, batch: Batch, targets: Any) -> torch.Tensor:
        """The loss as a scalar, from outputs in float32."""
        return loss_of(self.loss, outputs, batch)


class Step(nn.Module):
    """Graph and objective as one module, batch to loss: what is wrapped for several processes."""

    def __init__(self, graph_module: fx.GraphModule, objective: Objective) -> None:
        super().__init__()
        self.graph_module, self.objective = graph_module, objective

    def forward(self, batch: Batch) -> torch.Tensor:
        """The loss of a batch."""
        targets = self.objective.targets(batch)
        args, kwargs = nested_inputs(self.graph_module, batch.leaves)
        outputs = self.graph_module(*args, **kwargs)
        kind = next((leaf.device.type for leaf in batch.leaves if isinstance(leaf, torch.Tensor)), "cpu")
        if not torch.is_autocast_enabled(kind):
            return self.objective(outputs, batch, targets)
        with torch.autocast(kind, enabled=False):
            return self.objective(_wide(outputs), batch, _wide(targets))


def _wide(values: Any) -> Any:
    return pytree.tree_map_only(
        torch.Tensor, lambda leaf: leaf.float() if leaf.dtype in (torch.bfloat16, torch.float16) else leaf, values
    )
