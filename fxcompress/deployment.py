"""Is a deployed bundle still what was built? Hashes, outputs and latency, from the bundle alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxcompress.backends.benchmark import BenchmarkResult, benchmark
from fxcompress.backends.bundle import Manifest
from fxcompress.backends.reference import read_reference, replay
from fxcompress.backends.registry import load_engine

__all__ = ["Verified", "verify_bundle"]


@dataclass(frozen=True)
class Verified:
    """What :func:`verify_bundle` found.

    Attributes:
        manifest: of the bundle.
        errors: greatest relative error by output.
        tolerance: what each may be.
        input_shapes: of the reference inputs.
        latency: on the reference inputs, on this machine.
    """

    manifest: Manifest
    errors: dict[str, float]
    tolerance: float
    input_shapes: list[list[int]]
    latency: BenchmarkResult

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {
            "backend": self.manifest.backend,
            "files": {name: record.sha256 for name, record in self.manifest.files.items()},
            "relative_error": self.errors,
            "tolerance": self.tolerance,
            "input_shapes": self.input_shapes,
            "latency": self.latency.to_dict(),
            "verified": True,
        }


def verify_bundle(path: str | Path, options: Mapping[str, Any] | None = None, *, repetitions: int = 50) -> Verified:
    """Check every file of a bundle, load its engine, replay its reference data, and time it.

    Args:
        path: the bundle's directory.
        options: of the backend, in place of those that the bundle was built with.
        repetitions: calls measured, after five that are not.

    Raises:
        BundleError: a file is missing, damaged or altered.
        BackendError: the engine cannot be loaded, or cannot run on this machine.
        PreconditionError: the bundle holds no reference data.
        VerificationError: an output differs from PyTorch's by more than the bundle allows.
    """
    with load_engine(path, **(options or {})) as engine:
        found = replay(engine)
        reference = read_reference(engine.path)
        assert reference is not None
        latency = benchmark({"engine": engine.run_flat}, (reference.inputs,), repetitions=repetitions)
        return Verified(engine.manifest, found["relative_error"], found["tolerance"], found["input_shapes"], latency)
