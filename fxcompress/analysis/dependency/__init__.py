"""Which indices of which weights must be removed together: as a graph, in groups, with reasons, and as a picture."""

from fxcompress.analysis.dependency.dimensions import Dimension
from fxcompress.analysis.dependency.graph import Dependencies, DependencyGroup, dependencies
from fxcompress.analysis.dependency.index_map import IndexMap
from fxcompress.analysis.dependency.why import Why

__all__ = ["Dependencies", "DependencyGroup", "Dimension", "IndexMap", "Why", "dependencies"]
