"""Fashion-MNIST (Xiao et al. 2017): 60,000 training and 10,000 test images of clothes, 28 x 28 grey, ten classes.

Read from the four gzipped IDX files that Debian ships as `dataset-fashion-mnist`, or from any folder that holds them
and that the environment variable `FASHION_MNIST` names. Images stay `uint8`; a batch is normalised when it is taken.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

CLASSES = 10
FOLDER = Path("/usr/share/datasets/fashion-mnist")
FOLDER_VARIABLE = "FASHION_MNIST"
SHIFT = 2  # pixels, each way

_FILES = {"train": "train", "test": "t10k"}
_MEAN, _STD = 0.2860, 0.3530  # of the training images, in [0, 1]
_UNSIGNED_BYTES = 8  # the IDX code of the element type


@dataclass(frozen=True)
class Split:
    """One part of the data.

    Attributes:
        images: `uint8`, `[count, 1, 28, 28]`.
        labels: `int64`, `[count]`.
    """

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> Split:
        """The first `count` images and their labels."""
        return Split(self.images[:count], self.labels[:count])

    def batches(self, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Normalised batches in order, the last one smaller where they do not come out even."""
        for start in range(0, len(self), size):
            yield normalize(self.images[start : start + size]), self.labels[start : start + size]

    def shuffled(self, size: int, generator: torch.Generator) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """One epoch of full batches in a random order, flipped and shifted at random, normalised."""
        order = torch.randperm(len(self), generator=generator)
        for start in range(0, len(self) - size + 1, size):
            chosen = order[start : start + size]
            yield normalize(augment(self.images[chosen], generator)), self.labels[chosen]


def load(split: str, folder: Path | None = None) -> Split:
    """The `train` or the `test` split.

    Args:
        split: `train` or `test`.
        folder: where the files lie; by default what `FASHION_MNIST` names, else Debian's folder.

    Raises:
        FileNotFoundError: a file is missing; says how to get it.
        ValueError: a file is not what its name says.
    """
    folder = folder or Path(os.environ.get(FOLDER_VARIABLE) or FOLDER)
    prefix = _FILES[split]
    images = _read(folder / f"{prefix}-images-idx3-ubyte.gz", 3)
    labels = _read(folder / f"{prefix}-labels-idx1-ubyte.gz", 1)
    if len(images) != len(labels):
        raise ValueError(f"{folder}: {len(images)} images but {len(labels)} labels in the split {split!r}")
    return Split(torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels).long())


def normalize(images: torch.Tensor) -> torch.Tensor:
    """`uint8` images as `float32` with mean 0 and variance 1 over the training images."""
    return images.float().div_(255).sub_(_MEAN).div_(_STD)


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each image of `[count, 1, height, width]` flipped with probability a half and shifted by up to `SHIFT` pixels."""
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (SHIFT, SHIFT, SHIFT, SHIFT))[:, 0]
    windows = padded.unfold(1, height, 1).unfold(2, width, 1)  # [count, shifts, shifts, height, width]
    down, right = torch.randint(2 * SHIFT + 1, (2, count), generator=generator)
    shifted = windows[torch.arange(count), down, right]
    flip = torch.rand(count, generator=generator) < 0.5
    return torch.where(flip[:, None, None], shifted.flip(-1), shifted).unsqueeze(1)


def _read(path: Path, dims: int) -> np.ndarray:
    """The array of an IDX file: two zero bytes, the type, the number of dims, big-endian int32 dims, the data."""
    try:
        with gzip.open(path) as file:
            data = file.read()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"Fashion-MNIST is not at {path}: on Debian, `apt-get install dataset-fashion-mnist`; elsewhere put the "
            f"four *-ubyte.gz files of the original data set into a folder and name it in {FOLDER_VARIABLE}"
        ) from None
    header = 4 + 4 * dims
    if len(data) < header or data[:4] != bytes((0, 0, _UNSIGNED_BYTES, dims)):
        raise ValueError(f"{path} is not an IDX file of bytes with {dims} dims")
    shape = tuple(int(size) for size in np.frombuffer(data, ">i4", dims, 4))
    if len(data) != header + int(np.prod(shape)):
        raise ValueError(f"{path} is cut short or too long: its header says {shape}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape).copy()
