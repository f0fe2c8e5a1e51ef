"""Rules of Fourier transforms: linear, so that zeros stay zeros, and whole along what they transform."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxcompress.analysis.dependency.builder import Builder
from fxcompress.analysis.dependency.layout import Layout, dirtied, inert, is_live
from fxcompress.analysis.dependency.overloads import overloads
from fxcompress.analysis.dependency.zeros import name
from fxcompress.capture.raising import call_arguments

__all__ = ["RULES"]

aten = torch.ops.aten


def _transform(b: Builder, node: fx.Node) -> Layout:
    a = call_arguments(node)
    layout = b.layout(a["self"])
    rank = len(layout)
    given = a.get("dim")
    if given is None:  # all, or as many of the last as sizes are given
        given = range(rank - len(a["s"]), rank) if a.get("s") is not None else range(rank)
    dims = {int(dim) % rank for dim in (given if isinstance(given, (list, tuple, range)) else [given])}
    live = [layout[dim] for dim in sorted(dims) if is_live(layout[dim])]
    if live:
        b.barrier(node, f"{name(node)} mixes all indices of the dimension", live)
    sizes = node.meta["val"].shape
    return tuple(inert(sizes[number]) if number in dims else dim for number, dim in enumerate(layout))


def _as_real(b: Builder, node: fx.Node) -> Layout:
    return (*b.layout(node.args[0]), inert(2))


def _as_complex(b: Builder, node: fx.Node) -> Layout:
    *layout, parts = b.layout(node.args[0])
    if is_live(parts):
        b.barrier(node, "real and imaginary part are told by their place", [parts])
        return tuple(map(dirtied, layout))
    return tuple(layout)


_TRANSFORMS = """
    fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_hfft2 fft_ihfft2
    fft_fftn fft_ifftn fft_rfftn fft_irfftn fft_hfftn fft_ihfftn fft_fftshift fft_ifftshift
"""

RULES: dict[Any, Any] = {
    **dict.fromkeys(overloads(_TRANSFORMS), _transform),
    **dict.fromkeys(overloads("view_as_real view_as_real_copy"), _as_real),
    **dict.fromkeys(overloads("view_as_complex view_as_complex_copy"), _as_complex),
}
