"""Passes by name: ``"prune_channels(ratio=0.5)"`` from text, and third-party passes by entry point."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from fxcompress.errors import OptionError, nearest
from fxcompress.passes.base import Pass

__all__ = ["as_pass", "make_pass", "parse_pass", "pass_class", "pass_form", "pass_names", "resolve_passes"]

_BUILT_IN = {
    "calibrate": "fxcompress.passes.calibrate:Calibrate",
    "convert_precision": "fxcompress.passes.convert_precision:ConvertPrecision",
    "correct_bias": "fxcompress.passes.correct_bias:CorrectBias",
    "distill": "fxcompress.passes.distill:Distill",
    "equalize_cross_layers": "fxcompress.passes.equalize_cross_layers:EqualizeCrossLayers",
    "factorize_conv": "fxcompress.passes.factorize_conv:FactorizeConv",
    "factorize_linear": "fxcompress.passes.factorize_linear:FactorizeLinear",
    "fine_tune": "fxcompress.passes.fine_tune:FineTune",
    "fuse_modules": "fxcompress.passes.fuse_modules:FuseModules",
    "insert_quant_stubs": "fxcompress.passes.insert_quant_stubs:InsertQuantStubs",
    "iterate": "fxcompress.passes.iterate:Iterate",
    "prune_channels": "fxcompress.passes.prune_channels:PruneChannels",
    "quantize": "fxcompress.passes.quantize:Quantize",
    "quantize_dynamic": "fxcompress.passes.quantize_dynamic:QuantizeDynamic",
    "quantize_weights": "fxcompress.passes.quantize_weights:QuantizeWeights",
    "round_adaptively": "fxcompress.passes.round_adaptively:RoundAdaptively",
    "smooth_activations": "fxcompress.passes.smooth_activations:SmoothActivations",
    "sparsify_weights": "fxcompress.passes.sparsify_weights:SparsifyWeights",
    "substitute_depthwise_separable": "fxcompress.passes.substitute_depthwise_separable:SubstituteDepthwiseSeparable",
    "train_quantized": "fxcompress.passes.train_quantized:TrainQuantized",
}
_GROUP = "fxcompress.passes"
_IN_FILE = re.compile(r"[^:]+\.py:\w+")


def pass_names() -> list[str]:
    """All names that :func:`parse_pass` knows, ours and third-party ones."""
    return sorted({*_BUILT_IN, *(point.name for point in entry_points(group=_GROUP))})


def resolve_passes(passes: Sequence[Pass | str] | Pass | str | None) -> tuple[Pass, ...]:
    """Instances for what the user listed.

    Raises:
        OptionError: an unknown name or option, or something that is no pass.
    """
    if passes is None:
        return ()
    if isinstance(passes, (Pass, str)):
        passes = [passes]
    if not isinstance(passes, Iterable) or isinstance(passes, Mapping):
        raise OptionError(
            f"passes is a {type(passes).__name__}",
            where="passes",
            remedy="give a list of passes: [FuseModules(), 'prune_channels(ratio=0.5)']",
        )
    resolved: list[Pass] = []
    for index, item in enumerate(passes):
        if isinstance(item, Pass):
            resolved.append(item)
        elif isinstance(item, str):
            resolved.append(parse_pass(item))
        elif isinstance(item, type) and issubclass(item, Pass):
            raise OptionError(
                f"passes[{index}] is the class {item.__name__}", remedy=f"make an instance: {item.__name__}(...)"
            )
        else:
            raise OptionError(
                f"passes[{index}] is a {type(item).__name__}, not a pass",
                remedy="give a Pass instance such as FuseModules(), or its name",
            )
    return tuple(resolved)


def as_pass(item: Any, load: Callable[[str], Any] | None = None) -> Pass:
    """A pass as it is, ``"name(option=value)"``, or ``{name: {option: value}}``.

    Args:
        item: one of these; options that are passes themselves may be told likewise.
        load: gives what an option of the form ``file.py:name`` means; None leaves such text as it is.

    Raises:
        OptionError: it is nothing of the kind, or names an unknown pass or option.
    """
    if isinstance(item, Pass):
        return item
    if isinstance(item, str):
        return parse_pass(item, load)
    name, options = pass_form(item)
    return make_pass(pass_class(name), _loaded(options, load))


def pass_form(item: Any) -> tuple[str, dict[str, Any]]:
    """Name and options of ``{name: {option: value}}``.

    Raises:
        OptionError: it has another form.
    """
    if not isinstance(item, Mapping):
        raise OptionError(f"{item!r} is no pass", remedy="give a pass, its name, or {name: {option: value}}")
    if len(item) != 1:
        raise OptionError(
            f"an entry of passes names {len(item)} passes: {', '.join(map(str, item))}",
            where="passes",
            remedy="begin each pass on a line of its own: - prune_channels: {ratio: 0.5}",
        )
    [(name, options)] = item.items()
    if options is not None and not (isinstance(options, Mapping) and all(isinstance(key, str) for key in options)):
        raise OptionError(
            f"the options of {name!r} are {options!r}, which names none",
            where=f"passes: {name}",
            remedy=f"name each option: - {name}: {{OPTION: {options!r}}}; `fxcompress passes` lists them",
        )
    return str(name), dict(options or {})


def _loaded(value: Any, load: Callable[[str], Any] | None) -> Any:
    if load is None:
        return value
    if isinstance(value, str) and _IN_FILE.fullmatch(value):
        return load(value)
    if isinstance(value, Mapping):
        return {key: _loaded(item, load) for key, item in value.items()}
    return type(value)(_loaded(item, load) for item in value) if isinstance(value, (list, tuple)) else value


def parse_pass(text: str, load: Callable[[str], Any] | None = None) -> Pass:
    """``"name"`` or ``"name(option=value, ...)"``; values are Python literals, ``load`` as for :func:`as_pass`.

    Raises:
        OptionError: the text is malformed, or names an unknown pass or option (the nearest is suggested).
    """
    name, options = _parse(text)
    return make_pass(pass_class(name), _loaded(options, load))


def make_pass(cls: type[Pass], options: dict[str, Any]) -> Pass:
    """An instance with options by name.

    Raises:
        OptionError: an unknown, missing or invalid option.
    """
    fields = {item.name: item for item in dataclasses.fields(cls) if item.init}
    for option in options:
        if option not in fields:
            raise OptionError(
                f"the pass {cls.name!r} has no option {option!r}", where=cls.name, remedy=nearest(option, fields)
            )
    missing = [
        name
        for name, item in fields.items()
        if name not in options and item.default is item.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise OptionError(
            f"the pass {cls.name!r} needs the option {missing[0]!r}",
            where=cls.name,
            remedy=f"give it: {cls.name}({missing[0]}=…); in text and recipes, data are of the form file.py:name",
        )
    values = {option: tuple(value) if isinstance(value, list) else value for option, value in options.items()}
    try:
        return cls(**values)
    except TypeError as error:
        raise OptionError(f"the pass {cls.name!r} cannot be made: {error}", remedy="give the missing option") from error


def _parse(text: str) -> tuple[str, dict[str, Any]]:
    malformed = OptionError(
        f"{text!r} is no pass",
        remedy="write a name, or a name with options: prune_channels(ratio=0.5); text among them stands in quotes "
        "of its own: quantize(data='file.py:batches')",
    )
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        raise malformed from None
    if isinstance(tree, ast.Name):
        return tree.id, {}
    if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name) or tree.args:
        raise malformed
    options: dict[str, Any] = {}
    for keyword in tree.keywords:
        if keyword.arg is None:
            raise malformed
        try:
            options[keyword.arg] = ast.literal_eval(keyword.value)
        except ValueError:
            raise OptionError(
                f"the value of {keyword.arg!r} in {text!r} is no literal",
                remedy="use a number, a 'string', True, False, None, or a tuple of those",
            ) from None
    return tree.func.id, options


def pass_class(name: str) -> type[Pass]:
    """The class of a pass, imported now.

    Raises:
        OptionError: the name is unknown (the nearest is suggested), or leads to what cannot be imported or is no pass.
    """
    if name in _BUILT_IN:
        module, _, attribute = _BUILT_IN[name].partition(":")
        cls = getattr(import_module(module), attribute)
    else:
        points = {point.name: point for point in entry_points(group=_GROUP)}
        if name not in points:
            raise OptionError(f"there is no pass {name!r}", remedy=nearest(name, pass_names()))
        try:
            cls = points[name].load()
        except Exception as error:
            raise OptionError(
                f"the pass {name!r} of {points[name].value!r} cannot be imported: {error}",
                remedy="repair or uninstall the package that provides it",
            ) from error
    if not (isinstance(cls, type) and issubclass(cls, Pass)):
        raise OptionError(f"the entry point {name!r} is no subclass of fxcompress.passes.Pass")
    return cls
