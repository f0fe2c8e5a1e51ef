"""Zeros against accuracy on Fashion-MNIST: the residual network with 0 to 98 % of its weights zero.

At every sparsity four networks, global magnitude: not trained since; the same after a short training that holds the
zeros; with zeros that come while this training runs (cubic ramp); and SparseGPT's, which sees data but trains nothing.

    python -m benchmarks.fashion_mnist.sparsify                                    # all
    python -m benchmarks.fashion_mnist.sparsify --sparsity 0.9 --epochs 0.05 --output /tmp/sparse.json

What the results hold already of as many epochs is not run again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import fxcompress as fxc
from benchmarks import _results
from benchmarks.fashion_mnist.data import Split, load, normalize
from benchmarks.fashion_mnist.distill import Batches
from benchmarks.fashion_mnist.network import trained
from benchmarks.fashion_mnist.train import PRECISION, accuracy
from fxcompress.analysis.sparsity import compressed_bytes, sparsity
from fxcompress.passes import FineTune, SparsifyWeights

RESULTS = _results.RESULTS / "sparsify_fashion_mnist.json"
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
EPOCHS, RATE = 1.0, 0.02
COLUMNS = ("sparsity", "one_shot", "sparsegpt", "one_shot_trained", "gradual", "deflated_bytes", "seconds")
INPUTS = (torch.zeros(2, 1, 28, 28),)
OPTIONS: dict[str, Any] = {"optimizer": "sgd", "lr": RATE, "weight_decay": 5e-4, "precision": PRECISION}

Row = dict[str, Any]


def methods(share: float, train: Split, epochs: float) -> dict[str, Callable[[], list[Any]]]:
    """Passes by the name of their column."""
    calibration = [normalize(train.images[128 * i : 128 * (i + 1)]) for i in range(8)]

    def training() -> FineTune:
        return FineTune(Batches(train, 0), epochs=epochs, schedule="one_cycle", **OPTIONS)

    zeros = {"sparsity": share, "scope": "global"}
    return {
        "one_shot": lambda: [SparsifyWeights(**zeros)],
        "sparsegpt": lambda: [SparsifyWeights(sparsity=share, method="sparsegpt", calibration=calibration)],
        "one_shot_trained": lambda: [SparsifyWeights(**zeros), training()],
        "gradual": lambda: [SparsifyWeights(**zeros, training=training(), every=5)],
    }


def measure(row: Row, data: tuple[Split, Split], epochs: float) -> None:
    """Fill in what the row lacks."""
    train, test = data
    for name, passes in methods(row["sparsity"], train, epochs).items():
        if name in row:
            continue
        started = time.perf_counter()
        module = fxc.compile(trained(), passes(), INPUTS, verify=False).module
        row[name], row[f"{name}_zeros"] = accuracy(module, test), sparsity(module).share
        row[f"{name}_s"] = time.perf_counter() - started
        if name == "one_shot":
            row["deflated_bytes"] = compressed_bytes(module.parameters())
        print(f"{row['sparsity']:.0%} {name}: {row[name]:.2f}% in {row[f'{name}_s']:.0f} s", flush=True)
    row["seconds"] = sum(value for key, value in row.items() if key.endswith("_s"))


def taken_up(row: Row, epochs: float) -> Row:
    """What an earlier run measured; trainings only where they were as long."""
    if row.get("epochs") == epochs:
        return row
    trained_names = ("one_shot_trained", "gradual")
    return {key: value for key, value in row.items() if not key.startswith(trained_names)} | {"epochs": epochs}


def main(arguments: list[str] | None = None) -> None:
    """Measure what the results lack, write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, nargs="*", default=SPARSITIES)
    parser.add_argument("--epochs", type=float, default=EPOCHS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    data = load("train"), load("test")
    rows = {row["sparsity"]: taken_up(row, options.epochs) for row in _results.read_rows(options.output)}
    if 0.0 not in rows:
        model = trained()
        rows[0.0] = {"sparsity": 0.0, "deflated_bytes": compressed_bytes(model.parameters())}
        rows[0.0]["one_shot"] = accuracy(model, data[1])
    for share in options.sparsity:
        measure(rows.setdefault(share, {"sparsity": share, "epochs": options.epochs}), data, options.epochs)
        write(options.output, [rows[share] for share in sorted(rows)], options)


def write(path: Path, rows: Sequence[Row], options: argparse.Namespace) -> None:
    """The curve, and what was measured how."""
    _results.write(
        path,
        title="Zeros in the weights of a residual network on Fashion-MNIST",
        rows=rows,
        columns=COLUMNS,
        notes=[
            "Accuracy in percent on the 10,000 test images. `one_shot`: global magnitude, nothing trained since; "
            "`sparsegpt`: the same share in every layer, other weights fitted on 1,024 unlabelled training images, "
            f"nothing trained; `one_shot_trained`: global magnitude, then {options.epochs:g} epochs in {PRECISION}, "
            "zeros held; `gradual`: the zeros come during these epochs, by a cubic ramp over three quarters of them.",
            "`deflated_bytes`: of all parameters in float32, compressed. Zeros make no engine here faster. `seconds`: "
            "of the row, evaluation included, on a machine that others used too.",
        ],
        facts=_results.machine_facts(options.threads),
    )


if __name__ == "__main__":
    main()
