"""Which models does TensorRT for RTX build, for which GPUs, how fast and how large? Every model of the zoo.

For each model: `fxcompress.compile` with `TensorRT(compute_capabilities=("sm86", "sm89"))`, a dynamic batch; the ONNX
file that the engine is made of is run in ONNX Runtime against PyTorch at two batch sizes (`--no-verify` leaves that
out); the engine itself needs a GPU and is not run. A model that is not built stands in the table with what the
importability check, the parser or the builder says, and the layer.

    python -m benchmarks.tensorrt_build --model resnet18 --model swin_t
    python -m benchmarks.tensorrt_build --jobs 1 --timeout 600 --resume     # all; go on where it ended

The table goes to `benchmarks/results/` after every model. A time limit needs `--jobs`: the library does not let a build
be interrupted from inside its process.
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

from benchmarks import _results, coverage, zoo
from benchmarks.coverage import Row
from benchmarks.zoo import ZooModel

COLUMNS = (
    "model",
    "suite",
    "ok",
    "parameters_m",
    "engine_mb",
    "build_s",
    "compile_s",
    "onnx_error",
    "trt_layers",
    "failure",
)


@dataclass(frozen=True)
class Settings(coverage.Settings):
    """As for capture; which GPUs to build for, and whether the ONNX file is run."""

    capabilities: tuple[str, ...] = ("sm86", "sm89")
    verify: bool = True


def check(entry: ZooModel, settings: Settings) -> Row:
    """Build one model. Never raises: what failed stands in the row, with its stage."""
    return coverage.examined(entry, settings, _check)


def _check(
    entry: ZooModel,
    settings: Settings,
    row: Row,
    stage: Callable[[str], Any],
    failures: list[dict[str, str]],
) -> None:
    import fxcompress as fxc

    with stage("make"):
        model = entry.build()
        inputs = entry.inputs(zoo.BATCHES[0])
        row["parameters_m"] = round(sum(p.numel() for p in model.parameters()) / 1e6, 3)
    if failures:
        return
    with stage("capture"):
        compiled = fxc.compile(model, list(settings.passes), inputs, verify=False, progress=False)
    if failures:
        return
    with stage("build"), tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        backend = fxc.backends.TensorRT(compute_capabilities=settings.capabilities)
        engine = compiled.export(backend, Path(folder) / "bundle", verify=settings.verify)
        row["compile_s"] = round(time.perf_counter() - started, 2)
        measured = engine.manifest.measurements
        row["engine_mb"] = round(measured["tensorrt"]["bytes"] / 1e6, 3)
        row["build_s"] = round(measured["tensorrt"]["seconds"], 2)
        row["trt_layers"] = measured["tensorrt"]["layers"]
        row["warnings"] = list(measured["tensorrt"]["warnings"])
        row["verification"] = measured.get("verification", {}).get("skipped", "")
        found = measured.get("onnx_verification", {}).get("relative_error", {})
        if found:
            row["onnx_error"] = max(found.values())
        engine.close()


def save(path: Path, rows: Sequence[Row], settings: Settings) -> None:
    """Write the table, the failures first."""
    summary: dict[str, Any] = {}
    for suite in zoo.SUITES:
        found = [row for row in rows if row["suite"] == suite]
        if found:
            built = sum(row["ok"] for row in found)
            summary[suite] = f"{built} of {len(found)} built ({100 * built / len(found):.1f}%)"
    times = sorted(row["build_s"] for row in rows if row.get("build_s") is not None)
    if times:
        summary["build_s_median"], summary["build_s_max"] = times[len(times) // 2], times[-1]
    errors = [row["onnx_error"] for row in rows if row.get("onnx_error") is not None]
    if errors:
        summary["largest_onnx_error"] = max(errors)
    from importlib import metadata

    facts = _results.machine_facts(settings.threads)
    order = {suite: index for index, suite in enumerate(zoo.SUITES)}
    _results.write(
        path,
        title="TensorRT for RTX: engines built ahead of time",
        rows=sorted(rows, key=lambda row: (row["ok"], order[row["suite"]], row["model"])),
        columns=COLUMNS,
        summary=summary,
        notes=[
            f"One engine for {', '.join(settings.capabilities)} with a dynamic batch, built without a GPU and not run. "
            "`onnx_error`: of the ONNX file in ONNX Runtime against PyTorch, the larger of two batch sizes. `build_s`: "
            "parsing and building; `compile_s`: from the captured graph to the bundle, that run included. "
            "`trt_layers`: before the builder fused any.",
        ],
        facts=facts | {"tensorrt-rtx": metadata.version("tensorrt-rtx")},
    )


def describe(row: Row) -> str:
    """One line for the console."""
    if not row["ok"]:
        return coverage.describe(row)
    error = f"  onnx error {row['onnx_error']:.0e}" if "onnx_error" in row else ""
    figures = f"{row['engine_mb']:8.1f} MB  build {row['build_s']:6.2f} s  all {row['compile_s']:6.1f} s"
    return f"ok    {row['suite'] + ':' + row['model']:<48} {figures}{error}"


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=zoo.SUITES, action="append", help="may be repeated; default: all")
    parser.add_argument("--model", action="append", help="only models of this name")
    parser.add_argument("--jobs", type=int, default=0, help="worker processes; 0: all in this process")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch in each process")
    parser.add_argument("--timeout", type=float, default=0, help="seconds for one model; 0: no limit")
    parser.add_argument("--capability", action="append", metavar="SM", help="default: sm86 and sm89")
    parser.add_argument("--passes", action="append", default=[], help="passes before the build, as strings")
    parser.add_argument("--no-verify", action="store_true", help="do not run the ONNX file in ONNX Runtime")
    parser.add_argument("--json", type=Path, default=_results.RESULTS / "tensorrt_build.json", help="results file")
    parser.add_argument("--resume", action="store_true", help="leave out models that are recorded, built or not")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the chosen models; 1 if one of them failed."""
    options = _arguments(arguments)
    settings = Settings(
        timeout=options.timeout,
        threads=options.threads,
        passes=tuple(options.passes),
        capabilities=tuple(options.capability or Settings.capabilities),
        verify=not options.no_verify,
    )
    chosen = [entry for suite in options.suite or zoo.SUITES for entry in zoo.models(suite)]
    if options.model:
        chosen = [entry for entry in chosen if entry.name in options.model]
    recorded = {f"{row['suite']}:{row['model']}": row for row in _results.read_rows(options.json)}
    if options.resume:
        chosen = [entry for entry in chosen if entry.key not in recorded]
    if options.jobs:
        rows = coverage.run_pool(chosen, settings, options.jobs, check)  # type: ignore[arg-type]
    else:
        rows = coverage.run_here(chosen, settings, check)  # type: ignore[arg-type]
    failed = False
    for row in rows:
        recorded[f"{row['suite']}:{row['model']}"] = row
        failed |= not row["ok"]
        print(describe(row), flush=True)
        save(options.json, list(recorded.values()), settings)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
