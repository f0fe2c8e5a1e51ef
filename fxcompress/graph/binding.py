"""From a call as the user writes it to the flat list of tensors that an engine takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fxcompress.errors import PreconditionError
from fxcompress.graph.structure import Structure

__all__ = ["bind", "signature_text"]

_NOT_GIVEN = object()


def bind(structure: Structure, names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The leaves of a call, in the order of ``names``.

    Three ways of calling are understood, and the first that fits is taken:

    1. as the model was called: positional arguments, then keywords by the parameters' names (parameters that were
       keywords at capture may also follow by position, in their order at capture);
    2. flat: one tensor per leaf by position, by leaf name, or both;
    3. one mapping in place of keywords: ``engine.run({"input_ids": ids, "attention_mask": mask})``.

    Args:
        structure: of ``(args, kwargs)``, with the parameters' names (:meth:`Structure.with_parameters`).
        names: of the leaves, ``structure.leaf_count`` of them.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.

    Raises:
        PreconditionError: an argument is missing, unknown, given twice, or of another structure; says what was
            expected and given.
    """
    try:
        return _bind_parameters(structure, names, args, kwargs)
    except PreconditionError as error:
        flat = _bind_flat(names, args, kwargs)
        if flat is not None:
            return flat
        if len(args) == 1 and not kwargs and isinstance(args[0], Mapping):
            return bind(structure, names, (), args[0])
        given = [type(value).__name__ for value in args] + [f"{k}={type(v).__name__}" for k, v in kwargs.items()]
        raise PreconditionError(
            f"{error.problem}; expected ({signature_text(structure, names)}), given ({', '.join(given)})",
            where=error.where,
            remedy=f"call it as the model was called at capture, or with one tensor for each of: {', '.join(names)}",
        ) from None


def signature_text(structure: Structure, names: Sequence[str]) -> str:
    """The call as text: ``"x, pair=(pair_0, pair_1), mask"``."""
    leaves = iter(names)
    parts = []
    for name, part in _parameters(structure):
        own = [next(leaves) for _ in range(part.leaf_count)]
        if part.kind == "constant":
            parts.append(f"{name or '_'}={part.value!r}")
        elif part.kind == "leaf":
            parts.append(name or own[0])
        else:
            body = ", ".join(own)
            parts.append(f"{name or '_'}=" + (f"{{{body}}}" if part.kind in ("dict", "record") else f"({body})"))
    return ", ".join(parts)


def _parameters(structure: Structure) -> list[tuple[str | None, Structure]]:
    """Parameters in order, positional first. A positional one may be nameless."""
    positional, keywords = structure.children
    known: Sequence[Any] = positional.keys or [None] * len(positional.children)
    return [
        *zip(known, positional.children, strict=True),
        *zip(map(str, keywords.keys), keywords.children, strict=True),
    ]


def _bind_parameters(
    structure: Structure, names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[Any]:
    parameters = _parameters(structure)
    if len(args) > len(parameters):
        raise PreconditionError(f"{len(args)} positional arguments are more than the {len(parameters)} parameters")
    by_name = {name: index for index, (name, _) in enumerate(parameters) if name is not None}
    by_leaf = {name: index for index, name in enumerate(names)}
    given: dict[int, Any] = dict(enumerate(args))
    leaves: list[Any] = [_NOT_GIVEN] * len(names)
    for key, value in kwargs.items():
        if key in by_name and by_name[key] in given:
            raise PreconditionError(f"argument {key!r} is given twice")
        if key in by_name:
            given[by_name[key]] = value
        elif key in by_leaf:
            leaves[by_leaf[key]] = value
        else:
            raise PreconditionError(f"unknown argument {key!r}")
    start = 0
    for index, (name, part) in enumerate(parameters):
        end = start + part.leaf_count
        if index in given:
            if any(leaf is not _NOT_GIVEN for leaf in leaves[start:end]):
                raise PreconditionError(f"parts of argument {name or index!r} are given twice")
            leaves[start:end] = part.flatten(given[index], str(name or f"argument {index}"))
        start = end
    missing = [name for name, leaf in zip(names, leaves, strict=True) if leaf is _NOT_GIVEN]
    if missing:
        raise PreconditionError(f"missing {', '.join(map(repr, missing))}")
    return leaves


def _bind_flat(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any] | None:
    rest = names[len(args) :]
    if len(args) + len(kwargs) != len(names) or set(rest) != set(kwargs):
        return None
    leaves = [*args, *(kwargs[name] for name in rest)]
    return None if any(leaf is None or isinstance(leaf, (tuple, list, Mapping, str)) for leaf in leaves) else leaves
