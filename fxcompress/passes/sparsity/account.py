"""What the report says of weights with zeros: how many, what they cost, what a compressed file saves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxcompress.analysis.sparsity import compressed_bytes, sparsity
from fxcompress.passes.sparsity.data import as_groups
from fxcompress.passes.sparsity.sites import Site

__all__ = ["detail_of", "note_of"]


def detail_of(
    site: Site,
    weight: torch.Tensor,
    moment: torch.Tensor | None,
    pattern: str,
    method: str,
    before: torch.Tensor | None = None,
) -> dict[str, Any]:
    """Of one site: its new ``weight`` against the one ``before``, by default the one that it holds."""
    old = site.weight if before is None else before
    difference = (old - weight).double()
    zeros = int((weight == 0).sum())
    detail: dict[str, Any] = {
        "pattern": pattern,
        "method": method,
        "weights": old.numel(),
        "zeros_before": int((old == 0).sum()),
        "zeros": zeros,
        "sparsity": zeros / old.numel(),
        "nonzeros": {site.path: [old.numel() - int((old == 0).sum()), old.numel() - zeros]},
        "weight_error": float(difference.norm() / old.double().norm().clamp_min(1e-30)),
        "compressed_bytes_before": compressed_bytes([old]),
        "compressed_bytes": compressed_bytes([weight]),
    }
    if len(site.layers) > 1:
        detail["tied"] = list(site.layers)
    if moment is not None:
        rows, gap = as_groups(site).double(), as_groups(site, difference)
        wide = moment.to(rows.device)
        power = torch.einsum("goi,gij,goj->", rows, wide, rows)
        noise = torch.einsum("goi,gij,goj->", gap, wide, gap)
        detail["output_error"] = float((noise.clamp_min(0) / power.clamp_min(1e-30)).sqrt())
    return detail


def note_of(graph_module: fx.GraphModule, details: Sequence[dict[str, Any]], pattern: str) -> str:
    """The whole in one sentence, and what the zeros are good for."""
    found = sparsity(graph_module)
    before, after = (sum(d[key] for d in details) for key in ("compressed_bytes_before", "compressed_bytes"))
    empty = [path for path, share in found.layers.items() if share == 1]
    text = (
        f"{found.share:.1%} of {found.weights:,} weights are zero; the changed ones take {before:,} → {after:,} bytes "
        "when compressed (deflate). "
    )
    if pattern == "2:4":
        text += "TensorRT has kernels for 2:4 on GPUs from sm80 on; other engines multiply by the zeros as before."
    else:
        text += "The zeros make a compressed file smaller; engines multiply by them as before, so latency stays."
    if empty:
        text += f" Nothing is left of {', '.join(map(repr, empty[:3]))}{' and others' if len(empty) > 3 else ''}."
    return text
