"""CREPE, a pitch tracker of dense convolutions, on synthetic tones."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

import fxcompress as fxc
from benchmarks._results import RESULTS, machine_facts, read_rows, write
from benchmarks.low_rank.common import packaged
from fxcompress.analysis.cost import cost
from fxcompress.backends.benchmark import benchmark
from fxcompress.capture import capture
from fxcompress.passes import FactorizeConv, Pass, SubstituteDepthwiseSeparable


class Crepe(nn.Module):
    """The pitch tracker of torchcrepe ("tiny"): frames ``[batch, 1024]`` to 360 bins of 20 cents."""

    def __init__(self) -> None:
        super().__init__()
        widths = [1, 128, 16, 16, 16, 32, 64]
        for index in range(6):
            kernel, stride = ((512, 1), (4, 1)) if index == 0 else ((64, 1), (1, 1))
            setattr(self, f"conv{index + 1}", nn.Conv2d(widths[index], widths[index + 1], kernel, stride))
            setattr(self, f"conv{index + 1}_BN", nn.BatchNorm2d(widths[index + 1], eps=0.001))
        self.classifier = nn.Linear(256, 360)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[:, None, :, None]
        for index in range(1, 7):
            x = nn.functional.pad(x, (0, 0, 254, 254) if index == 1 else (0, 0, 31, 32))
            x = getattr(self, f"conv{index}_BN")(torch.relu(getattr(self, f"conv{index}")(x)))
            x = nn.functional.max_pool2d(x, (2, 1), (2, 1))
        return torch.sigmoid(self.classifier(x.permute(0, 2, 1, 3).flatten(1)))


def tones(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames at 16 kHz of five harmonics of falling strength with a little noise; their pitch in cents over 10 Hz."""
    generator = torch.Generator().manual_seed(seed)
    pitch = 60 * 2 ** (torch.rand(count, generator=generator, dtype=torch.float64) * math.log2(1000 / 60))
    time_ = torch.arange(1024, dtype=torch.float64) / 16000
    frames = torch.zeros(count, 1024, dtype=torch.float64)
    for harmonic in range(1, 6):
        phase = torch.rand(count, 1, generator=generator, dtype=torch.float64) * 2 * math.pi
        strength = torch.rand(count, 1, generator=generator, dtype=torch.float64) / harmonic
        frames += strength * torch.sin(2 * math.pi * harmonic * pitch[:, None] * time_ + phase)
    frames += 0.01 * torch.randn(count, 1024, generator=generator, dtype=torch.float64)
    frames = (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True)
    return frames.float(), 1200 * torch.log2(pitch / 10)


def within(model: Any, frames: torch.Tensor, cents: torch.Tensor) -> float:
    """Share of frames whose pitch is found to 25 cents: the mean of nine bins around the greatest, by weight."""
    with torch.no_grad():
        found = torch.cat([model(part) for part in frames.split(128)]).double()
    bins = torch.arange(360, dtype=torch.float64) * 20 + 1997.3794084376191
    near = (torch.arange(360) - found.argmax(1, keepdim=True)).abs() <= 4
    weight = found * near
    pitch = (weight * bins).sum(1) / weight.sum(1)
    return float(((pitch - cents).abs() <= 25).double().mean())


def crepe(ratios: tuple[float, ...]) -> None:
    """Measure each method at each ratio, and add them to the table."""
    model = Crepe().eval()
    state = torch.load(packaged("torchcrepe", "assets/tiny.pth"), weights_only=True)  # noqa: TID251 - published so
    model.load_state_dict(state)
    calibration_frames, _ = tones(96, seed=1)
    frames, cents = tones(1000, seed=2)
    calibration = list(calibration_frames.split(8))
    graph_module = capture(model, (frames[:2],), dynamic_shapes="batch")
    path = RESULTS / "low_rank_crepe.json"
    rows = {(row["method"], row["ratio"]): row for row in read_rows(path)}
    whole = cost(graph_module)
    forms: list[tuple[str, float, Pass | None]] = [("original", 1.0, None)]
    for ratio in ratios:
        for data in (None, calibration):
            told = "" if data is None else ", on data"
            shared: dict[str, Any] = {"ratio": ratio, "calibration": data, "ignore": ("conv1",)}
            for method in ("channel", "tucker2"):
                forms.append((method + told, ratio, FactorizeConv(method=method, **shared)))  # type: ignore[arg-type]
            forms.append((f"depthwise-separable{told}", ratio, SubstituteDepthwiseSeparable(**shared)))
        forms.append(
            ("channel, on data, where faster", ratio, FactorizeConv(method="channel", cost="latency", **shared))
        )
        faster = SubstituteDepthwiseSeparable(cost="latency", **shared)
        forms.append(("depthwise-separable, on data, where faster", ratio, faster))
    graphs: dict[tuple[str, float], fx.GraphModule] = {}
    for name, ratio, pass_ in forms:
        made, seconds, sites = graph_module, 0.0, 0
        if pass_ is not None:
            start = time.perf_counter()
            compiled = fxc.compile(graph_module, [pass_], (frames[:2],))
            made, seconds = compiled.module, time.perf_counter() - start
            sites = len(compiled.report.passes[0].rewrites)
        row = {
            "method": name,
            "ratio": ratio,
            "sites": sites,
            "macs_m": (cost(made).macs or 0) / 1e6,
            "share_of_macs": (cost(made).macs or 0) / (whole.macs or 1),
            "within_25_cents": within(made, frames, cents),
            "seconds": seconds,
        }
        rows[name, ratio], graphs[name, ratio] = row, made
        print(row, flush=True)
    for key, median in latencies(graphs, frames[:1]).items():
        rows[key]["latency_ms"] = median
    write(
        path,
        title="A pitch tracker with thinner convolutions",
        rows=sorted(rows.values(), key=lambda row: -row["ratio"]),
        columns=["method", "ratio", "sites", "share_of_macs", "within_25_cents", "latency_ms"],
        notes=[
            "CREPE tiny with its published weights; conv2 to conv6 (kernels of 64 × 1, so that there is no spatial "
            "factorization) at a ratio of their multiply-accumulates, no training after. 1,000 synthetic frames of "
            "known pitch between 60 and 1,000 Hz; calibrated on 96 others. `sites`: layers that were rewritten; of "
            "`where faster` (cost latency) those whose replacement took less time than they, each alone. "
            "Latency: median of ONNX Runtime at batch 1, one thread, all in turns."
        ],
        facts=machine_facts(torch.get_num_threads()),
    )


def latencies(graphs: Mapping[Any, fx.GraphModule], x: torch.Tensor) -> dict[Any, float]:
    """Median milliseconds of engines, called in turns."""
    backend = fxc.backends.OnnxRuntime(threads=1)
    with tempfile.TemporaryDirectory() as folder:
        engines: dict[str, Any] = {}
        for index, graph_module in enumerate(graphs.values()):
            output = Path(folder) / str(index)
            compiled = fxc.compile(graph_module, [], (x.repeat(2, 1),), backend=backend, output=output, progress=False)
            engines[str(index)] = compiled.engine
        found = benchmark(engines, (x,), repetitions=100)
    return {key: found[str(index)].median_ms for index, key in enumerate(graphs)}
