"""Accuracy and latency of the Fashion-MNIST network with half and with a quarter of its multiply-accumulates.

`PruneChannels` against Torch-Pruning with the same importance (squared l2 norms of kernels and of batch norms' scales,
summed over a group), the same scope and the same budget: accuracy right after the removal, after a short fine-tune
that is the same for both, and latency on ONNX Runtime. Torch-Pruning goes first, with the least ratio that meets the
budget; what it leaves is the budget of ours.

    python -m benchmarks.fashion_mnist.prune                           # 3 seeds, one epoch each
    python -m benchmarks.fashion_mnist.prune --seeds 1 --epochs 0.2    # a quick look; writes no results
    python -m benchmarks.fashion_mnist.prune --resume                  # goes on with a run that was cut off

Every network is tuned with one seed before any is with the next, and the results are written after each.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fxcompress as fxc
from benchmarks import _results
from benchmarks.fashion_mnist.data import Split, load, normalize
from benchmarks.fashion_mnist.network import CHECKPOINT, trained
from benchmarks.fashion_mnist.train import accuracy, fit
from fxcompress.backends import OnnxRuntime
from fxcompress.backends.benchmark import benchmark
from fxcompress.passes import FuseModules, PruneChannels

RESULTS = _results.RESULTS / "prune_fashion_mnist.json"
SHARES = (0.5, 0.25)  # of the multiply-accumulates, to keep
BATCHES = (1, 32)  # of the latencies
SEEDS, EPOCHS, LEARNING_RATE = 3, 1.0, 0.02
CALIBRATION = 1024  # training images that the refit sees
COLUMNS = ("network", "macs", "parameters", "pruned", "tuned", "spread", *(f"speedup_{batch}" for batch in BATCHES))

Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What all networks of one run have in common."""

    scope: str
    inputs: torch.Tensor
    calibration: Sequence[torch.Tensor]


@dataclass(frozen=True)
class Method:
    """One way to prune.

    Attributes:
        tool: that does it.
        round_to: remaining widths are multiples of this.
        reconstruct: fit what reads the remaining channels to what it read before; fxcompress only.
    """

    tool: str
    round_to: int = 1
    reconstruct: bool = False

    def __call__(self, model: nn.Module, budget: int, setting: Setting) -> nn.Module:
        """A copy of `model` with at most `budget` multiply-accumulates, in eval mode."""
        return (_ours if self.tool == OURS else prune_theirs)(model, budget, setting, self).eval()


OURS, THEIRS = "fxcompress", "Torch-Pruning"
METHODS = {
    THEIRS: Method(THEIRS),
    OURS: Method(OURS),
    f"{OURS} refitted": Method(OURS, reconstruct=True),
    f"{THEIRS} in 16s": Method(THEIRS, round_to=16),
    f"{OURS} in 16s": Method(OURS, round_to=16),
}


def _ours(model: nn.Module, budget: int, setting: Setting, method: Method) -> nn.Module:
    pass_ = PruneChannels(
        macs=budget,
        importance="l2",
        scope=setting.scope,
        round_to=method.round_to,
        reconstruct=method.reconstruct,
        calibration=setting.calibration if method.reconstruct else None,
    )
    compiled = fxc.compile(model, passes=[pass_], example_inputs=(setting.inputs,), dynamic_shapes="batch")
    return compiled.module


def prune_theirs(model: nn.Module, budget: int, setting: Setting, method: Method) -> nn.Module:
    """Torch-Pruning knows ratios of channels only: the least one that meets the budget is searched."""
    import torch_pruning as tp

    def at(ratio: float) -> nn.Module:
        pruned = copy.deepcopy(model)
        tp.pruner.BasePruner(
            pruned,
            setting.inputs,
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=ratio,
            global_pruning=setting.scope == "global",
            ignored_layers=[pruned.fc],
            round_to=method.round_to,
        ).step()
        return pruned

    low, high = 0.0, 0.99
    best: nn.Module | None = None
    while high - low > 1e-3:
        middle = (low + high) / 2
        pruned = at(middle)
        if macs(pruned) <= budget:
            high, best = middle, pruned
        else:
            low = middle
    if best is None:  # near 1 it leaves layers whole of which nothing would remain
        raise LookupError(f"no ratio leaves {budget:,} multiply-accumulates or fewer")
    return best


def macs(model: nn.Module) -> int:
    """Multiply-accumulates for one image, counted by PyTorch as the model runs, for all networks alike."""
    model.eval()
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 1, 28, 28))
    return counter.get_total_flops() // 2


def described(name: str, method: Method | None, share: float, model: nn.Module, test: Split, epochs: float) -> Row:
    """The row of one network before it is tuned; `model` is left as it is."""
    row: Row = {
        "network": f"{name}, {share:.0%} of the MACs" if method else name,
        "tool": method.tool if method else None,
        "round_to": method.round_to if method else 1,
        "share": share,
        "macs": macs(model),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "pruned": accuracy(model, test),
        "epochs": epochs,
    }
    print(f"{row['network']}: {row['macs']:,} MACs, {row['pruned']:.2f}% without fine-tuning", flush=True)
    return row


def tune(row: Row, model: nn.Module, data: tuple[Split, Split], seed: int) -> None:
    """Fine-tune a copy of `model` and add its accuracy to the row."""
    train, test = data
    tuned, start = copy.deepcopy(model), time.perf_counter()
    fit(tuned, train, epochs=row["epochs"], lr=LEARNING_RATE, seed=seed)
    row.setdefault("seeds", []).append(accuracy(tuned, test))
    row["tuned"] = statistics.mean(row["seeds"])
    row["spread"] = max(row["seeds"]) - min(row["seeds"])
    print(
        f"{row['network']}, seed {seed}: {row['seeds'][-1]:.2f}% after {time.perf_counter() - start:.0f} s", flush=True
    )


def taken_up(rows: Sequence[Row], known: Sequence[Row]) -> None:
    """Take the tuned accuracies of an earlier run for networks that are the same."""
    same = ("network", "macs", "parameters", "pruned", "epochs")
    for row in rows:
        for other in known:
            if "seeds" in other and all(row[key] == other.get(key) for key in same):
                row |= {key: other[key] for key in ("seeds", "tuned", "spread")}


def time_engines(models: Mapping[str, nn.Module], rows: Sequence[Row], repetitions: int) -> None:
    """Add the latency on ONNX Runtime with one thread to the rows: all engines in turns, the first the original's."""
    inputs = torch.zeros(2, 1, 28, 28)
    engines = [
        fxc.compile(
            model,
            passes=[FuseModules()],
            example_inputs=(inputs,),
            dynamic_shapes="batch",
            backend=OnnxRuntime(threads=1),
        ).engine
        for model in models.values()
    ]
    for batch in BATCHES:
        found = benchmark(
            dict(zip(models, engines, strict=True)), (torch.randn(batch, 1, 28, 28),), repetitions=repetitions
        )
        for row, timing in zip(rows, found.timings, strict=True):
            row[f"latency_ms_{batch}"] = timing.median_ms
            row[f"speedup_{batch}"] = 1 / timing.ratio
            row[f"speedup_{batch}_interval"] = [1 / timing.ratio_high, 1 / timing.ratio_low]


def summary(rows: Sequence[Row]) -> dict[str, float]:
    """Points of accuracy by which ours are above Torch-Pruning's of the same budget and rounding."""
    found: dict[str, float] = {}
    for row in rows:
        alike = (p for p in rows if p["tool"] == THEIRS and all(p[key] == row[key] for key in ("share", "round_to")))
        peer = next(alike, None)
        if peer is None or row is peer:
            continue
        for state in ("pruned", "tuned"):
            if state in row:
                found[f"points_ahead_{state}_{row['network']}"] = round(row[state] - peer[state], 3)
    return found


def main(arguments: list[str] | None = None) -> None:
    """Prune, tune, measure, print; write the results of a full run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--epochs", type=float, default=EPOCHS, help="of the fine-tune; 0 leaves it out")
    parser.add_argument("--scope", choices=("local", "global"), default="local")
    parser.add_argument("--threads", type=int, default=2, help="of pruning and training; latencies take one")
    parser.add_argument("--repetitions", type=int, default=300, help="of each latency")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--resume", action="store_true", help="take what the output holds of the same networks")
    parser.add_argument("--output", type=Path, help="JSON file; by default results/, for a full run only")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", module="torch_pruning")
    data = load("train"), load("test")
    images = normalize(data[0].images[:CALIBRATION])
    setting = Setting(options.scope, images[:2], images.split(128))
    original = trained(options.checkpoint)
    full = options.seeds >= SEEDS and options.epochs >= EPOCHS
    output = options.output or (RESULTS if full else None)
    models: dict[str, nn.Module] = {"original": original}
    rows = [described("original", None, 1, original, data[1], 0)]
    for share in SHARES:
        budgets: dict[int, int] = {}  # by rounding
        for name, method in METHODS.items():
            budget = budgets.get(method.round_to, int(share * rows[0]["macs"]))
            try:
                model = method(original, budget, setting)
            except LookupError as error:
                print(f"{name}, {share:.0%} of the MACs: {error}", flush=True)
                continue
            budgets.setdefault(method.round_to, macs(model))
            rows.append(described(name, method, share, model, data[1], options.epochs))
            models[rows[-1]["network"]] = model
    if options.resume and output is not None:
        taken_up(rows, _results.read_rows(output))
    for seed in range(options.seeds if options.epochs else 0):
        for row in rows[1:]:
            if len(row.get("seeds", [])) <= seed:
                tune(row, models[row["network"]], data, seed)
                if output is not None:
                    write(output, rows, options)
    time_engines(models, rows, options.repetitions)
    print(_results.table(rows, COLUMNS))
    if output is not None:
        write(output, rows, options)


def write(output: Path, rows: Sequence[Row], options: argparse.Namespace) -> None:
    """The table as it stands."""
    facts = _results.machine_facts(options.threads)
    facts["torch-pruning"] = _results.importlib.metadata.version("torch-pruning")
    _results.write(
        output,
        title="Removing channels of a residual network on Fashion-MNIST",
        rows=rows,
        columns=COLUMNS,
        summary=summary(rows),
        notes=notes(options),
        facts=facts,
    )


def notes(options: argparse.Namespace) -> list[str]:
    """What was measured and how."""
    return [
        f"Importance l2, of kernels and batch norms' scales, and {options.scope} scope for both tools. "
        "Torch-Pruning takes the least ratio that leaves at most the given share of the MACs of one image; fxcompress "
        "has at most the MACs that this left. `in 16s`: the widths that remain are multiples of 16. "
        "A row is missing where no ratio reaches the budget.",
        "`pruned` is the accuracy in percent on the 10,000 test images right after the removal; `tuned` the mean over "
        f"{options.seeds} seeds after a fine-tune of {options.epochs:g} epochs by the same loop, `spread` their "
        "largest minus their smallest.",
        f"`refitted` adds a least-squares fit of the remaining weights on {CALIBRATION} unlabelled training images, "
        "which Torch-Pruning does not offer.",
        "`speedup_N` is the original's median latency over the network's on ONNX Runtime at batch N with one thread, "
        f"{options.repetitions} calls each in turns, batch norms folded in all.",
    ]


if __name__ == "__main__":
    main()
