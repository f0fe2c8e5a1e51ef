"""What training leaves alone."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

__all__ = ["frozen_layers"]


def frozen_layers(graph_module: fx.GraphModule) -> Iterator[tuple[str, str, str]]:
    """``(path, code, reason)`` of every layer with weights that do not train."""
    for path, layer in graph_module.named_modules():
        own = list(layer.parameters(recurse=False))
        if own:
            if not any(parameter.requires_grad for parameter in own):
                yield path, "frozen", "none of its parameters requires gradients"
            continue
        integers = [b for b in layer.buffers(recurse=False) if not b.is_floating_point() and b.dim() > 1]
        if integers:
            yield path, "integer_weights", "its weights are integers, which have no gradients"
