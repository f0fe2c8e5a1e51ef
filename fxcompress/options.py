"""Options of passes and backends: dataclass fields whose values are checked against their annotations."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Self

import yaml
from pydantic import ConfigDict, InstanceOf, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError

from fxcompress.errors import OptionError, nearest

__all__ = ["Options", "check_types", "parse_options"]


class Options:
    """Base of dataclasses whose fields are options: a keyword that is none of them is told with the nearest that is."""

    def __new__(cls, *_: Any, **options: Any) -> Self:
        """Refuse unknown keywords.

        Raises:
            OptionError: names the option that was probably meant.
        """
        if dataclasses.is_dataclass(cls):
            known = [item.name for item in dataclasses.fields(cls) if item.init]
            for option in options:
                if option not in known:
                    raise OptionError(
                        f"{cls.__name__} has no option {option!r}",
                        where=f"{cls.__name__}({option}=…)",
                        remedy=nearest(option, known),
                    )
        return super().__new__(cls)


def check_types(options: Any) -> None:
    """Check every field of a dataclass instance against its annotation.

    Raises:
        OptionError: names the option, what was given and what is allowed.
    """
    cls: Any = type(options)
    for name, adapter in _adapters(cls).items():
        value = getattr(options, name)
        try:
            adapter.validate_python(value, strict=True)
        except ValidationError as error:
            owner = getattr(options, "name", type(options).__name__)
            raise OptionError(
                f"the option {name}={value!r} of {owner!r} is not valid: {error.errors()[0]['msg']}",
                where=f"{owner}({name}=…)",
                remedy="see the option's type in the docs: "
                + str({item.name: item.type for item in dataclasses.fields(options)}[name]),
            ) from None


def parse_options(items: Iterable[str], *, where: str) -> dict[str, Any]:
    """``["threads=2", "simplify=false"]`` as options; values are read as YAML, what is no YAML as text.

    Args:
        items: one option each.
        where: for the error.

    Raises:
        OptionError: an item is not ``NAME=VALUE``.
    """
    options: dict[str, Any] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not name.isidentifier():
            raise OptionError(f"{item!r} is no option", where=where, remedy="write NAME=VALUE, as in threads=2")
        try:
            options[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            options[name] = value
    return options


@lru_cache
def _adapters(cls: Any) -> dict[str, TypeAdapter[Any]]:
    hints = typing.get_type_hints(cls)
    adapters: dict[str, TypeAdapter[Any]] = {}
    for item in dataclasses.fields(cls):
        try:
            adapters[item.name] = TypeAdapter(
                _unread(hints[item.name]), config=ConfigDict(arbitrary_types_allowed=True)
            )
        except (PydanticSchemaGenerationError, PydanticUserError):
            continue  # a type that only the pass itself can judge, such as a data loader protocol
    return adapters


def _unread(hint: Any) -> Any:
    """The annotation with data that is not read for the check: to begin with a loader may start processes."""
    if typing.get_origin(hint) is Iterable:
        return InstanceOf[Iterable]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.Union[tuple(_unread(choice) for choice in typing.get_args(hint))]  # noqa: UP007
    return hint
