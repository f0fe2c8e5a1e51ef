"""What calibration costs: time of a batch against a plain forward pass, and memory against the number of batches.

    python -m benchmarks.quantize_calibration
    python -m benchmarks.quantize_calibration --memory        # adds memory to the rows that are there

Time is that of the processor, so that a busy machine does not change it. The captured graph, called as the user calls
it, and `Calibrate` pass over the same batches in turns; what `Calibrate` does once (grids from what was seen, weights,
and with `damage` the first samples once more, there and back) is told apart by two numbers of batches. The whole of a
calibration with default options on 128 samples stands beside a forward pass over the same samples. Memory: the peak of
a process that calibrates on few batches and of one that calibrates on many.
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
WHOLE = 128  # samples of a whole calibration
DEFAULT = Calibrate([]).observer
COLUMNS = ("model", "observer", "batch", "forward_ms", "calibrate_ms", "ratio", "once_ms")
COLUMNS += ("forward_128_s", "calibrate_128_s", "ratio_128", "peak_mib_2", "peak_mib_16")

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


def measure(name: str, size: int, count: int, rounds: int) -> list[Row]:
    """A row for each observer, without memory."""
    graph = with_stubs(name)
    first = -(-SAMPLES // size)  # batches of which ranges are refined: what comes later is only collected
    data = list(batches(name, size, first + count))
    found: dict[str, list[tuple[float, float, float]]] = {observer: [] for observer in OBSERVERS}
    for number in range(rounds + 1):
        for observer in OBSERVERS:
            forward = _forward(graph, data) / len(data)
            whole, start = (_calibrate(graph, observer, part) for part in (data, data[:first]))
            each = (whole - start) / count
            if number:  # the first warms up
                found[observer].append((forward, each, start - first * each))
    many = list(batches(name, size, WHOLE // size))
    plain, calibrated = _forward(graph, many), _calibrate(graph, DEFAULT, many)
    whole_row = {"forward_128_s": plain, "calibrate_128_s": calibrated, "ratio_128": calibrated / plain}
    rows = []
    for observer, seen in found.items():
        forward, each, once = (1000 * statistics.median(values) for values in zip(*seen, strict=True))
        ratio = statistics.median(calibrate / plain for plain, calibrate, _ in seen)
        rows.append(
            {
                "model": name,
                "observer": observer,
                "batch": size,
                "forward_ms": forward,
                "calibrate_ms": each,
                "ratio": ratio,
                "once_ms": once,
                "batches": count,
                "ratios": [round(calibrate / plain, 3) for plain, calibrate, _ in seen],
                **(whole_row if observer == DEFAULT else {}),
            }
        )
    return rows


def _forward(graph: fx.GraphModule, data: list[Any]) -> float:
    started = time.process_time()
    with torch.no_grad():
        for batch in data:
            graph(*batch)
    return time.process_time() - started


def _calibrate(graph: fx.GraphModule, observer: str, data: list[Any]) -> float:
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
            "largest ratio of a whole calibration": max(row.get("ratio_128", 0) for row in rows),
        },
        notes=[
            "Milliseconds of processor time for each batch of a plain forward pass of the graph and of `Calibrate`, "
            f"and what `Calibrate` does once; medians over rounds, the ratio is the median of those of a round. "
            f"Peak memory in MiB of a process that calibrates on {FEW} and on {MANY} batches. Random weights.",
            f"`damage`, the default, collects what `mse` does, and once reads {SAMPLES} samples there and "
            "back, which `once_ms` holds.",
            f"Seconds of processor time for {WHOLE} samples: a plain forward pass, and all of `Calibrate` with its "
            "default options, what is done once included; measured once.",
        ],
        facts=_results.machine_facts(threads),
    )


def main(arguments: list[str] | None = None) -> None:
    """Measure all models, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--count", type=int, default=3, help="batches of a round")
    parser.add_argument("--rounds", type=int, default=2)
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
        rows += measure(name, options.batch, options.count, options.rounds)
        print(_results.table(rows[-len(OBSERVERS) :], COLUMNS), flush=True)
        save(rows, options.threads)


if __name__ == "__main__":
    main()
