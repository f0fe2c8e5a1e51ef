"""What every backend is held to: the backends with the options that the tests use, models, and what each can do.

``FEATURES`` is the table of ``docs/backends.md``; ``test_contract.py`` finds out whether it is true.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxcompress import backends
from fxcompress.backends.registry import backend_class

DOCS = Path(__file__).resolve().parents[2] / "docs" / "backends.md"

# In the order of the table. TensorRT's engines need a GPU to run: its own tests build them.
BACKENDS: dict[str, dict[str, Any]] = {
    "onnxruntime": {"threads": 1},
    "openvino": {"threads": 1},
    "torchscript": {},
    "torch_export": {},
}
BUILT_IN = tuple(BACKENDS)
# Backends of other packages, by the names of their entry points; they are held to all that is held of anything here.
BACKENDS |= {name: {} for name in os.environ.get("FXCOMPRESS_BACKENDS", "").split(",") if name}
LIBRARIES = {"onnxruntime": "onnxruntime", "openvino": "openvino", "torchscript": "torch", "torch_export": "torch"}
CLASSES = {
    "onnxruntime": "OnnxRuntime",
    "openvino": "OpenVINO",
    "torchscript": "TorchScript",
    "torch_export": "TorchExport",
}


def backend(name: str, **options: Any) -> backends.Backend:
    made = backend_class(name)(**(BACKENDS[name] | options))
    assert isinstance(made, backends.Backend)
    return made


def available(name: str) -> bool:
    return name not in LIBRARIES or find_spec(LIBRARIES[name]) is not None


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


# What the table says: feature → backends that have it. Each "no" is tried too: refused, or as the docs say.
FEATURES: dict[str, frozenset[str]] = {
    "dynamic dims": frozenset(BACKENDS),
    "dict and keyword inputs": frozenset(BACKENDS),
    "attention": frozenset(BACKENDS),
    "recurrent layers": frozenset(BACKENDS),
    "float16": frozenset(BACKENDS),
    "bfloat16": frozenset(BACKENDS) - {"onnxruntime"},  # it has no kernel for Gemm in bfloat16
    "float64": frozenset(BACKENDS) - {"openvino"},  # it computes in 32 bits, and is found out
    "integers of 64 bits": frozenset(BACKENDS) - {"openvino"},
    "dynamic quantization": frozenset(BACKENDS),
    "int8 in integer kernels": frozenset({"onnxruntime", "openvino"}),
    "weights stored in 4 bits": frozenset(BACKENDS),
    "kernels for 2:4 sparse weights": frozenset(),  # of TensorRT alone
    "refuses an index out of range": frozenset(BACKENDS) - {"openvino"},
}


def table() -> str:
    """The table of ``docs/backends.md``, as these facts have it."""
    rows = [["feature", *(f"`{name}`" for name in BUILT_IN)]]
    rows += [[title, *("yes" if name in having else "no" for name in BUILT_IN)] for title, having in FEATURES.items()]
    header, *lines = ["| " + " | ".join(row) + " |\n" for row in rows]
    return header + "|---" * len(rows[0]) + "|\n" + "".join(lines)


def write_table() -> None:
    """Put it into the docs, in place of the one there: ``python -m tests.backends.contract``."""
    text = DOCS.read_text(encoding="utf-8")
    start = text.index("| feature |")
    DOCS.write_text(text[:start] + table() + text[text.index("\n\n", start) + 1 :], encoding="utf-8")


if __name__ == "__main__":
    write_table()
