"""The benchmark: turns, figures, intervals."""

from __future__ import annotations

import gc
import json
import time

import numpy as np
import pytest
import torch

from fxcompress.backends.benchmark import _ratios, benchmark
from fxcompress.errors import OptionError, PreconditionError


def test_candidates_take_turns_and_each_leads_equally_often() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    result = benchmark(calls, repetitions=6, warmup=3)
    rounds = ["".join(order[start : start + 3]) for start in range(0, len(order), 3)]
    assert rounds == ["abc", "bca", "cab"] * 3
    assert (result.repetitions, result.warmup) == (6, 3)


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
    first = np.repeat([1.0, 10.0], 20)
    ratios, low, high = _ratios(np.stack([first, 2 * first]), seed=0)
    assert ratios[1] == low[1] == high[1] == 2


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
    with pytest.raises(PreconditionError, match="nothing to measure"):
        benchmark({})
