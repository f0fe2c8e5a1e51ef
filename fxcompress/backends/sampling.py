"""Random inputs that no model chokes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fxcompress.backends.signature import TensorSpec
from fxcompress.backends.tensors import torch_dtype
from fxcompress.errors import PreconditionError

__all__ = ["random_inputs"]


def random_inputs(
    specs: Sequence[TensorSpec], *, batch: int = 1, sizes: Mapping[str, int] | None = None, seed: int = 0
) -> list[torch.Tensor]:
    """One CPU tensor per spec, the same for the same ``seed``.

    Floating-point values are normally distributed. Integers are drawn between the least and the greatest value of
    the example at capture, which keeps indices inside their tables; without an example they are 0. Booleans are
    true, as in a mask that hides nothing. A symbol that leads an input's shape takes ``batch``, any other its size
    in the example, or ``batch`` without one; ``sizes`` overrides both.

    Raises:
        PreconditionError: a size is below 1, or an expression of symbols has no example to take its size from.
    """
    known = dict(sizes or {})
    for spec in specs:
        for axis, size in enumerate(spec.shape):
            if isinstance(size, str) and size.isidentifier() and size not in known and axis == 0:
                known[size] = batch
    for spec in specs:
        for axis, size in enumerate(spec.shape):
            if isinstance(size, str) and size.isidentifier() and size not in known:
                known[size] = spec.example[axis] if spec.example else batch
    wrong = {name: size for name, size in known.items() if size < 1}
    if wrong:
        raise PreconditionError(f"sizes must be at least 1: {wrong}")
    generator = torch.Generator().manual_seed(seed)
    return [_sample(spec, known, generator) for spec in specs]


def _sample(spec: TensorSpec, known: Mapping[str, int], generator: torch.Generator) -> torch.Tensor:
    shape = []
    for axis, size in enumerate(spec.shape):
        if isinstance(size, str) and size not in known and not spec.example:
            raise PreconditionError(
                f"no size is known for {size!r}",
                where=f"input {spec.name!r}",
                remedy=f"hand in inputs, or sizes={{{size!r}: ...}}",
            )
        known_size = known.get(size) if isinstance(size, str) else size
        shape.append(known_size if known_size is not None else (spec.example or ())[axis])
    dtype = torch_dtype(spec.dtype)
    if dtype is torch.bool:
        return torch.ones(shape, dtype=dtype)
    if dtype.is_floating_point or dtype.is_complex:
        drawn = torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype
        return torch.randn(shape, dtype=drawn, generator=generator).to(dtype)
    if spec.low is None or spec.high is None:
        return torch.zeros(shape, dtype=dtype)
    return torch.randint(spec.low, spec.high + 1, shape, generator=generator).to(dtype)
