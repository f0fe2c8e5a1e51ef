"""A bundle: a directory that holds an engine or a graph, and ``manifest.json``, which tells what is in it.

Layout of format 1: the files that the backend writes, at any depth, and ``manifest.json`` with one entry for every
other file (its sha256 and size). A bundle appears all at once: files are written to a hidden sibling directory,
flushed to disk and hashed, and the directory is renamed into place last.

Reading trusts nothing. Every file must be listed, have the size and hash that the manifest says, lie inside the
directory and be a regular file; a file that is *not* listed is refused too, since engine libraries pick up files by
name (external weights, timing caches). The manifest is JSON; nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, TypeAlias

import pydantic

from fxcompress.backends.signature import TensorSpec
from fxcompress.errors import BundleError, FxCompressError, OptionError
from fxcompress.graph.structure import Structure

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST",
    "FileRecord",
    "Manifest",
    "PassRecord",
    "as_path",
    "files_of",
    "read_manifest",
]

FORMAT_VERSION = 1
MANIFEST = "manifest.json"

StructureJson: TypeAlias = Annotated[
    Structure,
    pydantic.PlainValidator(lambda told: told if isinstance(told, Structure) else _structure(told)),
    pydantic.PlainSerializer(Structure.to_json),
]


@dataclass(frozen=True)
class PassRecord:
    """A pass that made the graph what it is, with its options."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FileRecord:
    """What a file of the bundle must be: hexadecimal ``sha256`` and size in ``bytes``."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """What ``manifest.json`` says.

    Attributes:
        kind: ``engine`` (made by a backend) or ``graph`` (a graph saved to be worked on again).
        backend: the backend's name; None for a graph.
        inputs: flat, in the order in which an engine takes them.
        outputs: flat, in the order in which an engine gives them.
        input_structure: of ``(args, kwargs)``.
        output_structure: of what the user's model returned.
        options: of the backend, as needed to load the engine again.
        passes: what was done to the graph, in order.
        measurements: figures: errors against PyTorch, milliseconds, bytes.
        files: every file but the manifest, by its path inside the bundle.
        versions: of libraries, Python and platform where the bundle was made.
        fxcompress: the version that made it.
        created: UTC, ISO 8601.
        format_version: of this layout.
    """

    kind: Literal["engine", "graph"]
    backend: str | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    input_structure: StructureJson
    output_structure: StructureJson
    options: dict[str, Any] = field(default_factory=dict)
    passes: tuple[PassRecord, ...] = ()
    measurements: dict[str, Any] = field(default_factory=dict)
    files: dict[str, FileRecord] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    fxcompress: str = ""
    created: str = ""
    format_version: int = FORMAT_VERSION

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")

    def to_json(self) -> str:
        """The text of ``manifest.json``: strict JSON, indented."""
        return json.dumps(_adapter().dump_python(self, mode="json"), indent=2, allow_nan=False) + "\n"


def read_manifest(path: str | Path, *, kind: Literal["engine", "graph"] | None = None) -> Manifest:
    """Read and check the bundle at ``path``; every file of it is hashed.

    Args:
        path: the bundle's directory.
        kind: what the bundle must hold; None takes either.

    Raises:
        BundleError: the directory or a file of it is missing, truncated, altered, unlisted, or leads outside; the
            manifest is damaged, of a newer format, or of another kind.
    """
    directory = as_path(path, "path")
    if not directory.is_dir():
        what = "this is a file" if directory.exists() else "there is no such directory"
        raise BundleError(f"no bundle here: {what}", where=str(directory), remedy="give the directory of a bundle")
    manifest = _parse(directory / MANIFEST)
    if kind is not None and manifest.kind != kind:
        function, wanted = ("load", "an engine") if kind == "engine" else ("load_engine", "a graph")
        raise BundleError(
            f"this bundle does not hold {wanted}", where=str(directory), remedy=f"load it with fxcompress.{function}"
        )
    for name in manifest.files:
        _check_path(directory, name)
    present = set(files_of(directory)) - {MANIFEST}
    for name in sorted(present - manifest.files.keys()):
        raise BundleError(
            "the manifest does not list this file, so it may not be the bundle's",
            where=str(directory / name),
            remedy="delete it, or keep it outside the bundle",
        )
    for name, expected in manifest.files.items():
        if name not in present:
            raise _damaged(directory / name, "is missing")
        size = (directory / name).stat().st_size
        if size != expected.bytes:
            raise _damaged(directory / name, f"has {size} bytes instead of {expected.bytes}")
        if file_record(directory / name).sha256 != expected.sha256:
            raise _damaged(directory / name, "was altered: its sha256 differs from the manifest's")
    return manifest


def as_path(path: object, option: str) -> Path:
    """The path that a caller gave for a bundle.

    Raises:
        OptionError: it is neither text nor a path, or empty.
    """
    if isinstance(path, (str, os.PathLike)) and os.fspath(path):
        return Path(os.fsdecode(path))
    raise OptionError(
        f"{option} is {path!r}, which names no directory", where=option, remedy="give a directory as text or Path"
    )


def files_of(directory: Path) -> Iterator[str]:
    """Paths of all files under ``directory``, relative, with ``/``.

    Raises:
        BundleError: there is a symbolic link, a device or a pipe.
    """
    for entry in sorted(directory.iterdir()):
        mode = entry.lstat().st_mode
        if stat.S_ISDIR(mode):
            yield from (f"{entry.name}/{inner}" for inner in files_of(entry))
        elif stat.S_ISREG(mode):
            yield entry.name
        else:
            what = "a symbolic link" if stat.S_ISLNK(mode) else "not a regular file"
            raise BundleError(
                f"a bundle holds plain files and directories only; this is {what}",
                where=str(entry),
                remedy="copy the bundle with its links followed (cp -rL) from a source that you trust",
            )


def file_record(path: Path) -> FileRecord:
    """Hash and size of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileRecord(digest, file.tell())


@cache
def _adapter() -> pydantic.TypeAdapter[Manifest]:
    return pydantic.TypeAdapter(Manifest)


def _structure(told: Any) -> Structure:
    try:
        return Structure.from_json(told)
    except FxCompressError as error:
        raise ValueError(error.problem) from error  # pydantic adds the place


def _parse(file: Path) -> Manifest:
    try:
        text = file.read_bytes()
        told = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        raise _damaged(file, reason) from error
    version = told.get("format_version") if isinstance(told, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise BundleError(
            f"this bundle has format {version}; this fxcompress reads up to {FORMAT_VERSION}",
            where=str(file),
            remedy=f"update fxcompress (the bundle was made by {told.get('fxcompress') or 'a newer version'})",
        )
    try:
        manifest = _adapter().validate_json(text, strict=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise _damaged(file, f"is damaged at {place}: {first['msg']}") from error
    if manifest.format_version != FORMAT_VERSION:
        raise _damaged(file, f"tells an impossible format {manifest.format_version}")
    return manifest


def _check_path(directory: Path, name: str) -> None:
    path = PurePosixPath(name)
    climbs = path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or "\0" in name
    if climbs or not path.parts or path.as_posix() != name or name == MANIFEST:
        raise BundleError(
            f"the manifest lists {name!r}, which is no plain path inside the bundle",
            where=str(directory / MANIFEST),
            remedy="do not use this bundle: it was not written by fxcompress, or was altered",
        )


def _damaged(file: Path, reason: str) -> BundleError:
    return BundleError(
        f"{file.name} {reason}", where=str(file), remedy="copy or download the bundle again, or build it anew"
    )
