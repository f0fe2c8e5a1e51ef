"""Small hard models for channel removal: one list, which the benchmark and the tests share."""

from benchmarks.patterns import attention, convolutions, moves, places, products, statistics, weights
from benchmarks.patterns.model import PATTERNS, Pattern, Small, build, pairs

__all__ = [
    "PATTERNS",
    "Pattern",
    "Small",
    "attention",
    "build",
    "convolutions",
    "moves",
    "pairs",
    "places",
    "products",
    "statistics",
    "weights",
]
