"""Which channels of which layers can trade a positive factor without changing what the model computes.

A layer that makes a channel can give it divided by s, and every layer that reads it can multiply it back, if all that
lies between is homogeneous: f(x / s) = f(x) / s. ``flow`` finds these channels for a whole graph, ``rules`` says what
each operation does, and ``apply`` writes factors into weights.
"""

from fxcompress.analysis.scaling.apply import Factors, apply_factors
from fxcompress.analysis.scaling.flow import Group, Maker, Reader, Scaling, scaling

__all__ = ["Factors", "Group", "Maker", "Reader", "Scaling", "apply_factors", "scaling"]
