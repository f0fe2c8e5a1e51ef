"""Which engines compute what PyTorch does? Every model of the zoo, lowered by every backend and compared.

Each model is captured once, with a dynamic batch, and lowered by each backend to a bundle, which is loaded again from
disk and held against eager PyTorch at two batch sizes.

    python -m benchmarks.engines --model resnet18 --model swin_t
    python -m benchmarks.engines --jobs 1 --timeout 900 --resume   # a crash loses one model; go on where it ended

The table goes to `benchmarks/results/` after every model.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file, not with -m
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks import _results, coverage, zoo
from benchmarks.coverage import Row
from benchmarks.zoo import ZooModel, call

BACKENDS = ("onnxruntime", "openvino", "torchscript", "torch_export")
TOLERANCE = 1e-4
SUITES = (*zoo.SUITES, "segmentation")


@dataclass(frozen=True)
class Settings:
    """What is done to each model: the backends, seconds for one model (0: no limit), threads of torch."""

    backends: tuple[str, ...] = BACKENDS
    timeout: float = 0
    threads: int = 1


def check(entry: ZooModel, settings: Settings) -> Row:
    """The row of one model; what failed stands in it, with its stage."""
    return coverage.examined(entry, settings, _check)  # type: ignore[arg-type]


def _check(
    entry: ZooModel, settings: Settings, row: Row, stage: Callable[[str], Any], failures: list[dict[str, str]]
) -> None:
    import fxcompress as fxc

    with stage("eager"), torch.no_grad():
        model = entry.build()
        inputs = {batch: entry.inputs(batch) for batch in zoo.BATCHES}
        expected = {batch: zoo.tensors_of(call(model, inputs[batch])) for batch in zoo.BATCHES}
    if failures:
        return
    row["parameters_m"] = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    with stage("capture"):
        started = time.perf_counter()
        compiled = fxc.compile(model, example_inputs=inputs[zoo.BATCHES[0]], verify=False, progress=False)
        row["capture_s"] = round(time.perf_counter() - started, 2)
    if failures:
        return
    for name in settings.backends:
        with stage(name), tempfile.TemporaryDirectory() as folder:
            bundle = Path(folder) / "bundle"
            started = time.perf_counter()
            compiled.export(name, bundle, verify=False).close()
            row[f"{name}_s"] = round(time.perf_counter() - started, 2)
            row[f"{name}_mb"] = round(sum(file.stat().st_size for file in bundle.iterdir()) / 1e6, 2)
            with fxc.load_engine(bundle) as engine:
                for batch in zoo.BATCHES:
                    actual = zoo.tensors_of(call(engine, inputs[batch]))
                    # Known before it is judged, so that the table has it where it is too large.
                    error = coverage.compare(expected[batch], actual, float("inf"))
                    row[f"{name}_error"] = max(row.get(f"{name}_error", 0.0), error)
            if not row[f"{name}_error"] <= TOLERANCE:
                raise coverage.Failure(f"differs from PyTorch by {row[f'{name}_error']:.1e}, more than {TOLERANCE:.0e}")


def save(path: Path, rows: Sequence[Row], settings: Settings) -> None:
    """Write the table."""
    summary: dict[str, Any] = {}
    for name in settings.backends:
        for suite in SUITES:
            found = [row for row in rows if row["suite"] == suite]
            agree = sum(row.get(f"{name}_error", float("inf")) <= TOLERANCE for row in found)
            if found:
                summary[f"{name}, {suite}"] = f"{agree} of {len(found)} agree"
        errors = [row[f"{name}_error"] for row in rows if f"{name}_error" in row]
        seconds = sorted(row[f"{name}_s"] for row in rows if f"{name}_s" in row)
        if errors:
            summary[f"{name}, largest error"] = max(errors)
            summary[f"{name}, median seconds to build"] = seconds[len(seconds) // 2]
    columns = ["model", "suite", "ok", "parameters_m", "capture_s"]
    columns += [f"{name}_{figure}" for name in settings.backends for figure in ("error", "s", "mb")] + ["failure"]
    _results.write(
        path,
        title="Engines against PyTorch",
        rows=sorted(rows, key=lambda row: (row["ok"], row["suite"], row["model"])),
        columns=columns,
        summary=summary,
        notes=[
            f"Largest max|a-b|/max|a| of any output against eager at batch {' and '.join(map(str, zoo.BATCHES))}, "
            f"{TOLERANCE:.0e} is allowed; seconds to lower and open the engine after capture, and megabytes of the "
            "bundle. Random weights, every layer enlivened (benchmarks/zoo.py)."
        ],
        facts=_results.machine_facts(settings.threads),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the models asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, action="append", help="may be repeated; default: all")
    parser.add_argument("--model", action="append", help="only models of this name")
    parser.add_argument("--backend", choices=BACKENDS, action="append", help="may be repeated; default: all")
    parser.add_argument("--jobs", type=int, default=0, help="worker processes; 0: all in this process")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch in each process")
    parser.add_argument("--timeout", type=float, default=0, help="seconds for one model; 0: no limit")
    parser.add_argument("--json", type=Path, default=_results.RESULTS / "engines.json", help="results file")
    parser.add_argument("--resume", action="store_true", help="leave out models that are recorded as passing")
    options = parser.parse_args(arguments)
    settings = Settings(tuple(options.backend or BACKENDS), options.timeout, options.threads)
    entries = [e for suite in options.suite or SUITES for e in zoo.models(suite)]
    entries = [e for e in entries if not options.model or e.name in options.model or e.key in options.model]
    known = {f"{row['suite']}:{row['model']}": row for row in _results.read_rows(options.json)}
    if options.resume:
        entries = [entry for entry in entries if not known.get(entry.key, {}).get("ok")]
    run: Any = (
        coverage.run_pool(entries, settings, options.jobs, check)  # type: ignore[arg-type]
        if options.jobs
        else coverage.run_here(entries, settings, check)  # type: ignore[arg-type]
    )
    failed = 0
    for number, row in enumerate(run, start=1):
        known[f"{row['suite']}:{row['model']}"] = row
        failed += not row["ok"]
        errors = " ".join(f"{name} {row.get(f'{name}_error', float('nan')):.1e}" for name in settings.backends)
        print(f"{number:3d}/{len(entries)} {row['model']:32} {errors} {row.get('failure', '')}", flush=True)
        save(options.json, list(known.values()), settings)
    print(f"{len(entries) - failed} of {len(entries)} models pass; the table is {options.json.with_suffix('.md').name}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
