"""Tensors at an engine's door: checked against a spec and handed over without a copy where that is possible.

An engine works on numpy arrays or on torch tensors, as its library does; callers bring either. A dtype that numpy
lacks (bfloat16, float8) always travels as a torch tensor inside; to a caller who brought numpy it is given as an
array of the ``ml_dtypes`` package (a dependency of ``onnx``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from fxcompress.backends.signature import TensorSpec, dtype_name
from fxcompress.errors import PreconditionError

__all__ = ["Array", "Native", "numpy_dtype", "reader", "to_numpy", "to_torch", "torch_dtype"]

Array: TypeAlias = np.ndarray | torch.Tensor
Native: TypeAlias = Literal["numpy", "torch"]

_FROM_ANOTHER_PACKAGE = 2  # numpy.dtype.isbuiltin of ml_dtypes' bfloat16 and float8


def torch_dtype(name: str) -> torch.dtype:
    """``torch.float32`` of ``"float32"``.

    Raises:
        PreconditionError: torch has no such dtype.
    """
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise PreconditionError(f"{name!r} is no dtype of torch")
    return found


def numpy_dtype(name: str) -> np.dtype[Any] | None:
    """The dtype of numpy itself called ``name``; None for bfloat16 and the float8 types."""
    try:
        return np.dtype(name) if name != "bfloat16" and not name.startswith("float8") else None
    except TypeError:
        return None


@cache
def _numpy_has(dtype: torch.dtype) -> bool:
    return numpy_dtype(dtype_name(dtype)) is not None


def reader(spec: TensorSpec, native: Native) -> Callable[[Any], Array]:
    """A function that checks one input against ``spec`` and gives it in the engine's form.

    numpy arrays and CPU tensors share memory with what is given. Symbolic sizes are not compared here.

    Raises (the function):
        PreconditionError: neither tensor nor array, or another dtype, rank or static size.
    """
    expected_torch = torch_dtype(spec.dtype)
    expected_numpy = numpy_dtype(spec.dtype)
    rank = len(spec.shape)
    static = tuple((axis, size) for axis, size in enumerate(spec.shape) if isinstance(size, int))
    stays_torch = native == "torch" or expected_numpy is None

    def read(value: Any) -> Array:
        is_array = isinstance(value, np.ndarray)
        if is_array:
            found = value.dtype
            right = found is expected_numpy or (found == expected_numpy if expected_numpy else found.name == spec.dtype)
        elif isinstance(value, torch.Tensor):
            right = value.dtype is expected_torch
        else:
            raise _wrong(spec, f"a {type(value).__name__}", "hand in a torch tensor or a numpy array")
        shape = value.shape
        if not right:
            raise _wrong(spec, _told(value), f"convert it: {_conversion(value, spec.dtype)}")
        if len(shape) != rank:
            raise _wrong(spec, _told(value), f"it needs {rank} dimensions, this has {len(shape)}")
        for axis, size in static:
            if shape[axis] != size:
                raise _wrong(spec, _told(value), f"dimension {axis} is fixed at {size}")
        if is_array:
            return _tensor(value) if stays_torch else value
        if stays_torch:
            return value.detach() if value.requires_grad else value
        try:
            return value.numpy()
        except (RuntimeError, TypeError):  # it requires a gradient, or lies on another device
            return value.numpy(force=True)

    return read


def to_torch(value: Array) -> torch.Tensor:
    """``value`` as a tensor, sharing memory where it can."""
    return _tensor(value) if isinstance(value, np.ndarray) else value


def to_numpy(value: Array) -> np.ndarray:
    """``value`` as an array on the CPU; bfloat16 and float8 become arrays of ``ml_dtypes``."""
    if isinstance(value, np.ndarray):
        return value
    if _numpy_has(value.dtype):
        array: np.ndarray = value.numpy(force=True)
        return array
    import ml_dtypes

    bits = torch.int16 if value.element_size() == 2 else torch.uint8
    return value.detach().cpu().contiguous().view(bits).numpy().view(getattr(ml_dtypes, dtype_name(value.dtype)))


def _tensor(array: np.ndarray) -> torch.Tensor:
    if array.dtype.isbuiltin == _FROM_ANOTHER_PACKAGE:
        bits = np.ascontiguousarray(array).view(np.int16 if array.dtype.itemsize == 2 else np.uint8)
        return _tensor(bits).view(torch_dtype(array.dtype.name))
    flags = array.flags
    if not (flags.writeable and (flags.c_contiguous or min(array.strides) >= 0)):
        array = array.copy()  # torch knows neither read-only memory nor backward strides
    return torch.from_numpy(array)


def _told(value: Array) -> str:
    dtype = dtype_name(value.dtype) if isinstance(value, torch.Tensor) else value.dtype.name
    return f"{dtype}[{', '.join(map(str, value.shape))}]"


def _conversion(value: Array, dtype: str) -> str:
    if isinstance(value, torch.Tensor):
        return f"tensor.to(torch.{dtype})"
    return f"array.astype(np.{dtype})" if numpy_dtype(dtype) is not None else f"array.astype(ml_dtypes.{dtype})"


def _wrong(spec: TensorSpec, given: str, remedy: str) -> PreconditionError:
    expected = f"{spec.dtype}[{', '.join(map(str, spec.shape))}]"
    return PreconditionError(f"expected {expected}, given {given}", where=f"input {spec.name!r}", remedy=remedy)
