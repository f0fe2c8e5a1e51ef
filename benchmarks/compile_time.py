"""What does the compiler cost beside the export it contains?

The whole of `fxcompress.compile` (capture, fusion, verification, ONNX, onnxsim, the engine and its check) against
bare `torch.onnx.export(dynamo=True)` of the same model in the same run. Every measurement has a fresh process, so that
peak memory is its own; imports and a warm-up on a tiny model are left out of the time of both. The two take turns to
go first, and the median of the rounds counts.

`compile` also opens the engine and compares it with the model, which the export does not. So peak memory is compared
twice: with the export alone, and with the export opened in ONNX Runtime and run once beside the model.

    python -m benchmarks.compile_time                       # five models, three rounds
    python -m benchmarks.compile_time --model resnet50 --rounds 1
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file, not with -m
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import _results  # torch is imported in the measuring processes only

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("resnet50", "mobilenet_v3_large", "vit_b_16", "swin_t", "densenet121")
SIDES = ("fxcompress", "export")
OPENED = "export_and_run"  # for peak memory only
TIME_BAR = 1.1
MEMORY_BAR = 1.3
COLUMNS = (
    "model",
    "compile_s",
    "export_s",
    "time_ratio",
    "time_ratio_min",
    "time_ratio_max",
    "cpu_ratio",
    "compile_peak_mib",
    "export_peak_mib",
    "memory_ratio",
    "export_and_run_peak_mib",
    "memory_ratio_and_run",
)

# --- one measurement, in a process of its own -----------------------------------------------------------------------


def compile_whole(model: Any, inputs: tuple[Any, ...], folder: Path) -> dict[str, float]:
    """All that `fxcompress.compile` does; returns what its report knows of the parts."""
    import fxcompress as fxc

    compiled = fxc.compile(
        model,
        passes=[fxc.passes.FuseModules()],
        example_inputs=inputs,
        backend="onnxruntime",
        output=folder / "bundle",
        verify=True,
        progress=False,
    )
    report = compiled.report
    return {"capture": report.capture.seconds, **{item.name: item.seconds for item in report.passes}}


def export_bare(model: Any, inputs: tuple[Any, ...], folder: Path) -> dict[str, float]:
    """The export alone, as a user would write it."""
    import torch

    shapes = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs)
    torch.onnx.export(model, inputs, folder / "model.onnx", dynamo=True, dynamic_shapes=shapes, verbose=False)
    return {}


def export_and_run(model: Any, inputs: tuple[Any, ...], folder: Path) -> dict[str, float]:
    """The export, opened and compared with the model on the same inputs."""
    import onnxruntime
    import torch

    export_bare(model, inputs, folder)
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]
    with torch.no_grad():
        expected = model(*inputs)
    (got,) = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
    torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-2, atol=1e-2)
    return {}


WORK: dict[str, Callable[[Any, tuple[Any, ...], Path], dict[str, float]]] = {
    "fxcompress": compile_whole,
    "export": export_bare,
    OPENED: export_and_run,
}


def measure(side: str, name: str, threads: int) -> dict[str, Any]:
    """Seconds and peak memory of one side on one model, after imports and a warm-up."""
    import torch
    from torch import nn

    from benchmarks import zoo

    warnings.simplefilter("ignore")
    if threads:
        torch.set_num_threads(threads)
    work = WORK[side]
    entry = zoo.find(f"torchvision:{name}")
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        tiny = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
        (folder / "tiny").mkdir()
        work(tiny, (torch.randn(2, 3, 8, 8),), folder / "tiny")
        model, inputs = entry.build(), entry.inputs(2)
        assert isinstance(inputs, tuple)
        _results.reset_peak_memory()  # building the model runs it once
        before = _results.peak_memory_mib()
        started, cpu_started = time.perf_counter(), time.process_time()
        parts = work(model, inputs, folder)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    peak = _results.peak_memory_mib()
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mib": peak, "before_mib": before, "parts": parts}


def measure_apart(side: str, name: str, threads: int) -> dict[str, Any]:
    """`measure` in a fresh process.

    Raises:
        RuntimeError: the process failed; holds the end of what it wrote.
    """
    command = [sys.executable, "-m", "benchmarks.compile_time", "--measure", side, "--model", name]
    command += ["--threads", str(threads)]
    search = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": search}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    answers = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not answers:
        raise RuntimeError(f"{side} {name}: exit code {done.returncode}: {done.stderr.strip()[-800:]}")
    found: dict[str, Any] = json.loads(answers[-1])
    return found


# --- the comparison -------------------------------------------------------------------------------------------------


def summarize(name: str, rounds: Sequence[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """One row: medians of the rounds, and the ratio of each round from least to most."""
    ratios = [found["fxcompress"]["seconds"] / found["export"]["seconds"] for found in rounds]

    def median(side: str, figure: str) -> float:
        return round(statistics.median(found[side][figure] for found in rounds), 3)

    row: dict[str, Any] = {"model": name, "rounds": len(rounds)}
    for side, label in (("fxcompress", "compile"), ("export", "export")):
        row[f"{label}_s"] = median(side, "seconds")
        row[f"{label}_cpu_s"] = median(side, "cpu_seconds")
        row[f"{label}_peak_mib"] = round(median(side, "peak_mib"))
        row[f"{label}_before_mib"] = round(median(side, "before_mib"))
        row[f"{label}_s_all"] = [round(found[side]["seconds"], 3) for found in rounds]
    row["time_ratio"] = round(row["compile_s"] / row["export_s"], 3)
    row["cpu_ratio"] = round(row["compile_cpu_s"] / row["export_cpu_s"], 3)
    row["time_ratio_min"], row["time_ratio_max"] = round(min(ratios), 3), round(max(ratios), 3)
    row["memory_ratio"] = round(row["compile_peak_mib"] / row["export_peak_mib"], 3)
    row[f"{OPENED}_peak_mib"] = round(median(OPENED, "peak_mib"))
    row["memory_ratio_and_run"] = round(row["compile_peak_mib"] / row[f"{OPENED}_peak_mib"], 3)
    parts = rounds[-1]["fxcompress"]["parts"]
    if parts:
        row["compile_parts_s"] = {key: round(value, 3) for key, value in parts.items()}
    return row


def save(path: Path, rows: Sequence[dict[str, Any]], threads: int) -> dict[str, Any]:
    """Write the table; returns the figures that the bars are set on."""
    summary = {
        "time_ratio_geometric_mean": round(_results.geometric_mean(row["time_ratio"] for row in rows), 3),
        "time_bar": TIME_BAR,
        "cpu_ratio_geometric_mean": round(_results.geometric_mean(row["cpu_ratio"] for row in rows), 3),
        "memory_ratio_max": max(row["memory_ratio"] for row in rows),
        "memory_ratio_geometric_mean": round(_results.geometric_mean(row["memory_ratio"] for row in rows), 3),
        "memory_ratio_and_run_max": max(row["memory_ratio_and_run"] for row in rows),
        "memory_bar": MEMORY_BAR,
    }
    notes = [
        "`compile`: `fxcompress.compile(passes=[FuseModules()], backend='onnxruntime', verify=True)`, the engine on "
        "disk. `export`: `torch.onnx.export(dynamo=True)` alone. Both with a dynamic batch, in fresh processes, "
        f"without imports and after a warm-up; median of {rows[0]['rounds']} rounds in alternating order. "
        "`peak`: the largest resident size of the process, imports and the model included. "
        "`export_and_run`: the export, opened in ONNX Runtime and compared with the model once, as `compile` does; "
        "the weights are then held twice. "
        "`time_ratio_min` and `time_ratio_max` are the ratios of single rounds; "
        "`cpu_ratio` compares processor seconds, which other programs on the machine disturb less.",
    ]
    _results.write(
        path,
        title="Compile time",
        rows=rows,
        columns=COLUMNS,
        summary=summary,
        notes=notes,
        facts=_results.machine_facts(threads or None),
    )
    return summary


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help=f"torchvision models; default: {', '.join(MODELS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="threads of torch; 0: its own choice")
    parser.add_argument("--json", type=Path, default=_results.RESULTS / "compile_time.json")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a bar is missed")
    parser.add_argument("--measure", choices=list(WORK), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    names = options.model or list(MODELS)
    if options.measure:
        print(json.dumps(measure(options.measure, names[0], options.threads)))
        return 0
    rounds: dict[str, list[dict[str, dict[str, Any]]]] = {name: [] for name in names}
    for turn in range(options.rounds):
        for name in names:
            order = SIDES if turn % 2 == 0 else SIDES[::-1]
            found = {side: measure_apart(side, name, options.threads) for side in (*order, OPENED)}
            rounds[name].append(found)
            ours, theirs = found["fxcompress"], found["export"]
            print(
                f"round {turn + 1}  {name:<20} compile {ours['seconds']:6.2f} s {ours['peak_mib']:5.0f} MiB   "
                f"export {theirs['seconds']:6.2f} s {theirs['peak_mib']:5.0f} MiB   "
                f"ratio {ours['seconds'] / theirs['seconds']:.3f}",
                flush=True,
            )
    rows = [summarize(name, found) for name, found in rounds.items()]
    summary = save(options.json, rows, options.threads)
    print(_results.table(rows, COLUMNS))
    print(
        f"time ratio, geometric mean: {summary['time_ratio_geometric_mean']} (bar {TIME_BAR}); "
        f"memory ratio, largest: {summary['memory_ratio_max']} (bar {MEMORY_BAR})"
    )
    met = summary["time_ratio_geometric_mean"] <= TIME_BAR and summary["memory_ratio_max"] <= MEMORY_BAR
    return 1 if options.check and not met else 0


if __name__ == "__main__":
    raise SystemExit(main())
