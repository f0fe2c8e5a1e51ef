"""Figures as people read them."""

import pytest

from fxcompress.reporting import figures


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00 k"), (11_689_512, "11.69 M"), (123_456_789, "123.5 M"), (1.81e9, "1.81 G"),
     (999_999_999, "1.00 G"), (3e12, "3.00 T"), (None, "?")],
)  # fmt: skip
def test_counts(number, text):
    assert figures.count(number) == text


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 B"), (1500, "1.50 kB"), (46_796_608, "46.80 MB"), (2e9, "2.00 GB")]
)
def test_sizes(number, text):
    assert figures.size(number) == text


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [(100, 50, "−50.0%"), (100, 150, "+50.0%"), (100, 100, "="), (10_000, 9_996, "−0.04%"), (1e9, 1e9 - 1, "≈"),
     (0, 5, "new"), (0, 0, "="), (None, 5, "?"), (5, None, "?")],
)  # fmt: skip
def test_changes(before, after, text):
    assert figures.change(before, after) == text


@pytest.mark.parametrize(("value", "text"), [(None, "–"), (0.0, "0"), (1.23e-6, "1.2e-06"), (float("inf"), "inf")])
def test_errors(value, text):
    assert figures.error(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.085, "85 ms"), (0.9999, "1.0 s"), (1.61, "1.6 s"), (720, "12 min")])
def test_durations(seconds, text):
    assert figures.duration(seconds) == text


def test_speed():
    assert figures.times_faster(1.0, 3.0) == "3.00× faster"
    assert figures.times_faster(3.0, 2.0) == "1.50× slower"
    assert figures.times_faster(0.0, 2.0) == "?"
