"""The pytree structure of a model's inputs and outputs as plain JSON, reloadable without the user's classes.

Tuples, lists and dicts come back as what they were, a namedtuple (``torch.return_types`` too) as one of the same
names, a dataclass or ``transformers`` ``ModelOutput`` as a :class:`Record`, because its class may not exist where
an engine runs. Leaves that never change (``None``, numbers, strings) are kept in the structure itself, as constants.
"""

from __future__ import annotations

import dataclasses
import keyword
import math
import re
from collections import OrderedDict, deque, namedtuple
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias, get_args

from torch.utils import _pytree as pytree

from fxcompress.errors import PreconditionError
from fxcompress.graph.pytree_types import SCALARS, Container, Scalar, describe, fields_of, listed, type_name
from fxcompress.graph.record import Record

__all__ = ["Record", "Scalar", "Structure"]

Kind: TypeAlias = Literal["leaf", "constant", "tuple", "list", "dict", "namedtuple", "record"]


@dataclass(frozen=True)
class Structure:
    """One node of the tree.

    Attributes:
        kind: ``leaf`` is a tensor; ``constant`` a value that capture fixed; ``record`` an object with named fields.
        keys: of a dict, namedtuple or record, one per child. Of the positional arguments' tuple: the parameters' names.
        children: the parts, in pytree order.
        value: of a constant.
        type_name: the original type, ``"transformers.modeling_outputs.BaseModelOutput"``; information only.
        absent: fields of a record that were ``None``.
    """

    kind: Kind
    keys: tuple[Scalar, ...] = ()
    children: tuple[Structure, ...] = ()
    value: Scalar = None
    type_name: str | None = None
    absent: tuple[str, ...] = ()

    @classmethod
    def from_spec(cls, spec: pytree.TreeSpec, constants: Mapping[int, Any] | None = None) -> Structure:
        """The structure of a ``TreeSpec``.

        Args:
            spec: as ``torch.utils._pytree.tree_structure`` or ``torch.export`` make it.
            constants: the values of leaves that are not tensors, by the leaf's position among *all* leaves of
                ``spec``. They take no further part in :meth:`flatten` and :meth:`unflatten`.

        Raises:
            PreconditionError: a part's type tells no names for its parts, or a constant is not a JSON scalar.
        """
        return _read(spec, iter(range(spec.num_leaves)), constants or {})

    def with_parameters(self, names: Sequence[str]) -> Structure:
        """Of the structure of ``(args, kwargs)``: the same with the names of the positional parameters kept."""
        positional, keywords = self.children
        known = tuple(names[: len(positional.children)])
        if len(set(known)) == len(positional.children):
            positional = dataclasses.replace(positional, keys=known)
        return dataclasses.replace(self, children=(positional, keywords))

    @cached_property
    def leaf_count(self) -> int:
        """The number of leaves; constants do not count."""
        return 1 if self.kind == "leaf" else sum(child.leaf_count for child in self.children)

    # -- values ------------------------------------------------------------------------------------------------

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        """Put ``leaves`` (:attr:`leaf_count` of them, constants left out) into this structure.

        Raises:
            PreconditionError: the number of leaves differs.
        """
        if len(leaves) != self.leaf_count:
            raise PreconditionError(f"this structure holds {self.leaf_count} tensors, {len(leaves)} were given")
        if self._flat:
            return tuple(leaves) if self.kind == "tuple" else dict(zip(self.keys, leaves, strict=True))
        return self._build(iter(leaves))

    @cached_property
    def _flat(self) -> bool:
        """A tuple or dict of tensors only, as most models return: built without a walk."""
        plain = self.kind == "tuple" or (self.kind == "dict" and self.type_name is None)
        return plain and all(child.kind == "leaf" for child in self.children)

    def _build(self, leaves: Iterator[Any]) -> Any:
        if self.kind == "leaf":
            return next(leaves)
        if self.kind == "constant":
            return self.value
        parts = [child._build(leaves) for child in self.children]
        if self.kind == "tuple":
            return tuple(parts)
        if self.kind == "list":
            return parts
        if self.kind == "namedtuple":
            return self._namedtuple(*parts)
        items = dict(zip(self.keys, parts, strict=True))
        if self.kind == "record":
            return Record({str(key): part for key, part in items.items()}, self.absent)
        return OrderedDict(items) if self.type_name == "collections.OrderedDict" else items

    def flatten(self, value: Any, where: str = "value") -> list[Any]:
        """The leaves of ``value``, in order, constants left out.

        A list passes for a tuple and the other way round; a record is read from a mapping or from attributes.

        Raises:
            PreconditionError: ``value`` differs from this structure; ``where`` leads to the place.
        """
        leaves: list[Any] = []
        self._collect(value, where, leaves)
        return leaves

    def _collect(self, value: Any, where: str, leaves: list[Any]) -> None:
        if self.kind == "leaf":
            if value is None or isinstance(value, (tuple, list, Mapping, str)):
                raise _mismatch("a tensor", value, where)
            leaves.append(value)
        elif self.kind == "constant":
            if not _same_constant(self.value, value):
                raise _mismatch(f"{self.value!r}, which capture made part of the graph", value, where)
        elif self.kind in ("tuple", "list"):
            if not isinstance(value, (tuple, list, deque)) or len(value) != len(self.children):
                raise _mismatch(f"a {self.kind} of {len(self.children)}", value, where)
            for index, (child, part) in enumerate(zip(self.children, value, strict=True)):
                child._collect(part, f"{where}[{index}]", leaves)
        else:
            fields = fields_of(value)
            if fields is None:
                raise _mismatch(f"a {self.kind} with {listed(self.keys)}", value, where)
            extra = [key for key, part in fields.items() if key not in self.keys and part is not None]
            missing = [k for k, c in zip(self.keys, self.children, strict=True) if k not in fields and c.leaf_count]
            if extra or missing:
                raise _mismatch(f"a {self.kind} with {listed(self.keys)}", value, where, listed(fields))
            for key, child in zip(self.keys, self.children, strict=True):
                if key in fields:
                    child._collect(fields[key], f"{where}[{key!r}]", leaves)

    @cached_property
    def _namedtuple(self) -> Any:
        name = (self.type_name or "").rpartition(".")[2]
        return namedtuple(name if name.isidentifier() else "Output", map(str, self.keys))

    # -- names -------------------------------------------------------------------------------------------------

    def leaf_names(self, prefix: str = "output", taken: Iterable[str] = ()) -> list[str]:
        """A name for each leaf: ``logits`` for a key, ``output_0`` in a tuple, ``output`` for a single tensor.

        The names are identifiers, differ from each other and from those ``taken``; nested steps join with ``_``.
        """
        names: list[str] = []
        used = set(taken)
        for path in self._paths():
            base = "_".join([prefix, *map(str, path)] if not path or isinstance(path[0], int) else map(str, path))
            base = re.sub(r"\W", "_", base)
            if not base or base[0].isdigit() or keyword.iskeyword(base):
                base = f"{prefix}_{base}"
            name, number = base, 1
            while name in used:
                name, number = f"{base}_{number}", number + 1
            used.add(name)
            names.append(name)
        return names

    def _paths(self) -> Iterator[tuple[int | str, ...]]:
        if self.kind == "leaf":
            yield ()
        keys = self.keys if self.kind in ("dict", "namedtuple", "record") else range(len(self.children))
        for key, child in zip(keys, self.children, strict=True):
            step = key if isinstance(key, int) else str(key)
            for path in child._paths():
                yield (step, *path)

    # -- JSON --------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """This tree as values that the ``json`` module writes strictly."""
        if self.kind == "constant":
            infinite = isinstance(self.value, float) and not math.isfinite(self.value)
            return {"kind": "constant", **({"float": str(self.value)} if infinite else {"value": self.value})}
        told: dict[str, Any] = {"kind": self.kind}
        if self.type_name:
            told["type"] = self.type_name
        if self.keys:
            told["keys"] = list(self.keys)
        if self.absent:
            told["absent"] = list(self.absent)
        if self.kind != "leaf":
            told["children"] = [child.to_json() for child in self.children]
        return told

    @classmethod
    def from_json(cls, told: Any) -> Structure:
        """The tree that :meth:`to_json` told.

        Raises:
            PreconditionError: this is not such a tree.
        """
        try:
            return cls._from_json(told)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise PreconditionError(f"not the JSON of a structure: {error!r}") from error

    @classmethod
    def _from_json(cls, told: Mapping[str, Any]) -> Structure:
        kind = told["kind"]
        if kind == "leaf":
            return cls("leaf")
        if kind == "constant":
            value = float(told["float"]) if "float" in told else told["value"]
            if not isinstance(value, SCALARS):
                raise ValueError(f"a constant {value!r}")
            return cls("constant", value=value)
        if kind not in get_args(Container):
            raise ValueError(f"unknown kind {kind!r}")
        children = tuple(cls._from_json(child) for child in told["children"])
        keys = tuple(told.get("keys", ()))
        expected = len(children) if kind not in ("tuple", "list") or keys else 0
        if len(keys) != expected or len(set(keys)) != expected or not all(isinstance(key, SCALARS) for key in keys):
            raise ValueError(f"keys {keys!r} for {len(children)} parts")
        absent = tuple(map(str, told.get("absent", ())))
        read = cls(kind, keys, children, None, str(told["type"]) if "type" in told else None, absent)
        if kind == "namedtuple":
            read._namedtuple  # noqa: B018  (raises ValueError here rather than at the first run)
        return read


def _read(spec: pytree.TreeSpec, positions: Iterator[int], constants: Mapping[int, Any]) -> Structure:
    if spec.is_leaf():
        position = next(positions)
        if position not in constants:
            return Structure("leaf")
        value = constants[position]
        if not isinstance(value, SCALARS):
            raise PreconditionError(
                f"a model's input or output is a {type_name(type(value))}, which an engine cannot keep",
                remedy="hand in and return tensors, None, numbers, strings, and tuples, lists, dicts or dataclasses",
            )
        return Structure("constant", value=value)
    kind, keys, absent, type_ = describe(spec)
    children = tuple(_read(child, positions, constants) for child in spec.children())
    return Structure(kind, keys, children, None, type_name(type_) if type_ else None, absent)


def _same_constant(fixed: Scalar, value: Any) -> bool:
    if not isinstance(value, SCALARS):
        return False
    return fixed == value or (fixed != fixed and value != value)


def _mismatch(expected: str, value: Any, where: str, found: str | None = None) -> PreconditionError:
    if found is None:
        sized = isinstance(value, (tuple, list, Mapping))
        found = repr(value) if isinstance(value, SCALARS) else type(value).__name__ + (f" of {len(value)}" * sized)
    return PreconditionError(f"expected {expected}, got {found}", where=where)
