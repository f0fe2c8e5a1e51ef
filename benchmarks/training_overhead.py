"""What the training loop adds to a step, against a bare PyTorch loop over the same model, batches and optimizer.

    python -m benchmarks.training_overhead

The bare loop is forward, cross entropy, backward, SGD step. Ours does the same through the loop of `FineTune`, without
clipping, average and checkpoints; the loss is looked at, random numbers are seeded and hooks called, as always.
Both run in turns; a figure is the median over rounds of the mean step of a round.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks import _results
from benchmarks.fashion_mnist.network import ResNet
from fxcompress.capture import capture
from fxcompress.training.loop import train
from fxcompress.training.objective import Objective
from fxcompress.training.options import TrainingOptions

RESULTS = _results.RESULTS / "training_overhead.json"
COLUMNS = ("network", "batch", "bare_ms", "loop_ms", "overhead_percent")

Row = dict[str, Any]
Batch = tuple[torch.Tensor, torch.Tensor]


def cases() -> list[tuple[str, Callable[[], nn.Module], int]]:
    """Networks and batch sizes, from long steps to short ones."""
    return [
        ("ResNet 0.70 M, Fashion-MNIST", ResNet, 64),
        ("ResNet 0.18 M, Fashion-MNIST", lambda: ResNet((16, 32, 64)), 32),
        ("ResNet 0.18 M, Fashion-MNIST", lambda: ResNet((16, 32, 64)), 8),
    ]


def bare(model: nn.Module, batches: list[Batch]) -> float:
    """Mean seconds per step of the loop that anyone would write."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    start = time.perf_counter()
    for images, labels in batches:
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (time.perf_counter() - start) / len(batches)


def ours(model: nn.Module, batches: list[Batch]) -> float:
    """Mean seconds per step, from the end of the first to the end of the last."""
    graph = capture(model.eval(), (batches[0][0],))
    ends: list[float] = []
    options = TrainingOptions(
        optimizer="sgd", lr=0.01, loss="cross_entropy", callback=lambda _: ends.append(time.perf_counter())
    )
    train(graph, batches, Objective("cross_entropy"), options)
    return (ends[-1] - ends[0]) / (len(ends) - 1)


def measure(name: str, make: Callable[[], nn.Module], size: int, steps: int, rounds: int) -> Row:
    """One row."""
    torch.manual_seed(0)
    model = make()
    batches = [(torch.randn(size, 1, 28, 28), torch.randint(0, 10, (size,))) for _ in range(steps)]
    found: dict[str, list[float]] = {"bare": [], "loop": []}
    for number in range(rounds + 1):
        pair = bare(copy.deepcopy(model), batches), ours(copy.deepcopy(model), batches)
        if number:  # the first warms up
            found["bare"].append(pair[0])
            found["loop"].append(pair[1])
    medians = {key: statistics.median(values) for key, values in found.items()}
    ratios = [loop / alone for loop, alone in zip(found["loop"], found["bare"], strict=True)]
    return {
        "network": name,
        "batch": size,
        "bare_ms": 1000 * medians["bare"],
        "loop_ms": 1000 * medians["loop"],
        "overhead_percent": round(100 * (statistics.median(ratios) - 1), 2),
        "ratios": [round(ratio, 4) for ratio in ratios],
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure all cases, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dry", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    for name, make, size in cases():
        rows.append(measure(name, make, size, options.steps, options.rounds))
        print(_results.table(rows[-1:], COLUMNS), flush=True)
    if options.dry:
        return
    _results.write(
        RESULTS,
        title="Overhead of the training loop",
        rows=rows,
        columns=COLUMNS,
        summary={"largest_overhead_percent": max(row["overhead_percent"] for row in rows)},
        notes=[
            f"Float32, {options.steps} steps a round, {options.rounds} rounds of both in turns after one to warm up; "
            "milliseconds are medians over the rounds, the overhead is the median of the ratios of a round. The bare "
            "loop runs the model itself, ours its captured graph."
        ],
        facts=_results.machine_facts(options.threads),
    )


if __name__ == "__main__":
    main()
