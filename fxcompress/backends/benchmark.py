"""Latency of several candidates in one run, in turns, so that a noisy machine is noisy to all of them alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from fxcompress.errors import OptionError, PreconditionError

__all__ = ["BenchmarkResult", "Timing", "benchmark"]

_RESAMPLES = 1000


@dataclass(frozen=True)
class Timing:
    """Latency of one candidate, in milliseconds per call.

    Attributes:
        name: of the candidate.
        median_ms: half of the calls were faster.
        p95_ms: 95% of the calls were faster.
        mean_ms: arithmetic mean.
        min_ms: the fastest call.
        ratio: median over the first candidate's median; 1 for the first.
        ratio_low: lower end of the ratio's 95% bootstrap interval.
        ratio_high: upper end of it.
    """

    name: str
    median_ms: float
    p95_ms: float
    mean_ms: float
    min_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float


@dataclass(frozen=True)
class BenchmarkResult:
    """Timings of all candidates, in the order given; the first is what ratios refer to."""

    timings: tuple[Timing, ...]
    repetitions: int
    warmup: int
    threads: int

    def __getitem__(self, name: str) -> Timing:
        for timing in self.timings:
            if timing.name == name:
                return timing
        raise KeyError(f"{name!r} was not measured; measured: {', '.join(timing.name for timing in self.timings)}")

    @property
    def median_ms(self) -> float:
        """Of the first candidate."""
        return self.timings[0].median_ms

    @property
    def p95_ms(self) -> float:
        """Of the first candidate."""
        return self.timings[0].p95_ms

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        return asdict(self) | {"timings": [asdict(timing) for timing in self.timings]}

    def __str__(self) -> str:
        width = max(len(timing.name) for timing in self.timings)
        lines = [f"{'':{width}}  median ms     p95 ms    mean ms     min ms  ratio (95% interval)"]
        for t in self.timings:
            interval = f"{t.ratio:5.3f} ({t.ratio_low:.3f} to {t.ratio_high:.3f})"
            lines.append(
                f"{t.name:{width}}{t.median_ms:11.4f}{t.p95_ms:11.4f}{t.mean_ms:11.4f}{t.min_ms:11.4f}  {interval}"
            )
        return "\n".join(lines)


def benchmark(
    candidates: Mapping[str, Callable[..., Any]] | Sequence[Callable[..., Any]],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    repetitions: int = 50,
    warmup: int = 5,
    seed: int = 0,
) -> BenchmarkResult:
    """Call every candidate in turn, ``repetitions`` times round, and report latencies.

    Each round starts with another candidate, so that none always follows the same neighbour. Calls run without
    autograd; the garbage collector is off while the clock runs; CUDA work is waited for.

    Args:
        candidates: engines, modules or functions, by name; a sequence is named after the types.
        args: positional arguments of every call.
        kwargs: keyword arguments of every call.
        repetitions: rounds measured.
        warmup: rounds before that.
        seed: of the bootstrap, which resamples whole rounds.

    Raises:
        OptionError: no repetitions, or a negative warm-up.
        PreconditionError: no candidates.
    """
    if repetitions < 1 or warmup < 0:
        raise OptionError(f"repetitions={repetitions}, warmup={warmup}", remedy="measure at least one repetition")
    named = dict(candidates) if isinstance(candidates, Mapping) else _named(candidates)
    if not named:
        raise PreconditionError("there is nothing to measure", remedy="hand in at least one engine or function")
    calls = list(named.values())
    milliseconds = _measure(calls, tuple(args), dict(kwargs or {}), repetitions, warmup)
    ratios, low, high = _ratios(milliseconds, seed)
    timings = tuple(
        Timing(
            name,
            *(float(figure(milliseconds[index])) for figure in (np.median, _p95, np.mean, np.min)),
            *(float(bound[index]) for bound in (ratios, low, high)),
        )
        for index, name in enumerate(named)
    )
    return BenchmarkResult(timings, repetitions, warmup, torch.get_num_threads())


def _measure(
    calls: list[Callable[..., Any]], args: tuple[Any, ...], kwargs: dict[str, Any], repetitions: int, warmup: int
) -> np.ndarray:
    """Milliseconds, float64 [candidate, repetition]."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() and torch.cuda.is_initialized() else _nothing
    measured = np.empty((len(calls), repetitions))
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        with torch.inference_mode():
            for round_ in range(-warmup, repetitions):
                for turn in range(len(calls)):
                    index = (turn + round_) % len(calls)
                    wait()
                    start = time.perf_counter_ns()
                    calls[index](*args, **kwargs)
                    wait()
                    end = time.perf_counter_ns()
                    if round_ >= 0:
                        measured[index, round_] = (end - start) / 1e6
    finally:
        if collecting:
            gc.enable()
    return measured


def _ratios(milliseconds: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ratio of medians to the first candidate, and the ends of its 95% interval; each float64 [candidate]."""
    repetitions = milliseconds.shape[1]
    rounds = np.random.default_rng(seed).integers(repetitions, size=(_RESAMPLES, repetitions))
    medians = np.stack([np.median(row[rounds], axis=1) for row in milliseconds])  # [candidate, resample]
    tiny = np.finfo(float).tiny
    resampled = medians / np.maximum(medians[0], tiny)
    median = np.median(milliseconds, axis=1)
    low, high = np.percentile(resampled, [2.5, 97.5], axis=1)
    return median / max(median[0], tiny), low, high


def _p95(values: np.ndarray) -> np.floating[Any]:
    return np.percentile(values, 95)


def _named(candidates: Sequence[Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    named: dict[str, Callable[..., Any]] = {}
    for candidate in candidates:
        base = getattr(candidate, "__name__", type(candidate).__name__)
        name, number = base, 2
        while name in named:
            name, number = f"{base} {number}", number + 1
        named[name] = candidate
    return named


def _nothing() -> None:
    pass
