"""Reference data in a bundle: inputs, and what PyTorch made of them, so that an engine can be checked where it runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from fxcompress.backends.bundle_writer import library_versions
from fxcompress.backends.engine import Engine
from fxcompress.backends.verification import verify_engine
from fxcompress.errors import BundleError, PreconditionError, VerificationError

__all__ = ["REFERENCE_FILE", "Reference", "read_reference", "replay", "write_reference"]

REFERENCE_FILE = "reference.safetensors"
_LIMIT = 8 << 20  # bytes; more would weigh upon the bundle


@dataclass(frozen=True)
class Reference:
    """Flat inputs and outputs of the model in PyTorch, in the manifest's order.

    Attributes:
        inputs: one tensor per input.
        outputs: one tensor per output.
        tolerance: the relative error that an engine may have.
    """

    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]
    tolerance: float


def write_reference(directory: Path, reference: Reference, *, whatever_size: bool = False) -> str:
    """Write the reference beside an engine's files.

    Args:
        directory: of the bundle.
        reference: to write.
        whatever_size: for a bundle that is of no use without it.

    Returns:
        nothing, or a sentence that says why it was left out.
    """
    tensors = {f"input.{index}": tensor for index, tensor in enumerate(reference.inputs)}
    tensors |= {f"output.{index}": tensor for index, tensor in enumerate(reference.outputs)}
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if total > _LIMIT and not whatever_size:
        return f"left out: {total} bytes of inputs and outputs, more than {_LIMIT}"
    # Copies: inputs may be views of one another, which the format does not know.
    copies = {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()
    }
    try:
        told = safetensors.torch.save(copies, {"tolerance": repr(reference.tolerance)})
    except (KeyError, ValueError, safetensors.SafetensorError) as error:  # a dtype that the format does not know
        return f"left out: {error!r}"
    (directory / REFERENCE_FILE).write_bytes(told)  # with the rights that the bundle's other files have
    return ""


def read_reference(directory: Path) -> Reference | None:
    """The reference in a bundle; None if it holds none.

    Raises:
        BundleError: the file is damaged.
    """
    file = directory / REFERENCE_FILE
    if not file.exists():
        return None
    try:
        with safetensors.safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
            tolerance = float((opened.metadata() or {})["tolerance"])
        return Reference(_listed(tensors, "input"), _listed(tensors, "output"), tolerance)
    except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
        raise BundleError(
            f"the reference data cannot be read: {error!r}", where=str(file), remedy="build the bundle anew"
        ) from error


def replay(engine: Engine) -> dict[str, Any]:
    """Run an engine on its bundle's reference inputs and compare.

    Returns:
        ``relative_error`` by output, the ``tolerance``, and ``input_shapes``.

    Raises:
        PreconditionError: the bundle holds no reference.
        BundleError: the reference is damaged. BackendError: the engine cannot run.
        VerificationError: an output differs by more than the reference allows.
    """
    reference = read_reference(engine.path)
    if reference is None:
        raise PreconditionError(
            "this bundle holds no reference data, so its outputs cannot be checked",
            where=str(engine.path),
            remedy="build it with example inputs and with verify=True",
        )
    try:
        errors = verify_engine(engine, lambda *_: list(reference.outputs), [reference.inputs], reference.tolerance)
    except VerificationError as error:
        made, here = engine.manifest.versions, library_versions(engine.manifest.versions)
        other = ", ".join(
            f"{name} {made[name]}, here {here[name]}" for name in made if here.get(name, made[name]) != made[name]
        )
        raise VerificationError(
            error.problem,
            where=error.where,
            remedy=f"build it anew with what runs it here; it was built with {other}"
            if other
            else "build it anew on this machine: everything here is as it was, but the processor may be another one",
        ) from error
    shapes = [list(tensor.shape) for tensor in reference.inputs]
    return {"relative_error": errors, "tolerance": reference.tolerance, "input_shapes": shapes}


def _listed(tensors: dict[str, torch.Tensor], prefix: str) -> tuple[torch.Tensor, ...]:
    count = sum(name.startswith(f"{prefix}.") for name in tensors)
    return tuple(tensors[f"{prefix}.{index}"] for index in range(count))
