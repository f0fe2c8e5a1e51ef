"""Decompositions of kernels: bounds that theory gives, and tensors whose rank is known."""

import torch

from fxcompress.passes.low_rank.cp import cp_factors
from fxcompress.passes.low_rank.tucker import tucker2, vbmf_rank


def test_tucker_keeps_the_bound_of_hosvd_and_finds_the_rank_that_is_there():
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(2, 12, 10, 9, generator=generator)
    right, left, core = tucker2(kernel, 4, 6)
    made = torch.einsum("gos,gsrk,gir->goik", left, core, right)
    error = (kernel.double() - made).square().sum((1, 2, 3))
    wide = kernel.double()
    tails = [
        torch.linalg.svdvals(unfolded)[:, rank:].square().sum(1)
        for unfolded, rank in ((wide.flatten(2), 6), (wide.transpose(1, 2).flatten(2), 4))
    ]
    assert bool((error <= tails[0] + tails[1] + 1e-9).all())
    assert bool((error >= torch.maximum(*tails) - 1e-9).all())
    exact = torch.einsum("gos,gsrk,gir->goik", left, core, right)
    again = torch.einsum("gos,gsrk,gir->goik", *(lambda r, u, c: (u, c, r))(*tucker2(exact, 4, 6)))
    torch.testing.assert_close(again, exact)


def test_cp_finds_the_components_that_are_there():
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(size, 3, generator=generator, dtype=torch.float64) for size in (8, 7, 9))
    kernel = torch.einsum("or,ir,kr->oik", a, b, c)
    made = torch.einsum("or,ir,kr->oik", *cp_factors(kernel, 3))
    assert float((kernel - made).norm() / kernel.norm()) < 1e-3
    assert not bool(torch.einsum("or,ir,kr->oik", *cp_factors(torch.zeros_like(kernel), 2)).any())


def test_variational_rank_is_the_rank_under_noise():
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(60, 5, generator=generator) @ torch.randn(5, 200, generator=generator)
    assert vbmf_rank(low + 0.3 * torch.randn(60, 200, generator=generator)) == 5
    assert vbmf_rank((low + 0.3 * torch.randn(60, 200, generator=generator)).T) == 5
    assert vbmf_rank(torch.zeros(6, 8)) == 1
