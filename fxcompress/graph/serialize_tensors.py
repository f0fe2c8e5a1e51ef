"""Parameters and buffers of a saved graph: a table of paths, and one stored tensor per piece of memory.

Tied weights stay tied. A parameter reached by several paths is one entry and its aliases; different parameters in the
same memory (a transposed head) are stored once, and told by offset and strides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from fxcompress.errors import BundleError
from fxcompress.graph.serialize_values import unserializable

__all__ = ["put_tensors", "stored_tensors", "tensor_table"]

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
        *(torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2),
    )
}


def tensor_table(root: nn.Module) -> dict[str, dict[str, Any]]:
    """Every path of a parameter or buffer → where it is stored and what it is, as JSON.

    Raises:
        BundleError: a tensor has no serial form: on the meta device, sparse, a subclass, one storage of two dtypes.
    """
    groups = {id(tensor): group for group in _by_memory(root) for _, tensor in group}
    seen: dict[int, str] = {}
    table: dict[str, dict[str, Any]] = {}
    for path, tensor, owner in _tensors(root):
        name = path.rpartition(".")[2]
        told: dict[str, Any] = {"kind": "parameter" if isinstance(tensor, nn.Parameter) else "buffer"}
        if name in owner._non_persistent_buffers_set:
            told["persistent"] = False
        if id(tensor) in seen:
            told["same_as"] = seen[id(tensor)]
        else:
            seen[id(tensor)] = path
            told |= {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
            told["requires_grad"] = tensor.requires_grad
            told |= _place(tensor, groups[id(tensor)])
        table[path] = told
    return table


def stored_tensors(root: nn.Module) -> dict[str, torch.Tensor]:
    """What to write into ``weights.safetensors``: contiguous tensors, no two in one storage.

    Raises:
        BundleError: as :func:`tensor_table`.
    """
    stored: dict[str, torch.Tensor] = {}
    for group in _by_memory(root):
        path, tensor = group[0]
        if len(group) == 1:
            stored[path] = tensor.detach().contiguous()
        else:
            low, high = _bounds(group)
            whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            stored[path] = whole.set_(tensor.untyped_storage(), low, (high - low,), (1,)).clone()
    return stored


def put_tensors(
    root: nn.Module, table: Mapping[str, Any], stored: Mapping[str, torch.Tensor], device: torch.device
) -> None:
    """Put the tensors that :func:`tensor_table` told of into the modules of ``root``.

    Raises:
        BundleError: a tensor is missing, left over, or of another shape or dtype than told.
    """
    bases: dict[str, torch.Tensor] = {}
    made: dict[str, torch.Tensor] = {}
    for path, told in table.items():
        if "same_as" in told:
            tensor = made[told["same_as"]]
        else:
            tensor = _read(path, told, stored, bases, device)
        made[path] = tensor
        owner, name = _owner(root, path)
        if told["kind"] == "parameter":
            _check_kind(path, name in owner._buffers)
            _check_shape(path, tensor, owner._parameters.get(name))
            setattr(owner, name, tensor)
        else:
            _check_kind(path, name in owner._parameters)
            _check_shape(path, tensor, owner._buffers.get(name))
            owner.register_buffer(name, tensor, persistent=told.get("persistent", True) is True)
    unread = sorted(set(stored) - set(bases))
    if unread:
        raise _wrong(f"the file holds tensors that the graph does not name: {', '.join(unread[:5])}", unread[0])
    for path, tensor, _ in _tensors(root):
        if path not in made:
            raise _wrong(f"the {'parameter' if isinstance(tensor, nn.Parameter) else 'buffer'} is missing", path)


# --- saving ----------------------------------------------------------------------------------------------------


def _tensors(root: nn.Module) -> Iterator[tuple[str, torch.Tensor, nn.Module]]:
    for prefix, module in root.named_modules(remove_duplicate=False):
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None:
                    yield f"{prefix}.{name}".lstrip("."), tensor, module


Group = list[tuple[str, torch.Tensor]]
"""Different tensors whose memory overlaps, each under its first path."""


def _by_memory(root: nn.Module) -> list[Group]:
    """All tensors. What merely lies in one storage (a file that was read as a whole) is not one group."""
    held: Group = []
    seen: set[int] = set()
    for path, tensor, _ in _tensors(root):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            _check_plain(path, tensor)
            held.append((path, tensor))
    spans = []
    for index, (_, tensor) in enumerate(held):
        start = int(tensor.storage_offset()) * tensor.itemsize
        end = start + _extent(tensor.shape, tensor.stride()) * tensor.itemsize
        spans.append((tensor.untyped_storage()._cdata, start, end, index))
    groups: list[list[int]] = []
    storage, reached = None, -1
    for key, start, end, index in sorted(spans):
        if key == storage and start < reached:
            groups[-1].append(index)
        else:
            groups.append([index])
            reached = -1
        storage, reached = key, max(reached, end)
    return [[held[index] for index in sorted(group)] for group in sorted(groups, key=min)]


def _check_plain(path: str, tensor: torch.Tensor) -> None:
    if tensor.device.type == "meta":
        raise unserializable("a tensor is on the meta device and has no values", path, "load the weights first")
    if tensor.layout is not torch.strided or type(tensor) not in (torch.Tensor, nn.Parameter):
        what = type(tensor).__name__ if tensor.layout is torch.strided else str(tensor.layout)
        raise unserializable(f"a tensor is {what}, not a plain dense one", path, "convert it to a dense torch.Tensor")
    if str(tensor.dtype).removeprefix("torch.") not in _DTYPES:
        raise unserializable(f"a tensor is {tensor.dtype}, which has no serial form", path)
    if tensor.is_conj() or tensor.is_neg():
        raise unserializable("a tensor is a lazy conjugate or negative", path, "call resolve_conj() or resolve_neg()")


def _bounds(group: Group) -> tuple[int, int]:
    if len({tensor.dtype for _, tensor in group}) > 1:
        names = ", ".join(path for path, _ in group)
        raise unserializable("tensors of different dtypes lie in the same memory", names, "give each its own memory")
    spans = [(int(tensor.storage_offset()), _extent(tensor.shape, tensor.stride())) for _, tensor in group]
    return min(start for start, _ in spans), max(start + extent for start, extent in spans)


def _extent(shape: Any, stride: Any) -> int:
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def _place(tensor: torch.Tensor, group: Group) -> dict[str, Any]:
    place: dict[str, Any] = {"stored": group[0][0]}
    if len(group) > 1:
        low, high = _bounds(group)
        place |= {"offset": tensor.storage_offset() - low, "stride": list(tensor.stride()), "elements": high - low}
    elif tensor.stride() != torch.empty(tensor.shape, device="meta").stride() and _is_dense(tensor):
        place["stride"] = list(tensor.stride())  # channels_last: the layout decides which kernel runs
    return place


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlaps, in whatever order of dims."""
    expected = 1
    for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


# --- loading ---------------------------------------------------------------------------------------------------


def _read(
    path: str,
    told: Mapping[str, Any],
    stored: Mapping[str, torch.Tensor],
    bases: dict[str, torch.Tensor],
    device: torch.device,
) -> torch.Tensor:
    key = told["stored"]
    if key not in stored:
        raise _wrong("the tensor is missing from the file of weights", path)
    dtype, shape, stride = _DTYPES.get(told["dtype"]), tuple(map(int, told["shape"])), told.get("stride")
    if key not in bases:
        bases[key] = stored[key].to(device)
    base = bases[key]
    if base.dtype != dtype:
        raise _wrong(f"the stored tensor is {base.dtype}, the graph asks for {told['dtype']}", path)
    if "offset" in told:
        offset, elements = int(told["offset"]), int(told["elements"])
        steps = tuple(map(int, stride or ()))
        inside = len(steps) == len(shape) and min((0, offset, *steps, *shape)) >= 0
        if base.shape != (elements,) or not inside or offset + _extent(shape, steps) > elements:
            raise _wrong("the tensor reaches outside of what is stored", path)
        tensor = base.as_strided(shape, steps, offset)
    else:
        if base.shape != shape:
            raise _wrong(f"the stored tensor is {list(base.shape)}, the graph asks for {list(shape)}", path)
        tensor = base
        if stride is not None:
            tensor = torch.empty_strided(shape, tuple(map(int, stride)), dtype=dtype, device=device)
            if not _is_dense(tensor):
                raise _wrong(f"strides {stride} do not fit the shape {list(shape)}", path)
            tensor.copy_(base)
    grad = told["requires_grad"] is True
    return nn.Parameter(tensor, requires_grad=grad) if told["kind"] == "parameter" else tensor


def _owner(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return root.get_submodule(parent), name


def _check_kind(path: str, other: bool) -> None:
    if other:
        raise _wrong("a parameter stands where a buffer should, or the other way round", path)


def _check_shape(path: str, tensor: torch.Tensor, expected: torch.Tensor | None) -> None:
    if expected is not None and expected.shape != tensor.shape:
        raise _wrong(f"the layer asks for the shape {list(expected.shape)}, the graph for {list(tensor.shape)}", path)


def _wrong(problem: str, path: str) -> BundleError:
    return BundleError(
        f"the saved weights do not fit the graph: {problem}",
        where=path,
        remedy="use the graph and the weights of one and the same save",
    )
