"""What a backend is: it writes a graph into a bundle, and loads such a bundle as an engine.

A new backend is one frozen dataclass: its fields are its options, ``name`` its name in manifests and on the command
line, :meth:`Backend.write` puts files into a directory, :meth:`Backend.load` opens them. Staging, hashing, the
manifest, verification and clean-up on failure are done here, once for all.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, fx

from fxcompress.backends.bundle import Manifest, PassRecord
from fxcompress.backends.bundle_writer import BundleWriter, library_versions
from fxcompress.backends.engine import Engine
from fxcompress.backends.reference import REFERENCE_FILE, Reference, write_reference
from fxcompress.backends.signature import Signature, TensorSpec, signature_of
from fxcompress.backends.verification import verify_engine
from fxcompress.errors import BackendError, OptionError, nearest
from fxcompress.options import Options

__all__ = ["Backend", "BuildContext", "Engine", "PassRecord", "Signature", "TensorSpec", "verify_engine"]


def _silent(_: str) -> None:
    """Report nothing."""


@dataclass
class BuildContext:
    """What the pipeline hands to a backend beside the graph.

    Attributes:
        passes: what was done to the graph, for the manifest.
        example_inputs: flat, one tensor per input; None if there are none.
        progress: called with a few words before each step.
        measurements: figures for the manifest; a backend adds its own.
        verify: called with the engine before its bundle is put into place; the figures that it returns go into the
            manifest under ``"verification"``, and what it raises leaves nothing on disk. Not called for an engine
            that cannot run on this machine.
        instead: what was verified in the place of such an engine; a sentence for the manifest, after the reason.
        reference: gives inputs and PyTorch's outputs to keep in the bundle, for ``fxcompress verify``; not asked where
            the backend wrote some of its own.
        sources: filled in by a backend that knows: name of a node of the engine → the node of the graph that it
            came from.
    """

    passes: Sequence[PassRecord] = ()
    example_inputs: Sequence[Tensor] | None = None
    progress: Callable[[str], None] = _silent
    measurements: dict[str, Any] = field(default_factory=dict)
    verify: Callable[[Engine], Mapping[str, Any]] | None = None
    instead: str = ""
    reference: Callable[[], Reference] | None = None
    sources: Mapping[str, str] = field(default_factory=dict)

    def note(self, sentence: str) -> None:
        """What the report shall say of the engine; nothing where it is empty."""
        if sentence:
            self.measurements.setdefault("notes", []).append(sentence)


class Backend(Options, ABC):
    """Base of all backends; a subclass is a frozen dataclass whose fields are options of JSON's types.

    Class attributes:
        name: in manifests, registries and on the command line.
        packages: distributions whose versions the manifest records.
        built_in: options that are in the engine's files, and cannot be others when it is loaded.
    """

    name: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()
    built_in: ClassVar[tuple[str, ...]] = ()

    # -- to implement ------------------------------------------------------------------------------------------

    @abstractmethod
    def write(self, graph_module: fx.GraphModule, directory: Path, signature: Signature, context: BuildContext) -> None:
        """Write the engine's files into ``directory``, which is empty, exists, and will be moved afterwards.

        Args:
            graph_module: a captured graph; it is not changed.
            directory: for the files; subdirectories are fine, symbolic links are not.
            signature: names, shapes and dtypes that the engine shall have.
            context: of the build; ``measurements`` may be added to.

        Raises:
            BackendError: this graph cannot be lowered; names the node.
        """

    @classmethod
    @abstractmethod
    def load(cls, path: Path, manifest: Manifest, **overrides: Any) -> Engine:
        """Open the engine in the bundle at ``path``, whose files are already checked.

        Args:
            path: the bundle's directory.
            manifest: of the bundle.
            overrides: options that replace those in the manifest, by name.

        Raises:
            OptionError: an override is unknown or outside its range.
            BackendError: the library refuses the files, or lacks what the options ask for.
        """

    @property
    def computes_in(self) -> torch.dtype | None:
        """What the options let the engine round to, where that is coarser than the graph's own dtypes."""
        return None

    def load_built(self, path: Path, manifest: Manifest) -> Engine:
        """Open what :meth:`write` has just written here; :meth:`load`, which need not trust what it reads, will do."""
        return type(self).load(path, manifest)

    def examine(self, engine: Engine, graph_module: fx.GraphModule, context: BuildContext) -> Mapping[str, Any]:
        """Figures for the manifest that only the engine tells: nothing, unless a backend has some.

        Args:
            engine: that was just built from ``graph_module``.
            graph_module: a captured graph.
            context: of the build.
        """
        return {}

    # -- done here ---------------------------------------------------------------------------------------------

    def build(self, graph_module: fx.GraphModule, output: str | Path | None, context: BuildContext) -> Engine:
        """Lower a graph to an engine in a bundle.

        Args:
            graph_module: a captured graph; it is not changed.
            output: where the bundle shall be; None keeps it in a temporary directory for as long as the engine
                lives.
            context: of the build.

        Returns:
            the engine, ready to run, verified if ``context.verify`` is given.

        Raises:
            BundleError: the bundle cannot be written at ``output``.
            BackendError: the graph cannot be lowered, or the engine cannot be opened.
            VerificationError: from ``context.verify``.
        """
        signature = signature_of(graph_module, context.example_inputs)
        with BundleWriter(output) as writer:
            try:
                self.write(graph_module, writer.directory, signature, context)
            except OSError as error:
                raise self._no_room(error) from error
            draft = Manifest(
                "engine",
                self.name,
                signature.inputs,
                signature.outputs,
                signature.input_structure,
                signature.output_structure,
                options=self.options(),
                passes=tuple(context.passes),
                measurements=context.measurements,
                versions=library_versions(self.packages),
            )
            context.progress(f"load {self.name} engine")
            engine = self.load_built(writer.directory, draft)
            try:
                left_out = self._keep_reference(writer.directory, context)
                context.measurements |= {"reference": left_out} if left_out else {}
                if context.verify is None or left_out:
                    engine.open()  # now: the first run could not tell whether the engine is right
                if context.verify is not None:
                    context.progress(f"verify {self.name} engine")
                    skipped = {"skipped": "; ".join(filter(None, (engine.unavailable, context.instead)))}
                    found = skipped if engine.unavailable else dict(context.verify(engine))
                    context.measurements["verification"] = found
                context.measurements.update(self.examine(engine, graph_module, context))
                path, manifest = writer.commit(draft)
            except BaseException:
                engine.close()
                raise
        engine._settle(path, manifest, writer.temporary)
        return engine

    def _keep_reference(self, directory: Path, context: BuildContext) -> str:
        """Write the reference data, unless :meth:`write` chose its own; why it was left out, if it was."""
        if context.reference is None or (directory / REFERENCE_FILE).exists():
            return ""
        try:
            return write_reference(directory, context.reference())
        except OSError as error:
            raise self._no_room(error) from error

    def _no_room(self, error: OSError) -> BackendError:
        return BackendError(
            f"writing the {self.name} engine failed: {error.strerror or error}",
            remedy="make room on the disk, or choose another output",
        )

    def options(self) -> dict[str, Any]:
        """The options by name."""
        assert dataclasses.is_dataclass(self) and not isinstance(self, type)
        return {option.name: getattr(self, option.name) for option in dataclasses.fields(self)}

    @classmethod
    def from_manifest(cls, manifest: Manifest, overrides: Mapping[str, Any]) -> Self:
        """The backend with the options of a manifest, ``overrides`` taking precedence.

        Raises:
            OptionError: an option is unknown, outside its range, or built into the engine.
        """
        assert dataclasses.is_dataclass(cls)
        known = [option.name for option in dataclasses.fields(cls)]
        told = {**manifest.options, **overrides}
        for name in told:
            if name not in known:
                raise OptionError(
                    f"backend {cls.name!r} has no option {name!r}",
                    where=f"{cls.__name__}.{name}",
                    remedy=nearest(name, known),
                )
        for name in cls.built_in:
            if name in overrides and overrides[name] != manifest.options.get(name):
                raise OptionError(
                    f"the option {name} is built into the engine",
                    where=f"{cls.__name__}.{name}",
                    remedy="build the engine anew with it",
                )
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in told.items()})
