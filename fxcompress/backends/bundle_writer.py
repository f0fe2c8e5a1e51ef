"""Writing a bundle so that it appears at once, complete, or not at all."""

from __future__ import annotations

import math
import os
import platform
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from fxcompress.backends.bundle import MANIFEST, Manifest, as_path, file_record, files_of
from fxcompress.errors import BundleError

__all__ = ["BundleWriter", "check_output", "library_versions"]


def check_output(path: str | Path) -> Path:
    """The absolute form of ``path``, after making sure that a bundle can be written there.

    Meant to be called before any work is done. Nothing stays on disk.

    Raises:
        OptionError: ``path`` is neither text nor a path, or empty.
        BundleError: a file or a directory with something in it stands there, or the place cannot be written.
    """
    target = Path(os.path.abspath(as_path(path, "output")))
    try:
        if target.is_symlink() and not target.exists():
            raise _occupied(target, "a symbolic link that leads nowhere")
        if target.exists() and not target.is_dir():
            raise _occupied(target, "a file")
        if target.is_dir() and any(target.iterdir()):
            raise _occupied(target, "a directory that is not empty")
        ancestor = next(parent for parent in target.parents if parent.exists())
        # Asking the file system to do it is the only answer that holds: read-only mounts, quotas, root. The name
        # is as long as the one that the scratch directory will have.
        os.rmdir(tempfile.mkdtemp(prefix=f".{target.name}.", dir=ancestor))
    except (OSError, ValueError) as error:
        raise _unwritable(target, error) from error
    return target


class BundleWriter:
    """A staging directory that :meth:`commit` turns into a bundle.

    ``with BundleWriter(output) as writer:`` write files into ``writer.directory``, then ``writer.commit(manifest)``.
    Leaving the block without a commit removes everything that was written, directories made on the way included.

    Args:
        output: where the bundle shall be; None keeps it in a temporary directory, which belongs to whoever takes
            ``writer.temporary`` after the commit and removes it in the end.

    Attributes:
        directory: where to write.
        temporary: the directory to remove when the bundle is not needed any more; None if ``output`` was given.

    Raises:
        BundleError: as :func:`check_output`, and when writing fails.
    """

    def __init__(self, output: str | Path | None) -> None:
        self.target = None if output is None else check_output(output)
        self.temporary: Path | None = None
        self.directory = Path()
        self._scratch: Path | None = None
        self._made: list[Path] = []

    def __enter__(self) -> BundleWriter:
        try:
            if self.target is None:
                self._scratch = Path(tempfile.mkdtemp(prefix="fxcompress-"))
            else:
                self._made = [parent for parent in self.target.parents if not parent.exists()]
                self.target.parent.mkdir(parents=True, exist_ok=True)
                # A sibling, so that the rename stays within one file system.
                self._scratch = Path(tempfile.mkdtemp(prefix=f".{self.target.name}.", dir=self.target.parent))
            # One level down: mkdtemp makes directories that only the owner can read, bundles are for others too.
            self.directory = self._scratch / "bundle"
            self.directory.mkdir()
        except OSError as error:
            self._clear()
            raise _unwritable(self.target or Path(tempfile.gettempdir()), error) from error
        return self

    def commit(self, manifest: Manifest) -> tuple[Path, Manifest]:
        """Hash the files, write the manifest, and put the bundle into place.

        Args:
            manifest: complete but for ``files``, ``versions`` (merged with :func:`library_versions`), ``fxcompress``
                and ``created``, which are filled in here.

        Returns:
            the bundle's path and the manifest as written.

        Raises:
            BundleError: the manifest holds what JSON cannot, a file is a link, or the disk refuses.
        """
        manifest = replace(
            manifest,
            options=_plain(manifest.options, "options"),
            passes=tuple(replace(done, options=_plain(done.options, done.name)) for done in manifest.passes),
            measurements=_plain(manifest.measurements, "measurements"),
            files={name: file_record(self.directory / name) for name in files_of(self.directory) if name != MANIFEST},
            versions={**library_versions(), **manifest.versions},
            fxcompress=library_versions(["fxcompress"]).get("fxcompress", "source"),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        try:
            (self.directory / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
            for directory, _, names in os.walk(self.directory):
                for name in names:
                    _flush(Path(directory, name))
                _flush(Path(directory))
            return self._place(), manifest
        except OSError as error:
            raise _unwritable(self.target or self.directory, error) from error

    def _place(self) -> Path:
        if self.target is None:
            self.temporary, self._scratch = self._scratch, None
            return self.directory
        place = self.target.resolve()  # an empty directory reached by a link is filled, the link stays
        if os.name == "nt" and place.exists():
            place.rmdir()  # POSIX renames over an empty directory in one step
        os.rename(self.directory, place)
        self._made = []
        _flush(place.parent)
        return self.target

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clear()

    def _clear(self) -> None:
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
        for directory in self._made:  # innermost first; stops mattering once one is in use
            try:
                directory.rmdir()
            except OSError:
                break


def library_versions(packages: Iterable[str] = ("torch", "numpy")) -> dict[str, str]:
    """Versions of installed ``packages``, of Python and of the platform; packages not installed are left out."""
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _plain(value: Any, where: str) -> Any:
    """``value`` in JSON's own types: arrays' scalars become numbers, NaN and infinities become null."""
    if isinstance(value, (np.generic, torch.Tensor)) and np.ndim(value) == 0:
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (tuple, list, set, frozenset)):
        items = value if isinstance(value, (tuple, list)) else sorted(value, key=str)
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(items)]
    if isinstance(value, (Path, torch.dtype)):
        return str(value)
    raise BundleError(
        f"a manifest cannot hold a {type(value).__name__}", where=where, remedy="record numbers, text, lists and dicts"
    )


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows has no handle on directories to flush
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _occupied(target: Path, what: str) -> BundleError:
    return BundleError(
        f"the output is {what}, and a bundle never overwrites",
        where=str(target),
        remedy="choose another output, or delete what is there",
    )


def _unwritable(target: Path, error: Exception) -> BundleError:
    return BundleError(
        f"a bundle cannot be written here: {getattr(error, 'strerror', None) or error}",
        where=str(target),
        remedy="choose an output in a directory that you may write to, with room for the engine",
    )
