"""Canonical polyadic decomposition of a kernel by alternating least squares."""

from __future__ import annotations

import torch

__all__ = ["cp_factors"]

_SWEEPS = 60
_STILL = 1e-7  # relative fall of the error below which the sweeps end


def cp_factors(kernel: torch.Tensor, rank: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``kernel[o, i, k] ≈ Σ_r a[o, r] b[i, r] c[k, r]``, the norms shared out evenly.

    Starts from the leading singular vectors of each unfolding, filled up with random ones. Each step solves for one
    factor with the others fixed, with a ridge that keeps components from cancelling each other.

    Args:
        kernel: float64 ``[out, in, k²]``.
        rank: number of components.
        seed: of the random columns.
    """
    generator = torch.Generator().manual_seed(seed)
    factors = [_start(kernel, dim, rank, generator) for dim in range(3)]
    energy = float(kernel.square().sum())
    if energy == 0:
        return tuple(torch.zeros_like(factor) for factor in factors)  # type: ignore[return-value]
    one = torch.eye(rank, dtype=kernel.dtype, device=kernel.device)
    before = float("inf")
    for _ in range(_SWEEPS):
        for dim in range(3):
            first, second = (factors[other] for other in range(3) if other != dim)
            gram = (first.T @ first) * (second.T @ second)
            target = torch.einsum("dab,ar,br->dr", kernel.movedim(dim, 0), first, second)
            strength = 1e-9 * float(gram.diagonal().mean())
            factors[dim] = torch.linalg.solve(gram + strength * one, target.T).T
            if dim < 2:
                factors[dim] = factors[dim] / factors[dim].norm(dim=0).clamp_min(1e-300)
        grams = [factor.T @ factor for factor in factors]
        size = float((grams[0] * grams[1] * grams[2]).sum())
        error = energy - 2 * float((target * factors[2]).sum()) + size
        if before - error < _STILL * energy:
            break
        before = error
    norms = torch.stack([factor.norm(dim=0).clamp_min(1e-300) for factor in factors])
    even = norms.prod(0).pow(1 / 3)
    a, b, c = (factor / norm * even for factor, norm in zip(factors, norms, strict=True))
    return a, b, c


def _start(kernel: torch.Tensor, dim: int, rank: int, generator: torch.Generator) -> torch.Tensor:
    unfolded = kernel.movedim(dim, 0).flatten(1)
    vectors = torch.linalg.eigh(unfolded @ unfolded.T)[1].flip(-1)[:, :rank]
    missing = rank - vectors.shape[1]
    if missing <= 0:
        return vectors
    random = torch.randn(vectors.shape[0], missing, generator=generator, dtype=torch.float64).to(kernel)
    return torch.cat([vectors, random / random.norm(dim=0)], 1)
