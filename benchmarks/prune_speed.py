"""How long does channel removal take, beside Torch-Pruning's whole job, and does planning stay linear in depth?

Ours: capture, and then `PruneChannels(ratio=0.5)` (planning, scores, choice, removal) on the captured graph, the proof
left out. Theirs: `DependencyGraph` and pruner built and stepped once, at the same ratio and importance, the classifier
ignored. Every measurement has a fresh process; imports and a warm-up on a tiny model are left out of the time of both.
Peak memory counts from the model built and ready, in units of its weights.

    python -m benchmarks.prune_speed                           # five models, three rounds, then growth with depth
    python -m benchmarks.prune_speed --model resnet50 --rounds 1 --without-growth
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file, not with -m
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import _results  # torch is imported in the measuring processes only

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("resnet50", "densenet201", "efficientnet_v2_l", "convnext_large", "regnet_y_128gf")
SIDES = ("fxcompress", "torch_pruning")
RATIO = 0.5
PRUNE_BAR, WHOLE_BAR, WORST_BAR, MEMORY_BAR, EXPONENT_BAR = 5.0, 1.5, 1 / 3, 1.5, 1.1
FACTORS = (1, 2, 4, 8)
COLUMNS = (
    "model",
    "capture_s",
    "plan_s",
    "prune_s",
    "torch_pruning_s",
    "prune_faster",
    "whole_faster",
    "prune_faster_wall",
    "whole_faster_wall",
    "memory",
    "torch_pruning_memory",
    "left",
    "torch_pruning_left",
)
GROWTH_COLUMNS = ("net", "depth", "nodes", "plan_s", "prune_s", "plan_exponent", "prune_exponent")

Parts = dict[str, tuple[float, float]]


class Clock:
    """Processor and wall seconds of named parts."""

    def __init__(self) -> None:
        self.parts: Parts = {}

    def run(self, name: str, work: Callable[[], Any]) -> Any:
        """Do `work` and take its times down."""
        started, cpu_started = time.perf_counter(), time.process_time()
        result = work()
        self.parts[name] = (time.process_time() - cpu_started, time.perf_counter() - started)
        return result


# --- one measurement, in a process of its own -----------------------------------------------------------------------


def prune_ours(model: Any, inputs: tuple[Any, ...], head: str) -> tuple[Parts, Any]:
    """Capture, then plan and remove; planning is also timed alone."""
    from benchmarks.prune_coverage import _timed
    from fxcompress.capture import capture
    from fxcompress.passes import PruneChannels
    from fxcompress.passes.base import PassContext

    clock = Clock()
    graph_module = clock.run("capture", lambda: capture(model, inputs, dynamic_shapes="batch"))
    with _timed("make_plan") as timer:
        context = PassContext(original=graph_module)
        result = clock.run("prune", lambda: PruneChannels(ratio=RATIO).run(graph_module, context))
    clock.parts["plan"] = (timer.seconds["make_plan"], timer.seconds["make_plan"])
    assert result.changed
    return clock.parts, result.graph_module


def prune_theirs(model: Any, inputs: tuple[Any, ...], head: str) -> tuple[Parts, Any]:
    """The whole job of Torch-Pruning; it works in place."""
    import torch_pruning

    def whole() -> None:
        pruner = torch_pruning.pruner.BasePruner(
            model,
            inputs[0],
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=RATIO,
            ignored_layers=[model.get_submodule(head)],
        )
        pruner.step()

    clock = Clock()
    clock.run("prune", whole)
    return clock.parts, model


WORK: dict[str, Callable[[Any, tuple[Any, ...], str], tuple[Parts, Any]]] = {
    "fxcompress": prune_ours,
    "torch_pruning": prune_theirs,
}


def measure(side: str, name: str, threads: int) -> dict[str, Any]:
    """Seconds and peak memory of one side on one model, after imports and a warm-up."""
    import torch
    from torch import nn

    from benchmarks import zoo

    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    work = WORK[side]
    entry = zoo.find(f"torchvision:{name}")
    tiny = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    work(nn.Sequential(tiny, nn.Flatten(), nn.Linear(64, 2)).eval(), (torch.randn(2, 3, 8, 8),), "2")
    model, inputs = entry.build(), entry.inputs(2)
    assert isinstance(inputs, tuple)
    head = next(name for name, module in reversed(list(model.named_modules())) if isinstance(module, nn.Linear))
    count = sum(parameter.numel() for parameter in model.parameters())
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())) / 2**20
    gc.collect()
    _results.reset_peak_memory()  # building the model runs it once
    before = _results.peak_memory_mib()
    parts, pruned = work(model, inputs, head)
    peak = _results.peak_memory_mib()
    left = sum(parameter.numel() for parameter in pruned.parameters()) / count
    return {"parts": parts, "memory": (peak - before) / weights, "weights_mib": weights, "left": left}


def measure_apart(side: str, name: str, threads: int) -> dict[str, Any]:
    """`measure` in a fresh process.

    Raises:
        RuntimeError: the process failed; holds the end of what it wrote.
    """
    command = [sys.executable, "-m", "benchmarks.prune_speed", "--measure", side, "--model", name]
    command += ["--threads", str(threads)]
    search = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": search}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    answers = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not answers:
        raise RuntimeError(f"{side} {name}: exit code {done.returncode}: {done.stderr.strip()[-800:]}")
    found: dict[str, Any] = json.loads(answers[-1])
    return found


# --- growth with depth ------------------------------------------------------------------------------------------------


def measure_growth(rounds: int) -> list[dict[str, Any]]:
    """Processor seconds of planning and of the whole pass at four depths of two nets."""
    import itertools
    import math

    from benchmarks.growth import NETS
    from benchmarks.prune_coverage import _timed
    from fxcompress.capture import capture
    from fxcompress.graph.edit import copy_graph
    from fxcompress.passes import PruneChannels
    from fxcompress.passes.base import PassContext

    rows: list[dict[str, Any]] = []
    for net, build in NETS.items():
        found: list[dict[str, Any]] = []
        for factor in (1, *FACTORS):  # the first is a warm-up
            model, x = build(factor)
            graph_module = capture(model, (x,))
            plans, prunes = [], []
            for _ in range(max(3, rounds)):
                copied = copy_graph(graph_module)
                gc.collect()
                with _timed("make_plan") as timer:
                    started = time.process_time()
                    PruneChannels(ratio=RATIO).run(copied, PassContext())
                    prunes.append(time.process_time() - started)
                plans.append(timer.seconds["make_plan"])
            nodes = len(graph_module.graph.nodes)
            row = {"net": net, "depth": f"×{factor}", "nodes": nodes, "plan_s": min(plans), "prune_s": min(prunes)}
            found.append({key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()})
        del found[0]
        for smaller, larger in itertools.pairwise(found):
            size = math.log(larger["nodes"] / smaller["nodes"])
            for stage in ("plan", "prune"):
                growth = math.log(larger[f"{stage}_s"] / smaller[f"{stage}_s"])
                larger[f"{stage}_exponent"] = round(growth / size, 3)
        rows += found
    return rows


# --- the comparison --------------------------------------------------------------------------------------------------


def summarize(name: str, rounds: Sequence[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """One row: medians of the rounds."""

    def median(side: str, part: str, clock: int) -> float:
        return statistics.median(found[side]["parts"][part][clock] for found in rounds)

    def figure(side: str, key: str) -> float:
        return round(statistics.median(found[side][key] for found in rounds), 3)

    row: dict[str, Any] = {"model": name, "rounds": len(rounds)}
    for clock, suffix in ((0, ""), (1, "_wall")):
        capture, prune = median("fxcompress", "capture", clock), median("fxcompress", "prune", clock)
        theirs = median("torch_pruning", "prune", clock)
        row[f"capture_s{suffix}"], row[f"prune_s{suffix}"] = round(capture, 3), round(prune, 3)
        row[f"torch_pruning_s{suffix}"] = round(theirs, 3)
        row[f"prune_faster{suffix}"] = round(theirs / prune, 2)
        row[f"whole_faster{suffix}"] = round(theirs / (capture + prune), 2)
    row["plan_s"] = round(median("fxcompress", "plan", 0), 3)
    row["memory"], row["torch_pruning_memory"] = figure("fxcompress", "memory"), figure("torch_pruning", "memory")
    row["left"], row["torch_pruning_left"] = figure("fxcompress", "left"), figure("torch_pruning", "left")
    row["weights_mib"] = figure("fxcompress", "weights_mib")
    return row


def save(path: Path, rows: Sequence[dict[str, Any]], growth: Sequence[dict[str, Any]], threads: int) -> dict[str, Any]:
    """Write the tables; returns the figures that the bars are set on."""
    summary: dict[str, Any] = {}
    if rows:
        for stage, bar in (("prune", PRUNE_BAR), ("whole", WHOLE_BAR)):
            summary[f"{stage}_faster_geometric_mean"] = round(
                _results.geometric_mean(row[f"{stage}_faster"] for row in rows), 2
            )
            summary[f"{stage}_bar"] = bar
        summary["whole_faster_least"] = min(row["whole_faster"] for row in rows)
        summary["memory_above_model_largest"] = max(row["memory"] for row in rows)
        summary["memory_bar"] = MEMORY_BAR
    if growth:
        from benchmarks.growth import fitted_exponent

        for net in dict.fromkeys(row["net"] for row in growth):
            found = [row for row in growth if row["net"] == net]
            for stage in ("plan", "prune"):
                summary[f"{net}_{stage}_exponent"] = fitted_exponent(found, stage)
    notes = [
        "`capture_s`, `plan_s`, `prune_s` and `torch_pruning_s` are processor seconds, which other programs on the "
        "machine disturb less; the ratios with `wall` compare wall seconds. `prune_s` is the whole pass on the "
        "captured graph (planning, scores, choice, removal), without its proof. `prune_faster` is Torch-Pruning's "
        "whole job (graph and removal) over that, `whole_faster` over capture and pass together. "
        "Medians of the rounds, in alternating order and fresh processes. "
        "`memory`: peak resident size above the model built and ready, over the size of its weights. "
        "`left`: share of parameters that remain.",
    ]
    if growth:
        notes += ["", "## Growth with depth", "", _results.table(growth, GROWTH_COLUMNS), ""]
        notes += ["The fastest of several runs; exponents of seconds in the number of nodes, from the row above."]
    _results.write(
        path,
        title="Speed of channel removal",
        rows=rows or growth,
        columns=COLUMNS if rows else GROWTH_COLUMNS,
        summary=summary,
        notes=notes,
        facts={**_results.machine_facts(threads), **_torch_pruning()},
    )
    return summary


def _torch_pruning() -> dict[str, str]:
    import importlib.metadata

    return {"torch-pruning": importlib.metadata.version("torch-pruning")}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help=f"torchvision models; default: {', '.join(MODELS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--without-growth", action="store_true")
    parser.add_argument("--only-growth", action="store_true")
    parser.add_argument("--json", type=Path, default=_results.RESULTS / "prune_speed.json")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a bar is missed")
    parser.add_argument("--measure", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    names = options.model or list(MODELS)
    if options.measure:
        print(json.dumps(measure(options.measure, names[0], options.threads)))
        return 0
    rounds: dict[str, list[dict[str, dict[str, Any]]]] = {} if options.only_growth else {name: [] for name in names}
    for turn in range(options.rounds):
        for name in rounds:
            order = SIDES if turn % 2 == 0 else SIDES[::-1]
            found = {side: measure_apart(side, name, options.threads) for side in order}
            rounds[name].append(found)
            row = summarize(name, rounds[name])
            shown = "  ".join(f"{key} {row[key]}" for key in COLUMNS[1:])
            print(f"round {turn + 1}  {name:<20} {shown}", flush=True)
            save(options.json, [summarize(each, done) for each, done in rounds.items() if done], [], options.threads)
    rows = [summarize(name, found) for name, found in rounds.items()]
    growth = [] if options.without_growth else measure_growth(options.rounds)
    summary = save(options.json, rows, growth, options.threads)
    print(_results.table(rows, COLUMNS) if rows else "")
    print(_results.table(growth, GROWTH_COLUMNS) if growth else "")
    print(", ".join(f"{key} {value}" for key, value in summary.items()))
    exponents = [value for key, value in summary.items() if key.endswith("_exponent")]
    met = all(value <= EXPONENT_BAR for value in exponents)
    if rows:
        met &= summary["prune_faster_geometric_mean"] >= PRUNE_BAR and summary["whole_faster_least"] >= WORST_BAR
        met &= summary["whole_faster_geometric_mean"] >= WHOLE_BAR
        met &= summary["memory_above_model_largest"] <= MEMORY_BAR
    return 1 if options.check and not met else 0


if __name__ == "__main__":
    raise SystemExit(main())
