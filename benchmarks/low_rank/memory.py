"""Memory beside the model while linear layers are factorized, without data and on data."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from benchmarks._results import RESULTS, machine_facts, read_rows, write
from fxcompress.capture import capture
from fxcompress.graph.edit import copy_graph
from fxcompress.passes import FactorizeLinear, PassContext

_ROWS = 64  # of a batch
_OPTIONS: tuple[dict[str, Any], ...] = (
    {"ratio": 0.25},
    {"ratio": 0.5},
    {"ratio": 0.7},
    {"energy": 0.8},
    {"error": 0.3},
    {"ratio": 0.5, "scope": "global"},
    {"ratio": 0.7, "scope": "global"},
    {"ratio": 0.5, "refit": True},
    {"ratio": 0.7, "refit": True},
    {"ratio": 0.5, "method": "asvd"},
)


def work_bytes(model: nn.Module, *, rows: int = 0, **options: Any) -> int:
    """The most bytes of tensors that live at once while a model is factorized, less the factors of layers done before.

    Args:
        model: linear layers, one after the other.
        rows: of calibration data; 0 is without data.
        options: of the pass.
    """
    torch.manual_seed(0)
    inputs = model[0].in_features
    graph_module = capture(model.eval(), (torch.randn(2, inputs),), dynamic_shapes="batch")
    scale = torch.logspace(0, -2, inputs)
    if rows:
        options["calibration"] = [torch.randn(_ROWS, inputs) * scale for _ in range(rows // _ROWS)]
    marks: list[str] = []

    def told(done: int, total: int, what: str) -> None:
        if what in dict(model.named_children()):
            with torch.profiler.record_function(f"factorized {what}"):
                marks.append(what)

    gc.collect()  # what an earlier call left would count as freed in this one
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        made = FactorizeLinear(**options).run(copy_graph(graph_module), PassContext(progress=told))
    thinner = {rewrite.site: rewrite.detail["layers"] for rewrite in made.rewrites}
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    live = most = done = 0
    for event in events:
        name = event.name()
        if name == "[memory]":
            live += event.nbytes()
            most = max(most, live - done)
        elif name.startswith("factorized "):
            path = name.removeprefix("factorized ")
            layers = thinner.get(path, ())
            pair = [made.graph_module.get_submodule(layer).weight for layer in layers]
            done += sum(weight.numel() * weight.element_size() for weight in pair)
    assert len(marks) == len(model)
    return most


def block(width: int, blocks: int = 1) -> nn.Sequential:
    """Linear layers of the blocks of a transformer: four of the attention and two of the MLP."""
    layers: list[nn.Module] = []
    for _ in range(blocks):
        layers += [nn.Linear(width, width) for _ in range(4)]
        layers += [nn.Linear(width, 4 * width), nn.Linear(4 * width, width)]
    return nn.Sequential(*layers)


def equal(width: int) -> nn.Sequential:
    """Square layers of one size."""
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(3)))


def memory(widths: Sequence[int]) -> None:
    """Measure a transformer's blocks and square layers of each width, and add them to the table."""
    path = RESULTS / "low_rank_memory.json"
    rows = {(row["layers"], row["width"], row["options"]): row for row in read_rows(path) if "options" in row}
    for width in widths:
        for layers, model in (("2 blocks", block(width, 2)), ("3 square", equal(width))):
            largest = max(sum(p.numel() * 4 for p in layer.parameters()) for layer in model)
            for options in _OPTIONS:
                told = ", ".join(f"{name}={value!r}" for name, value in options.items())
                row: dict[str, Any] = {"layers": layers, "width": width, "options": told, "without_data": None}
                if not {"refit", "method"} & set(options):
                    row["without_data"] = work_bytes(model, **options) / largest
                row["on_data"] = work_bytes(model, rows=2 * width, **options) / largest
                row["on_few"] = work_bytes(model, rows=width // 2, **options) / largest
                rows[layers, width, told] = row
                print(row, flush=True)
    write(
        path,
        title="Memory beside the model while its layers are factorized",
        rows=[rows[key] for key in sorted(rows)],
        columns=["layers", "width", "options", "without_data", "on_data", "on_few"],
        notes=[
            "In sizes of the model's largest layer: all tensors that live at once while FactorizeLinear runs, as "
            "torch's profiler counts them, less the factors of layers that are done. Of two blocks of a transformer "
            "(four layers width × width, width × 4 width, 4 width × width) the largest has 4 · width² numbers, of "
            f"square layers width². On data: batches of {_ROWS} rows, 2 · width rows in all, which decay over two "
            "decades; on few: width / 2 rows."
        ],
        facts=machine_facts(torch.get_num_threads()),
    )
