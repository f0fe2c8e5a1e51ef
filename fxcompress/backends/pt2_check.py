"""Is a ``.pt2`` file safe to load? ``torch.export.load`` unpickles, resolves names and evaluates expressions in it.

What was read in torch 2.13: weights and constants marked ``use_pickle``, sample inputs, and files of the older formats
are unpickled without restriction; a node's ``target`` may be any attribute of ``torch``, and is called; size
expressions go through ``sympy.sympify``, which evaluates Python. A program of ATen operations needs none of that, so a
file is let through only if it has none.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fxcompress.errors import BackendError, BundleError

__all__ = ["check_pt2"]

_PROGRAM = "models/model.json"
_CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_SAMPLE_INPUTS = "data/sample_inputs/model.pt"
_TENSORS = re.compile(r"data/weights/weight_\d+|data/constants/tensor_\d+")
_MARKS = re.compile(r"archive_format|archive_version|byteorder|version|\.data/\w+|\.format_version|\.storage_alignment")
_TARGETS = re.compile(
    r"torch\.ops\.aten\.(?!from_file\b)\w+\.\w+"
    r"|_operator\.(?:getitem|add|sub|mul|floordiv|truediv|mod|pow|neg|eq|ne|lt|le|gt|ge|and_|or_|not_)"
    r"|math\.(?:floor|ceil|trunc|sqrt)|torch\.sym_(?:max|min|float|int|not|ite)"
)
# Symbols with their assumptions, numbers, and sympy's functions of them: no attribute, no other text, no underscore.
_EXPRESSION = re.compile(
    r"(?:'[a-z]{1,4}\d+'|\b[a-z]{1,4}\d+\b|\b[a-z]+=(?:True|False)|\b[A-Z][A-Za-z]*\b|\b\d+(?:\.\d+)?\b|[\s+\-*/(),<>=!&|])*+"
)
_CONTAINERS = ("builtins.tuple", "builtins.list", "builtins.dict", None)


def check_pt2(file: Path) -> None:
    """Refuse a file that could run code while ``torch.export.load`` reads it.

    Raises:
        BackendError: this is no ``.pt2`` file.
        BundleError: it holds what could run code; names it.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = {name.partition("/")[2]: info for name, info in archive.NameToInfo.items()}
            if len(members) != len(archive.infolist()):
                raise _refused(file, "it holds two files of one name")
            _check_members(file, {name: info.file_size for name, info in members.items()})
            for config in _CONFIGS:
                _check_config(file, json.loads(archive.read(members[config])))
            _check_program(file, json.loads(archive.read(members[_PROGRAM])))
    except (zipfile.BadZipFile, OSError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BackendError(
            f"this is no exported program: {error!r}", where=str(file), remedy="build the bundle anew"
        ) from error


def _check_members(file: Path, sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        known = name in (_PROGRAM, *_CONFIGS) or _TENSORS.fullmatch(name) or _MARKS.fullmatch(name)
        if not known and not (name == _SAMPLE_INPUTS and size == 0):
            raise _refused(file, f"it holds {name!r}, which may be pickled")


def _check_config(file: Path, config: Any) -> None:
    for name, payload in config["config"].items():
        if payload["use_pickle"] is not False:
            raise _refused(file, f"the tensor {name!r} is pickled")


def _check_program(file: Path, program: Any) -> None:
    if program.get("guards_code"):
        raise _refused(file, "it holds guards, which are Python code")
    for name in program["range_constraints"]:
        _check_expression(file, name)
    for key, value in _entries(program):
        if key == "target" and isinstance(value, str) and "." in value and not _TARGETS.fullmatch(value):
            # Names of weights stand under "target" too, but are no attributes of a package.
            if value.split(".")[0] in ("torch", "_operator", "math") or value.startswith("#"):
                raise _refused(file, f"it calls {value!r}")
        elif key == "expr_str":
            _check_expression(file, value)
        elif key in ("in_spec", "out_spec") and value:
            for inner, kind in _entries(json.loads(value)):
                if inner == "type" and kind not in _CONTAINERS:
                    raise _refused(file, f"its inputs or outputs are a {kind!r}")


def _check_expression(file: Path, text: str) -> None:
    if not _EXPRESSION.fullmatch(text):
        raise _refused(file, f"the size {text!r} is no arithmetic of sizes")


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            yield from found.items()
            waiting.extend(found.values())
        elif isinstance(found, list):
            waiting.extend(found)


def _refused(file: Path, reason: str) -> BundleError:
    return BundleError(
        f"this exported program could run code when it is loaded: {reason}",
        where=str(file),
        remedy="do not use this bundle unless you know who made it, and then load it with torch.export.load",
    )
