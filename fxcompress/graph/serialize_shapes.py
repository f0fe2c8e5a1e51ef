"""What a saved graph's inputs are: dtypes, devices and sizes, with equal symbols for equal dynamic dims.

A size is a number or text such as ``"s77"`` or ``"2*s77"``. Loading makes new symbols with the same ranges in a new
``ShapeEnv``; the text is read by a parser of its own that knows numbers, symbols and ``+ - * // %``, and runs nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from fxcompress.errors import BundleError
from fxcompress.graph.serialize_values import check_identifier, decode, encode, unserializable

__all__ = ["decode_value", "encode_value", "make_symbols", "parse_size", "symbols_of"]


def symbols_of(graph: fx.Graph) -> dict[str, dict[str, int | None]]:
    """The symbols in the sizes of the inputs: name → example size, least and greatest size."""
    found: dict[str, dict[str, int | None]] = {}
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        for size in value.shape if isinstance(value, torch.Tensor) else (value,):
            if not isinstance(size, torch.SymInt):
                continue
            environment = size.node.shape_env
            for symbol in sorted(size.node.expr.free_symbols, key=str):
                if symbol not in environment.backed_var_to_val:
                    raise unserializable(f"the size {size} of an input is not known before it runs", node.name)
                bounds = environment.var_to_range[symbol]
                found[str(symbol)] = {
                    "example": int(environment.backed_var_to_val[symbol]),
                    "min": _finite(bounds.lower),
                    "max": _finite(bounds.upper),
                }
    return found


def make_symbols(told: Mapping[str, Mapping[str, Any]]) -> tuple[FakeTensorMode, dict[str, Any]]:
    """A new fake mode with a size for each symbol that :func:`symbols_of` told of.

    Raises:
        BundleError: the example lies outside the range.
    """
    from torch._dynamo.source import ConstantSource  # which takes as long to import as all of fxcompress

    environment = ShapeEnv()
    sizes: dict[str, Any] = {}
    for name, facts in told.items():
        check_identifier(name, "symbols")
        example, low, high = int(facts["example"]), facts["min"], facts["max"]
        source = ConstantSource(name)
        symbol = environment.create_symbol(example, source, DimDynamic.DYNAMIC, do_not_specialize_zero_one=True)
        if (low is not None and int(low) > example) or (high is not None and int(high) < example):
            raise BundleError(
                f"the size {name} is {example}, outside of {low} to {high}",
                where="symbols",
                remedy="do not use this file: it was altered",
            )
        known = environment.var_to_range[symbol]
        environment.constrain_symbol_range(
            symbol, known.lower if low is None else int(low), known.upper if high is None else int(high)
        )
        sizes[name] = environment.create_symintnode(symbol, hint=example, source=source)
    return FakeTensorMode(shape_env=environment), sizes


def encode_value(value: Any, where: str) -> dict[str, Any]:
    """What an input is, as JSON: a tensor, a size, or a constant that capture fixed."""
    if isinstance(value, torch.Tensor):
        return {
            "dtype": str(value.dtype).removeprefix("torch."),
            "device": str(value.device),
            "shape": [_told(size, where) for size in value.shape],
            "stride": [_told(step, where) for step in value.stride()],
        }
    if isinstance(value, torch.SymInt):
        return {"size": _told(value, where)}
    return {"constant": encode(value, where)}


def decode_value(
    told: Mapping[str, Any], mode: FakeTensorMode, sizes: Mapping[str, Any], device: torch.device | None, where: str
) -> Any:
    """The fake value that :func:`encode_value` told.

    Raises:
        BundleError: it is no such value.
    """
    if "constant" in told:
        return decode(told["constant"], {}, device, where)
    if "size" in told:
        return parse_size(told["size"], sizes, where)
    dtype = decode({"dtype": told["dtype"]}, {}, None, where)
    place = decode({"device": told["device"]}, {}, device, where)
    shape, stride = ([parse_size(size, sizes, where) for size in told[key]] for key in ("shape", "stride"))
    with mode:
        return torch.empty_strided(shape, stride, dtype=dtype, device=place)


# --- sizes -----------------------------------------------------------------------------------------------------

_TOKEN = re.compile(r"\s*(\d+|[A-Za-z_]\w*|//|\*\*|[-+*%()])")


def parse_size(told: Any, sizes: Mapping[str, Any], where: str) -> Any:
    """The size that a number or a text such as ``"2*s77"`` says, computed on ``sizes`` of the symbols.

    Raises:
        BundleError: it is no such text, or names an unknown symbol.
    """
    if isinstance(told, int) and not isinstance(told, bool):
        return told
    if not isinstance(told, str) or len(told) > 1000:
        raise _no_size(told, where)
    tokens, end = [], 0
    while told[end:].strip():
        found = _TOKEN.match(told, end)
        if found is None:
            raise _no_size(told, where)
        tokens.append(found[1])
        end = found.end()
    try:
        value = _sum(tokens, sizes)
    except (KeyError, IndexError, ValueError, ZeroDivisionError, RecursionError) as error:
        raise _no_size(told, where) from error
    if tokens:
        raise _no_size(told, where)
    return value


def _sum(tokens: list[str], sizes: Mapping[str, Any]) -> Any:
    value = _product(tokens, sizes)
    while tokens and tokens[0] in "+-":
        sign, other = tokens.pop(0), _product(tokens, sizes)
        value = value + other if sign == "+" else value - other
    return value


def _product(tokens: list[str], sizes: Mapping[str, Any]) -> Any:
    value = _power(tokens, sizes)
    while tokens and tokens[0] in ("*", "//", "%"):
        sign, other = tokens.pop(0), _power(tokens, sizes)
        value = value * other if sign == "*" else value // other if sign == "//" else value % other
    return value


def _power(tokens: list[str], sizes: Mapping[str, Any]) -> Any:
    value = base = _atom(tokens, sizes)
    if tokens and tokens[0] == "**":
        tokens.pop(0)
        exponent = int(tokens.pop(0))
        if not 0 < exponent <= 8:
            raise ValueError("no such power of a size")
        for _ in range(exponent - 1):
            value = value * base
    return value


def _atom(tokens: list[str], sizes: Mapping[str, Any]) -> Any:
    token = tokens.pop(0)
    if token == "-":
        return -_power(tokens, sizes)
    if token == "(":
        value = _sum(tokens, sizes)
        if tokens.pop(0) != ")":
            raise ValueError("unbalanced")
        return value
    return int(token) if token[0].isdigit() else sizes[token]


def _told(size: Any, where: str) -> int | str:
    if not isinstance(size, torch.SymInt):
        return int(size)
    text = str(size.node.expr)
    if text.isdigit():
        return int(text)
    # Read back what was written, with numbers in the place of sizes: what fails here would fail at loading.
    try:
        parse_size(text, {str(symbol): 60 for symbol in size.node.expr.free_symbols}, where)
    except BundleError as error:
        raise unserializable(
            f"an input's size is {text}, which has no serial form", where, "capture it with independent dynamic dims"
        ) from error
    return text


def _finite(bound: Any) -> int | None:
    return int(bound) if bound.is_Integer and abs(int(bound)) < 2**62 else None


def _no_size(told: Any, where: str) -> BundleError:
    return BundleError(f"{str(told)[:80]!r} is no size", where=where, remedy="do not use this file: it was altered")
