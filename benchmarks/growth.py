"""Does the compiler stay linear in the size of the model?

A residual convolutional net and a transformer, each at depth ×1, ×2, ×4 and ×8: seconds to capture, fuse, verify, and
for the whole compile down to an engine. The exponent between two sizes is `log(t2 / t1) / log(n2 / n1)` with the
number of graph nodes for n: 1 is linear, below 1 is a fixed cost that counts less and less.

    python -m benchmarks.growth
    python -m benchmarks.growth --net transformer --rounds 1 --without-engine
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file, not with -m
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import _results

FACTORS = (1, 2, 4, 8)
STAGES = ("capture", "fuse", "verify", "compile")
EXPONENT_BAR = 1.1  # linear, and room for the noise of a shared machine
COLUMNS = (
    "net",
    "depth",
    "nodes",
    *(f"{stage}_s" for stage in STAGES),
    *(f"{stage}_exponent" for stage in STAGES),
)


class ResidualBlock(nn.Module):
    """conv → norm → relu → conv → norm, added to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.bn2(self.conv2(y)))


class TransformerBlock(nn.Module):
    """Attention and a perceptron, each after a layer norm and added to its input."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
        x = x + self.project(attended)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def residual(factor: int) -> tuple[nn.Module, torch.Tensor]:
    """8 residual blocks times `factor`, and an input."""
    torch.manual_seed(0)
    blocks = [ResidualBlock(16) for _ in range(8 * factor)]
    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)]
    return nn.Sequential(*stem, *blocks, *head).eval(), torch.randn(2, 3, 16, 16)


def transformer(factor: int) -> tuple[nn.Module, torch.Tensor]:
    """6 transformer blocks times `factor`, and an input."""
    torch.manual_seed(0)
    blocks = [TransformerBlock(32) for _ in range(6 * factor)]
    return nn.Sequential(*blocks, nn.LayerNorm(32), nn.Linear(32, 10)).eval(), torch.randn(2, 16, 32)


NETS: dict[str, Callable[[int], tuple[nn.Module, torch.Tensor]]] = {"residual": residual, "transformer": transformer}


CLOCKS: dict[str, Callable[[], float]] = {"cpu": time.process_time, "wall": time.perf_counter}


def fastest(work: Callable[[Any], Any], clock: Callable[[], float], arguments: Iterable[Any]) -> tuple[float, Any]:
    """The least seconds of `work` on each of the arguments, and what the last run returned."""
    best, result = math.inf, None
    for argument in arguments:
        gc.collect()
        started = clock()
        result = work(argument)
        best = min(best, clock() - started)
    return best, result


def measure(net: str, factor: int, rounds: int, clock: Callable[[], float], engine: bool) -> dict[str, Any]:
    """Seconds of each stage at one depth."""
    import fxcompress as fxc
    from fxcompress.capture import capture
    from fxcompress.graph.edit import copy_graph
    from fxcompress.graph.verify import verify
    from fxcompress.passes.base import PassContext

    model, x = NETS[net](factor)
    many = max(5, rounds)  # of the short stages
    seconds: dict[str, float] = {}
    seconds["capture"], graph_module = fastest(lambda _: capture(model, (x,)), clock, range(rounds))
    context = PassContext(example_inputs=[x], original=graph_module)
    copies = (copy_graph(graph_module) for _ in range(many))
    seconds["fuse"], _ = fastest(lambda copy: fxc.passes.FuseModules().run(copy, context), clock, copies)
    seconds["verify"], _ = fastest(verify, clock, [graph_module] * many)

    def compile_whole(_: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            fxc.compile(
                model,
                passes=[fxc.passes.FuseModules()],
                example_inputs=(x,),
                backend="onnxruntime" if engine else None,
                output=Path(folder) / "bundle",
                verify=True,
                progress=False,
            )

    seconds["compile"], _ = fastest(compile_whole, clock, range(rounds))
    row: dict[str, Any] = {"net": net, "depth": f"×{factor}", "nodes": len(graph_module.graph.nodes)}
    return row | {f"{stage}_s": round(value, 5) for stage, value in seconds.items()}


def add_exponents(rows: Sequence[dict[str, Any]]) -> None:
    """The growth of each stage from the size before, into the rows of one net."""
    for smaller, larger in itertools.pairwise(rows):
        size = math.log(larger["nodes"] / smaller["nodes"])
        for stage in STAGES:
            larger[f"{stage}_exponent"] = round(math.log(larger[f"{stage}_s"] / smaller[f"{stage}_s"]) / size, 3)


def fitted_exponent(rows: Sequence[dict[str, Any]], stage: str) -> float:
    """Slope of the least-squares line through (log nodes, log seconds)."""
    points = [(math.log(row["nodes"]), math.log(row[f"{stage}_s"])) for row in rows]
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    return round(slope, 3)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=tuple(NETS), action="append", help="default: both")
    parser.add_argument("--rounds", type=int, default=3, help="the fastest of so many runs counts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="cpu", help="cpu: not disturbed by other programs")
    parser.add_argument("--without-engine", action="store_true", help="compile to a saved graph, not an engine")
    parser.add_argument("--json", type=Path, default=_results.RESULTS / "growth.json")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a fit is above the bar")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    engine, clock = not options.without_engine, CLOCKS[options.clock]
    rows: list[dict[str, Any]] = []
    summary: dict[str, Any] = {"exponent_bar": EXPONENT_BAR}
    for net in options.net or NETS:
        measure(net, 1, 1, clock, engine)  # warm-up
        found: list[dict[str, Any]] = []
        for factor in FACTORS:
            found.append(measure(net, factor, options.rounds, clock, engine))
            times = "  ".join(f"{stage} {found[-1][stage + '_s']:8.4f} s" for stage in STAGES)
            print(f"{net:<12} ×{factor}  {found[-1]['nodes']:5d} nodes  {times}", flush=True)
        add_exponents(found)
        summary |= {f"{net}_{stage}_exponent": fitted_exponent(found, stage) for stage in STAGES}
        rows += found
    notes = [
        f"Seconds by the {options.clock} clock, the fastest of {options.rounds} runs after a warm-up. "
        "`X_exponent` compares with the row above; the "
        "figures at the top are least-squares fits over all four sizes. `fuse` is `FuseModules` alone; `compile` is "
        + ("everything down to a verified ONNX Runtime engine." if engine else "everything down to a saved graph."),
    ]
    facts = _results.machine_facts(options.threads)
    _results.write(options.json, title="Growth", rows=rows, columns=COLUMNS, summary=summary, notes=notes, facts=facts)
    print(_results.table(rows, COLUMNS))
    fits = {key: value for key, value in summary.items() if key != "exponent_bar"}
    print("fitted exponents: " + ", ".join(f"{key.removesuffix('_exponent')} {value}" for key, value in fits.items()))
    return 1 if options.check and max(fits.values()) > EXPONENT_BAR else 0


if __name__ == "__main__":
    raise SystemExit(main())
