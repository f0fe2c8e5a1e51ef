"""A student of a quarter of the teacher's multiply-accumulates on Fashion-MNIST, with and without the teacher.

The teacher is the committed network; the student has half its widths, starts from random weights, and trains from the
same start on the same batches in the same order: once on labels alone (`FineTune`), once as `fxc.distill` does.

    python -m benchmarks.fashion_mnist.distill                             # 3 seeds, two epochs each
    python -m benchmarks.fashion_mnist.distill --seeds 1 --epochs 0.02     # a quick look; writes no results

Runs that the results hold already are not run again.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxcompress as fxc
from benchmarks import _results
from benchmarks.fashion_mnist.data import Split, load
from benchmarks.fashion_mnist.network import CHECKPOINT, ResNet, trained
from benchmarks.fashion_mnist.prune import macs
from benchmarks.fashion_mnist.train import BATCH, PRECISION, accuracy
from fxcompress.passes import FineTune

RESULTS = _results.RESULTS / "distill_fashion_mnist.json"
WIDTHS = (16, 32, 64)  # half of the teacher's, so a quarter of its work
SEEDS, EPOCHS = 3, 2.0
COLUMNS = ("method", "seed", "accuracy", "seconds")
OPTIONS: dict[str, Any] = {
    "optimizer": "sgd",
    "lr": 0.1,
    "weight_decay": 5e-4,
    "schedule": "one_cycle",
    "precision": PRECISION,
    "loss": "cross_entropy",
}

Row = dict[str, Any]


class Batches:
    """The training images of every epoch in an order and with an augmentation of its own."""

    def __init__(self, data: Split, seed: int) -> None:
        self.data, self.seed, self.epoch = data, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """What the next reading is of."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.data) // BATCH

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        generator = torch.Generator().manual_seed(1000 * self.seed + self.epoch)
        for images, labels in self.data.shuffled(BATCH, generator):
            yield images.contiguous(memory_format=torch.channels_last), labels


Train = Callable[[nn.Module, nn.Module, Batches, float, int], fxc.Compiled]

INPUTS = (torch.zeros(2, 1, 28, 28),)


def labels_alone(teacher: nn.Module, student: nn.Module, data: Batches, epochs: float, seed: int) -> fxc.Compiled:
    """Cross entropy."""
    return fxc.compile(student, [FineTune(data, epochs=epochs, seed=seed, **OPTIONS)], INPUTS)


def distilled(teacher: nn.Module, student: nn.Module, data: Batches, epochs: float, seed: int) -> fxc.Compiled:
    """A tenth cross entropy, nine tenths the teacher at temperature 4."""
    return fxc.distill(teacher, student, data, INPUTS, epochs=epochs, seed=seed, alpha=0.9, temperature=4.0, **OPTIONS)


METHODS: dict[str, Train] = {"labels alone": labels_alone, "distilled": distilled}


def summary(rows: list[Row], figures: Row) -> Row:
    """Means, spreads and the verdict."""
    made = dict(figures)
    by = {name: [row["accuracy"] for row in rows if row["method"] == name] for name in METHODS}
    for name, found in by.items():
        key = name.replace(" ", "_")
        made[f"{key}_mean"] = round(statistics.mean(found), 3)
        made[f"{key}_spread"] = round(max(found) - min(found), 3)
    margin = statistics.mean(by["distilled"]) - statistics.mean(by["labels alone"])
    made["margin"] = round(margin, 3)
    wins = margin > max(made["labels_alone_spread"], made["distilled_spread"])
    made["verdict"] = (
        "distillation wins by more than the spread" if wins else "the margin is within the spread of the seeds"
    )
    return made


def main(arguments: list[str] | None = None) -> None:
    """Train, measure on the 10,000 test images, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--seed", type=int, help="only this one, for runs side by side; give each an --output")
    parser.add_argument("--epochs", type=float, default=EPOCHS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file; by default results/, for a full run only")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    train, test = load("train"), load("test")
    teacher = trained(CHECKPOINT).to(memory_format=torch.channels_last)
    full = options.seeds >= SEEDS and options.epochs >= EPOCHS
    output = options.output or (RESULTS if full else None)
    rows: list[Row] = _results.read_rows(output) if output is not None else []
    rows = [row for row in rows if row["epochs"] == options.epochs]
    figures: Row = {"teacher_accuracy": round(accuracy(teacher, test), 2), "teacher_macs": macs(teacher)}
    for seed in range(options.seeds) if options.seed is None else [options.seed]:
        for name, method in METHODS.items():
            if any(row["method"] == name and row["seed"] == seed for row in rows):
                continue
            torch.manual_seed(seed)
            student = ResNet(WIDTHS).eval().to(memory_format=torch.channels_last)
            figures["student_macs"] = macs(student)
            start = time.perf_counter()
            compiled = method(teacher, student, Batches(train, seed), options.epochs, seed)
            seconds = time.perf_counter() - start
            reached = round(accuracy(compiled.module, test), 2)
            rows.append(
                {"method": name, "seed": seed, "epochs": options.epochs, "accuracy": reached, "seconds": seconds}
            )
            print(f"{name}, seed {seed}: {reached:.2f}% after {seconds:.0f} s", flush=True)
            if output is not None:
                write(output, rows, {**figures, "student_macs": macs(student)}, options)
    print(_results.table(rows, COLUMNS))


def write(output: Path, rows: list[Row], figures: Row, options: argparse.Namespace) -> None:
    """The rows so far, with a summary once there is one for every method."""
    done = {row["method"] for row in rows} == set(METHODS)
    _results.write(
        output,
        title="Distillation into a quarter of the multiply-accumulates on Fashion-MNIST",
        rows=rows,
        columns=COLUMNS,
        summary=summary(rows, figures) if done else figures,
        notes=[
            f"Accuracy in percent on the 10,000 test images after {options.epochs:g} epochs on 60,000 training images, "
            f"batches of {BATCH}, flips and shifts; the same start, batches and order for both methods of one seed. "
            f"SGD, one cycle up to 0.1, weight decay 5e-4, {PRECISION}. `distilled`: alpha 0.9, temperature 4. "
            "Spread is the largest minus the smallest of the seeds. `seconds` are of a machine that had other work.",
        ],
        facts=_results.machine_facts(options.threads),
    )


if __name__ == "__main__":
    main()
