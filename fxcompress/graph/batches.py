"""Batches of data as calls of a graph: which of a batch is input, and what is left over (labels, as a rule)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxcompress.errors import OptionError, PreconditionError
from fxcompress.graph.info import info
from fxcompress.graph.running import flat_inputs

__all__ = ["Batch", "as_batch", "batches", "check_limit", "first_samples", "usable_device"]


@dataclass(frozen=True)
class Batch:
    """One batch, taken apart.

    Attributes:
        leaves: flat inputs of the graph, in placeholder order.
        rest: what the batch holds beside them: labels, weights.
        whole: the batch as it came.
    """

    leaves: list[Any]
    rest: tuple[Any, ...]
    whole: Any

    @property
    def size(self) -> int:
        """Samples: the first dimension of the first tensor."""
        return next((len(leaf) for leaf in self.leaves if isinstance(leaf, torch.Tensor) and leaf.dim()), 1)


def batches(
    graph_module: fx.GraphModule,
    data: Iterable[Any],
    *,
    limit: int | None = None,
    device: torch.device | str | None = None,
) -> Iterator[Batch]:
    """The batches of ``data`` as calls of the graph.

    A tensor is the only argument. A dict gives arguments by name, a tuple or list by position; what the model does
    not take is the rest: ``(images, labels)`` from a ``DataLoader`` is one input and one label. ``(arguments,
    labels)`` works too, where ``arguments`` is itself a dict, tuple or list.

    Args:
        graph_module: a captured graph.
        data: any iterable; a generator can be read only once.
        limit: most batches to take.
        device: where inputs and rest are moved; None leaves them.

    Raises:
        PreconditionError: there is no batch, or one does not fit; names it.
    """
    count = 0
    for number, given in enumerate(_iterate(data)):
        if limit is not None and number >= limit:
            break
        count += 1
        yield as_batch(graph_module, given, f"batch {number} of the data", device=device)
    if not count:
        raise PreconditionError(
            "the data holds no batch",
            where="calibration data",
            remedy="give a list or a DataLoader; a generator that was read once is empty",
        )


def first_samples(graph_module: fx.GraphModule, batch: Batch, count: int) -> Batch:
    """The first samples of a batch; all of it where the graph takes no other size. What it holds beside is left out."""
    symbols = [_first_size(node) for node in graph_module.graph.find_nodes(op="placeholder")]
    symbol = next((size for size in symbols if size is not None), None)
    if not isinstance(symbol, torch.SymInt) or count >= batch.size:
        return batch
    cut = [str(size) == str(symbol) for size in symbols]
    leaves = [leaf[:count] if is_cut else leaf for leaf, is_cut in zip(batch.leaves, cut, strict=True)]
    return Batch(leaves, (), None)


def _first_size(placeholder: fx.Node) -> Any:
    value = placeholder.meta.get("val")
    return value.shape[0] if isinstance(value, torch.Tensor) and value.dim() else None


def check_limit(limit: int | None) -> None:
    """The option ``batches`` of a pass: most batches to read, or None.

    Raises:
        OptionError: it is below 1.
    """
    if limit is not None and limit < 1:
        raise OptionError(f"batches={limit} is below 1", where="batches", remedy="None reads all")


def as_batch(
    graph_module: fx.GraphModule, given: Any, where: str = "batch", *, device: torch.device | str | None = None
) -> Batch:
    """One batch as a call of the graph; forms and ``device`` as in :func:`batches`.

    Raises:
        PreconditionError: it does not fit; says so at ``where``.
    """
    if device is not None:
        given = pytree.tree_map_only(torch.Tensor, lambda leaf: leaf.to(device), given)
    args, kwargs, rest = _parted(graph_module, given, where)
    try:
        leaves = flat_inputs(graph_module, args, kwargs)
    except PreconditionError as error:
        raise PreconditionError(error.problem, where=where, remedy=error.remedy) from error
    _check(graph_module, leaves, where)
    return Batch(leaves, rest, given)


def _iterate(data: Iterable[Any]) -> Iterator[Any]:
    if isinstance(data, (torch.Tensor, Mapping, str)):
        raise PreconditionError(
            f"the data is a {type(data).__name__}, not a series of batches", remedy="give a list of batches: [batch]"
        )
    try:
        return iter(data)
    except TypeError:
        raise PreconditionError(
            f"the data is a {type(data).__name__}, which cannot be iterated over",
            remedy="give a list of batches or a DataLoader",
        ) from None


def _parted(graph_module: fx.GraphModule, given: Any, where: str) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Positional and keyword arguments of the model, and the rest."""
    names = info(graph_module).parameter_names
    if isinstance(given, torch.Tensor):
        return (given,), {}, ()
    if isinstance(given, Mapping):
        if any(name in given for name in names):
            kwargs = {name: given[name] for name in names if name in given}
            return (), kwargs, tuple(value for key, value in given.items() if key not in kwargs)
        spec = info(graph_module).in_spec.child(0)
        if len(names) == 1 and spec.num_children == 1 and spec.child(0).type is dict:
            return (given,), {}, ()
    if isinstance(given, (tuple, list)):
        first = given[0] if given else None
        nested = isinstance(first, Mapping) and any(name in first for name in names)
        spread = isinstance(first, (tuple, list)) and len(first) == len(names) > 1
        if nested or (spread and len(given) <= 2):
            args, kwargs, rest = _parted(graph_module, first, where)
            return args, kwargs, (*rest, *given[1:])
        if len(given) >= len(names):
            return tuple(given[: len(names)]), {}, tuple(given[len(names) :])
    raise PreconditionError(
        f"a {type(given).__name__} gives no inputs for a model that takes {', '.join(names)}",
        where=where,
        remedy="give a tuple of the arguments, a dict with their names, or those and labels",
    )


def _check(graph_module: fx.GraphModule, leaves: list[Any], where: str) -> None:
    for node, leaf in zip(graph_module.graph.find_nodes(op="placeholder"), leaves, strict=True):
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            continue
        fits = isinstance(leaf, torch.Tensor) and leaf.dim() == value.dim() and leaf.dtype == value.dtype
        if fits:
            pairs = zip(leaf.shape, value.shape, strict=True)
            fits = all(isinstance(size, torch.SymInt) or int(size) == given for given, size in pairs)
        if not fits:
            got = f"{leaf.dtype} {list(leaf.shape)}" if isinstance(leaf, torch.Tensor) else type(leaf).__name__
            raise PreconditionError(
                f"the input {node.target!r} is {got}; the model was captured with {value.dtype} {list(value.shape)}",
                where=where,
                remedy="give data like the example inputs",
            )


def usable_device(device: torch.device | str) -> torch.device:
    """The device, once a tensor was put there.

    Raises:
        OptionError: there is no such device, or this PyTorch cannot use it.
    """
    try:
        return torch.empty(0, device=device).device
    except (AssertionError, RuntimeError) as error:  # a build without CUDA asserts
        raise OptionError(
            f"the device {str(device)!r} cannot be used here: {str(error).splitlines()[0]}",
            where="device",
            remedy="leave it out to stay where the weights are, or install a PyTorch that has it",
        ) from error
