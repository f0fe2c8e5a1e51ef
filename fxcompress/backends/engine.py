"""An engine: a compiled model that runs without PyTorch code, called as the user's model was."""

from __future__ import annotations

import shutil
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import numpy as np
import torch

from fxcompress.backends.benchmark import BenchmarkResult, benchmark
from fxcompress.backends.bundle import Manifest
from fxcompress.backends.sampling import random_inputs
from fxcompress.backends.tensors import Array, Native, reader, to_numpy, to_torch
from fxcompress.errors import BackendError, PreconditionError
from fxcompress.graph.binding import bind, signature_text

__all__ = ["Engine"]


class Engine(ABC):
    """A loaded bundle that can run.

    A subclass says in ``native`` what its library works on, and implements :meth:`_execute` and, where there is
    something to let go, :meth:`_release`. Everything that a call needs is worked out here, once.

    Args:
        path: the bundle's directory.
        manifest: as read from it.

    Attributes:
        path: the bundle's directory, absolute.
        manifest: inputs, outputs, passes, versions, figures.
        unavailable: why this engine cannot run on this machine; None where it can.
    """

    native: ClassVar[Native] = "numpy"

    def __init__(self, path: str | Path, manifest: Manifest, *, unavailable: str | None = None) -> None:
        self.path = Path(path).absolute()
        self.manifest = manifest
        self.unavailable = unavailable
        self._closed = False
        self._names = [spec.name for spec in manifest.inputs]
        self._readers = [reader(spec, self.native) for spec in manifest.inputs]
        self._symbols = _shared_symbols([spec.shape for spec in manifest.inputs])
        positional, keywords = manifest.input_structure.children
        parameters = [*positional.children, *keywords.children]
        # Most models take tensors only: then a call by position, or by name, is flat as it stands.
        self._flat_call = all(part.kind == "leaf" for part in parameters)
        known = [*(positional.keys or self._names[: len(positional.children)]), *keywords.keys]
        self._named_call = set(self._names) if self._flat_call and known == self._names else None
        self._sole_output = manifest.output_structure.kind == "leaf"

    # -- to implement ------------------------------------------------------------------------------------------

    @abstractmethod
    def _execute(self, inputs: list[Array]) -> Sequence[Array]:
        """Run on checked inputs, flat, in the order of the manifest; outputs likewise.

        Arrays and tensors may be strided and may be read-only. A dtype that numpy lacks comes as a tensor also
        where ``native`` is ``"numpy"``, and is expected back as one.

        Raises:
            BackendError: the library failed.
        """

    def _execute_each(self, sets: Sequence[list[Array]]) -> list[Sequence[Array]]:
        """:meth:`_execute` for several runs, which an engine may know a thriftier way for."""
        return [self._execute(inputs) for inputs in sets]

    def open(self) -> None:  # noqa: B027  (most engines are open from the start)
        """Get ready to run now, for an engine that opens its model when it is first run.

        Raises:
            BackendError: the library refuses the model, or the engine is closed.
            VerificationError: the opened model does not reproduce the bundle's reference data.
        """

    def when_wrong(self) -> str:
        """What to do about outputs that differ from PyTorch's, where the library has a known reason; else nothing."""
        return ""

    def _release(self) -> None:  # noqa: B027  (most engines have nothing to let go)
        """Let go of the library's objects."""

    # -- running -----------------------------------------------------------------------------------------------

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the engine.

        Args:
            args: tensors or numpy arrays, as the model was called at capture, or one per input in flat order.
            kwargs: the same by parameter name or by flat input name (``manifest.inputs[i].name``).

        Returns:
            what the user's model returned, in the same structure (objects of user classes as
            :class:`~fxcompress.graph.structure.Record`): torch tensors if any input was one, else numpy arrays.
            Tensors are on the CPU unless the backend says otherwise, and never require a gradient.

        Raises:
            PreconditionError: an input is missing, unknown, or of another structure, dtype, rank or static size.
            BackendError: the library failed, the engine is closed, or it cannot run on this machine.
        """
        values: Sequence[Any]
        if not kwargs and self._flat_call and len(args) == len(self._names) and not _is_mapping(args):
            values = args
        elif not args and kwargs.keys() == self._named_call:
            values = [kwargs[name] for name in self._names]
        else:
            values = bind(self.manifest.input_structure, self._names, args, kwargs)
        outputs = self.run_flat(values)
        return outputs[0] if self._sole_output else self.manifest.output_structure.unflatten(outputs)

    __call__ = run

    def run_flat(self, values: Sequence[Any]) -> list[Any]:
        """:meth:`run` without structures: one tensor or array per input of the manifest, one per output back.

        Raises:
            PreconditionError: another number of inputs, or an input does not fit.
            BackendError: as :meth:`run`.
        """
        return _as_given(values, self._execute(self._read(values)))

    def run_each(self, sets: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """:meth:`run_flat` of each of several sets of inputs; a fresh engine may need less memory for it.

        Raises:
            PreconditionError: another number of inputs, or an input does not fit.
            BackendError: as :meth:`run`.
        """
        outputs = self._execute_each([self._read(values) for values in sets])
        return [_as_given(values, made) for values, made in zip(sets, outputs, strict=True)]

    def _read(self, values: Sequence[Any]) -> list[Array]:
        if len(values) != len(self._readers):
            raise PreconditionError(
                f"expected {len(self._readers)} inputs ({', '.join(self._names)}), given {len(values)}"
            )
        inputs = [read(value) for read, value in zip(self._readers, values, strict=True)]
        if self._symbols:
            self._check_symbols(inputs)
        if self._closed or self.unavailable:
            raise self._cannot_run()
        return inputs

    def _check_symbols(self, inputs: Sequence[Array]) -> None:
        for symbol, places in self._symbols.items():
            index, axis = places[0]
            size = inputs[index].shape[axis]
            for index, axis in places:
                if inputs[index].shape[axis] == size:
                    continue
                told = ", ".join(f"{self._names[i]}.shape[{a}] = {inputs[i].shape[a]}" for i, a in places)
                raise PreconditionError(f"the inputs disagree on {symbol!r}: {told}", remedy="make these sizes equal")

    def _cannot_run(self) -> BackendError:
        if self._closed:
            return BackendError("this engine is closed", where=str(self.path), remedy="load it again with load_engine")
        return BackendError(f"this engine cannot run here: {self.unavailable}", where=str(self.path))

    # -- measuring ---------------------------------------------------------------------------------------------

    def random_inputs(
        self, batch: int = 1, sizes: Mapping[str, int] | None = None, seed: int = 0
    ) -> list[torch.Tensor]:
        """Flat inputs that are safe to run; see :func:`fxcompress.backends.sampling.random_inputs`."""
        return random_inputs(self.manifest.inputs, batch=batch, sizes=sizes, seed=seed)

    def benchmark(
        self,
        inputs: Any = None,
        *,
        against: Any = None,
        batch: int = 1,
        repetitions: int = 50,
        warmup: int = 5,
        seed: int = 0,
    ) -> BenchmarkResult:
        """Measure latency, in turns with others in the same run; see :func:`fxcompress.backends.benchmark.benchmark`.

        Args:
            inputs: a tuple of arguments, a dict of keyword arguments, or a single tensor; None makes random ones
                (:meth:`random_inputs`), in the structure of the model's call.
            against: an engine, module or function that takes the same inputs, or a dict of such by name.
            batch: of random inputs, the size of the dynamic leading dimension.
            repetitions: calls measured of each candidate.
            warmup: calls before those of each turn, unmeasured.
            seed: of the random inputs and the bootstrap.

        Returns:
            milliseconds for ``"engine"``, then for the others, with ratios to ``"engine"``.

        Raises:
            PreconditionError: the inputs do not fit.
        """
        candidates: dict[str, Any] = {"engine": self}
        if isinstance(against, Mapping):
            candidates |= against
        elif against is not None:
            candidates["against"] = against
        if inputs is None:
            args, kwargs = self.manifest.input_structure.unflatten(self.random_inputs(batch, seed=seed))
        else:
            args, kwargs = _as_call(inputs)
        return benchmark(candidates, args, kwargs, repetitions=repetitions, warmup=warmup, seed=seed)

    # -- lifetime ----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Let go of the engine and of its temporary bundle, if it has one. Safe to call twice."""
        if not self._closed:
            self._closed = True
            self._release()
            if self._remove is not None:
                self._remove()

    _remove: weakref.finalize[..., Any] | None = None

    def _settle(self, path: Path, manifest: Manifest, temporary: Path | None) -> None:
        """Take the place and manifest that the bundle got at last; ``temporary`` is removed with the engine."""
        self.path = path
        self.manifest = manifest
        if temporary is not None:
            self._remove = weakref.finalize(self, shutil.rmtree, temporary, True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        call = signature_text(self.manifest.input_structure, self._names)
        inputs, outputs = (", ".join(map(str, specs)) for specs in (self.manifest.inputs, self.manifest.outputs))
        return f"<{type(self).__name__} ({call}) at {self.path}\n  in   {inputs}\n  out  {outputs}>"


def _as_given(values: Sequence[Any], outputs: Sequence[Array]) -> list[Any]:
    """Tensors to whoever gave a tensor, else arrays."""
    for value in values:
        if type(value) is not np.ndarray and isinstance(value, torch.Tensor):
            return [to_torch(output) for output in outputs]
    return [to_numpy(output) for output in outputs]


def _shared_symbols(shapes: Sequence[Sequence[int | str]]) -> dict[str, list[tuple[int, int]]]:
    """Symbols that stand in more than one place, with the places: (input, axis)."""
    places: dict[str, list[tuple[int, int]]] = {}
    for index, shape in enumerate(shapes):
        for axis, size in enumerate(shape):
            if isinstance(size, str):
                places.setdefault(size, []).append((index, axis))
    return {symbol: found for symbol, found in places.items() if len(found) > 1}


def _is_mapping(args: tuple[Any, ...]) -> bool:
    # Tensors first: whether something is a mapping takes several times as long to find out.
    return len(args) == 1 and not isinstance(args[0], (torch.Tensor, np.ndarray)) and isinstance(args[0], Mapping)


def _as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (torch.Tensor, np.ndarray)):
        return (inputs,), {}
    return tuple(inputs), {}
