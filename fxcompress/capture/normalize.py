"""From torch functions, methods and operators to functional ATen operations, without knowing a single shape.

A walk over a symbolic trace that gives every node a value: a node of the new graph (a tensor, a size, or a list of
tensors), a Python container of those, or a fact about a tensor (its shape or dtype) that only its reader can use.

A write into a tensor makes a new value, which every later reader of the tensor gets. Without shapes it is not known what
shares memory: whatever *may* be a view of a written tensor must not be read again, or the model is refused.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxcompress.capture.overloads import Kind, match, result_kind
from fxcompress.capture.tensor_methods import ATTRIBUTES, METHODS
from fxcompress.capture.torch_functions import FUNCTIONS, OPERATORS
from fxcompress.capture.tracer import REMEDY, WRITES
from fxcompress.errors import CaptureError
from fxcompress.graph.shapes import where

__all__ = ["Normalizer"]

aten = torch.ops.aten


class Unknown(Exception):
    """A fact is needed that only example inputs tell."""


class Normalizer:
    """Builds the new graph; one object per trace. The tables of functions write with :meth:`call` and :meth:`emit`.

    Attributes:
        graph: the new graph, without its output.
        called: paths of the layers that it calls.
        notes: what the trace could not carry over.
        device: where the model's tensors are.
    """

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], layers: Mapping[str, nn.Module], device: torch.device
    ) -> None:
        self.graph = fx.Graph()
        self.called: set[str] = set()
        self.notes: list[str] = []
        self.device = device
        self._tensors = tensors
        self._layers = layers
        self._values: dict[fx.Node, Any] = {}
        self._kinds: dict[fx.Node, Kind] = {}
