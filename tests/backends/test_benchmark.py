"""The benchmark: turns, figures, intervals."""

from __future__ import annotations

import gc
import hashlib
import json
import sys
import threading
import time

import numpy as np
import pytest
import torch

from fxcompress.backends import benchmark as module
from fxcompress.backends.benchmark import _ratios, benchmark
from fxcompress.errors import OptionError, PreconditionError


def test_candidates_take_turns_and_each_leads_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(module, "_rest", lambda: order.append("."))
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    result = benchmark(calls, repetitions=5, warmup=1, rounds=3)
    turns = [turn for turn in "".join(order).split(".") if turn]
    assert turns == ["aaa", "bbb", "ccc", "bbb", "ccc", "aaa", "ccc", "aaa", "bbb"], "one to warm up, two measured"
    assert (result.repetitions, result.warmup, result.rounds) == (6, 1, 3)
    assert benchmark(calls, repetitions=2).rounds == 2, "no turn without a call that is measured"


def test_nobody_waits_for_a_candidate_that_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_rest", lambda: 1 / 0)
    result = benchmark({"alone": int}, repetitions=7)
    assert (result.repetitions, result.rounds) == (7, 1)


class Clock:
    """In the place of ``time``."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(
    ("works_until", "rested"),
    [(0.0, 0.006), (0.05, 0.056), (99.0, 1.0), (None, 0.1)],
    ids=["idle", "for a while", "for ever", "a system that does not tell"],
)
def test_a_turn_begins_when_no_thread_works_any_more(
    monkeypatch: pytest.MonkeyPatch, works_until: float | None, rested: float
) -> None:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(module, "_working", lambda: None if works_until is None else clock.now < works_until)
    module._rest()
    assert clock.now == pytest.approx(rested, abs=0.002)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_threads_that_work_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    done = threading.Event()

    def work() -> None:
        while not done.is_set():
            hashlib.sha256(bytes(1 << 24)).digest()  # without the lock of the interpreter

    def looks() -> list[bool | None]:
        return [module._working() for _ in range(50) if not time.sleep(0.002)]

    worker = threading.Thread(target=work)
    worker.start()
    seen = looks()
    done.set()
    worker.join()
    assert any(seen)
    assert not all(looks())
    monkeypatch.setattr(module, "_THREADS", "/nowhere")
    assert module._working() is None


def test_figures() -> None:
    result = benchmark({"fast": lambda: time.sleep(0.001), "slow": lambda: time.sleep(0.005)}, repetitions=15)
    fast, slow = result.timings
    assert 1 <= fast.min_ms <= fast.median_ms <= fast.p95_ms
    assert fast.min_ms <= fast.mean_ms
    assert (fast.ratio, fast.ratio_low, fast.ratio_high) == (1, 1, 1)
    assert slow.ratio == pytest.approx(slow.median_ms / fast.median_ms)
    assert 1 < slow.ratio_low <= slow.ratio <= slow.ratio_high
    assert result.median_ms == fast.median_ms and result.p95_ms == fast.p95_ms
    assert result["slow"] is slow
    with pytest.raises(KeyError, match="'none' was not measured; measured: fast, slow"):
        result["none"]


def test_result_is_json_and_text() -> None:
    result = benchmark([int, int], repetitions=3)
    told = json.loads(json.dumps(result.to_dict()))
    assert [timing["name"] for timing in told["timings"]] == ["int", "int 2"]
    assert told["repetitions"] == 3 and told["timings"][0]["ratio"] == 1
    assert "median ms" in str(result) and "int 2" in str(result)


def test_bootstrap_interval_resamples_whole_rounds() -> None:
    # A machine that slows down tenfold half-way: times are bimodal, the ratio within each round is 2.
    first = np.repeat([1.0, 10.0], 20).reshape(4, 10)
    ratios, low, high = _ratios(np.stack([first, 2 * first]), seed=0)
    assert ratios[1] == low[1] == high[1] == 2
    # Noise of a whole round that only one of them had: few rounds tell little, however many calls there were.
    noisy = np.repeat([2.0, 2.0, 2.0, 3.0, 4.0], 1000).reshape(5, 1000)
    ratios, low, high = _ratios(np.stack([np.ones((5, 1000)), noisy]), seed=0)
    assert (ratios[1], low[1], high[1]) == (2, 2, 4)


def test_bootstrap_interval_resamples_calls_within_a_round() -> None:
    calls = np.random.default_rng(0).normal(10, 1, size=(1, 100))
    _, low, high = _ratios(np.stack([np.ones((1, 100)), calls]), seed=0)
    assert 9.5 < low[1] < 10 < high[1] < 10.5


def test_arguments_autograd_and_garbage_collection() -> None:
    seen: list[tuple[bool, bool]] = []

    def function(x: torch.Tensor, *, y: int) -> None:
        assert y == 2 and x.shape == (1,)
        seen.append((torch.is_grad_enabled(), gc.isenabled()))

    benchmark({"f": function}, (torch.ones(1),), {"y": 2}, repetitions=2, warmup=1)
    assert seen == [(False, False)] * 3 and gc.isenabled()


def test_a_failing_candidate_leaves_the_collector_on() -> None:
    with pytest.raises(ZeroDivisionError):
        benchmark({"f": lambda: 1 / 0})
    assert gc.isenabled()


def test_wrong_options() -> None:
    with pytest.raises(OptionError, match="repetitions=0"):
        benchmark([int], repetitions=0)
    with pytest.raises(OptionError, match="warmup=-1"):
        benchmark([int], warmup=-1)
    with pytest.raises(OptionError, match="rounds=0"):
        benchmark([int], rounds=0)
    with pytest.raises(PreconditionError, match="nothing to measure"):
        benchmark({})
