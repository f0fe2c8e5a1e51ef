"""Small hard models for channel removal: one list, which the benchmark and the tests share."""

from benchmarks.patterns import attention, convolutions, moves, products, statistics, weights, writes
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
    "products",
    "statistics",
    "weights",
    "writes",
]
