"""Random numbers as a function of (seed, place in the run).

Before every batch is read and before every forward pass all generators are seeded anew from where the run is. So the
state of no generator has to be carried over an interruption: at the same step the same numbers are drawn.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["kept_randomness", "seed_everything", "seed_of"]


def seed_of(*parts: object) -> int:
    """32 bits that depend on every part, the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "little")


def seed_everything(*parts: object) -> None:
    """Seed Python, NumPy and PyTorch, GPUs in use too.

    ``torch.manual_seed`` would queue a call, with a stack trace, for every kind of device that is not in use: at every
    step of a run that costs a millisecond and memory that nothing frees.
    """
    seed = seed_of(*parts)
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    for kind in (torch.cuda, torch.xpu):
        if kind.is_initialized():
            kind.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


@contextmanager
def kept_randomness(*, gpus: bool = True) -> Iterator[None]:
    """Inside, generators may be seeded; after it they go on as if nothing had been. Those of ``gpus`` cost time."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(None if gpus else ()):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
