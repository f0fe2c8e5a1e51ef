"""Accuracy of the Fashion-MNIST network with integers of 8 and of 4 bits, on all 10,000 test images.

Every engine runs in ONNX Runtime. Calibration images are training images; training in integers has the float32 network
as its teacher, which is its default.

    python -m benchmarks.fashion_mnist.quantize                    # every method
    python -m benchmarks.fashion_mnist.quantize --method int8      # one of them; the results keep what they had
    python -m benchmarks.fashion_mnist.quantize --images 2000      # a quick look; writes no results
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fxcompress as fxc
from benchmarks import _results
from benchmarks.fashion_mnist.data import Split, load, normalize
from benchmarks.fashion_mnist.distill import Batches
from benchmarks.fashion_mnist.network import trained
from fxcompress.passes import CorrectBias, FuseModules, Pass, Quantize, RoundAdaptively, TrainQuantized

RESULTS = _results.RESULTS / "quantize_fashion_mnist.json"
COLUMNS = ("method", "accuracy", "drop", "seconds")
CALIBRATION, BATCH = 512, 64
STEPS = 60  # of the training in integers, 128 images each

Row = dict[str, Any]


def methods(data: list[Tensor], train: Split) -> dict[str, list[Pass]]:
    """What is compared."""

    def training(bits: int | None) -> TrainQuantized:
        return TrainQuantized(Batches(train, 0), steps=STEPS, alpha=0.9, weight_bits=bits)

    return {
        "float32": [],
        "int8": [Quantize(data)],
        "int8, biases corrected": [Quantize(data), CorrectBias(data, samples=CALIBRATION)],
        "int8, roundings learned": [Quantize(data), RoundAdaptively(data, samples=CALIBRATION)],
        "int8, trained": [Quantize(data), training(None)],
        "4-bit weights": [Quantize(data, weight_bits=4)],
        "4-bit weights, biases corrected": [Quantize(data, weight_bits=4), CorrectBias(data, samples=CALIBRATION)],
        "4-bit weights, roundings learned": [Quantize(data, weight_bits=4), RoundAdaptively(data, samples=CALIBRATION)],
        "4-bit weights, trained": [Quantize(data), training(4)],
    }


def accuracy(engine: Any, test: Split) -> float:
    """Percent of the images that the engine classifies correctly."""
    correct = sum(
        int((torch.as_tensor(engine(images)).argmax(1) == labels).sum()) for images, labels in test.batches(500)
    )
    return 100 * correct / len(test)


def run(images: int | None, chosen: Sequence[str] | None, known: Sequence[Row] = ()) -> list[Row]:
    """A row for each method, in their order; those that are not chosen as they are known."""
    train, test = load("train"), load("test")
    test = test if images is None else test.first(images)
    data = list(normalize(train.images[:CALIBRATION]).split(BATCH))
    rows: list[Row] = []
    for name, passes in methods(data, train).items():
        held = [row for row in known if row["method"] == name]
        if chosen and name not in chosen and (held or name != "float32"):
            rows += held
            continue
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            compiled = fxc.compile(
                trained(),
                [FuseModules(), *passes],
                (data[0][:2],),
                backend="onnxruntime",
                output=Path(folder) / "bundle",
                verify=False,
                progress=False,
            )
            seconds = time.perf_counter() - started
            found = accuracy(compiled.engine, test)
        rows.append({"method": name, "accuracy": found, "seconds": round(seconds, 1)})
        rows[-1]["drop"] = round(rows[0]["accuracy"] - found, 3)
        print(_results.table(rows[-1:], COLUMNS), flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the methods asked for, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, help="of the test split; default: all")
    parser.add_argument("--method", action="append", help="may be repeated; default: all")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows = run(options.images, options.method, _results.read_rows(RESULTS))
    if options.images is None:
        _results.write(
            RESULTS,
            title="Fashion-MNIST with integers of 8 and of 4 bits",
            rows=rows,
            columns=COLUMNS,
            notes=[
                "Percent of the 10,000 test images; drop in points against float32. Engines of ONNX Runtime, "
                f"calibrated on {CALIBRATION} training images without labels. 4-bit weights have one scale per output "
                f"channel and 8-bit activations. `trained`: {STEPS} steps of `TrainQuantized` at its defaults, 128 "
                "images each, alpha 0.9 with the float32 network as teacher; with 4 bits the first and the last layer "
                "keep 8. Seconds are those of compilation, on a shared machine."
            ],
            facts=_results.machine_facts(options.threads),
        )


if __name__ == "__main__":
    main()
