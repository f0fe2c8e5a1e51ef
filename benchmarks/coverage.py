"""Which models does capture take? Every model of the zoo, captured and compared with eager PyTorch.

For each model: build it, run it, capture it with a dynamic batch, check the graph's invariants, compare every output
with eager at the captured batch size and at another, and check that the user's model is exactly as it was. With
`--backend`, the model is also compiled to an engine, which is held against eager at both batch sizes.

    python -m benchmarks.coverage                                  # all suites, in this process
    python -m benchmarks.coverage --suite timm --model vit         # some of them
    python -m benchmarks.coverage --jobs 2 --timeout 300 --resume  # a crash loses one model only; go on where it ended

The table goes to `benchmarks/results/` after every model.
"""

from __future__ import annotations

import argparse
import gc
import math
import multiprocessing
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file, not with -m
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from benchmarks import _results, zoo
from benchmarks.zoo import Inputs, ZooModel, call

CAPTURE_TOLERANCE = 1e-5
ENGINE_TOLERANCE = 1e-4
COLUMNS = ("model", "suite", "ok", "capture_s", "verify_s", "error_2", "error_3", "layers", "ops", "failure")

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What is done to each model.

    Attributes:
        front_end: `fxcompress`, or `torch_export` alone to tell its limits from ours.
        backend: also compile to this engine and compare it.
        passes: the passes of that compilation.
        timeout: seconds for one model; 0 is no limit.
        threads: threads of torch.
    """

    front_end: str = "fxcompress"
    backend: str | None = None
    passes: tuple[str, ...] = ()
    timeout: float = 0
    threads: int = 1


class Failure(Exception):
    """A check did not hold; says at which stage."""


class OutOfTime(BaseException):
    """The time limit of one model. Not an `Exception`, so that no handler on the way swallows it."""


# --- one model -----------------------------------------------------------------------------------------------------


def check(entry: ZooModel, settings: Settings | None = None) -> Row:
    """All checks of one model. Never raises: what failed stands in the row, with its stage."""
    return examined(entry, settings or Settings(), _check)


def examined(entry: ZooModel, settings: Settings, body: Callable[..., None]) -> Row:
    """The row of one model: `body` fills it in, in stages; what fails is noted with its stage, never raised."""
    row: Row = {"model": entry.name, "suite": entry.suite, "ok": False}
    failures: list[dict[str, str]] = []
    started = time.perf_counter()

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        """Turn an error into an entry of `failures`."""
        try:
            yield
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - the table names every failure, of any kind
            failures.append({"stage": name, "error": _first_line(error), "where": _location(error)})

    with warnings.catch_warnings(), stage("between stages"), _time_limit(settings.timeout):
        warnings.simplefilter("ignore")
        body(entry, settings, row, stage, failures)
    row["total_s"] = round(time.perf_counter() - started, 2)
    row["ok"] = not failures
    if failures:
        row["failures"] = failures
        row["failure"] = "; ".join(f"{f['stage']}: {f['error']}" for f in failures)
    return row


def _check(
    entry: ZooModel,
    settings: Settings,
    row: Row,
    stage: Callable[[str], Any],
    failures: list[dict[str, str]],
) -> None:
    """Stage after stage; those that the rest depends on end the check where they fail."""
    expected: dict[int, Any] = {}
    with stage("build"):
        model = entry.build()
        inputs = {batch: entry.inputs(batch) for batch in zoo.BATCHES}
    if failures:
        return
    with stage("eager"), torch.no_grad():
        for batch in zoo.BATCHES:
            expected[batch] = call(model, inputs[batch])
            row["spread"] = min(row.get("spread", 1.0), zoo.spread(expected[batch], batch))
    if failures:
        return
    row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    before = fingerprint(model)

    with stage("capture"):
        started = time.process_time()
        graph_module = _front_end(settings.front_end)(model, inputs[zoo.BATCHES[0]])
        row["capture_s"] = round(time.process_time() - started, 2)
    with stage("model changed"):
        _same_fingerprint(before, fingerprint(model))
    if failures:
        return

    nodes = list(graph_module.graph.nodes)
    row["nodes"] = len(nodes)
    row["layers"] = sum(node.op == "call_module" for node in nodes)
    row["ops"] = sum(node.op == "call_function" for node in nodes)
    if settings.front_end == "fxcompress":
        with stage("verify"):
            from fxcompress.graph.verify import verify

            started = time.process_time()
            verify(graph_module)
            row["verify_s"] = round(time.process_time() - started, 3)
        with stage("stale shapes"):
            verify(graph_module, shapes=True)
        with stage("names"):
            _same_names(model, graph_module)
    for batch in zoo.BATCHES:
        with stage(f"outputs at batch {batch}"), torch.no_grad():
            actual = call(graph_module, inputs[batch])
            row[f"error_{batch}"] = compare(expected[batch], actual, CAPTURE_TOLERANCE)
    with stage("model changed by the graph"):
        _same_fingerprint(before, fingerprint(model))
    if settings.backend:
        _check_engine(model, inputs, expected, settings, row, stage)
        with stage("model changed by compile"):
            _same_fingerprint(before, fingerprint(model))


def _check_engine(
    model: nn.Module,
    inputs: dict[int, Inputs],
    expected: dict[int, Any],
    settings: Settings,
    row: Row,
    stage: Callable[[str], Any],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        engine = None
        with stage("compile"):
            import fxcompress as fxc

            started = time.perf_counter()
            compiled = fxc.compile(
                model,
                passes=list(settings.passes),
                example_inputs=inputs[zoo.BATCHES[0]],
                backend=settings.backend,
                output=Path(folder) / "bundle",
                verify=False,
                progress=False,
            )
            row["compile_s"] = round(time.perf_counter() - started, 2)
            engine = compiled.engine
        if engine is None:
            return
        for batch in zoo.BATCHES:
            with stage(f"engine at batch {batch}"):
                actual = zoo.tensors_of(pytree.tree_map(_as_tensor, call(engine, inputs[batch])))
                wanted = zoo.tensors_of(expected[batch])
                row[f"engine_error_{batch}"] = compare(wanted, actual, ENGINE_TOLERANCE)


def _as_tensor(value: Any) -> Any:
    return torch.from_numpy(value) if type(value).__module__ == "numpy" else value


def _front_end(name: str) -> Callable[[nn.Module, Inputs], fx.GraphModule]:
    if name == "fxcompress":
        from fxcompress.capture import capture

        return lambda model, inputs: capture(model, inputs, dynamic_shapes="batch")
    return _torch_export


def _torch_export(model: nn.Module, inputs: Inputs) -> fx.GraphModule:
    """What `torch.export` alone makes of the model, for comparison."""
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    spec = pytree.tree_map(lambda _: {0: torch.export.Dim.DYNAMIC}, inputs)
    program = torch.export.export(model, args, kwargs, dynamic_shapes=spec, strict=False)
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    return module


# --- comparing -----------------------------------------------------------------------------------------------------


def compare(expected: Any, actual: Any, tolerance: float) -> float:
    """The largest relative error of any output tensor, `max|a - b| / max|a|`.

    Raises:
        Failure: another structure, shape or dtype, another value that is no tensor, or an error above the tolerance.
    """
    wanted, wanted_spec = pytree.tree_flatten(expected)
    got, got_spec = pytree.tree_flatten(actual)
    if wanted_spec != got_spec:
        raise Failure(f"output structure {_short(got_spec)} instead of {_short(wanted_spec)}")
    return max((_error(i, a, b, tolerance) for i, (a, b) in enumerate(zip(wanted, got, strict=True))), default=0.0)


def _error(index: int, a: Any, b: Any, tolerance: float) -> float:
    if not isinstance(a, torch.Tensor):
        if a != b:
            raise Failure(f"output {index} is {b!r} instead of {a!r}")
        return 0.0
    if not isinstance(b, torch.Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        described = f"{b.dtype} {tuple(b.shape)}" if isinstance(b, torch.Tensor) else type(b).__name__
        raise Failure(f"output {index} is {described} instead of {a.dtype} {tuple(a.shape)}")
    if a.numel() == 0 or torch.equal(a, b):
        return 0.0
    if not a.dtype.is_floating_point:
        raise Failure(f"output {index} ({a.dtype}) differs")
    from fxcompress.graph.difference import difference

    worst, scale = difference(a, b)
    error = worst / max(scale, torch.finfo(a.dtype).tiny)
    if not math.isfinite(error) or error > tolerance:
        raise Failure(f"output {index} differs by {error:.1e}, more than {tolerance:.0e}")
    return error


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Where every tensor lies, its version and its bits, every module's class, mode and hooks."""
    found: dict[str, Any] = {}
    for kind in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in kind:
            plain = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
            bits = torch.hash_tensor(plain).view(torch.int64).item() if tensor.numel() else 0
            found[name] = (id(tensor), tensor.data_ptr(), tensor._version, tensor.requires_grad, tensor.shape, bits)
    for name, module in model.named_modules(remove_duplicate=False):
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
        found[name + ".<module>"] = (id(module), type(module), module.training, hooks, "forward" in vars(module))
    return found


def _same_fingerprint(before: dict[str, Any], after: dict[str, Any]) -> None:
    if list(before) != list(after):
        changed = sorted(set(before) ^ set(after)) or ["their order"]
    else:
        changed = [name for name, facts in before.items() if facts != after[name]]
    if changed:
        raise Failure(f"{len(changed)} tensors or modules of the user's model changed: {', '.join(changed[:4])}")


def _same_names(model: nn.Module, graph_module: fx.GraphModule) -> None:
    """The graph's parameters are the user's own, under the user's names."""
    theirs = model.state_dict(keep_vars=True)
    ours = {name: value for name, value in graph_module.state_dict(keep_vars=True).items() if value.requires_grad}
    unknown = [name for name in ours if name not in theirs]
    if unknown:
        raise Failure(f"{len(unknown)} parameters have names that the user's model does not know: {unknown[:4]}")
    copied = [name for name, value in ours.items() if value.data_ptr() != theirs[name].data_ptr()]
    if copied:
        raise Failure(f"{len(copied)} parameters no longer share memory with the user's: {copied[:4]}")


# --- errors in one line --------------------------------------------------------------------------------------------


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    place = getattr(error, "where", None)
    text += f" [{place}]" if place and place not in text else ""
    name = "" if isinstance(error, Failure) else f"{type(error).__name__}: "
    return _without_folders(name + text)[:300]


def _location(error: BaseException) -> str:
    """The innermost frame of the package, and the innermost frame of all where that is another."""
    frames = traceback.extract_tb(_deepest_cause(error).__traceback__) or traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "/fxcompress/" in frame.filename]
    picked = [*ours[-1:], *frames[-1:]]
    described = dict.fromkeys(f"{_without_folders(f.filename)}:{f.lineno} {f.name}" for f in picked)
    return " < ".join(described)


def _deepest_cause(error: BaseException) -> BaseException:
    seen: set[int] = set()
    while error.__cause__ is not None and id(error) not in seen:
        seen.add(id(error))
        error = error.__cause__
    return error


def _without_folders(text: str) -> str:
    """Paths from the package on, without the folders above it."""
    text = re.sub(r"\S*/site-packages/", "", text)
    root = str(Path(__file__).resolve().parents[1])
    return re.sub(r"0x[0-9a-f]{6,}", "0x…", text.replace(root + "/", ""))


def _short(spec: Any) -> str:
    text = re.sub(r"\s+", " ", str(spec))
    return text if len(text) < 120 else text[:117] + "…"


# --- many models ---------------------------------------------------------------------------------------------------


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in the main thread after `seconds`; the pool of processes has its own clock."""

    def expire(*_: object) -> None:
        raise OutOfTime(f"more than {seconds:.0f} s")

    if seconds <= 0 or not hasattr(signal, "setitimer"):
        yield
        return
    previous = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


Examine = Callable[[ZooModel, Any], Row]
"""Makes the row of one model; a function of a module, for worker processes import it."""


def run_here(entries: Sequence[ZooModel], settings: Settings, examine: Examine = check) -> Iterator[Row]:
    """One model after the other in this process."""
    torch.set_num_threads(settings.threads)
    for entry in entries:
        yield examine(entry, settings)
        gc.collect()


def run_pool(entries: Sequence[ZooModel], settings: Settings, jobs: int, examine: Examine = check) -> Iterator[Row]:
    """Models in worker processes; a worker that dies or hangs costs its model alone, and another takes its place."""
    waiting = list(reversed(entries))

    def keep_one_busy() -> list[Row]:
        worker = _Worker(settings, examine)
        while waiting:
            entry = waiting.pop()
            finished.append(worker.check(entry))
        worker.stop()
        return []

    finished: list[Row] = []
    with ThreadPoolExecutor(jobs) as threads:
        running = [threads.submit(keep_one_busy) for _ in range(jobs)]
        while not all(future.done() for future in running) or finished:
            while finished:
                yield finished.pop(0)
            time.sleep(0.05)
        for future in as_completed(running):
            future.result()


class _Worker:
    """A process that checks models one by one, started again after a crash or when it is out of time."""

    def __init__(self, settings: Settings, examine: Examine) -> None:
        self.settings = settings
        self.examine = examine
        self.process: Any = None
        self.connection: Connection | None = None

    def check(self, entry: ZooModel) -> Row:
        if self.process is None:
            self._start()
        assert self.connection is not None
        self.connection.send(entry.key)
        # The worker's own alarm comes first; this one is for code that does not come back to Python.
        limit = self.settings.timeout * 1.2 + 30 if self.settings.timeout else None
        try:
            if self.connection.poll(limit):
                row: Row = self.connection.recv()
                return row
            reason = f"no answer after {limit:.0f} s" if limit else "no answer"
        except (EOFError, ConnectionResetError):
            self.process.join(10)
            reason = f"the process died with exit code {self.process.exitcode}"
        self.stop()
        failure = {"stage": "process", "error": reason, "where": ""}
        return {
            "model": entry.name,
            "suite": entry.suite,
            "ok": False,
            "failures": [failure],
            "failure": f"process: {reason}",
        }

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, self.settings, self.examine), daemon=True)
        self.process.start()
        other.close()

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
        self.process = None


def _serve(connection: Connection, settings: Settings, examine: Examine = check) -> None:
    torch.set_num_threads(settings.threads)
    while True:
        try:
            key = connection.recv()
        except EOFError:
            return
        connection.send(examine(zoo.find(key), settings))
        gc.collect()


# --- the table -----------------------------------------------------------------------------------------------------


def save(path: Path, rows: Sequence[Row], settings: Settings) -> None:
    """Write the table, the failures first."""
    summary: dict[str, Any] = {}
    for suite in zoo.SUITES:
        found = [row for row in rows if row["suite"] == suite]
        if found:
            passed = sum(row["ok"] for row in found)
            summary[suite] = f"{passed} of {len(found)}"
    times = [row["capture_s"] for row in rows if row.get("capture_s") is not None]
    if times:
        summary["capture_s_median"] = sorted(times)[len(times) // 2]
        summary["capture_s_max"] = max(times)
    errors = [row[key] for row in rows for key in ("error_2", "error_3") if key in row]
    if errors:
        summary["largest_relative_error"] = max(errors)
    columns = list(COLUMNS)
    notes = [
        f"Each model is captured by `{settings.front_end}` with a dynamic batch from example inputs of batch "
        f"{zoo.BATCHES[0]}; `error_N` is the largest max|a-b|/max|a| of any output against eager at batch N "
        f"(at most {CAPTURE_TOLERANCE:.0e}). The user's model must be bit for bit as before. `capture_s` and "
        "`verify_s` are processor seconds; `layers` and `ops` count the graph's nodes.",
    ]
    if settings.backend:
        columns[-1:-1] = ["compile_s", "engine_error_2", "engine_error_3"]
        notes.append(f"`engine_error_N`: the same of the {settings.backend} engine (at most {ENGINE_TOLERANCE:.0e}).")
    order = {suite: i for i, suite in enumerate(zoo.SUITES)}
    _results.write(
        path,
        title="Coverage" + (f" with the {settings.backend} engine" if settings.backend else ""),
        rows=sorted(rows, key=lambda row: (row["ok"], order[row["suite"]], row["model"])),
        columns=columns,
        summary=summary,
        notes=notes,
        facts=_results.machine_facts(settings.threads),
    )


def describe(row: Row) -> str:
    """One line for the console."""
    if not row["ok"]:
        places = [f"      {f['stage']}: {f['error']}\n        at {f['where']}" for f in row["failures"]]
        return f"FAIL  {row['suite']}:{row['model']}\n" + "\n".join(places)
    figures = [f"capture {row['capture_s']:6.2f} s", f"total {row['total_s']:6.1f} s"]
    figures += [f"{key.replace('_', ' ')} {row[key]:.0e}" for key in row if "error_" in key]
    return f"ok    {row['suite'] + ':' + row['model']:<48} " + "  ".join(figures)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=zoo.SUITES, action="append", help="may be repeated; default: all")
    parser.add_argument("--model", action="append", help="only models whose name holds one of these")
    parser.add_argument("--limit", type=int, help="only the first so many of each suite")
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="only every Nth model, from the Ith on")
    parser.add_argument("--jobs", type=int, default=0, help="worker processes; 0: all in this process")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch in each process")
    parser.add_argument("--timeout", type=float, default=0, help="seconds for one model; 0: no limit")
    parser.add_argument("--front-end", choices=("fxcompress", "torch_export"), default="fxcompress")
    parser.add_argument("--backend", help="also compile to this engine and compare it")
    parser.add_argument("--passes", action="append", default=[], help="passes of that compilation, as strings")
    parser.add_argument("--json", type=Path, help="results file; the Markdown table lies beside it")
    parser.add_argument("--resume", action="store_true", help="leave out models that are recorded as passing")
    parser.add_argument("--fresh", action="store_true", help="forget the recorded models that are not run now")
    parser.add_argument("--merge", type=Path, nargs="+", help="run nothing; merge these results (of shards)")
    parser.add_argument("--list", action="store_true", help="print the models and end")
    return parser.parse_args(arguments)


def _selected(options: argparse.Namespace) -> list[ZooModel]:
    index, count = (int(part) for part in options.shard.split("/"))
    chosen: list[ZooModel] = []
    for suite in options.suite or zoo.SUITES:
        entries = [e for e in zoo.models(suite) if not options.model or any(part in e.name for part in options.model)]
        chosen += entries[: options.limit]
    return chosen[index - 1 :: count]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _arguments(arguments)
    settings = Settings(options.front_end, options.backend, tuple(options.passes), options.timeout, options.threads)
    suffix = "".join(f"-{part}" for part in (options.backend, *options.passes) if part)
    suffix += "" if options.front_end == "fxcompress" else f"-{options.front_end}"
    path = options.json or _results.RESULTS / f"coverage{suffix}.json"
    if options.merge:
        merged = {(row["suite"], row["model"]): row for part in options.merge for row in _results.read_rows(part)}
        save(path, list(merged.values()), settings)
        return 0
    entries = _selected(options)
    if options.list:
        print("\n".join(entry.key for entry in entries))
        return 0
    known = {f"{row['suite']}:{row['model']}": row for row in _results.read_rows(path)}
    if options.resume:
        entries = [entry for entry in entries if not known.get(entry.key, {}).get("ok")]
    if options.fresh:
        known = {}
    rows = run_pool(entries, settings, options.jobs) if options.jobs else run_here(entries, settings)
    failed = 0
    for number, row in enumerate(rows, start=1):
        known[f"{row['suite']}:{row['model']}"] = row
        failed += not row["ok"]
        print(f"{number:3d}/{len(entries)} {describe(row)}", flush=True)
        save(path, list(known.values()), settings)
    print(f"{len(entries) - failed} of {len(entries)} models pass; the table is {path.with_suffix('.md').name}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
