"""Memory beside the model while one layer is factorized, without data and on data."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from benchmarks._results import RESULTS, machine_facts, read_rows, write
from benchmarks.low_rank.common import applied
from fxcompress.capture import capture
from fxcompress.passes import FactorizeLinear

_ROWS = 64  # of a batch


def work_bytes(inputs: int, outputs: int, ratio: float, *, data: bool = False) -> int:
    """The most bytes of tensors that live at once while a layer is factorized, its factors and batches included."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, outputs)).eval()
    graph_module = capture(model, (torch.randn(2, inputs),), dynamic_shapes="batch")
    scale = torch.logspace(0, -2, inputs)
    batches = [torch.randn(_ROWS, inputs) * scale for _ in range(2 * max(inputs, outputs) // _ROWS)]
    options: dict[str, Any] = {"calibration": batches, "moments_mib": 1} if data else {}
    gc.collect()  # what an earlier call left would count as freed in this one
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        applied(graph_module, FactorizeLinear(ratio=ratio, **options))
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def memory(widths: Sequence[int], ratios: Sequence[float]) -> None:
    """Measure the layers of a transformer's block of each width, and add them to the table."""
    path = RESULTS / "low_rank_memory.json"
    rows = {(row["width"], row["inputs"], row["outputs"], row["ratio"]): row for row in read_rows(path)}
    for width in widths:
        largest = 4 * 4 * width * width
        for inputs, outputs in ((width, width), (width, 4 * width), (4 * width, width)):
            for ratio in ratios:
                row = {"width": width, "inputs": inputs, "outputs": outputs, "ratio": ratio}
                row["without_data"] = work_bytes(inputs, outputs, ratio) / largest
                row["on_data"] = work_bytes(inputs, outputs, ratio, data=True) / largest
                rows[width, inputs, outputs, ratio] = row
                print(row, flush=True)
    write(
        path,
        title="Memory beside the model while a layer is factorized",
        rows=[rows[key] for key in sorted(rows)],
        columns=["width", "inputs", "outputs", "ratio", "without_data", "on_data"],
        notes=[
            "In sizes of the largest layer of a transformer's block, 4 · width² float32 numbers: all tensors that live "
            "at once while FactorizeLinear takes one layer, its factors included, as torch's profiler counts them. On "
            f"data: batches of {_ROWS} rows, `moments_mib=1`, so that one layer's moments are held at a time; what "
            "is held of several layers adds to it."
        ],
        facts=machine_facts(torch.get_num_threads()),
    )
