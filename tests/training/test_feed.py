"""The batches of an epoch are the same from any position, whatever draws their order."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from fxcompress.capture import capture
from fxcompress.training.feed import Feed

GRAPH = capture(nn.Linear(1, 1).eval(), (torch.zeros(2, 1),))


class Noisy(Dataset[torch.Tensor]):
    """Samples that are drawn anew at each reading."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index + 0.5 * random.random()])


class AtOnce(Sampler[int]):
    """Draws the whole order from PyTorch's global generator."""

    def __len__(self) -> int:
        return 20

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(20).tolist())


class OneByOne(AtOnce):
    """Draws each index when it is asked for, from NumPy's."""

    def __iter__(self) -> Iterator[int]:
        for _ in range(20):
            yield int(np.random.randint(20))


class Batches(Sampler[list[int]]):
    """Makes the batches too."""

    def __len__(self) -> int:
        return 10

    def __iter__(self) -> Iterator[list[int]]:
        order = random.sample(range(20), 20)
        return iter([order[start : start + 2] for start in range(0, 20, 2)])


LOADERS = {
    "shuffled": lambda: DataLoader(Noisy(), batch_size=2, shuffle=True),
    "drawn at once": lambda: DataLoader(Noisy(), batch_size=2, sampler=AtOnce()),
    "drawn one by one": lambda: DataLoader(Noisy(), batch_size=2, sampler=OneByOne()),
    "batches drawn": lambda: DataLoader(Noisy(), batch_sampler=Batches()),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_from_any_position(kind: str) -> None:
    def read(epoch: int, start: int, seed: int = 3) -> list[list[float]]:
        torch.manual_seed(start)  # what was drawn before does not matter
        feed = Feed(GRAPH, LOADERS[kind](), seed=seed)
        return [batch.leaves[0].flatten().tolist() for (batch,) in feed.epoch(epoch, start)]

    whole = read(1, 0)
    assert len(whole) == 10
    for start in (0, 1, 4, 9):
        assert read(1, start) == whole[start:]
    assert read(2, 0) != whole != read(1, 0, seed=4)
