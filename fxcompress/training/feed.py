"""The batches of every epoch, in an order that seed and epoch fix, from any position: what makes a run resumable.

A ``DataLoader`` is read through a twin of itself whose samplers draw from (seed, epoch); those that have no generator
of their own and draw from the global ones draw each batch from (seed, epoch, batch). With workers in this process
what was used before is skipped without being read; with worker processes, which draw random numbers of their own,
it is read and dropped. Any other iterable is read from its start; it resumes exactly where each reading of it gives the
same batches, as a list does, or draws its order from the global generators, which are seeded by (seed, epoch).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from itertools import count, islice
from typing import Any

import torch
from torch import fx
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from fxcompress.errors import PreconditionError
from fxcompress.graph.batches import Batch, as_batch
from fxcompress.training.randomness import kept_randomness, seed_everything, seed_of

__all__ = ["Feed"]


class Feed:
    """Batches for optimizer steps.

    Args:
        graph_module: what the batches are calls of.
        data: a ``DataLoader`` or any iterable of batches.
        seed: of the order.
        accumulate: batches per step.
        processes: how many share the data; each takes its own batches, and what does not come out even is left.
        process: which of them this is.
        device: where tensors are moved.

    Attributes:
        length: steps in an epoch; None where the data has no length.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        data: Iterable[Any],
        *,
        seed: int = 0,
        accumulate: int = 1,
        processes: int = 1,
        process: int = 0,
        device: torch.device | None = None,
    ) -> None:
        self.graph_module, self.data, self.seed, self.accumulate = graph_module, data, seed, accumulate
        self.processes, self.process, self.device = processes, process, device
        if isinstance(data, (torch.Tensor, dict, str)) or not hasattr(data, "__iter__"):
            raise PreconditionError(
                f"the data is a {type(data).__name__}, not a series of batches",
                where="data",
                remedy="give a DataLoader or a list of batches: [batch]",
            )
        self.once = hasattr(data, "__next__")
        count = _length(data)
        if count is not None and count < processes:
            raise PreconditionError(
                "the data holds no batch" if not count else f"{count} batches are too few for {processes} processes",
                where="data",
                remedy="give data; a loader with drop_last drops what fills no batch" if not count else None,
            )
        self.length = None if count is None else math.ceil(count // processes / accumulate)

    def epoch(self, number: int, start: int = 0) -> Iterator[list[Batch]]:
        """Up to ``accumulate`` batches for every step of an epoch, from step ``start`` on.

        Raises:
            PreconditionError: a batch does not fit the model, or the data ends before its length.
        """
        source, dropped = self._source(number, start)
        step = start - dropped
        # Processes that read one stream of batches must draw the same numbers; a loader's are its own.
        reader = self.process if self._has_twin else 0
        while self.length is None or step < self.length:
            seed_everything(self.seed, "data", number, step, reader)
            taken = list(islice(source, self.accumulate))
            if not taken:
                break
            if step >= start:
                yield [
                    as_batch(self.graph_module, given, f"batch {index} of epoch {number}", device=self.device)
                    for index, given in enumerate(taken, step * self.accumulate)
                ]
            step += 1
        if step == 0 and number > 0 and self.length is None:
            raise PreconditionError(
                f"the data is exhausted: it gave no batch in epoch {number}",
                where="data",
                remedy="give a list or a DataLoader; a generator can be read only once",
            )
        if step == 0:
            raise PreconditionError("the data holds no batch", where="data", remedy="give a list or a DataLoader")
        if self.length is not None and step < self.length:
            raise PreconditionError(
                f"the data ended after {step} of {self.length} steps of epoch {number}: its length is not true",
                where="data",
                remedy="repair its __len__, or give an iterable without one and steps=",
            )

    @property
    def _has_twin(self) -> bool:
        return type(self.data) is DataLoader and not isinstance(self.data.dataset, IterableDataset)

    def _source(self, epoch: int, start: int) -> tuple[Iterator[Any], int]:
        """Batches of this process, and how many steps of those still have to be read and dropped."""
        if self._has_twin:
            drop = self.data.num_workers > 0  # type: ignore[attr-defined]
            twin = self._twin(self.data, epoch, 0 if drop else start * self.accumulate)  # type: ignore[arg-type]
            return iter(twin), start if drop else 0
        seed_everything(self.seed, "order", epoch)
        if hasattr(self.data, "set_epoch"):
            self.data.set_epoch(epoch)
        return self._shared(iter(self.data)), start

    def _twin(self, loader: DataLoader[Any], epoch: int, skip: int) -> DataLoader[Any]:
        """The loader for one epoch: same data, order by (seed, epoch), the share of this process, from ``skip`` on."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, "workers", epoch, self.process))
        order = seed_of(self.seed, "order", epoch)
        whole = loader.batch_sampler is not None
        indices = _reseeded(loader.batch_sampler if whole else loader.sampler, order, epoch)
        picked = _Picked(self, indices, order, skip)
        return DataLoader(
            loader.dataset,
            **({"batch_sampler": picked} if whole else {"batch_size": None, "sampler": picked}),
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            generator=generator,
            prefetch_factor=loader.prefetch_factor,
        )

    def _shared(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Every ``processes``-th of full rounds."""
        if self.processes == 1:
            yield from batches
            return
        while len(group := list(islice(batches, self.processes))) == self.processes:
            yield group[self.process]


class _Picked:
    """The batches of indices that this process reads, from ``skip`` on."""

    def __init__(self, feed: Feed, indices: Any, seed: int, skip: int) -> None:
        self.feed, self.indices, self.seed, self.skip = feed, indices, seed, skip

    def __iter__(self) -> Iterator[Any]:
        source: Iterator[Any] | None = None
        for number in count():
            with kept_randomness(gpus=False):
                seed_everything(self.seed, number)
                source = source or self.feed._shared(iter(self.indices))
                picked = next(source, None)
            if picked is None:
                return
            if number >= self.skip:
                yield picked


def _reseeded(sampler: Any, seed: int, epoch: int) -> Any:
    """A copy of a sampler that draws from ``seed``, if it has a generator."""
    twin = copy.copy(sampler)
    if isinstance(sampler, BatchSampler) and hasattr(sampler, "sampler"):
        twin.sampler = _reseeded(sampler.sampler, seed, epoch)
    if hasattr(sampler, "generator"):
        twin.generator = torch.Generator().manual_seed(seed)
    if hasattr(sampler, "set_epoch"):
        twin.set_epoch(epoch)
    return twin


def _length(data: Iterable[Any]) -> int | None:
    try:
        return len(data)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None
