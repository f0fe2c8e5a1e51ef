"""Operations, names and arguments of a saved graph, as JSON; reading one trusts nothing.

A loaded graph becomes Python code (``torch.fx`` generates a ``forward``), so every name that would stand in that code
must be an identifier, and an operation must be on a list: a document cannot name a function of its choosing.
"""

from __future__ import annotations

import keyword
import operator
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from fxcompress.errors import BundleError
from fxcompress.graph.verify import SIZE_ARITHMETIC

__all__ = [
    "allow_operators",
    "check_identifier",
    "check_path",
    "decode",
    "encode",
    "operation",
    "operation_name",
    "unserializable",
]

# Libraries of operators that a document may name: those of torch that compute, and of packages users have.
_NAMESPACES = {"aten", "prims", "quantized_decomposed", "torchvision"}
# These compute nothing: they map a file of the document's choosing into memory.
_FORBIDDEN = {"from_file", "_from_file"}

_FUNCTIONS: dict[str, Any] = {
    ("torch." if function.__module__ == "torch" else "operator.") + function.__name__: function
    for function in (*SIZE_ARITHMETIC, operator.getitem)
}
_FUNCTION_NAMES = {function: name for name, function in _FUNCTIONS.items()}

# Such a part stands in generated code as it is or, if it is no identifier, between double quotes.
_PATH_PART = re.compile(r"""[^"\\.\x00-\x1f\x7f]+""")

_NAMED: dict[str, type] = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}


def allow_operators(namespace: str) -> None:
    """Let saved graphs use the operators registered under ``torch.ops.<namespace>``.

    Call it where a graph that uses them is saved and where it is loaded.
    """
    check_identifier(namespace, "allow_operators")
    _NAMESPACES.add(namespace)


def unserializable(what: str, where: str, remedy: str | None = None) -> BundleError:
    """The error for a graph that has no serial form."""
    return BundleError(f"the graph cannot be saved: {what}", where=where, remedy=remedy)


# --- names -----------------------------------------------------------------------------------------------------


def check_identifier(name: Any, where: str) -> str:
    """``name``, if it may stand in generated code as a variable.

    Raises:
        BundleError: it may not.
    """
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise BundleError(f"{name!r} is no valid name", where=where, remedy="do not use this file: it was altered")
    return name


def check_path(path: Any, where: str) -> str:
    """``path``, if it is a dotted path of a module or tensor: ``layer1.0.conv1``.

    Raises:
        BundleError: it is not, or holds characters that have no place in generated code.
    """
    if not isinstance(path, str) or not all(_PATH_PART.fullmatch(part) for part in path.split(".")):
        raise BundleError(
            f"{path!r} is no valid name of a module or tensor",
            where=where,
            remedy="name modules and tensors without quotes, backslashes and control characters",
        )
    return path


# --- operations ------------------------------------------------------------------------------------------------


def operation_name(target: Any, where: str) -> str:
    """``"aten.conv2d.default"`` of an operator overload, ``"operator.mul"`` of arithmetic on sizes.

    Raises:
        BundleError: the target is neither, or of a library that is not allowed.
    """
    if isinstance(target, torch._ops.OpOverload):
        if target.namespace not in _NAMESPACES:
            raise unserializable(
                f"it calls {target}, an operator of another library",
                where,
                f"call fxcompress.graph.serialize.allow_operators({target.namespace!r}) before saving and loading",
            )
        return str(target)
    if target in _FUNCTION_NAMES:
        return _FUNCTION_NAMES[target]
    raise unserializable(f"it calls {target}, which is no operator", where)


def operation(name: Any, where: str) -> Any:
    """The operation that :func:`operation_name` named.

    Raises:
        BundleError: it is not known here, or not allowed.
    """
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    parts = name.split(".") if isinstance(name, str) else []
    if len(parts) != 3 or not all(part.isidentifier() for part in parts):
        raise BundleError(f"{name!r} is no operator", where=where, remedy="do not use this file: it was altered")
    namespace, packet, overload = parts
    if namespace not in _NAMESPACES or packet in _FORBIDDEN:
        raise BundleError(
            f"the graph calls {name!r}, which is not on the list of operators that a file may call",
            where=where,
            remedy=f"if you trust the file: fxcompress.graph.serialize.allow_operators({namespace!r})",
        )
    found = getattr(getattr(torch.ops, namespace), packet, None)
    if not isinstance(found, torch._ops.OpOverloadPacket) or overload not in found.overloads():
        raise BundleError(
            f"the operator {name!r} does not exist here",
            where=where,
            remedy=f"update torch, or import the package that registers the operators of {namespace!r}",
        )
    target = getattr(found, overload)
    if target._schema.is_mutable:
        raise BundleError(
            f"the graph calls {name!r}, which writes into its arguments",
            where=where,
            remedy="do not use this file: it was altered",
        )
    return target


# --- arguments -------------------------------------------------------------------------------------------------


def encode(value: Any, where: str) -> Any:
    """An argument of a node as JSON. Plain values stay plain; the rest are objects with one key, the kind.

    Raises:
        BundleError: an argument has no serial form.
    """
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if value is None or isinstance(value, (bool, str)) or type(value) is int:
        return value
    if isinstance(value, float):
        return value if value - value == 0 else {"float": str(value)}
    if isinstance(value, complex):
        return {"complex": [encode(value.real, where), encode(value.imag, where)]}
    if isinstance(value, tuple):
        return {"tuple": [encode(item, where) for item in value]}
    if isinstance(value, list):
        return [encode(item, where) for item in value]
    if isinstance(value, Mapping):
        return {"dict": [[encode(key, where), encode(item, where)] for key, item in value.items()]}
    if isinstance(value, slice):
        return {"slice": [encode(item, where) for item in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for kind, type_ in _NAMED.items():
        if isinstance(value, type_):
            return {kind: str(value).removeprefix("torch.")}
    raise unserializable(f"an argument is a {type(value).__name__}", where)


def decode(value: Any, nodes: Mapping[str, Any], device: torch.device | None, where: str) -> Any:
    """The argument that :func:`encode` told.

    Args:
        value: JSON.
        nodes: what came before, by name.
        device: takes the place of every device in the arguments; None keeps them.
        where: for error messages.

    Raises:
        BundleError: it is no such argument, or names a node that does not come before.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [decode(item, nodes, device, where) for item in value]
    if isinstance(value, dict) and len(value) == 1:
        ((kind, inner),) = value.items()
        if kind == "node" and isinstance(inner, str) and inner in nodes:
            return nodes[inner]
        if kind == "float" and inner in ("inf", "-inf", "nan"):
            return float(inner)
        if kind in ("tuple", "complex", "slice") and isinstance(inner, list):
            items = [decode(item, nodes, device, where) for item in inner]
            return tuple(items) if kind == "tuple" else complex(*items) if kind == "complex" else slice(*items)
        if kind == "dict" and isinstance(inner, list):
            return {decode(key, nodes, device, where): decode(item, nodes, device, where) for key, item in inner}
        if kind == "device" and isinstance(inner, str):
            return torch.device(inner) if device is None else device
        if kind in _NAMED and isinstance(inner, str):
            found = getattr(torch, inner, None)
            if isinstance(found, _NAMED[kind]):
                return found
    raise BundleError(
        f"{str(value)[:80]} is no argument of a graph", where=where, remedy="do not use this file: it was altered"
    )
