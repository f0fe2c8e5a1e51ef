"""Proof that an engine computes what PyTorch does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxcompress.backends.engine import Engine
from fxcompress.backends.tensors import to_torch
from fxcompress.errors import PreconditionError, VerificationError
from fxcompress.graph.difference import difference
from fxcompress.graph.structure import Structure

__all__ = ["relative_error", "verify_engine"]


def verify_engine(
    engine: Engine,
    expected: Callable[..., Any],
    input_sets: Sequence[Sequence[torch.Tensor]],
    tolerance: float,
) -> dict[str, float]:
    """Run the engine and the reference on the same inputs and compare every output.

    Args:
        engine: to be verified.
        expected: the reference, called with flat inputs; gives flat outputs or the structure that the user sees.
        input_sets: flat inputs of each run, in the order of the manifest; different batch sizes prove dynamic ones.
        tolerance: greatest :func:`relative_error` allowed.

    Returns:
        the greatest relative error of each output over all runs, by output name.

    Raises:
        VerificationError: an output differs in number, shape, dtype, place of NaN or infinity, or by more than
            ``tolerance``; names the worst output, its error and the inputs' shapes.
    """
    specs = engine.manifest.outputs
    structure = engine.manifest.output_structure
    errors = {spec.name: 0.0 for spec in specs}
    shapes: dict[str, str] = {}
    for inputs, given in zip(input_sets, engine.run_each(input_sets), strict=True):
        with torch.no_grad():
            wanted = _flat(expected(*inputs), len(specs), structure)
        told = ", ".join(str(tuple(tensor.shape)) for tensor in inputs)
        for spec, want, got in zip(specs, wanted, given, strict=True):
            want, got = torch.as_tensor(want).detach().cpu(), to_torch(got).cpu()
            if want.shape != got.shape or want.dtype != got.dtype:
                raise VerificationError(
                    f"the engine gives {got.dtype} {tuple(got.shape)}, PyTorch {want.dtype} {tuple(want.shape)}",
                    where=f"output {spec.name!r} for inputs of shape {told}",
                    remedy="a size of the graph was fixed at export; report the model",
                )
            error = relative_error(want, got)
            if spec.name not in shapes or error > errors[spec.name]:
                errors[spec.name], shapes[spec.name] = error, told
    worst = max(errors, key=lambda name: errors[name], default=None)
    if worst is not None and not errors[worst] <= tolerance:
        raise VerificationError(
            f"the engine differs from PyTorch by a relative {errors[worst]:.3g}; {tolerance:.3g} is allowed",
            where=f"output {worst!r} for inputs of shape {shapes.get(worst, 'none')}",
            remedy=engine.when_wrong()
            or "compile with verify=False to look at the engine, or allow more if the precision explains it",
        )
    return errors


def relative_error(reference: torch.Tensor, value: torch.Tensor) -> float:
    """max|reference - value| / max|reference| of tensors of one shape: see :func:`fxcompress.graph.difference`.

    Against a reference of zeros the error is absolute.
    """
    worst, scale = difference(reference, value)
    return worst / (scale if scale > 0 else 1.0)


def _flat(outputs: Any, count: int, structure: Structure) -> list[torch.Tensor]:
    if isinstance(outputs, torch.Tensor):
        outputs = [outputs]
    flat = isinstance(outputs, (tuple, list)) and all(isinstance(output, (torch.Tensor, int)) for output in outputs)
    if flat and len(outputs) == count:  # a size of an input is a number
        return [torch.as_tensor(output) for output in outputs]
    try:
        return structure.flatten(outputs, "output")
    except PreconditionError as error:
        raise VerificationError(f"PyTorch and the engine give different structures: {error.problem}") from error
