"""Which models can half of their channels be removed from? Every model of the zoo, pruned and put to the test.

For each model: capture, `PruneChannels(ratio=0.5)`, and then: the graph's invariants hold with every shape inferred
anew; outputs keep structure, shape and dtype at two batch sizes; the user's model is bit for bit as before; the
dead-channel rule, checked here from `detail["kept"]` alone: with the removed indices zeroed in the user's own model,
its outputs are those of the pruned one; ONNX Runtime takes the export and agrees at two batch sizes; one step of
training gives every parameter a finite gradient; and the parameters fall as far as they should.

    python -m benchmarks.prune_coverage --model resnet18 --model swin_t
    python -m benchmarks.prune_coverage --jobs 1 --timeout 900 --resume   # small models first; go on where it ended

The table goes to `benchmarks/results/` after every model.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file, not with -m
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from benchmarks import _results, coverage, zoo
from benchmarks.coverage import Failure, Row
from benchmarks.zoo import ZooModel, call

SUITES = (*zoo.SUITES, "segmentation")
RATIO = 0.5
PROOF_TOLERANCE = 1e-4
WIDE_TOLERANCE = 1e-6  # in float64, where a model amplifies the rounding of float32
ENGINE_TOLERANCE = 1e-3
FALL_BAR, BOUND_BAR = 0.60, 0.45
BOUND_SHARE = 0.5  # from here on, heads and embeddings dominate
OUTPUT_PIN = "it is an output of the model"
COLUMNS = (
    "model",
    "suite",
    "ok",
    "parameters_m",
    "left_m",
    "fall",
    "reachable",
    "bound_share",
    "groups",
    "pinned",
    "proof",
    "proof_error",
    "engine_error",
    "capture_s",
    "plan_s",
    "remove_s",
    "failure",
)


@dataclass(frozen=True)
class Settings(coverage.Settings):
    """As for capture; ``engine`` says whether the export is built and run."""

    engine: bool = True


def check(entry: ZooModel, settings: Settings) -> Row:
    """All checks of one model. Never raises: what failed stands in the row, with its stage."""
    return coverage.examined(entry, settings, _check)


def _check(
    entry: ZooModel,
    settings: Settings,
    row: Row,
    stage: Callable[[str], Any],
    failures: list[dict[str, str]],
) -> None:
    from fxcompress.capture import capture
    from fxcompress.graph.edit import copy_graph
    from fxcompress.graph.running import flat_inputs
    from fxcompress.passes import PruneChannels
    from fxcompress.passes.base import PassContext

    expected: dict[int, Any] = {}
    first = zoo.BATCHES[0]
    with stage("build"):
        model = entry.build()
        inputs = {batch: entry.inputs(batch) for batch in zoo.BATCHES}
    if failures:
        return
    with stage("capture"), torch.no_grad():
        expected = {batch: call(model, inputs[batch]) for batch in zoo.BATCHES}
        started = time.process_time()
        captured = capture(model, inputs[first], dynamic_shapes="batch")
        row["capture_s"] = round(time.process_time() - started, 2)
    if failures:
        return
    before = coverage.fingerprint(model)
    row["parameters_m"] = _count(captured) / 1e6
    with stage("prune"), _timed("make_plan", "remove", "dead_channel_proof") as timer:
        args, kwargs = ((), inputs[first]) if isinstance(inputs[first], dict) else (inputs[first], {})
        context = PassContext(example_inputs=flat_inputs(captured, args, kwargs), original=captured)
        result = PruneChannels(ratio=RATIO).run(copy_graph(captured), context)
        pruned = result.graph_module
        names = {"make_plan": "plan_s", "remove": "remove_s", "dead_channel_proof": "proof_s"}
        row.update({names[name]: round(seconds, 3) for name, seconds in timer.seconds.items()})
    if failures:
        return
    with stage("size"):
        row.update(_sizes(captured, pruned, result, timer.results["make_plan"]))
    del captured, timer, context
    with stage("verify"):
        from fxcompress.graph.verify import verify

        verify(pruned, shapes=True)
    with stage("model changed"):
        coverage._same_fingerprint(before, coverage.fingerprint(model))
    actual: dict[int, Any] = {}
    with stage("outputs"), torch.no_grad():
        for batch in zoo.BATCHES:
            actual[batch] = call(pruned, inputs[batch])
            _same_shapes(expected[batch], actual[batch])
    if len(actual) < len(zoo.BATCHES):
        return
    with stage("proof"):
        _prove(model, pruned, result, inputs[zoo.BATCHES[1]], row)
    if settings.engine:
        with stage("engine"):
            _run_engine(pruned, inputs, actual, row)
    with stage("train"):
        _train_one_step(pruned, inputs[first], row)
    with stage("fall"):
        _check_fall(row)


# --- what the pass is asked beside its result ------------------------------------------------------------------------


@dataclass
class _Timer:
    seconds: dict[str, float]
    results: dict[str, Any]


@contextmanager
def _timed(*names: str) -> Iterator[_Timer]:
    """Processor seconds of the named steps of the pass, and what the last call of each returned."""
    from fxcompress.passes import prune_channels as module

    timer = _Timer({}, {})
    originals = {name: getattr(module, name) for name in names}

    def wrapped(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            try:
                timer.results[name] = function(*args, **kwargs)
            finally:
                timer.seconds[name] = timer.seconds.get(name, 0.0) + time.process_time() - started
            return timer.results[name]

        return run

    for name, function in originals.items():
        setattr(module, name, wrapped(name, function))
    try:
        yield timer
    finally:
        for name, function in originals.items():
            setattr(module, name, function)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _sizes(before: fx.GraphModule, after: fx.GraphModule, result: Any, plan: Any) -> Row:
    """Parameters before and after, what share of them hangs on outputs or embeddings, and what stayed whole and why."""
    total, left = _count(before), _count(after)
    bound = _bound(before, plan)
    weights = Counter({name: parameter.numel() for name, parameter in before.named_parameters()})
    kept = []
    for skip in result.skipped:
        size = sum(numel for name, numel in weights.items() if name.rpartition(".")[0] == skip.site)
        kept.append({"site": skip.site, "parameters": size, "code": skip.code, "reason": skip.reason})
    kept.sort(key=lambda item: -item["parameters"])
    return {
        "left_m": left / 1e6,
        "fall": round(1 - left / total, 4),
        "reachable": round(_reachable(before, plan) / total, 4),
        "bound_share": round(bound / total, 3),
        "groups": len(result.rewrites),
        "pinned": len(result.skipped),
        "largest_pinned": kept[:5],
    }


def _bound(graph_module: fx.GraphModule, plan: Any) -> int:
    """Parameters of embeddings and tables, and of weights one side of which is an output or an input of the model.

    That side stays: of an encoder that returns what runs through all of its blocks, most weights have one.
    """
    from fxcompress.analysis.dependency.layout import blocks

    found: set[str] = set()
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" and str(node.target) not in plan.builder.makes:  # those are weights of calls
            found.add(str(node.target))
        elif node.op == "call_module" and isinstance(graph_module.get_submodule(str(node.target)), nn.Embedding):
            found.add(f"{node.target}.weight")
        elif node.op == "call_module" and any(source.op == "placeholder" for source in node.all_input_nodes):
            found.add(f"{node.target}.weight")  # an embedding of patches, say
    for path, layout in plan.builder.weights.items():
        first = [block.labels.reshape(-1)[:1] for dim in layout for block in blocks(dim)]
        if any(plan.reason(int(label))[1] == OUTPUT_PIN for labels in first for label in labels):
            found.add(path)
    sizes = {name: parameter.numel() for name, parameter in graph_module.named_parameters()}
    return sum(sizes.get(name, 0) for name in found)


def _reachable(graph_module: fx.GraphModule, plan: Any) -> float:
    """Parameters that go where exactly the ratio of every removable index does."""
    from fxcompress.analysis.dependency.layout import blocks

    total = 0.0
    sizes = {name: parameter.numel() for name, parameter in graph_module.named_parameters()}
    for path, layout in plan.builder.weights.items():
        kept = 1.0
        for block in (block for dim in layout for block in blocks(dim)):
            free = plan.solution.removable[plan.solution.class_of[block.labels]].mean() if block.labels.size else 0.0
            kept *= 1 - RATIO * float(free)
        total += sizes.get(path, 0) * (1 - kept)
    return total


# --- the checks ------------------------------------------------------------------------------------------------------


def _same_shapes(expected: Any, actual: Any) -> None:
    wanted, wanted_spec = pytree.tree_flatten(expected)
    got, got_spec = pytree.tree_flatten(actual)
    if wanted_spec != got_spec:
        raise Failure(f"output structure {coverage._short(got_spec)} instead of {coverage._short(wanted_spec)}")
    for index, (a, b) in enumerate(zip(wanted, got, strict=True)):
        if isinstance(a, torch.Tensor):
            if not isinstance(b, torch.Tensor) or a.shape != b.shape or a.dtype != b.dtype:
                raise Failure(f"output {index} is {getattr(b, 'shape', b)} instead of {tuple(a.shape)}")
            if b.is_floating_point() and not b.isfinite().all():
                raise Failure(f"output {index} is not finite")


def _prove(model: nn.Module, pruned: fx.GraphModule, result: Any, inputs: zoo.Inputs, row: Row) -> None:
    """The dead-channel rule from outside: zeroes in the user's own model, which is of no use afterwards."""
    if not result.rewrites:
        raise Failure("nothing was removed")
    told = result.rewrites[0].detail["proof"]
    if not told["applies"]:
        row["proof"] = f"does not apply: {told['reason']}"
        return
    if told["norms_over_kept_channels"]:
        # The pass compared with norms over what stays; zeros in the user's model would be part of their statistics.
        row["proof"] = f"with {len(told['norms_over_kept_channels'])} norms over what stays"
        row["proof_error"] = told["relative_error"]
        return
    row["proof"] = "from outside"
    kept: dict[str, dict[int, list[int]]] = {}
    for rewrite in result.rewrites:
        kept.update(rewrite.detail["kept"])
    _zero_removed(model, kept)
    row["proof_error"] = error = _difference(model, pruned, inputs)
    if not error <= PROOF_TOLERANCE:
        row["proof"] = "from outside, in float64"
        wide = pytree.tree_map_only(torch.Tensor, lambda x: x.double() if x.is_floating_point() else x, inputs)
        row["proof_error"] = wide_error = _difference(model.double(), _pruned_again(model, wide, kept), wide)
        if not wide_error <= WIDE_TOLERANCE:
            raise Failure(f"differs from the zeroed model by {error:.1e}, in float64 by {wide_error:.1e}")


def _pruned_again(zeroed: nn.Module, inputs: zoo.Inputs, kept: dict[str, dict[int, list[int]]]) -> fx.GraphModule:
    """The same removal from the zeroed model in float64, where zeros are the least important channels."""
    from fxcompress.capture import capture
    from fxcompress.passes import PruneChannels
    from fxcompress.passes.base import PassContext

    result = PruneChannels(ratio=RATIO).run(capture(zeroed, inputs, dynamic_shapes="batch"), PassContext())
    again: dict[str, dict[int, list[int]]] = {}
    for rewrite in result.rewrites:
        again.update(rewrite.detail["kept"])
    if again != kept:
        raise Failure("in float64 other channels were the least important")
    return result.graph_module


def _difference(model: Callable[..., Any], pruned: Callable[..., Any], inputs: zoo.Inputs) -> float:
    from fxcompress.graph.running import max_relative_error

    with torch.no_grad():
        outputs = [pytree.tree_leaves(call(each, inputs)) for each in (model, pruned)]
    return max_relative_error(*outputs)[0]


@torch.no_grad()
def _zero_removed(model: nn.Module, kept: dict[str, dict[int, list[int]]]) -> None:
    state = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for name, dims in kept.items():
        for dim, indices in dims.items():
            gone = torch.ones(state[name].shape[dim], dtype=torch.bool)
            gone[indices] = False
            state[name].index_fill_(dim, gone.nonzero().flatten(), 0)


def _run_engine(pruned: fx.GraphModule, inputs: dict[int, Any], expected: dict[int, Any], row: Row) -> None:
    import fxcompress as fxc

    with tempfile.TemporaryDirectory() as folder:
        compiled = fxc.compile(
            pruned,
            example_inputs=inputs[zoo.BATCHES[0]],
            backend="onnxruntime",
            output=Path(folder) / "bundle",
            verify=False,
            progress=False,
        )
        assert compiled.engine is not None
        errors = []
        for batch in zoo.BATCHES:
            got = zoo.tensors_of(pytree.tree_map(coverage._as_tensor, call(compiled.engine, inputs[batch])))
            errors.append(coverage.compare(zoo.tensors_of(expected[batch]), got, ENGINE_TOLERANCE))
        row["engine_error"] = max(errors)


def _train_one_step(pruned: fx.GraphModule, inputs: zoo.Inputs, row: Row) -> None:
    """Mean square of the outputs, one step down."""
    pruned.train()
    outputs = [value for value in zoo.tensors_of(call(pruned, inputs)) if value.is_floating_point()]
    loss = torch.stack([value.square().mean() for value in outputs]).sum()
    loss.backward()
    row["loss"] = float(loss.detach())
    named = [(name, p) for name, p in pruned.named_parameters() if p.requires_grad]
    missing = [name for name, parameter in named if parameter.grad is None]
    if missing:
        raise Failure(f"{len(missing)} parameters have no gradient: {', '.join(missing[:4])}")
    wild = [name for name, parameter in named if parameter.grad is not None and not parameter.grad.isfinite().all()]
    if wild or not math.isfinite(row["loss"]):
        raise Failure(f"loss {row['loss']:.2g}; {len(wild)} gradients are not finite: {', '.join(wild[:4])}")
    torch.optim.SGD([parameter for _, parameter in named], lr=1e-3).step()


def _check_fall(row: Row) -> None:
    bar = BOUND_BAR if row["bound_share"] >= BOUND_SHARE else FALL_BAR
    row["bar"] = bar
    if row["fall"] >= bar:
        return
    largest = [f"{item['site']} ({item['parameters']:,}): {item['reason']}" for item in row["largest_pinned"][:2]]
    raise Failure(
        f"parameters fall by {row['fall']:.1%}, less than {bar:.0%}; {row['reachable']:.1%} go where half of every "
        f"removable dimension does; whole: {'; '.join(largest) or 'nothing'}"
    )


# --- the table -------------------------------------------------------------------------------------------------------


def save(path: Path, rows: Sequence[Row], settings: Settings) -> None:
    """Write the table, the failures first."""
    summary: dict[str, Any] = {}
    for suite in SUITES:
        found = [row for row in rows if row["suite"] == suite]
        if found:
            summary[suite] = f"{sum(row['ok'] for row in found)} of {len(found)}"
    summary["all"] = f"{sum(row['ok'] for row in rows)} of {len(rows)}"
    falls = sorted(row["fall"] for row in rows if "fall" in row)
    if falls:
        summary["median_fall_of_parameters"] = falls[len(falls) // 2]
    dominated = [row["model"] for row in rows if row.get("bar") == BOUND_BAR]
    summary["heads_or_embeddings_dominate"] = ", ".join(sorted(dominated)) or "none"
    for key in ("proof_error", "engine_error"):
        errors = [row[key] for row in rows if row.get(key) is not None]
        if errors:
            summary[f"largest_{key}"] = max(errors)
    kinds = Counter(str(row["proof"]).split(":")[0].lstrip("with 0123456789") for row in rows if "proof" in row)
    summary["proofs"] = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
    order = {suite: i for i, suite in enumerate(SUITES)}
    _results.write(
        path,
        title="Coverage of channel removal",
        rows=sorted(rows, key=lambda row: (row["ok"], order[row["suite"]], row["model"])),
        columns=COLUMNS,
        summary=summary,
        notes=[
            f"`PruneChannels(ratio={RATIO})`. `fall`: share of the parameters that went; at least {FALL_BAR:.0%}, or "
            f"{BOUND_BAR:.0%} where `bound_share`, the share of parameters in embeddings, tables and weights one side "
            f"of which is an output or an input of the model, is {BOUND_SHARE:.0%} or more. `reachable`: what would go "
            "with exactly half of every dimension that can lose anything. `proof`: from outside means that the user's "
            "own model, with what "
            f"`detail['kept']` says is removed set to zero, gives the pruned outputs (relative error at most "
            f"{PROOF_TOLERANCE:.0e}, or {WIDE_TOLERANCE:.0e} in float64); with norms over what stays, that the pass "
            "compared with a reference whose layer or group norms leave the removed channels out of their statistics. "
            f"`engine_error`: of ONNX Runtime against the pruned graph at batch 2 and 3 (at most "
            f"{ENGINE_TOLERANCE:.0e}). `pinned`: layers that keep all channels. `plan_s`, `remove_s`: processor "
            "seconds of planning and removal on the captured graph.",
        ],
        facts=_results.machine_facts(settings.threads),
    )


def describe(row: Row) -> str:
    """One line for the console, more where it failed."""
    name = f"{row['suite']}:{row['model']}"
    figures = "  ".join(f"{key} {row[key]}" for key in ("fall", "proof", "plan_s", "remove_s", "total_s") if key in row)
    if row["ok"]:
        return f"ok    {name:<44} {figures}"
    places = [f"      {f['stage']}: {f['error']}\n        at {f['where']}" for f in row["failures"]]
    return "\n".join([f"FAIL  {name:<44} {figures}", *places])


def _selected(options: argparse.Namespace) -> list[ZooModel]:
    entries = [entry for suite in options.suite or SUITES for entry in zoo.models(suite)]
    chosen = [e for e in entries if not options.model or any(part in e.key for part in options.model)]
    if options.exact:
        chosen = [entry for entry in chosen if entry.name in options.model or entry.key in options.model]
    # Small models first: what the capture benchmark recorded tells their sizes.
    rows = _results.read_rows(_results.RESULTS / "coverage.json")
    sizes = {f"{row['suite']}:{row['model']}": row.get("total_s", 0) for row in rows}
    return sorted(chosen, key=lambda entry: sizes.get(entry.key, 0))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", "--family", dest="suite", choices=SUITES, action="append", help="default: all")
    parser.add_argument("--model", action="append", help="only models whose suite:name holds one of these")
    parser.add_argument("--limit", type=int, help="only the first so many of those that are left")
    parser.add_argument("--exact", action="store_true", help="only models whose whole name is one of these")
    parser.add_argument("--jobs", type=int, default=0, help="worker processes; 0: all in this process")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch in each process")
    parser.add_argument("--timeout", type=float, default=0, help="seconds for one model; 0: no limit")
    parser.add_argument("--no-engine", action="store_true", help="leave the export out")
    parser.add_argument("--json", type=Path, default=_results.RESULTS / "prune_coverage.json", help="results file")
    parser.add_argument("--resume", action="store_true", help="leave out models that are recorded as passing")
    parser.add_argument("--new", action="store_true", help="leave out models that are recorded at all")
    parser.add_argument("--fresh", action="store_true", help="forget the recorded models that are not run now")
    options = parser.parse_args(arguments)
    settings = Settings(timeout=options.timeout, threads=options.threads, engine=not options.no_engine)
    known = {f"{row['suite']}:{row['model']}": row for row in _results.read_rows(options.json)}
    entries = _selected(options)
    if options.resume:
        entries = [entry for entry in entries if not known.get(entry.key, {}).get("ok")]
    if options.new:
        entries = [entry for entry in entries if entry.key not in known]
    entries = entries[: options.limit]
    if options.fresh:
        known = {}
    if options.jobs:
        rows = coverage.run_pool(entries, settings, options.jobs, check)
    else:
        rows = coverage.run_here(entries, settings, check)
    failed = 0
    for number, row in enumerate(rows, start=1):
        known[f"{row['suite']}:{row['model']}"] = row
        failed += not row["ok"]
        print(f"{number:3d}/{len(entries)} {describe(row)}", flush=True)
        save(options.json, list(known.values()), settings)
    print(f"{len(entries) - failed} of {len(entries)} models pass; the table is {options.json.with_suffix('.md').name}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
