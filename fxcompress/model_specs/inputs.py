"""Example inputs from text: ``2x3x224x224``, ``input_ids=2x16:int64``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxcompress.capture.inputs import ExampleInputs
from fxcompress.errors import OptionError, nearest

__all__ = ["INPUT_FORM", "parse_inputs", "sample", "with_batch"]

INPUT_FORM = "[NAME=]SHAPE[:DTYPE]"
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}


def parse_inputs(specs: Sequence[str]) -> ExampleInputs:
    """Inputs of the shapes that ``specs`` tell: by position without a name, by keyword with one.

    Raises:
        OptionError: a spec is malformed, a name comes twice, or a position follows a keyword.
    """
    args: list[torch.Tensor] = []
    kwargs: dict[str, torch.Tensor] = {}
    for spec in specs:
        name, shape, dtype = _parse(spec)
        if name is None:
            if kwargs:
                raise OptionError(
                    f"the input {spec!r} has no name, but follows one that has",
                    where="--input",
                    remedy="name all inputs, or put those without a name first",
                )
            args.append(sample(shape, dtype))
        elif name in kwargs:
            raise OptionError(f"the input {name!r} is given twice", where="--input", remedy="give each input once")
        else:
            kwargs[name] = sample(shape, dtype, mask="mask" in name)
    return ExampleInputs(tuple(args), kwargs)


def sample(shape: Sequence[int], dtype: torch.dtype = torch.float32, *, mask: bool = False, below: int = 2) -> Any:
    """A tensor that no model chokes on, the same in every run.

    Floating-point values are normally distributed; integers lie in ``[0, below)``, which any table of two rows
    takes; booleans, and integers that are a mask, hide nothing.
    """
    generator = torch.Generator().manual_seed(0)
    if dtype.is_floating_point:
        return torch.randn(*shape, generator=generator).to(dtype)
    if mask or dtype is torch.bool:
        return torch.ones(*shape, dtype=dtype)
    return torch.randint(0, below, tuple(shape), generator=generator).to(dtype)


def with_batch(inputs: ExampleInputs, batch: int) -> ExampleInputs:
    """The inputs with their samples repeated, or left out, until there are ``batch`` of them."""
    sizes = [leaf.shape[0] for leaf in inputs.leaves if isinstance(leaf, torch.Tensor) and leaf.dim() > 0]

    def resize(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and leaf.shape[0] == sizes[0]:
            return leaf[torch.arange(batch) % leaf.shape[0]]
        return leaf

    args, kwargs = pytree.tree_map(resize, (inputs.args, inputs.kwargs))
    return ExampleInputs(args, kwargs)


def _parse(spec: str) -> tuple[str | None, list[int], torch.dtype]:
    found = re.fullmatch(r"(?:(?P<name>[^=:]+)=)?(?P<shape>\d+(?:[x,]\d+)*)(?::(?P<dtype>\w+))?", spec.strip())
    if found is None:
        raise OptionError(
            f"the input {spec!r} cannot be read",
            where="--input",
            remedy=f"write {INPUT_FORM}, such as 1x3x224x224, x=2x3x32x32 or input_ids=2x16:int64",
        )
    name, told = found["name"], found["dtype"] or "float32"
    if name is not None and not name.isidentifier():
        raise OptionError(f"{name!r} is no name of an argument", where=f"--input {spec}")
    if told not in _DTYPES:
        raise OptionError(f"there is no dtype {told!r}", where=f"--input {spec}", remedy=nearest(told, _DTYPES))
    shape = [int(size) for size in re.split("[x,]", found["shape"])]
    if 0 in shape:
        raise OptionError("a size is 0", where=f"--input {spec}", remedy="give at least 1 for every size")
    return name, shape, _DTYPES[told]
