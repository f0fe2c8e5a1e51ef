"""Backends by name: ours, and those that other packages register under the entry-point group."""

from __future__ import annotations

import importlib
from importlib import metadata
from pathlib import Path
from typing import Any

from fxcompress.backends.base import Backend
from fxcompress.backends.bundle import MANIFEST, as_path, read_manifest
from fxcompress.backends.engine import Engine
from fxcompress.errors import BackendError, BundleError, OptionError, nearest

__all__ = ["ENTRY_POINT_GROUP", "backend_class", "backend_names", "load_engine", "resolve_backend"]

ENTRY_POINT_GROUP = "fxcompress.backends"

_BUILT_IN = {
    "onnxruntime": "fxcompress.backends.onnxruntime:OnnxRuntime",
    "openvino": "fxcompress.backends.openvino:OpenVINO",
    "torchscript": "fxcompress.backends.torchscript:TorchScript",
    "torch_export": "fxcompress.backends.torch_export:TorchExport",
    "tensorrt": "fxcompress.backends.tensorrt:TensorRT",
}
_ALIASES = {"onnx": "onnxruntime"}
_EXTRAS = {"tensorrt": "tensorrt", "openvino": "openvino"}


def backend_names() -> list[str]:
    """All names that :func:`resolve_backend` takes, aliases included."""
    return sorted({*_BUILT_IN, *_ALIASES, *(point.name for point in metadata.entry_points(group=ENTRY_POINT_GROUP))})


def backend_class(name: str) -> type[Backend]:
    """The class of a backend, imported now.

    Raises:
        OptionError: the name is unknown.
        BackendError: its module, or the library that it drives, cannot be imported, or it is no backend.
    """
    name = _ALIASES.get(name, name)
    if name in _BUILT_IN:
        target = _BUILT_IN[name]
    else:
        points = metadata.entry_points(group=ENTRY_POINT_GROUP, name=name)
        if not points:
            raise OptionError(f"unknown backend {name!r}", where="backend", remedy=nearest(name, backend_names()))
        target = next(iter(points)).value
    module, _, attribute = target.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        extra = f"fxcompress[{_EXTRAS[name]}]" if name in _EXTRAS else "its package"
        raise BackendError(
            f"backend {name!r} cannot be imported: {error}", where=target, remedy=f"install {extra}, or repair it"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Backend)):
        raise BackendError(f"backend {name!r} is not a subclass of fxcompress.backends.base.Backend", where=target)
    return found


def resolve_backend(backend: str | Backend) -> Backend:
    """The backend itself, or the one called so, with default options.

    Raises:
        OptionError: the name is unknown, or this is neither a name nor a backend.
        BackendError: the backend cannot be imported.
    """
    if isinstance(backend, Backend):
        return backend
    if isinstance(backend, str):
        name, bracket, _ = backend.partition("(")
        if bracket and name in backend_names():
            made = f"fxcompress.backends.{backend_class(name).__name__}(...)"
            raise OptionError(f"{backend!r} is no name", where="backend", remedy=f"give options to an instance: {made}")
        return backend_class(backend)()
    if isinstance(backend, type) and issubclass(backend, Backend):
        made = f"{backend.__name__}(...)"
        raise OptionError(f"the backend is a class: {backend.__name__}", where="backend", remedy=f"make it: {made}")
    raise OptionError(
        f"a backend is a name or an instance, not a {type(backend).__name__}",
        where="backend",
        remedy=f"known names: {', '.join(backend_names())}",
    )


def load_engine(path: str | Path, **options: Any) -> Engine:
    """Load an engine from its bundle, after checking every file of it.

    Args:
        path: the bundle's directory.
        options: of the backend, in place of those that the bundle was built with: ``threads=4``.

    Raises:
        BundleError: the bundle is missing, damaged, altered, of a newer format, or holds no engine.
        BackendError: its backend is unknown here, lacks its library, or refuses the files.
        OptionError: an option is unknown or outside its range.
    """
    directory = as_path(path, "path").absolute()
    manifest = read_manifest(directory, kind="engine")
    name = manifest.backend or ""
    try:
        backend = backend_class(name)
    except OptionError as error:
        raise BackendError(
            f"this bundle needs backend {name!r}, which is not installed here",
            where=str(directory),
            remedy=error.remedy,
        ) from error
    try:
        backend.from_manifest(manifest, {})
    except OptionError as error:
        raise BundleError(
            f"the manifest's options are wrong: {error.problem}",
            where=str(directory / MANIFEST),
            remedy="copy or download the bundle again, or build it anew",
        ) from error
    return backend.load(directory, manifest, **options)
