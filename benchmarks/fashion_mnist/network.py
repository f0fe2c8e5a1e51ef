"""The network of every benchmark on Fashion-MNIST: a small residual network, and its trained weights.

Basic blocks (He et al. 2016) in three stages that each halve the image: 0.70 M parameters, 22 M multiply-accumulates.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

CHECKPOINT = Path(__file__).with_name("resnet.safetensors")
WIDTHS = (32, 64, 128)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with batch norms, added to the input, which is projected where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, inputs, height, width]` to `[batch, outputs, height / stride, width / stride]`."""
        skip = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + skip)


class ResNet(nn.Module):
    """`[batch, 1, 28, 28]` to `[batch, 10]` logits.

    Args:
        widths: channels of each stage; the first is that of the stem too.
        blocks: basic blocks in a stage; the first of them has stride 2.
        classes: number of logits.
    """

    def __init__(self, widths: Sequence[int] = WIDTHS, blocks: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        stages, inputs = [], widths[0]
        for width in widths:
            first = BasicBlock(inputs, width, 2)
            stages.append(nn.Sequential(first, *(BasicBlock(width, width, 1) for _ in range(blocks - 1))))
            inputs = width
        self.stages = nn.Sequential(*stages)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The logits."""
        x = self.relu(self.bn1(self.conv1(x)))
        return self.fc(self.avgpool(self.stages(x)).flatten(1))


def trained(path: Path = CHECKPOINT) -> ResNet:
    """The network with the weights that `benchmarks.fashion_mnist.train` wrote, in eval mode."""
    model = ResNet()
    model.load_state_dict(load_file(path))
    return model.eval()


def save(model: nn.Module, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write the weights, in place of what was there or not at all."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    os.close(handle)
    try:
        save_file(weights, temporary, dict(metadata or {}))
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
