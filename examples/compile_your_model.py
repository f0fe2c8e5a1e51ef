"""A model of your own: what to write, and what comes back.

``python examples/compile_your_model.py``, or the same from a shell:
``fxcompress compile examples/compile_your_model.py:build --pass fuse_modules``
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import fxcompress as fxc


class Net(nn.Module):
    """Two convolutions with a shortcut, and a head that takes images of any size."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32))
        self.head = nn.Linear(32, classes)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        features = self.stem(image)
        features = torch.relu(features + self.body(features))
        return {"logits": self.head(features.mean((2, 3)))}


def build() -> tuple[nn.Module, tuple[Tensor]]:
    """What ``fxcompress compile FILE.py:build`` calls: the model, and inputs that fit it."""
    return Net(), (torch.randn(2, 3, 32, 32),)


def main() -> None:
    model, inputs = build()
    compiled = fxc.compile(
        model.eval(),
        passes=[fxc.passes.FuseModules()],
        example_inputs=inputs,
        dynamic_shapes={"image": {0: "batch", 2: "height", 3: "width"}},  # "batch" alone is the default
    )
    print(compiled.report)
    print(compiled)  # the graph

    print(compiled(torch.randn(5, 3, 40, 48))["logits"].shape)  # called as the model is
    compiled.module.train()  # an ordinary module: fine-tune it here
    compiled.module.eval()

    with tempfile.TemporaryDirectory() as directory:
        engine = compiled.export("onnxruntime", Path(directory) / "net.bundle")
        print(engine.manifest.inputs[0], "→", engine.manifest.outputs[0])
        print(engine(image=torch.randn(1, 3, 64, 64))["logits"].shape)
        print(engine.benchmark())


if __name__ == "__main__":
    main()
