"""What the training loop adds to a step, against a bare PyTorch loop over the same model, batches and optimizer.

    python -m benchmarks.training_overhead

The bare loop is forward, cross entropy, backward, SGD step. Ours does the same through the loop of `FineTune`, without
clipping, average and checkpoints; the loss is looked at, random numbers are seeded and hooks called, as always.
Two more bare loops tell what comes from where: one over the captured graph, as ours trains, and one over the captured
graph whose optimizer steps in one kernel (`fused=True`), as that of ours does.
All run in turns; a figure is the median over rounds of the mean step of a round.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from benchmarks import _results
from benchmarks.fashion_mnist.network import ResNet
from fxcompress.capture import capture
from fxcompress.training.loop import train
from fxcompress.training.objective import Objective
from fxcompress.training.options import TrainingOptions

RESULTS = _results.RESULTS / "training_overhead.json"
COLUMNS = ("network", "batch", "bare_ms", "graph_ms", "fused_ms", "loop_ms", "overhead_percent", "over_fused_percent")

Row = dict[str, Any]
Batch = tuple[torch.Tensor, torch.Tensor]


def cases() -> list[tuple[str, Callable[[], nn.Module], int]]:
    """Networks and batch sizes, from long steps to short ones."""
    return [
        ("ResNet 0.70 M, Fashion-MNIST", ResNet, 64),
        ("ResNet 0.18 M, Fashion-MNIST", lambda: ResNet((16, 32, 64)), 32),
        ("ResNet 0.18 M, Fashion-MNIST", lambda: ResNet((16, 32, 64)), 8),
    ]


def bare(model: nn.Module, batches: list[Batch], fused: bool | None = None) -> float:
    """Mean seconds per step of the loop that anyone would write."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, fused=fused)
    start = time.perf_counter()
    for images, labels in batches:
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (time.perf_counter() - start) / len(batches)


def captured(model: nn.Module, batches: list[Batch]) -> fx.GraphModule:
    """A graph of a copy of the model."""
    return capture(copy.deepcopy(model).eval(), (batches[0][0],))


def ours(graph: fx.GraphModule, batches: list[Batch]) -> float:
    """Mean seconds per step, from the end of the first to the end of the last."""
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
    loops: dict[str, Callable[[], float]] = {
        "bare": lambda: bare(copy.deepcopy(model), batches),
        "graph": lambda: bare(captured(model, batches), batches),
        "fused": lambda: bare(captured(model, batches), batches, fused=True),
        "loop": lambda: ours(captured(model, batches), batches),
    }
    found: dict[str, list[float]] = {key: [] for key in loops}
    for number in range(rounds + 1):
        for key, loop in loops.items():
            seconds = loop()
            if number:  # the first warms up
                found[key].append(seconds)
    row: Row = {"network": name, "batch": size}
    row |= {f"{key}_ms": 1000 * statistics.median(values) for key, values in found.items()}
    for key, column in (("bare", "overhead_percent"), ("fused", "over_fused_percent")):
        ratios = [loop / alone for loop, alone in zip(found["loop"], found[key], strict=True)]
        row[column] = round(100 * (statistics.median(ratios) - 1), 2)
        row[f"ratios_{key}"] = [round(ratio, 4) for ratio in ratios]
    return row


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
            f"Float32, {options.steps} steps a round, {options.rounds} rounds of all in turns after one to warm up; "
            "milliseconds are medians over the rounds, the overheads are medians of the ratios of a round. `bare`: the "
            "loop anyone would write, over the model itself; `graph`: the same loop over the captured graph; `fused`: "
            "that, with `fused=True` for its optimizer; `loop`: ours, which trains the graph and fuses. "
            "`overhead_percent` is ours over `bare`, `over_fused_percent` ours over `fused`."
        ],
        facts=_results.machine_facts(options.threads),
    )


if __name__ == "__main__":
    main()
