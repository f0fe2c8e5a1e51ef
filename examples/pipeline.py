"""The whole way on real data: distil → prune → recover → quantize → train quantized → engine, in one call.

``python examples/pipeline.py``, or the same as a recipe: ``fxcompress compile --recipe examples/pipeline.yaml``.
The data are scikit-learn's 1,797 handwritten digits of 8 x 8 pixels (``pip install scikit-learn``), of which every
fifth is kept for the test. A teacher is trained first; a smaller student learns from it, loses channels, and ends as an
8-bit engine.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxcompress as fxc
from fxcompress.passes import Distill, FineTune, FuseModules, PruneChannels, Quantize, TrainQuantized

BATCH = 64


class Digits(nn.Module):
    """``[batch, 1, 8, 8]`` to ten logits: two stages of convolutions with a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.body, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.down, self.norm2 = nn.Conv2d(width, 2 * width, 3, 2, 1, bias=False), nn.BatchNorm2d(2 * width)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.norm0(self.stem(image)).relu()
        x = (self.norm1(self.body(x)) + x).relu()
        return self.head(self.norm2(self.down(x)).relu().mean((2, 3)))


@cache
def _data() -> tuple[TensorDataset, TensorDataset]:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target, dtype=torch.int64)
    test = torch.arange(len(labels)) % 5 == 0
    return TensorDataset(images[~test], labels[~test]), TensorDataset(images[test], labels[test])


def train() -> DataLoader:
    """Images and labels to learn from."""
    return DataLoader(_data()[0], batch_size=BATCH, shuffle=True, drop_last=True)


def test() -> DataLoader:
    """Images and labels that nothing learns from."""
    return DataLoader(_data()[1], batch_size=256)


def student() -> tuple[nn.Module, tuple[Tensor]]:
    """The network that is to be deployed, with random weights, and inputs that fit it."""
    torch.manual_seed(1)
    return Digits(32).eval(), (_data()[0].tensors[0][:2],)


@cache
def teacher() -> nn.Module:
    """A network four times as large, trained on the labels."""
    torch.manual_seed(0)
    inputs = (_data()[0].tensors[0][:2],)
    training = FineTune(train(), epochs=20, lr=3e-3)
    return fxc.compile(Digits(64).eval(), [training], inputs, verify=False, progress=False).module


def main() -> None:
    model, inputs = student()
    data, validation, large = train(), test(), teacher()
    recover = {"teacher": large, "validation": validation, "lr": 3e-3}
    passes = [
        Distill(data, epochs=20, **recover),
        PruneChannels(macs=0.4, round_to=8),
        Distill(data, epochs=10, **recover),
        FuseModules(),
        Quantize(data, batches=4),
        TrainQuantized(data, epochs=5, lr=3e-4, alpha=0.9, teacher=large, validation=validation),
    ]
    with tempfile.TemporaryDirectory() as directory:
        compiled = fxc.compile(model, passes, inputs, backend="onnxruntime", output=Path(directory) / "digits.bundle")
        print(compiled.report)
        engine = compiled.engine
        images, labels = validation.dataset.tensors
        found = torch.as_tensor(engine(images)).argmax(1)
        before = sum(parameter.numel() for parameter in large.parameters())
        after = sum(parameter.numel() for parameter in compiled.module.parameters())
        print(f"teacher: {before:,} parameters, {accuracy(large(images), labels):.2f}% of {len(labels)} digits")
        print(f"engine: {after:,} parameters in 8 bits, {100 * float((found == labels).float().mean()):.2f}%")


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Percent of labels that are the greatest logit."""
    return 100 * float((logits.argmax(1) == labels).float().mean())


if __name__ == "__main__":
    main()
