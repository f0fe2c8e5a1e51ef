"""What two processes run together: ``accelerate launch … -m tests.training.processes DIRECTORY``.

Each writes the weights that it ends with, and the metric that it measured, into DIRECTORY.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import fx, nn
from torch.utils.data import DataLoader, TensorDataset

from fxcompress.capture import capture
from fxcompress.training.history import History
from fxcompress.training.loop import train
from fxcompress.training.objective import Objective
from fxcompress.training.options import TrainingOptions

BATCH, SAMPLES = 8, 64


def run(norm: bool, **changes: Any) -> tuple[fx.GraphModule, History]:
    """Train a small network; with ``norm`` it has statistics, which differ between processes until they are told."""
    torch.manual_seed(0)
    middle = nn.BatchNorm1d(8) if norm else nn.Tanh()
    graph = capture(nn.Sequential(nn.Linear(5, 8), middle, nn.Linear(8, 3)).eval(), (torch.zeros(2, 5),))
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(SAMPLES, 5, generator=generator)
    data = TensorDataset(inputs, inputs[:, :3].argmax(1))
    loader = DataLoader(data, batch_size=BATCH, shuffle=True)
    uneven = DataLoader(data, batch_size=24)
    told: dict[str, Any] = {"epochs": 3, "lr": 0.05, "validation": uneven, "seed": 4, **changes}
    return graph, train(graph, loader, Objective(), TrainingOptions(**told))


def main() -> None:
    """Train with and without a norm."""
    torch.set_num_threads(1)
    directory, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    plain, history = run(norm=False, clip=1.0)
    normed, _ = run(norm=True, ema=0.9, checkpoint=directory / "checkpoints")
    weights = {f"plain.{name}": tensor for name, tensor in plain.state_dict().items()}
    weights |= {f"normed.{name}": tensor for name, tensor in normed.state_dict().items()}
    assert history.after is not None
    weights["metric"] = torch.tensor(history.after, dtype=torch.float64)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, directory / f"{rank}.safetensors")


if __name__ == "__main__":
    main()
