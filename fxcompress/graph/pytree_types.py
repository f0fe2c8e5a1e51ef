"""What each type of pytree node is, told without keeping the type: its kind and the names of its parts."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.utils import _pytree as pytree

from fxcompress.errors import PreconditionError

__all__ = ["SCALARS", "Container", "Scalar", "describe", "fields_of", "listed", "type_name"]

Scalar: TypeAlias = bool | int | float | str | None
Container: TypeAlias = Literal["tuple", "list", "dict", "namedtuple", "record"]

SCALARS = (bool, int, float, str, type(None))


def describe(spec: pytree.TreeSpec) -> tuple[Container, tuple[Scalar, ...], tuple[str, ...], type | None]:
    """Kind, keys, absent fields and original type of the root of ``spec``, which is not a leaf.

    Absent are the fields of a dataclass that were ``None``, so that the pytree does not hold them.

    Raises:
        PreconditionError: the type tells no names for its parts, or the keys of a dict are not JSON scalars.
    """
    type_, context = spec.type, spec.context
    if type_ in (tuple, torch.Size):
        return "tuple", (), (), None
    if type_ in (list, deque, immutable_list):
        return "list", (), (), None
    if type_ in (dict, OrderedDict, defaultdict, immutable_dict):
        keys = context[1] if type_ is defaultdict else context
        if not all(isinstance(key, SCALARS) for key in keys):
            raise PreconditionError(
                f"a dict among the model's inputs or outputs has {listed(keys)}",
                remedy="use strings or numbers as keys",
            )
        return "dict", tuple(keys), (), None if type_ is dict else type_
    if type_ is namedtuple:
        return "namedtuple", tuple(context._fields), (), context
    if hasattr(type_, "n_sequence_fields") and len(type_.__match_args__) == spec.num_children:  # torch.return_types
        return "namedtuple", tuple(type_.__match_args__), (), type_
    names, absent = _field_names(type_, context, spec.num_children)
    return "record", names, absent, type_


def _field_names(type_: Any, context: Any, count: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    fields = tuple(f.name for f in dataclasses.fields(type_)) if dataclasses.is_dataclass(type_) else ()
    if count and _are_names(context, count):  # ModelOutput and caches of transformers
        names = tuple(context)
    elif isinstance(context, (list, tuple)) and context and _are_names(context[0], count):  # registered dataclasses
        names = tuple(context[0])
    elif len(fields) == count:
        names = fields
    else:
        raise PreconditionError(
            f"a model's input or output is a {type_name(type_)}, which does not tell the names of its parts",
            remedy="use a tuple, a dict, or a dataclass registered with torch.export.register_dataclass",
        )
    return names, tuple(name for name in fields if name not in names)


def _are_names(context: Any, count: int) -> bool:
    return isinstance(context, (list, tuple)) and len(context) == count and all(isinstance(n, str) for n in context)


def fields_of(value: Any) -> dict[Any, Any] | None:
    """The named parts of a mapping, dataclass, namedtuple or ``torch.return_types``; None where there are none."""
    if isinstance(value, Mapping):
        return dict(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        names: tuple[str, ...] = getattr(type(value), "__match_args__", ())
        return dict(zip(names, value, strict=True)) if names and len(names) == len(value) else None
    return None


def type_name(type_: type) -> str:
    """``"package.module.Class"``."""
    return f"{type_.__module__}.{type_.__qualname__}"


def listed(keys: Iterable[Any]) -> str:
    """``"keys 'a', 'b'"`` for messages."""
    return "keys " + (", ".join(map(repr, keys)) or "(none)")
