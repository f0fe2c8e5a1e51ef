"""From a call as it stands in Python (``x.view(-1, 4)``, ``torch.add(x, 1)``) to the ATen overload that it means.

Without values there is no dispatcher to ask. So the schemas of ``torch.ops.aten.<name>`` are tried in their order
against the recorded arguments; a node stands for a tensor, a size or a list of tensors, whatever it was found to be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import fx

__all__ = ["Call", "Kind", "match", "result_kind"]

Kind = Literal["tensor", "size", "tensors"]
Call = tuple[Any, tuple[Any, ...], dict[str, Any]]

# Operations whose Tensor overload torch calls with plain numbers too.
_NUMBERS_AS_TENSORS = {
    *("add", "sub", "subtract", "mul", "multiply", "div", "divide", "true_divide", "floor_divide"),
    *("logical_and", "logical_or", "logical_xor"),
}
# Names that Python takes for those of the schemas.
_ALIASES = {"input": "self", "axis": "dim", "axes": "dims", "keepdims": "keepdim"}
_CONSTANTS: dict[str, type] = {
    "ScalarType": torch.dtype,
    "Layout": torch.layout,
    "MemoryFormat": torch.memory_format,
    "Device": torch.device,
}


def match(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], kind_of: Callable[[fx.Node], Kind]
) -> Call | None:
    """The overload of ``aten.<name>`` that takes these arguments, with them in its form; None if there is none."""
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        return None
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    usable = [overload for overload in overloads if _is_usable(overload)]
    for given in _spellings(args):
        for overload in usable:
            bound = _bind(overload, name, given, kwargs, kind_of)
            if bound is not None:
                return overload, *bound
    return None


def result_kind(overload: Any) -> Kind | None:
    """What an overload returns; None for a plain number, which a graph cannot hold."""
    if overload is torch.ops.aten.sym_size.int:
        return "size"
    returns = overload._schema.returns
    if len(returns) != 1 or str(returns[0].type) == "List[Tensor]":
        return "tensors"
    if str(returns[0].type) == "Tensor":
        return "tensor"
    return "size" if str(returns[0].real_type) == "SymInt" else None


def _is_usable(overload: Any) -> bool:
    schema = overload._schema
    types = [str(argument.real_type) for argument in schema.arguments]
    tensors = any(str(item.type) in ("Tensor", "List[Tensor]") for item in schema.returns) or "SymInt" in str(schema)
    return tensors and not schema.is_mutable and not any("Dimname" in type_ or type_ == "Generator" for type_ in types)


def _spellings(args: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """The arguments as they are, and with trailing numbers as one list: ``x.view(2, 3)`` is ``view(x, [2, 3])``."""
    spelled = [args]
    first = next((index for index, item in enumerate(args) if type(item) is int or isinstance(item, fx.Node)), None)
    for start in (1, 0):
        if first is not None and len(args) > start and not isinstance(args[start], (list, tuple)):
            spelled.append((*args[:start], list(args[start:])))
    return spelled


def _bind(
    overload: Any,
    name: str,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    kind_of: Callable[[fx.Node], Kind],
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    arguments = overload._schema.arguments
    places = [argument for argument in arguments if not argument.kwarg_only]
    if len(args) > len(places):
        return None
    rest = dict(kwargs)
    known = {argument.name for argument in arguments}
    for said, meant in _ALIASES.items():
        if said in rest and said not in known and meant in known and meant not in rest:
            rest[meant] = rest.pop(said)
    values: list[Any] = []
    last = len(args)
    for index, argument in enumerate(places):
        if index < len(args):
            value = args[index]
        elif argument.name in rest:
            value, last = rest.pop(argument.name), index + 1
        elif argument.has_default_value():
            values.append(argument.default_value)
            continue
        else:
            return None
        fitted = _fit(argument, value, name, kind_of)
        if fitted is _NO:
            return None
        values.append(fitted)
    named: dict[str, Any] = {}
    for argument in arguments:
        if not argument.kwarg_only:
            continue
        if argument.name in rest:
            value = _fit(argument, rest.pop(argument.name), name, kind_of)
            if value is _NO:
                return None
            if not (argument.has_default_value() and value == argument.default_value):
                named[argument.name] = value
        elif not argument.has_default_value():
            return None
    rest.pop("requires_grad", None)  # of factories
    return None if rest else (tuple(values[:last]), named)


_NO = object()


def _fit(argument: Any, value: Any, name: str, kind_of: Callable[[fx.Node], Kind]) -> Any:
    """``value`` as the argument takes it, or _NO."""
    if value is None and argument.has_default_value():
        return argument.default_value
    return _fit_type(str(argument.real_type), argument.N, value, name, kind_of)


def _fit_type(type_: str, length: int | None, value: Any, name: str, kind_of: Callable[[fx.Node], Kind]) -> Any:
    if type_.startswith("Optional["):
        return None if value is None else _fit_type(type_[9:-1], length, value, name, kind_of)
    kind = kind_of(value) if isinstance(value, fx.Node) else None
    if type_.startswith("List["):
        inner = type_[5:-1]
        if kind == "tensors" and inner == "Tensor":
            return value
        if isinstance(value, (list, tuple)):
            items = [_fit_type(inner, None, item, name, kind_of) for item in value]
            return _NO if any(item is _NO for item in items) else items
        item = _fit_type(inner, None, value, name, kind_of) if length and inner != "Tensor" else _NO
        return _NO if item is _NO or length is None else [item] * length
    if type_ == "Tensor":
        number = isinstance(value, (bool, int, float)) or kind == "size"
        return value if kind == "tensor" or (number and name in _NUMBERS_AS_TENSORS) else _NO
    if type_ in _CONSTANTS:
        if type_ == "Device" and isinstance(value, str):
            return torch.device(value)
        return value if isinstance(value, _CONSTANTS[type_]) else _NO
    accepted: dict[str, tuple[type, ...]] = {
        "int": (int,),
        "SymInt": (int,),
        "float": (float, int),
        "number": (float, int, bool, complex),
        "Scalar": (float, int, bool, complex),
        "bool": (bool,),
        "str": (str,),
    }
    if kind == "size":
        return value if type_ in ("int", "SymInt", "number", "Scalar", "float") else _NO
    types = accepted.get(type_, ())
    if isinstance(value, bool) and bool not in types:
        return _NO
    return value if isinstance(value, types) else _NO
