"""Which dims of the inputs are dynamic: from what the user asks for to what ``torch.export`` takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.export import Dim
from torch.utils import _pytree as pytree

from fxcompress.capture.inputs import ExampleInputs
from fxcompress.errors import OptionError

__all__ = ["Marks", "at_least_two", "attempts", "export_shapes", "marks_of"]

Mark = dict[int, Any] | None
Marks = list[Mark]
"""Per leaf of the inputs, its dynamic dims: a name, a ``torch.export.Dim``, or True for one without a name."""


def marks_of(inputs: ExampleInputs, wanted: object, names: Sequence[str]) -> Marks:
    """What the user asks for, per leaf.

    ``"batch"`` makes dim 0 of every tensor dynamic whose dim 0 is as long as the first tensor's; None makes all
    static; a dict or tuple is per argument, ``{"x": {0: "batch", 2: "height"}}``, where equal names are equal sizes.
    ``torch.export.Dim`` objects pass through.

    Raises:
        OptionError: an argument or dim does not exist, or the form is another.
    """
    leaves = inputs.leaves
    if wanted is None:
        return [None] * len(leaves)
    if wanted == "batch":
        sized = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim() > 0]
        same = [leaf for leaf in sized if leaf.shape[0] == sized[0].shape[0]]
        return [{0: True} if any(leaf is other for other in same) else None for leaf in leaves]
    values = [*inputs.args, *inputs.kwargs.values()]
    if isinstance(wanted, Mapping):
        unknown = set(wanted) - set(names)
        if unknown:
            raise OptionError(
                f"dynamic_shapes names {', '.join(sorted(map(repr, unknown)))}, which is no argument of the call",
                where="dynamic_shapes",
                remedy=f"the arguments are {', '.join(names)}",
            )
        given = [wanted.get(name) for name in names]
    elif isinstance(wanted, (tuple, list)):
        given = list(wanted)
        if len(given) != len(names):
            raise OptionError(
                f"dynamic_shapes has {len(given)} entries for {len(names)} arguments",
                where="dynamic_shapes",
                remedy=f"give one per argument: {', '.join(names)}",
            )
    else:
        raise OptionError(
            f"dynamic_shapes={wanted!r} is not known",
            where="dynamic_shapes",
            remedy="use 'batch', None, or a dict such as {'x': {0: 'batch', 2: 'height'}}",
        )
    return [
        mark for name, value, asked in zip(names, values, given, strict=True) for mark in _marks(asked, value, name)
    ]


def _marks(asked: Any, value: Any, where: str) -> Iterator[Mark]:
    spec = pytree.tree_structure(value)
    if asked is None:
        yield from [None] * spec.num_leaves
    elif spec.is_leaf():
        yield _mark(asked, value, where)
    else:
        parts = pytree.SUPPORTED_NODES[pytree._get_node_type(value)].flatten_fn(value)[0]
        keys = list(value) if isinstance(value, Mapping) else None
        if isinstance(asked, Mapping) and keys is not None:
            asked = [asked.get(key) for key in keys]
        if not isinstance(asked, (tuple, list)) or len(asked) != len(parts):
            raise OptionError(
                f"dynamic_shapes[{where!r}] does not fit an argument of {len(parts)} parts",
                where="dynamic_shapes",
                remedy="nest it as the argument is nested; None stands for a part of fixed size",
            )
        for index, (part, inner) in enumerate(zip(parts, asked, strict=True)):
            yield from _marks(inner, part, f"{where}[{index if keys is None else keys[index]!r}]")


def _mark(asked: Any, value: Any, where: str) -> Mark:
    dims = dict(enumerate(asked)) if isinstance(asked, (tuple, list)) else asked
    rank = value.dim() if isinstance(value, torch.Tensor) else 0
    if not isinstance(dims, Mapping) or not all(type(dim) is int and -rank <= dim < rank for dim in dims):
        raise OptionError(
            f"dynamic_shapes[{where!r}] is {asked!r} for an argument of {rank} dims",
            where="dynamic_shapes",
            remedy="give the dynamic dims of a tensor with their names: {0: 'batch', 2: 'height'}",
        )
    return {dim % rank: mark for dim, mark in dims.items() if mark is not None and mark is not False} or None


def attempts(marks: Marks, wanted: object) -> list[Marks]:
    """What to try in turn, strictest first, as ``torch.export`` takes it.

    A batch that several inputs merely share by length may be fixed for some of them. Dims of one name are equal; if
    the model puts bounds on such a dim, torch wants them said with the name, and takes the dims as nameless instead.
    """
    uses = Counter(name for mark in marks for name in (mark or {}).values() if isinstance(name, str))

    def export(mark: Any) -> Any:
        if isinstance(mark, str):
            return Dim(mark) if uses[mark] > 1 and mark.isidentifier() else Dim.DYNAMIC
        return Dim.DYNAMIC if mark is True else mark

    def relaxed(mark: Any) -> Any:
        return Dim.AUTO if wanted == "batch" else Dim.DYNAMIC if isinstance(mark, str) else mark

    strict = [{dim: export(mark) for dim, mark in dims.items()} if dims else None for dims in marks]
    again = [{dim: relaxed(mark) for dim, mark in dims.items()} if dims else None for dims in marks]
    shared = sum(map(bool, marks)) > 1 if wanted == "batch" else any(count > 1 for count in uses.values())
    return [strict, again] if shared else [strict]


def export_shapes(inputs: ExampleInputs, marks: Marks) -> tuple[Any, Any]:
    """``marks`` nested as the inputs are: a tuple for positional and a dict for keyword arguments.

    ``torch.export`` takes the parts of a container that is not Python's own as a list.
    """
    rest = iter(marks)

    def nest(spec: pytree.TreeSpec) -> Any:
        if spec.is_leaf():
            return next(rest)
        children = [nest(child) for child in spec.children()]
        if spec.type not in pytree.BUILTIN_TYPES:
            return children
        return pytree.SUPPORTED_NODES[spec.type].unflatten_fn(children, spec.context)

    args, kwargs = nest(pytree.tree_structure((inputs.args, inputs.kwargs)))
    return args, kwargs


def at_least_two(inputs: ExampleInputs, marks: Marks) -> ExampleInputs:
    """Inputs whose dynamic dims are ≥ 2 long: ``torch.export`` takes a size of 1 for a constant."""
    leaves, tree = pytree.tree_flatten((inputs.args, inputs.kwargs))
    for index, mark in enumerate(marks):
        for dim in mark or ():
            if leaves[index].shape[dim] == 1:
                leaves[index] = torch.cat([leaves[index]] * 2, dim)
    args, kwargs = pytree.tree_unflatten(leaves, tree)
    return ExampleInputs(args, kwargs)
