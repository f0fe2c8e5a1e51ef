"""Latency of several candidates in one run, in turns, so that a noisy machine is noisy to all of them alike.

Threads of an engine that has just run go on looking for work: those of ONNX Runtime keep their processors busy for some
50 ms after a call, and a call of another engine meanwhile was up to 2.5 times as slow as alone. So candidates do not
take turns call by call. A turn begins when the process is at rest, and is many calls one after the other.
"""

from __future__ import annotations

import functools
import gc
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from fxcompress.errors import OptionError, PreconditionError

__all__ = ["BenchmarkResult", "Timing", "benchmark"]

_RESAMPLES = 1000
_THREADS = "/proc/self/task"
_LOOK_S, _IDLE = 0.002, 3  # so often one looks, and so often nobody is seen to work
_PATIENCE_S = 1.0  # a process with other things to do never rests
_PAUSE_S = 0.1  # where the system does not tell


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
    """Timings of all candidates, in the order given; the first is what ratios refer to.

    Attributes:
        timings: one for each.
        repetitions: calls measured of each.
        warmup: calls before those of each turn.
        rounds: turns of each.
        threads: of PyTorch.
    """

    timings: tuple[Timing, ...]
    repetitions: int
    warmup: int
    rounds: int
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
    rounds: int = 5,
    seed: int = 0,
) -> BenchmarkResult:
    """Give every candidate its turn, several times round, and report latencies.

    A turn waits until the process is at rest, warms the candidate up, and measures its share of the calls. Each round
    starts with another candidate, so that none always follows the same neighbour. Calls run without autograd; the
    garbage collector is off while the clock runs; CUDA work is waited for.

    Args:
        candidates: engines, modules or functions, by name; a sequence is named after the types.
        args: positional arguments of every call.
        kwargs: keyword arguments of every call.
        repetitions: calls measured of each, rounded up to as many in every round.
        warmup: calls before those of each turn.
        rounds: turns of each candidate; one that is alone has one, and there are never more than repetitions.
        seed: of the bootstrap, which resamples whole rounds and calls within them.

    Raises:
        OptionError: no repetitions, no rounds, or a negative warm-up.
        PreconditionError: no candidates.
    """
    if repetitions < 1 or warmup < 0 or rounds < 1:
        raise OptionError(
            f"repetitions={repetitions}, warmup={warmup}, rounds={rounds}", remedy="measure at least one repetition"
        )
    named = dict(candidates) if isinstance(candidates, Mapping) else _named(candidates)
    if not named:
        raise PreconditionError("there is nothing to measure", remedy="hand in at least one engine or function")
    rounds = min(rounds, repetitions) if len(named) > 1 else 1
    calls = [functools.partial(call, *args, **(kwargs or {})) for call in named.values()]
    milliseconds = _measure(calls, rounds, -(-repetitions // rounds), warmup)
    ratios, low, high = _ratios(milliseconds, seed)
    timings = tuple(
        Timing(
            name,
            *(float(figure(milliseconds[index])) for figure in (np.median, _p95, np.mean, np.min)),
            *(float(bound[index]) for bound in (ratios, low, high)),
        )
        for index, name in enumerate(named)
    )
    return BenchmarkResult(timings, milliseconds[0].size, warmup, rounds, torch.get_num_threads())


def _measure(calls: Sequence[Callable[[], Any]], rounds: int, share: int, warmup: int) -> np.ndarray:
    """Milliseconds, float64 [candidate, round, call]."""
    measured = np.empty((len(calls), rounds, share))
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        with torch.inference_mode():
            for round_ in range(rounds):
                for turn in range(len(calls)):
                    index = (turn + round_) % len(calls)
                    if len(calls) > 1:
                        _rest()
                    for _ in range(warmup):
                        calls[index]()
                    _time(calls[index], measured[index, round_])
    finally:
        if collecting:
            gc.enable()
    return measured


def _time(call: Callable[[], Any], milliseconds: np.ndarray) -> None:
    """Fill in milliseconds, one for each call."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() and torch.cuda.is_initialized() else _nothing
    for number in range(len(milliseconds)):
        wait()
        start = time.perf_counter_ns()
        call()
        wait()
        milliseconds[number] = (time.perf_counter_ns() - start) / 1e6


def _rest() -> None:
    """Wait until no other thread of this process works."""
    if _working() is None:
        time.sleep(_PAUSE_S)
        return
    until = time.monotonic() + _PATIENCE_S
    seen_idle = 0
    while seen_idle < _IDLE and time.monotonic() < until:
        time.sleep(_LOOK_S)
        seen_idle = 0 if _working() else seen_idle + 1


def _working() -> bool | None:
    """Whether another thread runs, or would if a processor were free; None where the system does not tell."""
    own = str(threading.get_native_id())
    try:
        others = [task for task in os.listdir(_THREADS) if task != own]
    except OSError:
        return None
    return any(_state(task) == "R" for task in others)


def _state(task: str) -> str:
    try:
        with open(f"{_THREADS}/{task}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0]
    except (OSError, IndexError):  # it has ended
        return ""


def _ratios(milliseconds: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ratio of medians to the first candidate, and the ends of its 95% interval; each float64 [candidate].

    A round is resampled for all candidates together, for they shared its noise; calls within it for each alone.
    """
    count, rounds, share = milliseconds.shape
    random = np.random.default_rng(seed)
    chosen = random.integers(rounds, size=(_RESAMPLES, rounds, 1))
    medians = np.empty((count, _RESAMPLES))
    for index, own in enumerate(milliseconds):
        calls = random.integers(share, size=(_RESAMPLES, rounds, share))
        medians[index] = np.median(own[chosen, calls].reshape(_RESAMPLES, -1), axis=1)
    tiny = np.finfo(float).tiny
    resampled = medians / np.maximum(medians[0], tiny)
    median = np.median(milliseconds, axis=(1, 2))
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
