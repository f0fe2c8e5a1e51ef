"""The lottery ticket experiment on Fashion-MNIST: tickets against their masks over other random weights.

The network is that of Frankle & Carbin (2019), LeNet-300-100 with 266,200 weights. In each round 45 % of those that are
left go, the smallest of all layers; the others go back to their first values, or to those of step 100.

    python -m benchmarks.fashion_mnist.lottery                  # three seeds, both starts
    python -m benchmarks.fashion_mnist.lottery --seeds 1 --epochs 0.1 --output /tmp/lottery.json

Experiments that the results hold already are not run again.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxcompress as fxc
from benchmarks import _results
from benchmarks.fashion_mnist.data import load, normalize
from fxcompress.passes import FineTune

RESULTS = _results.RESULTS / "lottery_fashion_mnist.json"
ROUNDS, RATE, EPOCHS, SEEDS, REWIND = 6, 0.45, 2.0, 3, 100
COLUMNS = ("sparsity", "ticket", "rewound", "reinitialized", "ahead", "spread")

Row = dict[str, Any]


def lenet() -> nn.Module:
    """`[batch, 784]` to ten logits over 300 and 100 hidden units."""
    return nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


def loader(split: str, batch: int) -> DataLoader:
    """Flat normalised images and labels; those of the training shuffled."""
    data = load(split)
    flat = normalize(data.images).flatten(1)
    return DataLoader(TensorDataset(flat, data.labels), batch, shuffle=split == "train", drop_last=split == "train")


def experiment(seed: int, rewind: int, epochs: float) -> list[Row]:
    """All trainings from one start."""
    train, test = loader("train", 128), loader("test", 1000)
    training = FineTune(train, epochs=epochs, lr=2e-3, optimizer="adam", validation=test)
    started = time.perf_counter()
    curve = fxc.lottery_ticket(
        lenet, training, (torch.zeros(2, 784),), rounds=ROUNDS, rate=RATE, rewind=rewind, seeds=(seed,)
    )
    seconds = time.perf_counter() - started
    print(f"seed {seed}, from step {rewind}, {seconds:.0f} s\n{curve}", flush=True)
    return [{**point, "rewind": rewind, "epochs": epochs} for point in curve.to_dict()["points"]]


def rows_of(points: Sequence[Row]) -> list[Row]:
    """One line per sparsity: means in percent over the seeds, and by how much tickets are ahead."""
    rows: list[Row] = []
    for number in sorted({point["round"] for point in points}):
        own = [point for point in points if point["round"] == number]

        def of(kinds: tuple[str, ...], rewound: bool, own: Sequence[Row] = own) -> list[float]:
            return [100 * p["metric"] for p in own if p["kind"] in kinds and (p["rewind"] > 0) == rewound]

        tickets, rewound = of(("ticket", "dense"), False), of(("ticket", "dense"), True)
        others = of(("reinitialized",), False)
        row: Row = {"round": number, "sparsity": statistics.mean(point["sparsity"] for point in own)}
        for name, values in (("ticket", tickets), ("rewound", rewound), ("reinitialized", others)):
            if values:
                row[name] = statistics.mean(values)
        if tickets and others:
            row["ahead"] = row["ticket"] - row["reinitialized"]
            row["spread"] = max(max(v) - min(v) for v in (tickets, others))
        rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Run what the results lack, write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--epochs", type=float, default=EPOCHS)
    parser.add_argument("--rewind", type=int, nargs="*", default=[0, REWIND])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    known = (point for row in _results.read_rows(options.output) for point in row["points"])
    points = [point for point in known if point["epochs"] == options.epochs]
    for rewind in options.rewind:
        for seed in range(options.seeds):
            if not any((p["seed"], p["rewind"]) == (seed, rewind) for p in points):
                points += experiment(seed, rewind, options.epochs)
                write(options.output, points, options)


def write(path: Path, points: Sequence[Row], options: argparse.Namespace) -> None:
    """The curve, and what was measured how."""
    rows = rows_of(points)
    for row in rows:
        row["points"] = [point for point in points if point["round"] == row["round"]]
    seeds = len({point["seed"] for point in points})
    ahead = [row["ahead"] for row in rows if "ahead" in row]
    _results.write(
        path,
        title="Lottery tickets of LeNet-300-100 on Fashion-MNIST",
        rows=rows,
        columns=COLUMNS,
        summary={"seeds": seeds, "points ahead at the last sparsity": ahead[-1]} if ahead else {"seeds": seeds},
        notes=[
            f"{options.epochs:g} epochs each, Adam, the same for all; global magnitude, {RATE:.0%} of what is left per "
            f"round. `ticket` starts from the first weights, `rewound` from those of step {REWIND}, `reinitialized` is "
            "the mask of `ticket` over other random weights. Accuracy in percent on the 10,000 test images, means over "
            "the seeds; `ahead` is ticket minus reinitialized, `spread` the largest minus the smallest of one kind.",
            f"All trainings took {sum(point['seconds'] for point in points):.0f} s, on a machine that others used too.",
        ],
        facts=_results.machine_facts(options.threads),
    )


if __name__ == "__main__":
    main()
