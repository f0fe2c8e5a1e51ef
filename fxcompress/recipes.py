"""A recipe: everything that ``fxcompress compile`` takes, as a YAML file.

::

    model: torchvision:mobilenet_v2
    passes:
      - fuse_modules
      - prune_channels: {ratio: 0.5}
    backend: onnxruntime
    backend_options: {threads: 2}
    output: mobilenet_v2.bundle

An option of the form ``file.py:name`` is what that file defines: data, or a function that returns it.

The keys are the command's options; what is given on the command line takes precedence. Paths are relative to the
directory in which the command runs.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic
import yaml

from fxcompress.backends.base import Backend
from fxcompress.backends.registry import backend_class
from fxcompress.capture.inputs import ExampleInputs
from fxcompress.errors import OptionError, PreconditionError, nearest
from fxcompress.model_specs import load_value, parse_inputs
from fxcompress.options import parse_options
from fxcompress.passes.base import Pass
from fxcompress.passes.registry import as_pass, pass_form

__all__ = ["Recipe", "dynamic_shapes_of", "read_recipe"]


class Recipe(pydantic.BaseModel):
    """What to compile, and how.

    Attributes:
        model: a model spec.
        checkpoint: safetensors file with the model's weights.
        inputs: shapes of example inputs, ``["1x3x224x224"]`` or ``{"x": "1x3x224x224:float32"}``.
        dynamic_shapes: ``"batch"``, None, or per argument and dim: ``{"x": {0: "batch"}}``.
        passes: names, names with options in text form, or ``{name: {option: value}}``.
        backend: name of the backend; None saves the graph.
        backend_options: of the backend, by name.
        output: directory to write.
        verify: compare outputs at every step.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    model: str | None = None
    checkpoint: Path | None = None
    inputs: list[str] | dict[str, str] = []
    dynamic_shapes: str | dict[str, Any] | list[Any] | None = "batch"
    passes: list[str | dict[Any, Any]] = []
    backend: str | None = None
    backend_options: dict[str, Any] = {}
    output: Path | None = None
    verify: bool = True

    @pydantic.field_validator("dynamic_shapes")
    @classmethod
    def _whole_dims(cls, told: Any) -> Any:
        return _with_whole_dims(told)

    def overridden(
        self,
        *,
        dynamic: bool | None = None,
        dynamic_shapes: str | None = None,
        backend_options: Sequence[str] | None = None,
        **told: Any,
    ) -> Recipe:
        """A copy in which what was typed replaces what the recipe says; None and nothing replace nothing.

        Raises:
            OptionError: text that cannot be read.
        """
        changes = {name: value for name, value in told.items() if value is not None and value != []}
        if backend_options:
            changes["backend_options"] = self.backend_options | parse_options(backend_options, where="--backend-option")
        if dynamic is not None or dynamic_shapes is not None:
            changes["dynamic_shapes"] = dynamic_shapes_of(dynamic, dynamic_shapes)
        return Recipe.model_validate(dict(self) | changes)

    def make_passes(self) -> tuple[Pass, ...]:
        """The passes, made.

        Raises:
            OptionError: an unknown pass or option.
        """
        return tuple(as_pass(item, load_value) for item in self.passes)

    def make_backend(self) -> Backend | None:
        """The backend with its options, made.

        Raises:
            OptionError: an unknown backend or option.
            BackendError: the library that it drives is missing.
        """
        if self.backend is None:
            if self.backend_options:
                raise OptionError("there are backend options, but no backend", remedy="name one: --backend onnxruntime")
            return None
        cls = backend_class(self.backend)
        assert dataclasses.is_dataclass(cls)
        fields = {item.name: item for item in dataclasses.fields(cls)}
        options = dict(self.backend_options)
        for name, value in options.items():
            if name not in fields:
                raise OptionError(
                    f"the backend {cls.name!r} has no option {name!r}", where=cls.name, remedy=nearest(name, fields)
                )
            if isinstance(fields[name].default, tuple) and isinstance(value, (str, list)):
                options[name] = tuple(value.split(",") if isinstance(value, str) else value)
        return cls(**options)

    def make_inputs(self) -> ExampleInputs | None:
        """Example inputs of the shapes told; None if none are.

        Raises:
            OptionError: a shape cannot be read.
        """
        specs = self.inputs
        if isinstance(specs, dict):
            specs = [f"{name}={shape}" for name, shape in specs.items()]
        return parse_inputs(specs) if specs else None


class _Loader(yaml.SafeLoader):
    """YAML without keys that come twice, of which the last would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key.value!r} comes twice", problem_mark=key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def read_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        PreconditionError: the file is missing or no YAML.
        OptionError: an unknown key (the nearest is suggested), or a value of the wrong type.
    """
    try:
        told = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError as error:
        raise PreconditionError("there is no such recipe", where=str(path), remedy="check the path") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        raise PreconditionError(
            f"the recipe cannot be read: {getattr(error, 'problem', None) or error}",
            where=f"{path}:{mark.line + 1}" if mark is not None else str(path),
            remedy="repair it; a recipe is YAML",
        ) from error
    if not isinstance(told, Mapping):
        raise OptionError(
            "the recipe is no mapping of options",
            where=str(path),
            remedy=f"write KEY: VALUE lines with keys of {', '.join(Recipe.model_fields)}",
        )
    for key in told:
        if key not in Recipe.model_fields:
            raise OptionError(f"unknown key {key!r}", where=str(path), remedy=nearest(str(key), Recipe.model_fields))
    try:
        recipe = Recipe.model_validate(dict(told))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else ""
        raise OptionError(
            f"the value of {key!r} is {told.get(key)!r}: {first['msg']}",
            where=str(path),
            remedy="see docs/cli.md for the keys and their forms",
        ) from error
    for item in recipe.passes:
        if isinstance(item, str):
            continue
        try:
            pass_form(item)
        except OptionError as error:
            raise OptionError(error.problem, where=f"{path}: {error.where}", remedy=error.remedy) from None
    return recipe


def dynamic_shapes_of(dynamic: bool | None, shapes: str | None) -> Any:
    """``dynamic_shapes`` as ``compile()`` takes it, from ``--dynamic/--no-dynamic`` and ``--dynamic-shapes JSON``.

    Raises:
        OptionError: the text is no JSON, or the two contradict each other.
    """
    if shapes is None:
        return "batch" if dynamic in (None, True) else None
    if dynamic is False:
        raise OptionError("--no-dynamic fixes all sizes", where="--dynamic-shapes", remedy="give one of the two")
    try:
        told = json.loads(shapes)
    except ValueError as error:
        raise OptionError(
            f"{shapes!r} is no JSON: {error}",
            where="--dynamic-shapes",
            remedy="""give each input's free dims a name: '{"x": {"0": "batch", "2": "height"}}'""",
        ) from error
    return _with_whole_dims(told)


def _with_whole_dims(told: Any) -> Any:
    """JSON knows only text as keys; dims are numbers."""
    if isinstance(told, dict):
        return {int(key) if str(key).isdigit() else key: _with_whole_dims(value) for key, value in told.items()}
    return [_with_whole_dims(value) for value in told] if isinstance(told, list) else told
