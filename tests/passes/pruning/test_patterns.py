"""Channel removal on the benchmark's small hard patterns, each judged by the dead-channel rule.

Zero what was removed in the original model: its outputs must equal the pruned model's. That needs no knowledge of how
the pruning was planned. The judge also checks the graph, a second batch size, a training step, and the user's model.
"""

import pytest

from benchmarks.patterns import PATTERNS, pairs
from benchmarks.patterns.judge import ours

# torch says so of one of the patterns, once in a process
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")


def name_of(chain):
    return "+".join(pattern.name for pattern in chain)


def test_there_are_at_least_ninety_patterns():
    assert len(PATTERNS) >= 90


@pytest.mark.parametrize("importance", ["l2", "random"])
@pytest.mark.parametrize("name", PATTERNS)
def test_exact_or_refused_for_the_right_reason(name, importance):
    pattern = PATTERNS[name]
    verdict = ours((pattern,), importance)
    if pattern.refused is None:
        assert verdict.outcome == "exact", verdict
        assert verdict.removed > 0.15
    else:
        # The layer in question is refused; those before it may still lose channels.
        assert verdict.outcome in ("refused", "exact"), verdict
        assert pattern.refused in verdict.reason


@pytest.mark.slow
@pytest.mark.parametrize("chain", pairs(), ids=name_of)
def test_two_patterns_in_a_row(chain):
    verdict = ours(chain, "random")
    assert verdict.outcome == "exact", verdict
    assert verdict.removed > 0.15
