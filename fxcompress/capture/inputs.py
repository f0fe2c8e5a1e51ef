"""Example inputs and dynamic dims, checked and brought to the form that ``torch.export`` takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from fxcompress.errors import OptionError, PreconditionError

__all__ = ["ExampleInputs", "dynamic_spec", "example_inputs"]


@dataclass(frozen=True)
class ExampleInputs:
    """One call of the user's model: positional and keyword arguments, any nesting of tensors."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def leaves(self) -> list[Any]:
        """All leaves in pytree order, tensors and constants alike."""
        return pytree.tree_leaves((self.args, self.kwargs))


def example_inputs(given: object) -> ExampleInputs:
    """A tuple or list is positional arguments, a mapping keyword arguments, a tensor the only argument.

    Raises:
        PreconditionError: neither of those, or no tensor in it.
    """
    if isinstance(given, ExampleInputs):
        return given
    if isinstance(given, torch.Tensor):
        inputs = ExampleInputs((given,), {})
    elif isinstance(given, Mapping):
        inputs = ExampleInputs((), {str(key): value for key, value in given.items()})
    elif isinstance(given, (tuple, list)):
        inputs = ExampleInputs(tuple(given), {})
    else:
        raise PreconditionError(
            f"example_inputs is a {type(given).__name__}",
            remedy="give a tuple of positional arguments, or a dict of keyword arguments",
        )
    if not any(isinstance(leaf, torch.Tensor) for leaf in inputs.leaves):
        raise PreconditionError(
            "example_inputs holds no tensor", remedy="give at least one tensor, such as (torch.randn(2, 3, 224, 224),)"
        )
    return inputs


def bind(model: nn.Module, inputs: ExampleInputs) -> list[str]:
    """The names of ``forward``'s parameters that ``inputs`` fill, in call order.

    Raises:
        PreconditionError: the model does not take these arguments.
    """
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*inputs.args, **inputs.kwargs)
    except TypeError as error:
        raise PreconditionError(
            f"the model's forward{signature} does not take these example inputs: {error}",
            where="example_inputs",
            remedy="give a tuple with one entry per positional argument, or a dict of keyword arguments",
        ) from error
    names: list[str] = []
    for name in bound.arguments:
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            names += [f"{name}_{index}" for index in range(len(bound.arguments[name]))]
        elif kind is inspect.Parameter.VAR_KEYWORD:
            names += list(bound.arguments[name])
        else:
            names.append(name)
    return names


def dynamic_spec(inputs: ExampleInputs, wanted: object, names: Sequence[str]) -> tuple[Any, dict[str, str]]:
    """``dynamic_shapes`` for ``torch.export`` and the readable names of dims, from what the user asked for.

    ``"batch"`` makes dim 0 of every tensor dynamic whose dim 0 is as long as the first tensor's; ``None`` makes
    all static; a dict or tuple is per argument, ``{"x": {0: "batch", 2: "height"}}``, where equal names are equal
    sizes. ``torch.export.Dim`` objects pass through.

    Returns:
        A pytree like ``(args, kwargs)`` with ``{dim: Dim}`` or None at the leaves, and nothing else.
    """
    if wanted is None:
        return pytree.tree_map(lambda _: None, (inputs.args, inputs.kwargs)), {}
    if wanted == "batch":
        first = next(leaf for leaf in inputs.leaves if isinstance(leaf, torch.Tensor) and leaf.dim() > 0)
        size = first.shape[0]

        def batch(leaf: Any) -> dict[int, Any] | None:
            if isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and leaf.shape[0] == size:
                return {0: Dim.DYNAMIC}
            return None

        return pytree.tree_map(batch, (inputs.args, inputs.kwargs)), {}
    if isinstance(wanted, str):
        raise OptionError(
            f"dynamic_shapes={wanted!r} is not known",
            remedy="use 'batch', None, or a dict such as {'x': {0: 'batch', 2: 'height'}}",
        )
    return _from_user(inputs, wanted, names), {}


def _from_user(inputs: ExampleInputs, wanted: object, names: Sequence[str]) -> Any:
    dims: dict[str, Any] = {}

    def leaf_spec(spec: Any) -> Any:
        if isinstance(spec, Mapping):
            return {key: leaf_spec(value) for key, value in spec.items()}
        if isinstance(spec, (tuple, list)):
            return type(spec)(leaf_spec(value) for value in spec)
        if isinstance(spec, str):
            return dims.setdefault(spec, Dim(spec))
        return Dim.DYNAMIC if spec is True else spec

    count = len(inputs.args)
    if isinstance(wanted, Mapping):
        unknown = set(wanted) - set(names)
        if unknown:
            raise OptionError(
                f"dynamic_shapes names {', '.join(sorted(map(repr, unknown)))}, which is no argument of forward()",
                remedy=f"the arguments are {', '.join(names)}",
            )
        per_name = {name: leaf_spec(wanted.get(name)) for name in names}
        positional = tuple(per_name[name] for name in names[:count])
        return positional, {name: per_name[name] for name in names[count:]}
    if isinstance(wanted, (tuple, list)):
        if len(wanted) != len(names):
            raise OptionError(
                f"dynamic_shapes has {len(wanted)} entries for {len(names)} arguments",
                remedy=f"give one per argument: {', '.join(names)}",
            )
        specs = [leaf_spec(value) for value in wanted]
        return tuple(specs[:count]), dict(zip(names[count:], specs[count:], strict=True))
    raise OptionError(
        f"dynamic_shapes is a {type(wanted).__name__}", remedy="use 'batch', None, a dict or a tuple per argument"
    )


def at_least_two(inputs: ExampleInputs, spec: Any) -> ExampleInputs:
    """Inputs whose dynamic dims are ≥ 2 long: ``torch.export`` takes a size of 1 for a constant."""

    def widen(leaf: Any, dims: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and isinstance(dims, Mapping):
            for dim, mark in dims.items():
                if mark is not None and leaf.shape[dim] == 1:
                    leaf = torch.cat([leaf, leaf], dim)
        return leaf

    leaves, tree = pytree.tree_flatten((inputs.args, inputs.kwargs))
    marks = tree.flatten_up_to(_none_to_leaf(spec, (inputs.args, inputs.kwargs)))
    args, kwargs = pytree.tree_unflatten([widen(leaf, mark) for leaf, mark in zip(leaves, marks, strict=True)], tree)
    return ExampleInputs(args, kwargs)


def _none_to_leaf(spec: Any, like: Any) -> Any:
    """``None`` for a whole subtree means None at each of its leaves."""
    if spec is None:
        return pytree.tree_map(lambda _: None, like)
    if isinstance(like, dict):
        return type(like)({key: _none_to_leaf(spec.get(key), value) for key, value in like.items()})
    if isinstance(like, (tuple, list)):
        return type(like)(_none_to_leaf(s, value) for s, value in zip(spec, like, strict=True))
    return spec
