"""Writing what a benchmark found: one JSON file for programs and one Markdown table for people, side by side."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"

_PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "onnxsim", "torchvision", "timm", "transformers", "numpy")

_VECTORS = ("avx", "amx", "asimd", "bf16", "dot", "f16c", "fma", "i8mm", "neon", "sme", "sve")

Row = Mapping[str, Any]


def machine_facts(threads: int | None = None) -> dict[str, Any]:
    """What a figure depends on: processor, cores, memory, versions. Nothing that names the host or its folders."""
    facts: dict[str, Any] = {
        "processor": _processor(),
        "instructions": instructions(),
        "cpus": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "system": platform.system(),
        "python": platform.python_version(),
    }
    if threads is not None:
        facts["threads"] = threads
    for package in _PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return facts


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def instructions() -> str:
    """The sets of vector instructions, as torch finds them, on which an engine's speed depends."""
    found = _capabilities()
    names = [name for name, there in found.items() if there is True and name.startswith(_VECTORS)]
    return " ".join(sorted(names)) + ("" if has_vnni() else ", no VNNI")


def has_vnni() -> bool:
    """Whether products of bytes are summed in 32 bits: by VNNI on x64. Other processors do it without."""
    found = _capabilities()
    return not str(found.get("architecture")).startswith("x86") or bool(
        found.get("avx512_vnni") or found.get("avx_vnni")
    )


def _capabilities() -> dict[str, Any]:
    import torch

    return dict(torch.cpu.get_capabilities())


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None


def peak_memory_mib() -> float:
    """The largest resident size of this process so far, or since `reset_peak_memory`.

    Linux keeps it per address space as `VmHWM`; `ru_maxrss` also remembers the size of the parent before `exec`.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def reset_peak_memory() -> None:
    """Let `peak_memory_mib` start again from what is resident now, where the system can (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def geometric_mean(values: Iterable[float]) -> float:
    """The geometric mean; NaN of nothing."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """A Markdown table of `columns` of the rows; numbers to the right, floats to three significant digits."""
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(column), 3, *(len(line[i]) for line in cells)) for i, column in enumerate(columns)]
    numeric = [any(isinstance(row.get(column), int | float) for row in rows) for column in columns]
    rule = ["-" * (w - 1) + ":" if n else "-" * w for w, n in zip(widths, numeric, strict=True)]

    def line(texts: Sequence[str]) -> str:
        padded = (t.rjust(w) if n else t.ljust(w) for t, w, n in zip(texts, widths, numeric, strict=True))
        return "| " + " | ".join(padded) + " |"

    return "\n".join([line(list(columns)), line(rule), *(line(texts) for texts in cells)])


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if value == 0:
            return "0"
        return f"{value:.1e}" if abs(value) < 1e-3 else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def write(
    path: Path,
    *,
    title: str,
    rows: Sequence[Row],
    columns: Sequence[str],
    summary: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write `path` (JSON) and the Markdown file of the same stem, each replaced atomically.

    Args:
        path: the JSON file; its folder is made if it is missing.
        title: heading of the Markdown file.
        rows: the measurements; everything in them goes into the JSON.
        columns: which fields of the rows become columns of the table.
        summary: the figures that the rows come to.
        notes: sentences under the table: what was measured and how.
        facts: the machine; `machine_facts()` if not given.
    """
    facts = dict(facts) if facts is not None else machine_facts()
    summary = dict(summary or {})
    document = {"title": title, "machine": facts, "summary": summary, "notes": list(notes), "rows": list(rows)}
    lines = [f"# {title}", ""]
    if summary:
        lines += [*(f"* {key.replace('_', ' ')}: {_cell(value)}" for key, value in summary.items()), ""]
    if rows:
        lines += [table(rows, columns), ""]
    lines += [*notes, "", "Machine: " + ", ".join(f"{key} {value}" for key, value in facts.items()), ""]
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, json.dumps(document, indent=1, allow_nan=False, default=str) + "\n")
    _replace(path.with_suffix(".md"), "\n".join(lines))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of an earlier run; none where there was none."""
    if not path.exists():
        return []
    return list(json.loads(path.read_text())["rows"])


def _replace(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
