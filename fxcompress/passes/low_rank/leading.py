"""Leading eigenvectors of a Gram matrix by a randomized, Chebyshev-filtered subspace iteration.

A random block, a power step (Halko et al. 2011, arXiv:0909.4061), then filters that damp what lies below the least
Ritz value (Zhou et al. 2006, J. Comput. Phys. 219): matrix products only, a few per sweep. What a Ritz value θ may
still lack is at most ‖residual‖² / gap; the sum of these estimates what another matrix of the rank could gain, and
the block is handed out only where that is nothing against what every matrix of that rank loses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from fxcompress.passes.low_rank.in_place import eigh, orthonormal

__all__ = ["block_width", "captured", "density", "leading", "trusted"]

Product = Callable[[torch.Tensor], torch.Tensor]

_SWEEPS = 4
_DEGREE = 16  # of a filter at most
_CARRIED = 1e5  # growth of the largest component over the last wanted that float32 bears
_PANELS = 8  # in which a block is multiplied, so that what is made on the way is small
_WIDE = 256  # bytes of a row of a panel at least: fewer are slower
_STEPS = 32  # of the Lanczos run
_BEYOND = 16  # share of the full rank, at most, that a block has beyond the columns wanted
_HOPELESS = 48  # a filter that would need this degree: the spectrum is too flat at the rank
_LACKING = 1e-5  # of the loss: what the block may miss of the best one at most; half of that in the norm
_SPARE = 8  # columns of a block that captures a whole matrix, beyond its rank
_NOTHING = 1e-13  # of a trace, of a float32 weight
_ROUNDING = 1e-5  # of the loss: what rounding may take


def block_width(rank: int, full: int) -> int:
    """Columns that a rank takes, with those beyond it that make it converge."""
    return min(rank + max(16, min(rank // 3, full // _BEYOND)), full)


def leading(
    product: Product, size: int, rank: int, trace: Callable[[], float], *, like: torch.Tensor, seed: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Orthonormal ``[size, rank]`` and float64 eigenvalues, falling; None where it did not converge.

    Works in the dtype of ``like``, and from there in float64 where that proves too narrow.

    Args:
        product: of the Gram matrix and a block, in the block's dtype.
        size: of the Gram matrix.
        rank: columns wanted.
        trace: of it, in the precision of the product before.
        like: of the dtype and device to start with.
        seed: of the random block.
    """
    generator = torch.Generator(device=like.device).manual_seed(seed)
    width = block_width(rank, size)
    about = _density(product, size, like, generator)
    last, floor, top = float(about(rank)), float(about(width)), float(about(0))
    if not 0 < floor < last:
        return None
    block = torch.randn(width, size, generator=generator, device=like.device, dtype=like.dtype).T
    # From a random block the wanted components may not fall behind the largest by more than the dtype can carry.
    spread = math.acosh(max(2 * top / floor - 1, 1)) - math.acosh(2 * last / floor - 1)
    degree = min(_DEGREE, max(1, int(math.log(_CARRIED) / max(spread, 1e-6))))
    block = orthonormal(_filtered(product, block, floor, degree, top))
    for sweep in range(_SWEEPS + 1):
        ritz, turned = eigh(_projected(product, block))
        ritz, turned = ritz.double().flip(-1).clamp_min(0), turned.flip(-1)
        wanted, floor = ritz[:rank], float(ritz[-1])
        top, last = float(wanted[0]), float(wanted[-1])
        loss = trace() - float(wanted.sum())
        if not last > 0 or loss <= 0:
            return None
        if not trusted(top, loss, rank, block.dtype):
            if block.dtype == torch.float64:
                return None
            block = orthonormal(block.double())
            continue
        _rotate(block, turned)
        del turned
        residual = _residual(product, block[:, :rank], wanted)
        missing = residual / torch.maximum(wanted - floor, residual.sqrt()).clamp_min(1e-300)
        if float(missing.sum()) <= _LACKING * loss:
            return block[:, :rank], wanted
        edge = 2 * last / max(floor, 1e-300) - 1
        # What is missing falls by the square of that growth where the floor is known, which at first it hardly is.
        wanted_fall = math.log(float(missing.sum()) / (_LACKING / 3 * loss))
        degree = 1 + math.ceil(wanted_fall / math.acosh(edge)) if edge > 1 else _HOPELESS
        if sweep == _SWEEPS or degree >= _HOPELESS:
            return None
        block = orthonormal(_filtered(product, block, floor, min(degree, _DEGREE), top))
    return None


def captured(
    product: Product, size: int, rank: int, trace: Callable[[], float], *, like: torch.Tensor, seed: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """All that there is of a matrix of no more than ``rank`` components; None of any other.

    Arguments and result as of :func:`leading`, in float64.
    """
    generator = torch.Generator(device=like.device).manual_seed(seed)
    width = min(rank + _SPARE, size)
    block = torch.randn(width, size, generator=generator, device=like.device, dtype=like.dtype).T
    for _ in range(2):
        for (given,) in _panels(block):
            given.copy_(product(given))
        block = orthonormal(block)
    ritz, turned = eigh(_projected(product, block))
    wanted = ritz.flip(-1).clamp_min(0)[:rank]
    if trace() - float(wanted.sum()) > _NOTHING * trace():
        return None
    _rotate(block, turned.flip(-1))
    return block[:, :rank], wanted


def density(product: Product, size: int, *, like: torch.Tensor, seed: int) -> torch.Tensor:
    """About all eigenvalues, falling, float64 ``[size]``; arguments as of :func:`leading`."""
    about = _density(product, size, like, torch.Generator(device=like.device).manual_seed(seed))
    return about(torch.arange(size) + 0.5)


def _density(
    product: Product, size: int, like: torch.Tensor, generator: torch.Generator
) -> Callable[[torch.Tensor | int], torch.Tensor]:
    """Of a count the value that about so many eigenvalues exceed, of 0 about the largest.

    The spectrum's density by stochastic Lanczos quadrature, from a short Lanczos run (Golub and Meurant 2010, Matrices,
    Moments and Quadrature).
    """
    now = torch.randn(size, generator=generator, device=like.device, dtype=like.dtype)
    now = now / now.norm()
    before, along, off = torch.zeros_like(now), [], [0.0]
    for _ in range(min(_STEPS, size)):
        after = product(now[:, None])[:, 0].add_(before, alpha=-off[-1])
        along.append(float(after @ now))
        after.add_(now, alpha=-along[-1])
        off.append(float(after.norm()))
        before, now = now, after.div_(max(off[-1], torch.finfo(like.dtype).tiny))
    beside = torch.tensor(off[1:-1], dtype=torch.float64)
    tri = torch.tensor(along, dtype=torch.float64).diag() + beside.diag(1) + beside.diag(-1)
    nodes, vectors = torch.linalg.eigh(tri)
    order = nodes.argsort(descending=True)
    nodes, weights = nodes[order], vectors[0].square()[order] * size
    # Between two nodes along a straight line of logarithms; below the last as if one more lay a decade under it.
    above = torch.cat([weights.cumsum(0) - weights / 2, weights.new_tensor([size])])
    levels = nodes.clamp_min(1e-300).log()
    levels = torch.cat([levels, levels[-1:] - math.log(10)])

    def at(count: torch.Tensor | int) -> torch.Tensor:
        if isinstance(count, int) and count == 0:
            return nodes[0]
        given = torch.as_tensor(count, dtype=torch.float64)
        after = torch.searchsorted(above, given).clamp(1, len(levels) - 1)
        part = (given - above[after - 1]) / (above[after] - above[after - 1]).clamp_min(1e-12)
        return torch.lerp(levels[after - 1], levels[after], part.clamp(0, 1)).exp()

    return at


def trusted(largest: float, loss: float, rank: int, dtype: torch.dtype) -> bool:
    """Whether rounding of the Gram matrix, a few units of its largest eigenvalue, is nothing against the loss.

    Nor may the loss be so small that what it is made of falls below the least number of the dtype.
    """
    limits = torch.finfo(dtype)
    return max(10 * limits.eps * largest * math.sqrt(rank), limits.tiny / limits.eps) <= _ROUNDING * loss


def _filtered(product: Product, block: torch.Tensor, floor: float, degree: int, top: float) -> torch.Tensor:
    """The Chebyshev polynomial of [0, floor], scaled to about one at ``top``, of the matrix times ``block``.

    In the place of the block, a few columns after the others: no second block is made.
    """
    half = floor / 2
    first = half / (top - half)
    for (given,) in _panels(block):
        before, now, scale = given, product(given).add_(given, alpha=-half).mul_(first / half), first
        for _ in range(degree - 1):
            after = 1 / (2 / first - scale)
            image = product(now).add_(now, alpha=-half)
            before.mul_(-scale * after).add_(image, alpha=2 * after / half)
            del image  # before the next one is made
            before, now, scale = now, before, after
        given.copy_(now)
        del before, now
    return block


def _projected(product: Product, block: torch.Tensor) -> torch.Tensor:
    """``blockᵀ · matrix · block``."""
    found = block.new_empty(block.shape[1], block.shape[1])
    for given, made in _panels(block, found):
        torch.matmul(block.T, product(given), out=made)
    return found


def _rotate(block: torch.Tensor, turned: torch.Tensor) -> None:
    """``block · turned`` in the place of the block."""
    for rows in block.split(-(-len(block) // _PANELS)):
        rows.copy_(rows @ turned)


def _residual(product: Product, block: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Squared norms of ``matrix · block − block · values``, float64."""
    found = torch.empty_like(values)
    for given, scale, made in _panels(block, values.to(block.dtype), found):
        made.copy_(product(given).addcmul_(given, scale, value=-1).square_().sum(0))
    return found


def _panels(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same columns of all of them (of vectors the elements), a few at a time."""
    columns = tensors[0].shape[-1]
    step = -(-columns // min(_PANELS, max(1, columns * tensors[0].element_size() // _WIDE)))
    return zip(*(tensor.split(step, -1) for tensor in tensors), strict=True)
