"""What calibration costs: time of a batch against a plain forward pass, and memory against the number of batches.

    python -m benchmarks.quantize_calibration
    python -m benchmarks.quantize_calibration --memory        # adds memory to the rows that are there

Time is that of the processor, so that a busy machine changes it less. The data that `Calibrate` reads times it: each
batch first goes through the captured graph, as the user calls it, and then to `Calibrate`, until that asks for the next
one. The rest of its time is what it does once: grids from what was seen, weights, and with `damage`, the default, the
first samples once more, there and back. Memory: the peak of a process that calibrates on few batches and of one that
calibrates on many.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file, not with -m
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import fx

from benchmarks import _results, zoo
from fxcompress.capture import capture
from fxcompress.graph.copying import copy_graph
from fxcompress.passes import Calibrate, FuseModules, InsertQuantStubs, PassContext
from fxcompress.quantization.damage import SAMPLES

RESULTS = _results.RESULTS / "quantize_calibration.json"
MODELS = ("resnet18", "mobilenet_v2", "vit_b_16")
OBSERVERS = ("damage", "mse", "minmax")
FEW, MANY = 2, 16
COLUMNS = ("model", "observer", "batch", "forward_ms", "calibrate_ms", "ratio", "once_ms", "samples", "whole_ratio")
COLUMNS += ("peak_mib_2", "peak_mib_16")

Row = dict[str, Any]


def batches(name: str, size: int, count: int) -> Iterator[Any]:
    """Inputs of a model, made one after another."""
    for _ in range(count):
        yield zoo.find(f"torchvision:{name}").inputs(size)


def with_stubs(name: str) -> fx.GraphModule:
    """A model of the zoo, fused, with stubs that are not calibrated."""
    entry = zoo.find(f"torchvision:{name}")
    example = entry.inputs(2)
    graph, context = capture(entry.build(), example), PassContext(example_inputs=list(example))
    return InsertQuantStubs().run(FuseModules().run(graph, context).graph_module, context).graph_module


class _Timed:
    """Batches, and for each the processor time of a plain forward pass and of what its reader does with it."""

    def __init__(self, graph: fx.GraphModule, data: list[Any]) -> None:
        self.graph, self.data = graph, data
        self.forward: list[float] = []
        self.read: list[float] = []

    def __iter__(self) -> Iterator[Any]:
        for batch in self.data:
            started = time.process_time()
            with torch.no_grad():
                self.graph(*batch)
            given = time.process_time()
            yield batch
            self.forward.append(given - started)
            self.read.append(time.process_time() - given)


def measure(name: str, size: int, count: int) -> list[Row]:
    """A row for each observer, without memory."""
    graph = with_stubs(name)
    data = list(batches(name, size, count))
    _calibrate(graph, "minmax", _Timed(graph, data[:2]))  # warms up
    rows = []
    for observer in OBSERVERS:
        timed = _Timed(graph, data)
        whole = _calibrate(graph, observer, timed) - sum(timed.forward)
        ratios = sorted(read / plain for read, plain in zip(timed.read, timed.forward, strict=True))
        row = {
            "model": name,
            "observer": observer,
            "batch": size,
            "forward_ms": 1000 * statistics.median(timed.forward),
            "calibrate_ms": 1000 * statistics.median(timed.read),
            "ratio": statistics.median(ratios),
            "once_ms": 1000 * (whole - sum(timed.read)),
            "batches": count,
            "ratios": [round(ratio, 3) for ratio in ratios],
        }
        row["samples"], row["whole_ratio"] = size * count, whole / sum(timed.forward)
        rows.append(row)
    return rows


def _calibrate(graph: fx.GraphModule, observer: str, data: Any) -> float:
    copied = copy_graph(graph)
    started = time.process_time()
    Calibrate(data, observer).run(copied, PassContext())
    return time.process_time() - started


def peak(name: str, observer: str, size: int, count: int, threads: int) -> float:
    """MiB at most of a process that calibrates on so many batches."""
    command = [sys.executable, "-m", "benchmarks.quantize_calibration", "--peak", name, observer]
    command += ["--batch", str(size), "--count", str(count), "--threads", str(threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def save(rows: list[Row], threads: int) -> None:
    """Write the table."""
    _results.write(
        RESULTS,
        title="Cost of calibration",
        rows=rows,
        columns=COLUMNS,
        summary={
            "largest ratio": max(row["ratio"] for row in rows),
            "largest ratio of a whole calibration": max(row["whole_ratio"] for row in rows),
        },
        notes=[
            "Milliseconds of processor time for each batch: of a plain forward pass of the graph, and of `Calibrate`; "
            "medians over batches, and the median of their ratios. `once_ms`: what `Calibrate` does once, however many "
            "batches there are. `whole_ratio`: all of `Calibrate`, that included, against a forward pass over as many "
            "`samples`. Random weights.",
            f"Peak memory in MiB of a process that calibrates on {FEW} and on {MANY} batches.",
            f"`damage`, the default, collects what `mse` does, and once runs {SAMPLES} samples there and back.",
        ],
        facts=_results.machine_facts(threads),
    )


def main(arguments: list[str] | None = None) -> None:
    """Measure all models, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--count", type=int, default=32, help="batches")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", action="store_true", help="measure memory only, for the rows that are there")
    parser.add_argument("--peak", nargs=2, metavar=("MODEL", "OBSERVER"), help="print the peak of this process only")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.peak:
        name, observer = options.peak
        graph = with_stubs(name)
        _results.reset_peak_memory()
        Calibrate(batches(name, options.batch, options.count), observer).run(graph, PassContext())
        print(_results.peak_memory_mib())
        return
    if options.memory:
        rows = _results.read_rows(RESULTS)
        for row in rows:
            for count in (FEW, MANY):
                row[f"peak_mib_{count}"] = peak(row["model"], row["observer"], options.batch, count, options.threads)
            print(_results.table([row], COLUMNS), flush=True)
        save(rows, options.threads)
        return
    rows = []
    for name in MODELS:
        rows += measure(name, options.batch, options.count)
        print(_results.table(rows[-len(OBSERVERS) :], COLUMNS), flush=True)
        save(rows, options.threads)


if __name__ == "__main__":
    main()
