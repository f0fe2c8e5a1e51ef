"""What every backend is held to: the backends with the options that the tests use, models, and what each can do.

``FEATURES`` is the table of ``docs/backends.md``; ``test_contract.py`` finds out whether it is true.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from fxcompress import backends

# In the order of the table. TensorRT's engines need a GPU to run: its own tests build them.
BACKENDS: dict[str, dict[str, Any]] = {
    "onnxruntime": {"threads": 1},
    "openvino": {"threads": 1},
    "torchscript": {},
    "torch_export": {},
}
LIBRARIES = {"onnxruntime": "onnxruntime", "openvino": "openvino", "torchscript": "torch", "torch_export": "torch"}
CLASSES = {
    "onnxruntime": "OnnxRuntime",
    "openvino": "OpenVINO",
    "torchscript": "TorchScript",
    "torch_export": "TorchExport",
}


def backend(name: str, **options: Any) -> backends.Backend:
    made = getattr(backends, CLASSES[name])(**(BACKENDS[name] | options))
    assert isinstance(made, backends.Backend)
    return made


def available(name: str) -> bool:
    return find_spec(LIBRARIES[name]) is not None


class Convolutional(nn.Module):
    """Convolution, norm, residual addition, pooling, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 5)
        self.again = nn.Conv2d(8, 8, 3, padding=1, groups=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        x = torch.relu(x + self.again(x))
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """An encoder layer over embeddings of tokens, with a padding mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.layer(self.embed(tokens), src_key_padding_mask=~mask)


class Nested(nn.Module):
    """Everything that a call and a result may be made of."""

    def forward(
        self, x: torch.Tensor, pair: tuple[torch.Tensor, list[torch.Tensor]], *, scale: dict[str, torch.Tensor]
    ) -> dict[str, Any]:
        a, (b,) = pair
        return {"sum": (x + a, [b * scale["by"]]), "size": x.shape[0], "none": None, "same": x}


class Dtypes(nn.Module):
    """A float, an integer and a boolean through one model."""

    def forward(self, x: torch.Tensor, index: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x.gather(1, index) * keep, index * 2 + 1, keep.logical_not(), x > 0


class Sizes(nn.Module):
    """Arithmetic on the size of the batch; an engine with a size fixed in it fails."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        count = x.shape[0]
        return (x.reshape(count * 2, -1) + torch.arange(count * 2)[:, None]).reshape(count, -1) / count


# What the table says: feature → backends that have it.
FEATURES: dict[str, frozenset[str]] = {
    "dynamic dims": frozenset(BACKENDS),
    "float16": frozenset(BACKENDS),
    "bfloat16": frozenset(BACKENDS) - {"onnxruntime"},  # it has no kernel for Gemm in bfloat16
    "attention": frozenset(BACKENDS),
    "recurrent layers": frozenset(BACKENDS),
    "float64": frozenset(BACKENDS) - {"openvino"},  # it computes in 32 bits, and is found out
    "integers of 64 bits": frozenset(BACKENDS) - {"openvino"},
    "weights stored in 4 bits": frozenset(BACKENDS),
    "dynamic quantization": frozenset(BACKENDS),
    "kernels for 2:4 sparse weights": frozenset(),  # of TensorRT alone
    "int8 in integer kernels": frozenset({"onnxruntime", "openvino"}),
    "refuses an index out of range": frozenset(BACKENDS) - {"openvino"},
    "dict and keyword inputs": frozenset(BACKENDS),
}
