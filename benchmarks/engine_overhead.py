"""What ``engine.run`` costs over the bare call of the library, on a model that does almost nothing, by backend.

``python -m benchmarks.engine_overhead`` interleaves the calls and prints the median of each in microseconds. The bare
call is the least that gives the outputs to the caller to keep: the library's objects made beforehand, nothing checked;
it takes and gives what the engine takes and gives, arrays or tensors.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import fxcompress as fxc
from benchmarks._results import machine_facts, write

Call = Callable[[Any], Any]


def onnxruntime(engine: Any) -> Call:
    """``session.run`` with a dict of arrays."""
    (given,), (made,) = engine.session.get_inputs(), engine.session.get_outputs()
    return lambda array: engine.session.run([made.name], {given.name: array})[0]


def openvino(engine: Any) -> Call:
    """An infer request of one's own, which reads the array where it lies; the output is copied out of it."""
    from openvino import Tensor

    request = engine.compiled.create_infer_request()

    def call(array: np.ndarray) -> Any:
        request.set_input_tensor(0, Tensor(array, True))
        request.infer()
        return request.get_output_tensor(0).data.copy()

    return call


def torchscript(engine: Any) -> Call:
    """The frozen ``ScriptModule``, without autograd."""
    return _without_autograd(engine.module)


def torch_export(engine: Any) -> Call:
    """The exported program's module, without autograd."""
    return _without_autograd(engine._call)


def _without_autograd(function: Callable[..., Any]) -> Call:
    def call(tensor: torch.Tensor) -> Any:
        with torch.no_grad():
            made = function(tensor)
            return made if isinstance(made, torch.Tensor) else made[0]

    return call


BARE = {"onnxruntime": onnxruntime, "openvino": openvino, "torchscript": torchscript, "torch_export": torch_export}
THREADED = ("onnxruntime", "openvino")
ON_ARRAYS = THREADED


def measure(backend: str, repetitions: int) -> list[dict[str, Any]]:
    """Rows of one backend: bare calls, and the engine called with an array, a tensor, and by name."""
    torch.set_num_threads(1)
    array = np.ones((1, 3), np.float32)
    tensor = torch.from_numpy(array)
    compiled = fxc.compile(nn.ReLU().eval(), example_inputs=(torch.randn(2, 3),), progress=False)
    options = {"threads": 1} if backend in THREADED else {}
    with compiled.export(backend) as built:
        engine = built if not options else fxc.load_engine(built.path, **options)
        name = engine.manifest.inputs[0].name
        bare = BARE[backend](engine)
        on_arrays = backend in ON_ARRAYS
        calls: dict[str, Callable[[], Any]] = {
            "bare(array)": lambda: bare(array) if on_arrays else bare(torch.from_numpy(array)).numpy(),
            "bare(tensor)": lambda: torch.from_numpy(bare(tensor.numpy())) if on_arrays else bare(tensor),
            "engine(array)": lambda: engine(array),
            "engine(tensor)": lambda: engine(tensor),
            "engine(name=tensor)": lambda: engine(**{name: tensor}),
        }
        times: dict[str, list[float]] = {call: [] for call in calls}
        for _ in range(repetitions):
            for call, function in calls.items():
                start = time.perf_counter_ns()
                function()
                times[call].append((time.perf_counter_ns() - start) / 1000)
        if engine is not built:
            engine.close()
    medians = {call: statistics.median(found) for call, found in times.items()}
    least = min(medians.values())
    rows = []
    for call, us in medians.items():
        same = medians["bare(array)" if "array" in call else "bare(tensor)"]
        added = {"added_us": round(us - same, 2), "over_least_us": round(us - least, 2)}
        rows.append({"backend": backend, "call": call, "median_us": round(us, 2), **added})
    return rows


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5000)
    repetitions = parser.parse_args().repetitions
    rows = [row for backend in BARE for row in measure(backend, repetitions)]
    for row in rows:
        added = f"+ {row['added_us']} us  ({row['over_least_us']})"
        print(f"{row['backend']:14}{row['call']:22} {row['median_us']:8} us   {added}")
    write(
        Path(__file__).parent / "results" / "engine_overhead.json",
        title="Overhead of engine.run",
        rows=rows,
        columns=["backend", "call", "median_us", "added_us", "over_least_us"],
        summary={"most added, us": max(row["added_us"] for row in rows)},
        notes=[
            f"Median of {repetitions} interleaved calls of a ReLU on three numbers, one thread. `bare`: the library "
            "called with objects made beforehand, nothing checked, the output copied where the library reuses it. "
            "`added_us`: over the bare call with the same kind of data. `over_least_us`: over the quicker of the two "
            "bare calls, which converts nothing."
        ],
        facts=machine_facts(1),
    )


if __name__ == "__main__":
    main()
