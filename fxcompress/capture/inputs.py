"""Example inputs: one call of the user's model, checked and brought to one form."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxcompress.errors import PreconditionError

__all__ = ["ExampleInputs", "argument_names", "distinct", "example_inputs", "in_call_order", "register_dataclasses"]


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
        inputs = given
    elif isinstance(given, torch.Tensor):
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
    register_dataclasses((inputs.args, inputs.kwargs))
    if not any(isinstance(leaf, torch.Tensor) for leaf in inputs.leaves):
        raise PreconditionError(
            "example_inputs holds no tensor", remedy="give at least one tensor, such as (torch.randn(2, 3, 224, 224),)"
        )
    return inputs


def in_call_order(model: nn.Module, inputs: ExampleInputs) -> ExampleInputs:
    """The same call with keyword arguments in the order of ``forward``'s parameters.

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
    order = [name for name in bound.arguments if name in inputs.kwargs]
    order += [name for name in inputs.kwargs if name not in order]  # what **kwargs takes
    return ExampleInputs(inputs.args, {name: inputs.kwargs[name] for name in order})


def distinct(model: nn.Module, inputs: ExampleInputs) -> ExampleInputs:
    """The same call in which every tensor is an object of its own, and none is a weight of the model.

    ``torch.export`` knows tensors by identity: of ``model(x, x)`` it would make a graph that reads the second input
    twice and the first one never.
    """
    seen = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}

    def own(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            if id(leaf) in seen:
                leaf = leaf.detach().clone().requires_grad_(leaf.requires_grad)
            seen.add(id(leaf))
        return leaf

    args, kwargs = pytree.tree_map(own, (inputs.args, inputs.kwargs))
    return ExampleInputs(args, kwargs)


def argument_names(model: nn.Module, inputs: ExampleInputs) -> list[str]:
    """A name for each argument of the call: positional ones by the parameter they fill, then the keywords."""
    names: list[str] = []
    for parameter in inspect.signature(model.forward).parameters.values():
        if len(names) < len(inputs.args):
            if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                names += [f"{parameter.name}_{index}" for index in range(len(inputs.args) - len(names))]
            else:
                names.append(parameter.name)
    return names + list(inputs.kwargs)


def register_dataclasses(value: Any) -> None:
    """Make pytree nodes of the dataclasses in ``value``, as ``torch.export`` needs to keep their structure."""
    for leaf in pytree.tree_leaves(value):
        if is_dataclass(leaf) and not isinstance(leaf, type):
            torch.export.register_dataclass(type(leaf))
            register_dataclasses(leaf)
