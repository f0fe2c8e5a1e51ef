"""What ``engine.run`` costs over the bare ONNX Runtime call, on a model that does almost nothing.

``python -m benchmarks.engine_overhead`` interleaves the calls and prints the median of each in microseconds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import fxcompress as fxc
from benchmarks._results import write
from fxcompress.backends import OnnxRuntime
from fxcompress.backends.onnxruntime import OnnxRuntimeEngine


def main(repetitions: int = 5000) -> None:
    """Measure, print and store."""
    model = nn.ReLU().eval()
    compiled = fxc.compile(model, example_inputs=(torch.randn(2, 3),), backend=OnnxRuntime(threads=1))
    engine = compiled.engine
    assert isinstance(engine, OnnxRuntimeEngine)
    session, array = engine.session, np.ones((1, 3), np.float32)
    tensor = torch.from_numpy(array)
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    calls: dict[str, Callable[[], Any]] = {
        "session.run": lambda: session.run([made.name], {given.name: array}),
        "engine(array)": lambda: engine(array),
        "engine(tensor)": lambda: engine(tensor),
        "engine(name=tensor)": lambda: engine(**{given.name: tensor}),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repetitions):
        for name, call in calls.items():
            start = time.perf_counter_ns()
            call()
            times[name].append((time.perf_counter_ns() - start) / 1000)
    medians = {name: statistics.median(values) for name, values in times.items()}
    bare = medians["session.run"]
    rows = [{"call": name, "median_us": round(v, 2), "added_us": round(v - bare, 2)} for name, v in medians.items()]
    for row in rows:
        print(f"{row['call']:22} {row['median_us']:8} us   + {row['added_us']} us")
    write(
        Path(__file__).parent / "results" / "engine_overhead.json",
        title="Overhead of engine.run",
        rows=rows,
        columns=["call", "median_us", "added_us"],
        notes=[f"Median of {repetitions} interleaved calls of a ReLU on three numbers, one thread."],
    )


if __name__ == "__main__":
    main()
