"""Latency of engines, saved graphs and eager models in one run, each named as on a command line."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from fxcompress.backends.benchmark import BenchmarkResult, benchmark
from fxcompress.backends.bundle import MANIFEST, read_manifest
from fxcompress.backends.engine import Engine
from fxcompress.backends.registry import backend_class, load_engine
from fxcompress.capture.inputs import ExampleInputs
from fxcompress.compiled import Compiled
from fxcompress.errors import OptionError, PreconditionError, nearest
from fxcompress.model_specs import load_model, with_batch

__all__ = ["Candidate", "Race", "opened", "race"]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Something to measure.

    Attributes:
        name: as typed.
        spec: the bundle or model.
        kind: ``"onnxruntime engine"``, ``"eager PyTorch"``.
        call: the function.
        inputs: of a batch size, where it knows any that fit.
    """

    name: str
    spec: str
    kind: str
    call: Callable[..., Any]
    inputs: Callable[[int], ExampleInputs] | None


@dataclasses.dataclass(frozen=True)
class Race:
    """What :func:`race` measured.

    Attributes:
        result: the latencies.
        candidates: in the order of ``result.timings``.
        inputs: of every call.
    """

    result: BenchmarkResult
    candidates: tuple[Candidate, ...]
    inputs: ExampleInputs

    @property
    def batch(self) -> int:
        """The size of the batch that was measured."""
        return next(int(leaf.shape[0]) for leaf in self.inputs.leaves if isinstance(leaf, torch.Tensor))


def race(
    specs: Sequence[str],
    *,
    inputs: ExampleInputs | None = None,
    threads: int | None = None,
    options: Mapping[str, Any] | None = None,
    batch: int | None = None,
    repetitions: int = 50,
    warmup: int = 5,
) -> Race:
    """Measure all candidates in turns, on the same inputs and as many threads.

    Args:
        specs: directories of bundles, or model specs.
        inputs: of every call; None takes those of the first candidate that knows any.
        threads: of each candidate whose backend has such an option, and of PyTorch; None leaves PyTorch's number.
        options: of each engine whose backend has such an option.
        batch: size of the batch; None takes that of ``inputs``, or 1.
        repetitions: calls measured of each.
        warmup: calls before those of each turn.

    Returns:
        the latencies, the candidates, and the inputs.

    Raises:
        PreconditionError: nobody knows fitting inputs, or a candidate does not take them.
        OptionError: no candidate has an option.
        BundleError: a bundle is missing or damaged. BackendError: an engine cannot run.
    """
    usual = torch.get_num_threads()
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, usual)
        torch.set_num_threads(threads or usual)
        candidates: list[Candidate] = []
        for spec in specs:
            count = sum(spec == earlier for earlier in specs[: len(candidates)])
            name = f"{spec} #{count + 1}" if count else spec
            candidates.append(opened(spec, name, threads or usual, options or {}, stack))
        _check_options(specs, options or {})
        if inputs is None:
            known = next((item.inputs for item in candidates if item.inputs is not None), None)
            if known is None:
                raise PreconditionError("no candidate knows its inputs", remedy="give them: --input 1x3x224x224")
            inputs = known(batch or 1)
        elif batch is not None:
            inputs = with_batch(inputs, batch)
        for item in candidates:
            _try(item, inputs)
        result = benchmark(
            {item.name: item.call for item in candidates},
            inputs.args,
            inputs.kwargs,
            repetitions=repetitions,
            warmup=warmup,
        )
        return Race(result, tuple(candidates), inputs)


def opened(spec: str, name: str, threads: int, options: Mapping[str, Any], stack: contextlib.ExitStack) -> Candidate:
    """Open an engine, saved graph or model for as long as ``stack`` lasts.

    Of ``threads`` and ``options`` an engine gets what its backend has.

    Raises:
        PreconditionError, BundleError, BackendError: as :func:`race`.
    """
    known_options = _engine_options(spec)
    if known_options is not None:
        told = {name: value for name, value in {"threads": threads, **options}.items() if name in known_options}
        engine = stack.enter_context(load_engine(spec, **told))
        return Candidate(name, spec, f"{engine.manifest.backend} engine", engine, lambda batch: _inputs(engine, batch))
    source = load_model(spec)
    known = source.inputs
    make = (lambda batch: with_batch(known, batch)) if known is not None else None
    if isinstance(source.model, Compiled):
        return Candidate(name, spec, "saved graph in PyTorch", source.model, make)
    if isinstance(source.model, ExportedProgram):
        return Candidate(name, spec, "exported program in PyTorch", source.model.module(), make)
    return Candidate(name, spec, "eager PyTorch", source.model, make)


def _engine_options(spec: str) -> set[str] | None:
    """What an engine can be loaded with; None of what is no engine."""
    path = Path(spec)
    if not (path / MANIFEST).exists() or (manifest := read_manifest(path)).kind != "engine":
        return None
    cls: Any = backend_class(str(manifest.backend))
    only_at_load = inspect.signature(cls.load).parameters.values()
    named = {item.name for item in only_at_load if item.kind is inspect.Parameter.KEYWORD_ONLY}
    return named | ({item.name for item in dataclasses.fields(cls)} - set(cls.built_in))


def _check_options(specs: Sequence[str], options: Mapping[str, Any]) -> None:
    known = {name for spec in specs for name in _engine_options(spec) or ()}
    for name in options:
        if not known:
            raise OptionError("options are of engines, and none is among these", where=name, remedy="leave them out")
        if name not in known:
            raise OptionError(
                f"no engine here can be loaded with an option {name!r}", where=name, remedy=nearest(name, known)
            )


def _inputs(engine: Engine, batch: int) -> ExampleInputs:
    args, kwargs = engine.manifest.input_structure.unflatten(engine.random_inputs(batch))
    return ExampleInputs(tuple(args), dict(kwargs))


def _try(candidate: Candidate, inputs: ExampleInputs) -> None:
    """One call, so that inputs that do not fit are told by the candidate's name."""
    told = ", ".join(str(list(leaf.shape)) for leaf in inputs.leaves if isinstance(leaf, torch.Tensor))
    try:
        with torch.inference_mode():
            candidate.call(*inputs.args, **inputs.kwargs)
    except (PreconditionError, RuntimeError, TypeError, ValueError, IndexError) as error:
        problem = error.problem if isinstance(error, PreconditionError) else str(error).strip().splitlines()[0]
        raise PreconditionError(
            f"it does not take inputs of shape {told}: {problem}",
            where=candidate.name,
            remedy="give inputs that fit all candidates with --input, or measure those that fit together",
        ) from error
