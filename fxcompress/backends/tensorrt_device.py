"""The bundle for a device that has to build its engine itself: model, scripts, profiles, reference data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fxcompress.backends.reference import Reference
from fxcompress.backends.sampling import random_inputs
from fxcompress.backends.signature import Signature, TensorSpec
from fxcompress.backends.tensorrt_profiles import Profile
from fxcompress.backends.tensors import numpy_dtype, torch_dtype
from fxcompress.errors import BackendError
from fxcompress.graph.info import info
from fxcompress.graph.running import computed_outputs, nested_inputs, outputs_of, resized

__all__ = [
    "NEEDS",
    "SCRIPTS",
    "default_tolerance",
    "device_reference",
    "expected_outputs",
    "sized_inputs",
    "write_facts",
    "write_scripts",
]

NEEDS = {"tensorrt": "10.0", "tensorrt_rtx": "1.0"}  # the first with strongly typed networks
SCRIPTS = ("build_engine.py", "run_engine.py")

# Largest relative error against PyTorch, by the coarsest type that the model computes in.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def default_tolerance(graph_module: fx.GraphModule) -> float:
    """What an engine may differ by where nothing else was told."""
    dtypes = {tensor.dtype for tensor in (*graph_module.parameters(), *graph_module.buffers())}
    return max((_TOLERANCE.get(dtype, 1e-4) for dtype in dtypes), default=1e-4)


def write_facts(path: Path, signature: Signature, profiles: Sequence[Profile], facts: Mapping[str, Any]) -> None:
    """``tensorrt.json``, which the engine and the scripts read.

    Args:
        facts: everything but inputs, outputs and profiles.
    """
    told = {
        **facts,
        "inputs": [_spec(spec) for spec in signature.inputs],
        "outputs": [_spec(spec) for spec in signature.outputs],
        "profiles": [profile.to_json() for profile in profiles],
    }
    path.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def _spec(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "shape": list(spec.shape), "dtype": spec.dtype}


def write_scripts(directory: Path) -> None:
    """``build_engine.py`` and ``run_engine.py``, as they lie in this package."""
    source = resources.files("fxcompress.backends") / "device"
    for name in SCRIPTS:
        (directory / name).write_text((source / name).read_text(encoding="utf-8"), encoding="utf-8")


def device_reference(
    graph_module: fx.GraphModule,
    signature: Signature,
    profiles: Sequence[Profile],
    example_inputs: Sequence[Any] | None,
    tolerance: float,
) -> Reference:
    """Inputs and what PyTorch makes of them, at the sizes that the first profile is tuned for.

    Raises:
        BackendError: a dtype has no form in numpy, which is all that a device has. bfloat16 travels as its 16 bits.
    """
    for spec in (*signature.inputs, *signature.outputs):
        if numpy_dtype(spec.dtype) is None and torch_dtype(spec.dtype) is not torch.bfloat16:
            raise BackendError(f"{spec} has no form in numpy", remedy="cast it to float32 in the model")
    leaves = sized_inputs(graph_module, signature, profiles[0] if profiles else None, example_inputs)
    inputs = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return Reference(tuple(inputs), tuple(expected_outputs(graph_module, leaves)), tolerance)


def expected_outputs(graph_module: fx.GraphModule, leaves: Sequence[Any]) -> list[torch.Tensor]:
    """What an engine has to make of flat inputs, in PyTorch."""
    outputs = outputs_of(graph_module, *nested_inputs(graph_module, leaves))
    computed = computed_outputs(graph_module)
    return [torch.as_tensor(output) for output, gives in zip(outputs, computed, strict=True) if gives]


def sized_inputs(
    graph_module: fx.GraphModule, signature: Signature, profile: Profile | None, leaves: Sequence[Any] | None
) -> list[Any]:
    """Flat inputs of the sizes that a profile is tuned for: the examples, cut or repeated, or random ones."""
    wanted = {name: bounds[1] for name, bounds in profile.sizes.items()} if profile is not None else {}
    if leaves is None:
        return list(random_inputs(signature.inputs, sizes=wanted))
    known = info(graph_module).dim_names
    symbols = {symbol: wanted[name] for symbol, name in known.items() if name in wanted}
    symbols |= {name: size for name, size in wanted.items() if name not in known.values()}
    return resized(graph_module, leaves, symbols) or list(leaves)
