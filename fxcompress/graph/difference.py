"""How far one tensor is from another, as every proof of a pass or an engine measures it."""

from __future__ import annotations

import torch

__all__ = ["difference"]

_MARK = 1e3  # times all other values, and the same in both: not a result


def difference(reference: torch.Tensor, value: torch.Tensor) -> tuple[float, float]:
    """``max|reference − value|`` and ``max|reference|``, in float64, for tensors of one shape.

    The first is infinite if NaNs, or infinities of one sign, do not stand in the same places; those that do are left
    out. So are marks: what a mask hides is often the lowest number there is, beside which no error of the others would
    count.
    """
    if reference.is_complex():
        reference, value = (torch.view_as_real(tensor.resolve_conj()) for tensor in (reference, value))
    a, b = (tensor.detach().double().cpu().flatten() for tensor in (reference, value))
    same = (a == b) | (a.isnan() & b.isnan())
    if bool((~same & ~(a.isfinite() & b.isfinite())).any()):
        return float("inf"), 0.0
    finite = a.isfinite()
    a, b = a[finite], b[finite]
    if not a.numel():
        return 0.0, 0.0
    marks = a.abs() == a.abs().max()
    others = float(a[~marks].abs().max()) if not bool(marks.all()) else 0.0
    if 0 < _MARK * others < float(a.abs().max()) and torch.equal(a[marks], b[marks]):
        a, b = a[~marks], b[~marks]
    return float((a - b).abs().max()), float(a.abs().max())
