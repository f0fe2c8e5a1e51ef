"""Which engines compute what PyTorch does, and which does TensorRT build? Every model of the zoo, by every backend.

Each model is captured once, with a dynamic batch, and lowered by each backend to a bundle, which is loaded again from
disk and held against eager PyTorch at two batch sizes. A TensorRT engine is built, for GPUs that need not be there, and
not run; what it is made of is the ONNX file that ONNX Runtime ran. Images are as small as the model lets them be.

    python -m benchmarks.engines --model resnet18 --model swin_t
    python -m benchmarks.engines --jobs 1 --timeout 900 --resume   # a crash loses one model; go on where it ended
    python -m benchmarks.engines --passes 'quantize(...)' --backend tensorrt --json somewhere.json

The table goes to `benchmarks/results/` after every model.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file, not with -m
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch.utils import _pytree as pytree

from benchmarks import _results, coverage, zoo
from benchmarks.coverage import Row
from benchmarks.zoo import ZooModel, call

BACKENDS = ("onnxruntime", "openvino", "torchscript", "tensorrt", "torch_export")
USUAL = BACKENDS[:-1]  # torch_export writes the graph as it is: it costs much time here and was never off
CAPABILITIES = ("sm86", "sm89")
SIDE = 128  # of images, where the model takes any
TOLERANCE = 1e-4
AS_NEAR = 2  # an engine that is no more than so many times as far from float64 as eager float32 is
SUITES = (*zoo.SUITES, "segmentation")


@dataclass(frozen=True)
class Settings:
    """What is done to each model: passes, backends, seconds for one model (0: no limit), threads of torch."""

    backends: tuple[str, ...] = USUAL
    passes: tuple[str, ...] = ()
    side: int = SIDE
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
        model, inputs, expected = _eager(entry, settings.side)
    if failures:
        return
    row["parameters_m"] = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    row["input"] = "x".join(map(str, zoo.tensors_of(inputs[zoo.BATCHES[0]])[0].shape[1:]))
    with stage("capture"):
        started = time.perf_counter()
        compiled = fxc.compile(model, list(settings.passes), inputs[zoo.BATCHES[0]], verify=False, progress=False)
        row["capture_s"] = round(time.perf_counter() - started, 2)
        if settings.passes:
            expected = {batch: zoo.tensors_of(call(compiled, inputs[batch])) for batch in zoo.BATCHES}
    if failures:
        return
    missed: dict[str, dict[int, list[torch.Tensor]]] = {}
    with tempfile.TemporaryDirectory() as folder, _translated_once(Path(folder) / "onnx", row):
        for name in settings.backends:
            with stage(name):
                bundle = Path(folder) / name
                earlier, started = row.get("onnx_s", 0.0), time.perf_counter()
                backend = fxc.backends.TensorRT(compute_capabilities=CAPABILITIES) if name == "tensorrt" else name
                engine = compiled.export(backend, bundle, verify=False)
                translated = row.get("onnx_s", 0.0) - earlier
                row[f"{name}_s"] = round(time.perf_counter() - started - translated, 2)
                row[f"{name}_mb"] = round(sum(file.stat().st_size for file in bundle.iterdir()) / 1e6, 2)
                if name == "tensorrt":
                    row["tensorrt_layers"] = engine.manifest.measurements["tensorrt"]["layers"]
                engine.close()
                if name != "tensorrt":
                    outputs = _outputs(bundle, inputs)
                    row[f"{name}_error"] = _distance(expected, outputs)
                    if not row[f"{name}_error"] <= TOLERANCE:
                        missed[name] = outputs
                shutil.rmtree(bundle)
    if missed and not settings.passes:
        with stage("float64"), torch.no_grad():
            _against_float64(model, inputs, expected, missed, row)
    for name in missed:
        with stage(name):
            raise coverage.Failure(_told(name, row))


def _eager(entry: ZooModel, side: int) -> tuple[Any, dict[int, Any], dict[int, list[torch.Tensor]]]:
    """The model, its inputs and its outputs, by batch size; with small images if the model takes them."""
    small = zoo.smaller(entry, side)
    for chosen in (small, entry):
        try:
            model = chosen.build()
            inputs = {batch: chosen.inputs(batch) for batch in zoo.BATCHES}
            return model, inputs, {batch: zoo.tensors_of(call(model, inputs[batch])) for batch in zoo.BATCHES}
        except Exception:
            if chosen is entry:
                raise
    raise AssertionError


def _outputs(bundle: Path, inputs: dict[int, Any]) -> dict[int, list[torch.Tensor]]:
    import fxcompress as fxc

    with fxc.load_engine(bundle) as engine:
        return {batch: zoo.tensors_of(call(engine, inputs[batch])) for batch in zoo.BATCHES}


def _distance(wanted: dict[int, list[torch.Tensor]], given: dict[int, list[torch.Tensor]]) -> float:
    """The largest relative error at any batch size, however large."""
    return max(coverage.compare(wanted[batch], given[batch], float("inf")) for batch in zoo.BATCHES)


def _against_float64(
    model: torch.nn.Module,
    inputs: dict[int, Any],
    expected: dict[int, list[torch.Tensor]],
    missed: dict[str, dict[int, list[torch.Tensor]]],
    row: Row,
) -> None:
    """How far eager float32 itself is from the same model in float64, and the engines that differ from it.

    Where they are all as far, a deep network amplifies rounding, and no order of summation is the right one.
    """
    model.double()
    wide = {batch: zoo.tensors_of(call(model, _in_double(inputs[batch]))) for batch in zoo.BATCHES}
    row["eager_error64"] = _distance(wide, _in_double(expected))
    for name, outputs in missed.items():
        row[f"{name}_error64"] = _distance(wide, _in_double(outputs))


def _in_double(values: Any) -> Any:
    def widened(value: Any) -> Any:
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return pytree.tree_map(widened, values)


def _told(name: str, row: Row) -> str:
    told = f"differs from PyTorch by {row[f'{name}_error']:.1e}, more than {TOLERANCE:.0e}"
    if f"{name}_error64" not in row:
        return told
    return f"{told}; from float64 by {row[f'{name}_error64']:.1e}, eager itself by {row['eager_error64']:.1e}"


def _rounds(row: Row, name: str) -> bool:
    """Whether the engine is as near to float64 as eager PyTorch is."""
    return row.get(f"{name}_error64", float("inf")) <= AS_NEAR * row.get("eager_error64", 0.0)


@contextmanager
def _translated_once(place: Path, row: Row) -> Iterator[None]:
    """Write the ONNX file once, which is the slow part and the same for all that take it; the others get copies.

    The seconds that it took go into the row as `onnx_s`.
    """
    from fxcompress.backends import onnx_export

    write = onnx_export.write_onnx
    known: dict[Any, tuple[Any, Any]] = {}

    def once(graph_module: Any, path: Path, *, progress: Any = None, **options: Any) -> Any:
        key = (id(graph_module), repr(sorted(options.items())))
        if key not in known:
            started = time.perf_counter()
            kept = place / str(len(known))
            kept.mkdir(parents=True)
            written = write(graph_module, kept / path.name, progress=progress, **options)
            known[key] = graph_module, written  # the graph lives on, so that its id stays its own
            row["onnx_s"] = round(row.get("onnx_s", 0.0) + time.perf_counter() - started, 2)
        file = known[key][1]
        for source in filter(None, (file.path, file.weights)):
            shutil.copyfile(source, path.with_name(source.name))
        weights = file.weights and path.with_name(file.weights.name)
        return dataclasses.replace(file, path=path, weights=weights)

    onnx_export.write_onnx = once
    try:
        yield
    finally:
        onnx_export.write_onnx = write


def save(path: Path, rows: Sequence[Row], settings: Settings) -> None:
    """Write the table."""
    summary: dict[str, Any] = {}
    for name in settings.backends:
        for suite in SUITES:
            found = [row for row in rows if row["suite"] == suite]
            if found and name == "tensorrt":
                built = sum("tensorrt_mb" in row for row in found)
                summary[f"{name}, {suite}"] = f"{built} of {len(found)} built ({100 * built / len(found):.1f}%)"
            elif found:
                agree = sum(row.get(f"{name}_error", float("inf")) <= TOLERANCE for row in found)
                rounded = sum(_rounds(row, name) for row in found)
                besides = f"; {rounded} more at most {AS_NEAR} times as far from float64 as eager is" if rounded else ""
                summary[f"{name}, {suite}"] = f"{agree} of {len(found)} within {TOLERANCE:.0e} of eager{besides}"
        errors = [row[f"{name}_error"] for row in rows if f"{name}_error" in row]
        seconds = sorted(row[f"{name}_s"] for row in rows if f"{name}_s" in row)
        if errors:
            summary[f"{name}, largest error"] = max(errors)
        if seconds:
            summary[f"{name}, median seconds to build"] = seconds[len(seconds) // 2]
    columns = ["model", "suite", "ok", "parameters_m", "input", "capture_s", "onnx_s"]
    for name in settings.backends:
        columns += [f"{name}_{figure}" for figure in ("error", "s", "mb") if (name, figure) != ("tensorrt", "error")]
    columns += ["eager_error64", *(f"{name}_error64" for name in settings.backends if name != "tensorrt"), "failure"]
    facts = _results.machine_facts(settings.threads)
    facts |= {name: metadata.version(name) for name in ("openvino", "tensorrt-rtx")}
    _results.write(
        path,
        title="Engines against PyTorch",
        rows=sorted(rows, key=lambda row: (row["ok"], row["suite"], row["model"])),
        columns=columns,
        summary=summary,
        notes=[
            f"Largest max|a-b|/max|a| of any output against eager at batch {' and '.join(map(str, zoo.BATCHES))}, "
            f"{TOLERANCE:.0e} is allowed. `onnx_s`: seconds to translate the captured graph to ONNX, once for all "
            "that take it; `_s`: to lower and open the engine beside that; `_mb`: of the bundle. Random weights, every "
            f"layer enlivened (benchmarks/zoo.py); images of {settings.side} pixels where the model takes them. "
            f"TensorRT: one engine for {' and '.join(CAPABILITIES)} with a dynamic batch, built without a GPU and not "
            "run. `_error64`, where an engine differs by more: against the same model in float64, of the engine and of "
            f"eager float32 itself; as near is at most {AS_NEAR} times as far.",
            *([f"After {', '.join(settings.passes)}; against the rewritten graph."] if settings.passes else []),
        ],
        facts=facts,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the models asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, action="append", help="may be repeated; default: all")
    parser.add_argument("--model", action="append", help="only models of this name")
    parser.add_argument(
        "--backend", choices=BACKENDS, action="append", help="may be repeated; default: all but the last"
    )
    parser.add_argument("--passes", action="append", default=[], help="passes before, as strings")
    parser.add_argument("--side", type=int, default=SIDE, help="of images, where the model takes any")
    parser.add_argument("--jobs", type=int, default=0, help="worker processes; 0: all in this process")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch in each process")
    parser.add_argument("--timeout", type=float, default=0, help="seconds for one model; 0: no limit")
    parser.add_argument("--json", type=Path, default=_results.RESULTS / "engines.json", help="results file")
    parser.add_argument("--resume", action="store_true", help="leave out models that are recorded")
    options = parser.parse_args(arguments)
    settings = Settings(
        tuple(options.backend or USUAL), tuple(options.passes), options.side, options.timeout, options.threads
    )
    entries = [e for suite in options.suite or SUITES for e in zoo.models(suite)]
    entries = [e for e in entries if not options.model or e.name in options.model or e.key in options.model]
    known = {f"{row['suite']}:{row['model']}": row for row in _results.read_rows(options.json)}
    if options.resume:
        entries = [entry for entry in entries if entry.key not in known]
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
