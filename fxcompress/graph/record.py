"""What stands for an object with named fields where its class is not at hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch.fx import _pytree as fx_pytree
from torch.utils import _pytree as pytree

__all__ = ["Record"]


class Record(dict[str, Any]):
    """Stands for an object with named fields whose class is not at hand.

    A field is reached by name (``record.logits``), by key (``record["logits"]``) or by position (``record[0]``),
    as ``transformers`` outputs allow. ``absent`` are the fields that were ``None`` when the model was captured:
    they read as ``None`` and are not keys. A field called as a method of ``dict`` (``values``) hides that method,
    except ``keys`` and ``items``, which copying needs.
    """

    def __init__(self, fields: Mapping[str, Any] | Iterable[tuple[str, Any]] = (), absent: Sequence[str] = ()) -> None:
        super().__init__()
        self._absent = tuple(absent)
        for name, value in fields.items() if isinstance(fields, Mapping) else fields:
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        if hasattr(dict, name) and name not in ("keys", "items"):
            self.__dict__[name] = value

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        if name in self.__dict__.get("_absent", ()):
            return None
        raise AttributeError(f"no field {name!r}; fields: {', '.join(self)}")

    def __getitem__(self, key: Any) -> Any:
        return tuple(dict.values(self))[key] if isinstance(key, (int, slice)) else super().__getitem__(key)


pytree.register_pytree_node(
    Record,
    lambda record: (list(dict.values(record)), (tuple(record), record._absent)),
    lambda values, context: Record(zip(context[0], values, strict=True), context[1]),
)


def _fields(value: Any, spec: pytree.TreeSpec) -> list[Any]:
    """What a graph whose inputs hold a record takes: a record, a mapping, or an object of the original class."""
    names, _ = spec.context
    return [value[name] if isinstance(value, Mapping) else getattr(value, name) for name in names]


fx_pytree.register_pytree_flatten_spec(Record, _fields)
