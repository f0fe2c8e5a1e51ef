"""Weights rounded block by block: to nearest, or one input after the other with the error passed on (GPTQ)."""

from __future__ import annotations

import torch

from fxcompress.quantization.types import QuantType, parameters_of_range

__all__ = ["Rounded", "gptq", "round_to_nearest", "stored_values"]

Rounded = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Integers ``[out, blocks, block]``, scale ``[out, blocks]`` and zero point ``[out, blocks]``."""

_DAMPING = 0.01


def _blocks(weight: torch.Tensor, block: int) -> torch.Tensor:
    """``[out, blocks, block]``, the last one padded with zeros."""
    rest = -weight.shape[1] % block
    return torch.nn.functional.pad(weight, (0, rest)).unflatten(1, (-1, block))


def round_to_nearest(weight: torch.Tensor, bits: int, block: int, symmetric: bool = False) -> Rounded:
    """Each block ``[block]`` of a row of ``weight [out, in]`` on a grid over its own range.

    Args:
        weight: ``[out, in]``.
        bits: of the integers.
        block: inputs that share a scale.
        symmetric: the middle integer stands for 0 in every block; otherwise whichever makes the steps smallest does.
    """
    kind = QuantType(bits, signed=False, symmetric=symmetric)
    parted = _blocks(weight.float(), block)
    scale, zero = parameters_of_range(parted.amin(2), parted.amax(2), kind)
    integers = (parted / scale[..., None] + zero[..., None]).round().clamp(0, kind.maximum).to(torch.int32)
    return integers, scale, zero


def stored_values(rounded: Rounded, features: int) -> torch.Tensor:
    """``[out, features]`` what integers, scales and zero points stand for, float32."""
    integers, scale, zero = rounded
    return ((integers - zero[..., None]) * scale[..., None]).flatten(1)[:, :features]


def gptq(weight: torch.Tensor, moment: torch.Tensor, bits: int, block: int, symmetric: bool = False) -> Rounded:
    """Rounding that keeps the layer's output on data (Frantar et al. 2023).

    Inputs are rounded in their order; the error of each is made up for by those not rounded yet, as the second moment
    H = Σ x xᵀ of the inputs tells. All rows of the weight are done at once; what a block of inputs leaves behind is
    carried to the later ones in one product.

    Args:
        weight: ``[out, in]``.
        moment: H, ``[in, in]``.
        bits: of the integers.
        block: inputs that share a scale.
        symmetric: as of :func:`round_to_nearest`.
    """
    kind = QuantType(bits, signed=False, symmetric=symmetric)
    rest = weight.double().clone()
    hessian = moment.double().clone()
    dead = hessian.diagonal() <= 0
    hessian.diagonal()[dead] = 1.0
    rest[:, dead] = 0.0
    hessian.diagonal().add_(_DAMPING * hessian.diagonal().mean())
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    made: list[torch.Tensor] = []
    scales: list[torch.Tensor] = []
    zeros: list[torch.Tensor] = []
    for start in range(0, weight.shape[1], block):
        stop = min(start + block, weight.shape[1])
        part, errors, columns = rest[:, start:stop].clone(), [], []
        scale, zero = parameters_of_range(part.amin(1), part.amax(1), kind)
        wide = scale.double()
        for column in range(stop - start):
            value, own = part[:, column], factor[start + column, start + column : stop]
            integer = (value / wide + zero).round().clamp(0, kind.maximum)
            error = (value - (integer - zero) * wide) / own[0]
            part[:, column:] -= error[:, None] * own[None]
            errors.append(error)
            columns.append(integer)
        rest[:, stop:] -= torch.stack(errors, 1) @ factor[start:stop, stop:]
        found = torch.stack(columns, 1)
        # What pads the last block is the integer that stands for zero.
        pad = zero[:, None].expand(-1, block - found.shape[1]).to(found)
        made.append(torch.cat([found, pad], 1))
        scales.append(scale)
        zeros.append(zero)
    return torch.stack(made, 1).to(torch.int32), torch.stack(scales, 1), torch.stack(zeros, 1)
