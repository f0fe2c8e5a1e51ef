"""Memory that an engine, a saved graph or a model takes, each measured in a process of its own.

In the process that measures latencies all candidates lie side by side, and one cannot be told from another.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch.utils import _pytree as pytree

from fxcompress.capture.inputs import ExampleInputs
from fxcompress.errors import FxCompressError
from fxcompress.graph.structure import Structure
from fxcompress.latency import opened

__all__ = ["Footprint", "footprint"]

_TENSORS, _REQUEST = "inputs.safetensors", "request.json"
_CALLS = 3  # the first ones allocate what the engine keeps


@dataclass(frozen=True)
class Footprint:
    """Resident memory of one candidate, in bytes; None where it could not be measured.

    Attributes:
        resident: what the process grew by from before the candidate was opened until after a few calls: its weights
            and buffers, and the library that runs it (PyTorch, which is there anyway, left out).
        peak: the most that it grew by meanwhile.
        process: peak of the whole process, Python and PyTorch included.
        problem: why it could not be measured; empty where it was.
    """

    resident: int | None = None
    peak: int | None = None
    process: int | None = None
    problem: str = ""


def footprint(
    spec: str,
    inputs: ExampleInputs,
    *,
    threads: int | None = None,
    options: Mapping[str, Any] | None = None,
    timeout: float = 600,
) -> Footprint:
    """Open ``spec`` in a new process, call it on ``inputs`` a few times, and see what it takes.

    Args:
        spec: a bundle's directory or a model spec, as for :func:`fxcompress.latency.race`.
        inputs: of the calls.
        threads: of the candidate and of PyTorch.
        options: of an engine, as for :func:`fxcompress.latency.race`.
        timeout: seconds until the process is given up.

    Returns:
        the memory, or the problem: an error in that process is no error here.
    """
    if not _status():
        return Footprint(problem="this system has no /proc to read resident memory from")
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder), inputs, {"spec": spec, "threads": threads, "options": dict(options or {})})
        command = [sys.executable, "-m", "fxcompress.footprint", folder]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired:
            return Footprint(problem=f"no answer after {timeout:.0f} s")
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        told = [line for line in done.stderr.splitlines() if line.strip()]
        return Footprint(problem=told[-1] if told else f"the process ended with exit code {done.returncode}")
    return Footprint(**json.loads(lines[-1]))


def _write(folder: Path, inputs: ExampleInputs, request: dict[str, Any]) -> None:
    leaves, tree = pytree.tree_flatten((inputs.args, inputs.kwargs))
    constants = {index: leaf for index, leaf in enumerate(leaves) if not isinstance(leaf, torch.Tensor)}
    structure = Structure.from_spec(tree, constants)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    copies = {str(index): tensor.detach().cpu().clone().contiguous() for index, tensor in enumerate(tensors)}
    safetensors.torch.save_file(copies, folder / _TENSORS)
    request = {**request, "structure": structure.to_json()}
    (folder / _REQUEST).write_text(json.dumps(request), encoding="utf-8")


# --- in the process of its own ---------------------------------------------------------------------------------------


def _measure(folder: Path) -> Footprint:
    request = json.loads((folder / _REQUEST).read_text(encoding="utf-8"))
    tensors = safetensors.torch.load_file(folder / _TENSORS)
    args, kwargs = Structure.from_json(request["structure"]).unflatten([tensors[str(i)] for i in range(len(tensors))])
    threads = request["threads"] or torch.get_num_threads()
    torch.set_num_threads(threads)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts again from here
    before = _status()["VmRSS"]
    with contextlib.ExitStack() as stack, torch.inference_mode():
        candidate = opened(request["spec"], request["spec"], threads, request["options"], stack)
        for _ in range(_CALLS):
            candidate.call(*args, **kwargs)
        after = _status()
    return Footprint(after["VmRSS"] - before, after["VmHWM"] - before, after["VmHWM"])


def _status() -> dict[str, int]:
    """Resident memory of this process now and at its peak, in bytes; empty where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return {}
    return dict(_sizes(lines))


def _sizes(lines: list[str]) -> Iterator[tuple[str, int]]:
    for line in lines:
        name, _, value = line.partition(":")
        if name in ("VmRSS", "VmHWM"):
            yield name, int(value.split()[0]) << 10


def _main(arguments: list[str]) -> int:
    with contextlib.redirect_stdout(sys.stderr):
        try:
            found: Any = asdict(_measure(Path(arguments[0])))
        except FxCompressError as error:
            found = asdict(Footprint(problem=error.problem))
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
