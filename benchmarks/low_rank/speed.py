"""Time and memory of factorizing every linear layer, beside a loop of ``torch.linalg.svd``."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from benchmarks._results import RESULTS, machine_facts, peak_memory_mib, read_rows, reset_peak_memory, write
from benchmarks.low_rank.common import applied
from benchmarks.low_rank.memory import block, work_bytes
from fxcompress.capture import capture
from fxcompress.passes import FactorizeLinear

_ROUNDS, _SMALL = 3, 100  # of models of fewer million parameters


def peer(model: nn.Module, ratio: float, blocks: int) -> float:
    """Seconds of a loop of ``torch.linalg.svd`` over the layers of so many blocks, cut to the same ranks."""
    start = time.perf_counter()
    kept = []
    for layer in list(model.children())[: 6 * blocks]:
        weight: Any = layer.weight
        rows, width = weight.shape
        rank = int(ratio * rows * width / (rows + width))
        u, s, v = torch.linalg.svd(weight.detach(), full_matrices=False)
        kept.append(((u[:, :rank] * s[:rank].sqrt()).contiguous(), (s[:rank, None].sqrt() * v[:rank]).contiguous()))
    return time.perf_counter() - start


def speed(sizes: Sequence[tuple[int, int]], ratio: float, peer_blocks: int | None) -> None:
    """Measure models of these widths and numbers of blocks, and add them to the table."""
    applied(capture(block(768).eval(), (torch.randn(2, 768),), dynamic_shapes="batch"), FactorizeLinear(ratio=ratio))
    path = RESULTS / "low_rank_speed.json"
    rows = {(row["width"], row["blocks"], row["ratio"]): row for row in read_rows(path)}
    for width, blocks in sizes:
        row = measured(width, blocks, ratio, min(peer_blocks or blocks, blocks))
        rows[width, blocks, ratio] = row
        print(row, flush=True)
    kept = [rows[key] for key in sorted(rows)]
    write(
        path,
        title="Time and memory of factorizing every linear layer",
        rows=kept,
        columns=[
            "parameters_m",
            "width",
            "blocks",
            "ratio",
            "seconds",
            "peer_seconds",
            "faster",
            "ns_per_parameter",
            "work_in_largest_layers",
            "resident_in_largest_layers",
            "worst_error_over_best",
        ],
        summary={"exponent_of_seconds_in_parameters": exponent(kept)},
        notes=[
            "FactorizeLinear(ratio) on random weights (the hardest case: no component stands out) against a loop of "
            "torch.linalg.svd over the same layers in the same run, each on its own, in turns. Seconds are medians of "
            f"{_ROUNDS} rounds (one, of more than {_SMALL} million parameters), `faster` is the median of the ratios "
            "of a round, which are in the JSON. Where the peer was timed on fewer blocks (`peer_blocks`) its seconds "
            "are multiplied up; all blocks have the same shapes. "
            "work_in_largest_layers: tensors that live at once while one layer is factorized, its factors among them, "
            "as torch's profiler counts them, in sizes of the largest layer; the user's model is alive beside them. "
            "resident_in_largest_layers: the largest resident size of the process while the pass ran, less what was "
            "resident before and less all factors; it moves with what the allocator keeps. worst_error_over_best: of "
            "the first block, the error of a layer over that of Eckart and Young, less 1. The exponent is fitted to "
            "the rows of width 768."
        ],
        facts=machine_facts(torch.get_num_threads()),
    )


def measured(width: int, blocks: int, ratio: float, peer_blocks: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = block(width, blocks).eval()
    graph_module = capture(model, (torch.randn(2, width),), dynamic_shapes="batch")
    parameters = sum(p.numel() for p in model.parameters())
    largest = max(p.numel() * 4 for p in model.parameters()) / 2**20
    reset_peak_memory()
    before = peak_memory_mib()
    made, seconds = applied(graph_module, FactorizeLinear(ratio=ratio))
    factors_mib = sum(p.numel() * 4 for name, p in made.named_parameters() if name.endswith("weight")) / 2**20
    resident = (peak_memory_mib() - before - factors_mib) / largest
    worst = 0.0
    for index, layer in enumerate(list(model.children())[:6]):
        first: Any = made.get_submodule(f"{index}.0")
        second: Any = made.get_submodule(f"{index}.1")
        weight: Any = layer.weight
        error = float((weight - second.weight @ first.weight).detach().double().norm())
        best = float(torch.linalg.svdvals(weight.detach())[first.out_features :].double().norm())
        worst = max(worst, error / best - 1)
    del made
    rounds = [(seconds, peer(model, ratio, peer_blocks) * blocks / peer_blocks)]
    for _ in range(_ROUNDS - 1 if parameters < _SMALL * 1e6 else 0):
        again = applied(graph_module, FactorizeLinear(ratio=ratio))[1]
        rounds.append((again, peer(model, ratio, peer_blocks) * blocks / peer_blocks))
    seconds, peer_seconds = (statistics.median(times) for times in zip(*rounds, strict=True))
    ratios = [theirs / ours for ours, theirs in rounds]
    return {
        "width": width,
        "blocks": blocks,
        "ratio": ratio,
        "parameters_m": parameters / 1e6,
        "seconds": seconds,
        "peer_seconds": peer_seconds,
        "peer_blocks": peer_blocks,
        "faster": statistics.median(ratios),
        "rounds": [round(found, 2) for found in ratios],
        "ns_per_parameter": seconds / parameters * 1e9,
        "work_in_largest_layers": work_bytes(block(width), ratio=ratio) / 2**20 / largest,
        "resident_in_largest_layers": resident,
        "worst_error_over_best": worst,
    }


def exponent(rows: Sequence[dict[str, Any]]) -> float | None:
    """Slope of log seconds over log parameters, for one width and ratio."""
    chosen = [row for row in rows if row["width"] == 768 and row["ratio"] == 0.25]
    if len(chosen) < 2:
        return None
    xs, ys = ([math.log(row[key]) for row in chosen] for key in ("parameters_m", "seconds"))
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)
