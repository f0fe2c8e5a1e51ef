"""Statistics of activations, streamed over data: one collector for low rank, pruning, quantization and sensitivity.

::

    requests = {"fc1": [SecondMoment("input")], "relu": [Range(), Histogram()]}
    statistics = collect(graph_module, loader, requests, limit=16)
    statistics["fc1", SecondMoment("input")].total

``collect`` runs the graph; ``kinds`` says what can be asked for; ``patches`` is what a convolution reads,
``padding`` what of a batch of sequences does not count.
"""

from fxcompress.analysis.statistics.collect import Statistics, collect
from fxcompress.analysis.statistics.histogram import Histogram, HistogramValue
from fxcompress.analysis.statistics.kinds import Mean, MeanAbs, MeanSquare, Range, Statistic
from fxcompress.analysis.statistics.moments import CrossMoment, CrossMoments, Moments, PackedMoments, SecondMoment
from fxcompress.analysis.statistics.triangle import Triangle

__all__ = [
    "CrossMoment",
    "CrossMoments",
    "Histogram",
    "HistogramValue",
    "Mean",
    "MeanAbs",
    "MeanSquare",
    "Moments",
    "PackedMoments",
    "Range",
    "SecondMoment",
    "Statistic",
    "Statistics",
    "Triangle",
    "collect",
]
