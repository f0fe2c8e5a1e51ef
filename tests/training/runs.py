"""A small run of training that tests interrupt, and that runs as a program of its own: ``python runs.py DIR [KILL]``.

With KILL the process ends itself with SIGKILL after that many optimizer steps.
"""

from __future__ import annotations

import os
import signal
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

SAMPLES, BATCH = 70, 16


def network() -> nn.Module:
    """Norm, dropout and a skip: statistics, random numbers, several readers."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    ).eval()


def graph() -> fx.GraphModule:
    """The network, captured."""
    return capture(network(), (torch.zeros(2, 1, 6, 6),))


def samples() -> TensorDataset:
    """Images whose label is in their mean."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(SAMPLES, 1, 6, 6, generator=generator)
    labels = (images.mean((1, 2, 3)) * 12).round().clamp(-1, 1).long() + 1
    return TensorDataset(images, labels)


def loader(**changes: Any) -> DataLoader[Any]:
    """Shuffled batches; the last one is smaller."""
    return DataLoader(samples(), **{"batch_size": BATCH, "shuffle": True, **changes})


def options(directory: Path | None, **changes: Any) -> TrainingOptions:
    """Everything that has a state: momenta, average, best weights, schedule."""
    told: dict[str, Any] = {
        "epochs": 4,
        "lr": 0.02,
        "warmup": 0.2,
        "clip": 1.0,
        "ema": 0.9,
        "validation": loader(shuffle=False),
        "keep_best": True,
        "checkpoint": directory,
        "checkpoint_every": None if directory is None else 2,
        "seed": 3,
    }
    return TrainingOptions(**{**told, **changes})


def run(directory: Path | None, data: Any = None, hooks: Any = (), **changes: Any) -> tuple[fx.GraphModule, History]:
    """Train; the graph and the course of it."""
    module = graph()
    history = train(module, loader() if data is None else data, Objective(), options(directory, **changes), hooks=hooks)
    return module, history


def main() -> None:
    """Train in DIR and write the weights beside it."""
    torch.set_num_threads(1)
    directory, kill = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None

    def die(state: Any) -> None:
        if kill is not None and state.step >= kill:
            os.kill(os.getpid(), signal.SIGKILL)

    module, _ = run(directory, callback=die)
    save_file({k: v.contiguous() for k, v in module.state_dict().items()}, directory / "weights.safetensors")


if __name__ == "__main__":
    main()
