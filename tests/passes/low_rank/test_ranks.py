import itertools

import pytest
import torch

from fxcompress.passes.low_rank.ranks import Goal, Price, share_budget


def test_goals():
    price = Price(dense=600, unit=50, full=20)
    energy = torch.tensor([[8.0, 4.0, 2.0, 1.0, 1.0]], dtype=torch.float64)
    assert Goal(rank=7).fixed(price) == 7
    assert Goal(ratio=0.5).fixed(price) == 6
    assert Goal(ratio=0.5, round_to=4).fixed(price) == 4
    assert Goal(ratio=0.01).fixed(price) == 1
    assert Goal(energy=0.75).of_spectrum(energy) == 2
    assert Goal(energy=0.76).of_spectrum(energy) == 3
    assert Goal(energy=0.76, round_to=4).of_spectrum(energy) == 4
    assert Goal(error=0.5).of_spectrum(energy) == 2
    assert Goal(error=0.0).of_spectrum(energy) == 5
    assert Goal(energy=0.9).of_spectrum(torch.zeros(1, 5, dtype=torch.float64)) == 1


def test_break_even():
    price = Price(dense=600, unit=50, full=20)
    assert price.pays(11)
    assert not price.pays(12)
    assert price.break_even == 12


@pytest.mark.parametrize("ratio", [0.2, 0.45, 0.7])
def test_a_shared_budget_is_the_best_of_all_choices(ratio):
    generator = torch.Generator().manual_seed(0)
    spectra = [
        torch.rand(1, 6, generator=generator, dtype=torch.float64).sort(descending=True).values for _ in range(3)
    ]
    spectra = [energy**power for energy, power in zip(spectra, (1, 3, 8), strict=True)]
    prices = [Price(36, 12, 6) for _ in spectra]  # ranks 1 and 2 pay
    ranks = share_budget(spectra, prices, ratio)

    def loss(chosen):
        return sum(
            float(energy[0, rank:].sum() / energy.sum()) if rank is not None else 0.0
            for energy, rank in zip(spectra, chosen, strict=True)
        )

    def cost(chosen):
        return sum(36 if rank is None else 12 * rank for rank in chosen)

    budget = ratio * 108
    assert cost(ranks) <= budget or all(rank == 1 for rank in ranks)
    best = min((c for c in itertools.product((1, 2), repeat=3) if cost(c) <= cost(ranks)), key=loss, default=ranks)
    if None not in ranks:
        assert loss(ranks) <= loss(best) + 1e-12


def test_the_budget_goes_where_the_spectrum_is_flat():
    steep = torch.logspace(0, -6, 30, dtype=torch.float64)[None]
    flat = torch.linspace(1, 0.9, 30, dtype=torch.float64)[None]
    price = Price(900, 60, 30)
    first, second = share_budget([steep, flat], [price, price], 0.5)
    assert first is not None
    assert second is None or second > first
