"""Attributes, indexing, and the methods of tensors that are not simply the ATen operation of their name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxcompress.capture.facts import DtypeOf, Sizes, Unknown
from fxcompress.capture.traced_graph import TracedGraph

__all__ = ["METHODS", "attribute", "getitem"]

aten = torch.ops.aten


def attribute(n: TracedGraph, value: Any, name: str) -> Any:
    """``value.name``.

    Raises:
        Unknown: the attribute is not known without running.
    """
    if isinstance(value, tuple):  # values and indices of torch.max
        return getattr(value, name)
    if not n.is_tensor(value):
        raise Unknown(f"the attribute {name!r} is not known")
    if name == "shape":
        return Sizes(value)
    if name == "dtype":
        return DtypeOf(value)
    if name == "device":
        return n.device
    if name in ("is_cuda", "is_cpu"):
        return n.device.type == name.removeprefix("is_")
    if name == "ndim":
        return _rank(n, value)
    if name == "data":
        return _detach(n, value)
    if name in ("T", "mT"):
        return n.call("numpy_T" if name == "T" else name, value)
    raise Unknown(f"the attribute {name!r} of a tensor is not known")


# --- indexing --------------------------------------------------------------------------------------------------


def getitem(n: TracedGraph, value: Any, index: Any) -> Any:
    """``value[index]``.

    Raises:
        Unknown: the index depends on the number of dims.
    """
    if isinstance(value, Sizes):
        return _sizes(n, value, index)
    if isinstance(value, (tuple, list, dict)):
        return value[index]
    if not isinstance(value, fx.Node):
        raise Unknown(f"{value!r} has no parts")
    if not n.is_tensor(value):
        if isinstance(index, int):
            return n.item(value, index)
        raise Unknown("the number of pieces of a tensor is not known")
    return _index(n, value, index if isinstance(index, tuple) else (index,))


def _sizes(n: TracedGraph, sizes: Sizes, index: Any) -> Any:
    tensor, start = sizes.tensor, sizes.start
    if isinstance(index, int):
        return n.size(tensor, index + start if index >= 0 else index)
    if isinstance(index, slice) and index.step in (None, 1):
        first, last = index.start or 0, index.stop
        if first >= 0 and last is None:
            return Sizes(tensor, start + first)
        if (first >= 0) == ((last or -1) >= 0):
            return [n.size(tensor, dim if dim < 0 else dim + start) for dim in range(first, last or 0)]
    raise Unknown("this part of a tensor's shape is not known")


def _index(n: TracedGraph, tensor: fx.Node, parts: tuple[Any, ...]) -> fx.Node:
    dots = [position for position, part in enumerate(parts) if part is Ellipsis]
    if len(dots) > 1 or any(isinstance(part, (list, bool)) for part in parts):
        raise Unknown("an index of this kind has no ATen operation")
    gathered: list[fx.Node | None] = []
    before, after = (parts[: dots[0]], parts[dots[0] + 1 :]) if dots else (parts, ())
    dim = 0
    for part in before:
        tensor, dim = _step(n, tensor, part, dim, gathered)
    # After the dots dims are counted from the end; the last index first, so that the counts stay right.
    dim = -1
    for part in reversed(after):
        if part is None or (isinstance(part, fx.Node) and n.is_tensor(part)):
            raise Unknown("an index of this kind after '...' has no ATen operation")
        kept = isinstance(part, slice)
        tensor, _ = _step(n, tensor, part, dim, gathered)
        dim -= 1 if kept else 0
    if any(part is not None for part in gathered):
        tensor = n.call("index", tensor, gathered)
    return tensor


def _step(n: TracedGraph, tensor: fx.Node, part: Any, dim: int, gathered: list[Any]) -> tuple[fx.Node, int]:
    """One part of an index applied at ``dim``; returns the tensor and the dim of the next part."""
    if part is None:
        gathered.append(None)
        return n.call("unsqueeze", tensor, dim), dim + 1
    if isinstance(part, slice):
        gathered.append(None)
        start, stop, step = part.start, part.stop, part.step
        if start in (None, 0) and stop is None and step in (None, 1):
            return tensor, dim + 1
        bounds = (0 if start is None else start, torch.iinfo(torch.int64).max if stop is None else stop)
        return n.emit(aten.slice.Tensor, (tensor, dim, *bounds, *([] if step is None else [step]))), dim + 1
    if n.is_tensor(part):
        gathered.append(part)
        return tensor, dim + 1
    if any(item is not None for item in gathered):
        raise Unknown("an index of numbers and tensors has no single ATen operation")
    return n.emit(aten.select.int, (tensor, dim, part)), dim


# --- methods ---------------------------------------------------------------------------------------------------


def _detach(n: TracedGraph, tensor: fx.Node) -> fx.Node:
    return n.call("detach", tensor) if n.is_trained(tensor) else tensor


def _rank(n: TracedGraph, tensor: fx.Node) -> int:
    if tensor not in n.ranks:
        raise Unknown("the number of dims of a tensor is not known")
    return n.ranks[tensor]


def _size(n: TracedGraph, tensor: fx.Node, dim: int | None = None) -> Any:
    return Sizes(tensor) if dim is None else n.size(tensor, dim)


def _shaped(name: str) -> Callable[..., Any]:
    """``reshape``, ``expand``: sizes one by one, as a list, or the whole shape of another tensor."""

    def method(n: TracedGraph, tensor: fx.Node, *sizes: Any, **named: Any) -> Any:
        given = sizes[0] if len(sizes) == 1 else sizes
        if isinstance(given, Sizes) and given.start == 0:
            return n.call(f"{name}_as", tensor, given.tensor)
        return n.call(name, tensor, *sizes, **named)

    return method


_RESHAPE = _shaped("reshape")


def _view(n: TracedGraph, tensor: fx.Node, *sizes: Any, **named: Any) -> Any:
    """Of a shape, which any layout takes as ``reshape``; or of the same bits as another dtype."""
    dtype = sizes[0] if sizes else named.get("dtype")
    if isinstance(dtype, torch.dtype):
        return n.call("view", tensor, dtype)
    return _RESHAPE(n, tensor, *(named.values() or sizes))


def _split(n: TracedGraph, tensor: fx.Node, split_size: Any, dim: int = 0) -> Any:
    if isinstance(split_size, (list, tuple)):
        return n.emit(aten.split_with_sizes.default, (tensor, list(split_size), dim))
    return n.emit(aten.split.Tensor, (tensor, split_size, dim))


def _cast(dtype: torch.dtype) -> Callable[..., Any]:
    return lambda n, tensor: n.emit(aten.to.dtype, (tensor, dtype))


def _to(n: TracedGraph, tensor: fx.Node, *args: Any, **kwargs: Any) -> Any:
    wanted = [*args, *kwargs.values()]
    devices = [item for item in wanted if isinstance(item, (str, torch.device))]
    if any(torch.device(device).type != n.device.type for device in devices):
        raise Unknown("a move between devices cannot be followed")
    for item in wanted:
        if isinstance(item, DtypeOf):
            return n.call("type_as", tensor, item.tensor)
        if n.is_tensor(item):
            return n.emit(aten.to.other, (tensor, item))
        if isinstance(item, torch.dtype):
            return n.emit(aten.to.dtype, (tensor, item))
    if all(item in devices or isinstance(item, (bool, torch.memory_format)) for item in wanted):
        return tensor
    raise Unknown("this conversion has no ATen operation")


def _norm(
    n: TracedGraph, tensor: fx.Node, p: Any = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> Any:
    if isinstance(p, str) or dtype is not None:
        raise Unknown(f"a norm of the kind {p!r} has no ATen operation here")
    dims = [dim] if isinstance(dim, int) else dim
    return n.call("linalg_vector_norm", tensor, p, dims, keepdim)


def _spread(name: str) -> Callable[..., Any]:
    """``std`` and ``var``."""

    def method(
        n: TracedGraph, tensor: fx.Node, dim: Any = None, unbiased: bool = True, keepdim: bool = False, **rest: Any
    ) -> Any:
        if rest:
            return n.call(name, tensor, dim, keepdim=keepdim, **rest)
        if isinstance(dim, bool):
            dim, unbiased = None, dim
        if dim is None:
            return n.call(name, tensor, unbiased)
        return n.call(name, tensor, [dim] if isinstance(dim, int) else list(dim), unbiased, keepdim)

    return method


def _unknown(what: str) -> Callable[..., Any]:
    def method(n: TracedGraph, *args: Any, **kwargs: Any) -> Any:
        raise Unknown(f"{what} is not known")

    return method


METHODS: dict[str, Callable[..., Any]] = {
    "size": _size,
    "detach": _detach,
    "dim": _rank,
    "ndimension": _rank,
    "view": _view,
    "reshape": _shaped("reshape"),
    "expand": _shaped("expand"),
    "split": _split,
    "to": _to,
    "type": _to,
    "float": _cast(torch.float32),
    "half": _cast(torch.float16),
    "double": _cast(torch.float64),
    "bfloat16": _cast(torch.bfloat16),
    "int": _cast(torch.int32),
    "long": _cast(torch.int64),
    "bool": _cast(torch.bool),
    "norm": _norm,
    "std": _spread("std"),
    "var": _spread("var"),
    "item": _unknown("the value of a tensor"),
    "tolist": _unknown("the value of a tensor"),
    "numpy": _unknown("the value of a tensor"),
    "numel": _unknown("the number of elements of a tensor"),
    "get_device": _unknown("the device of a tensor"),
    "is_floating_point": _unknown("the dtype of a tensor"),
    "cuda": _unknown("what a move between devices does"),
    "cpu": lambda n, tensor: _to(n, tensor, "cpu"),
}
