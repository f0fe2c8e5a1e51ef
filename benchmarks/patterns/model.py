"""A pattern: the parts of a small model, and what it does between a stem and a head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PATTERNS", "Pattern", "Small", "build", "conv", "image", "pairs", "tokens"]

Body = Callable[[Any, Tensor], Any]
Parts = Callable[[], Mapping[str, Any]]

WIDTH = 16


@dataclass(frozen=True)
class Pattern:
    """One small model.

    Attributes:
        name: of the function that is its body.
        kind: ``image`` (``[B, 3, 8, 8]``, stem and head are convolution and linear) or ``tokens`` (``[B, 6, 16]``,
            both linear).
        body: from what the stem makes (16 channels or features) to what the head reads.
        parts: makes layers, parameters and buffers, anew for each model.
        out: channels or features that the body makes.
        refused: part of the reason for which nothing may be removed; None where removal is exact.
        outputs: the layers that make the model's output: the head, or layers of a body that makes the output itself.
    """

    name: str
    kind: str
    body: Body
    parts: Parts
    out: int
    refused: str | None = None
    outputs: tuple[str, ...] = ("head",)

    @property
    def whole(self) -> bool:
        """Whether the body makes the model's output itself."""
        return self.outputs != ("head",)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one input, without the batch."""
        return (3, 8, 8) if self.kind == "image" else (6, 16)


PATTERNS: dict[str, Pattern] = {}


class Small(nn.Module):
    """Stem, one or two bodies, head."""

    def __init__(self, *chain: Pattern) -> None:
        super().__init__()
        self.chain = chain
        self.outputs = chain[-1].outputs
        image = chain[0].kind == "image"
        self.stem: nn.Module = conv(3, WIDTH) if image else nn.Linear(WIDTH, WIDTH)
        self.bodies = nn.ModuleList(_Body(pattern) for pattern in chain)
        self.joints = nn.ModuleList(
            (nn.Conv2d(p.out, WIDTH, 1) if image else nn.Linear(p.out, WIDTH)) for p in chain[:-1]
        )
        if not chain[-1].whole:
            self.head = nn.Linear(chain[-1].out, 5)

    def forward(self, x: Tensor) -> Any:
        """``[B, …]`` to ``[B, 5]`` or ``[B, tokens, 5]``, or what the last body makes."""
        x = self.stem(x)
        for index, (pattern, body) in enumerate(zip(self.chain, self.bodies, strict=True)):
            x = pattern.body(body, x)
            if index < len(self.joints):
                if x.dim() == 2:
                    x = x[:, :, None, None] if pattern.kind == "image" else x.unsqueeze(1).expand(-1, 6, -1)
                x = self.joints[index](x)
                if pattern.kind == "image" and x.shape[-2:] != (8, 8):
                    x = F.interpolate(x, size=(8, 8))
        if self.chain[-1].whole:
            return x
        return self.head(x.mean((2, 3)) if x.dim() == 4 else x)


class _Body(nn.Module):
    def __init__(self, pattern: Pattern) -> None:
        super().__init__()
        for name, part in pattern.parts().items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)


def build(*chain: Pattern, seed: int = 0) -> Small:
    """The model of a pattern, or of several one after the other; norms get weights that are not one and zero."""
    torch.manual_seed(seed)
    model = Small(*chain).eval()
    for module in model.modules():
        if isinstance(module, (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)):
            for name, tensor in module.named_parameters(recurse=False):
                (nn.init.uniform_ if name == "weight" else nn.init.normal_)(tensor, 0.5, 1.5)
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
                nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    return model


def pairs() -> list[tuple[Pattern, Pattern]]:
    """Each exact pattern of a kind followed by another: neighbours in the list, and ones further apart."""
    found = []
    for kind in ("image", "tokens"):
        exact = [p for p in PATTERNS.values() if p.kind == kind and p.refused is None]
        for step in (1, 7):
            for index, first in enumerate(exact):
                second = exact[(index + step) % len(exact)]
                if not first.whole:
                    found.append((first, second))
    return found


def _register(
    kind: str, parts: Parts, out: int, refused: str | None, outputs: tuple[str, ...]
) -> Callable[[Body], Body]:
    def register(body: Body) -> Body:
        name = body.__name__
        assert name not in PATTERNS, name
        PATTERNS[name] = Pattern(name, kind, body, parts, out, refused, outputs)
        return body

    return register


def image(
    parts: Parts = dict, *, out: int = WIDTH, refused: str | None = None, outputs: tuple[str, ...] = ("head",)
) -> Callable[[Body], Body]:
    """Register a body on feature maps ``[B, 16, 8, 8]``."""
    return _register("image", parts, out, refused, outputs)


def tokens(
    parts: Parts = dict, *, out: int = WIDTH, refused: str | None = None, outputs: tuple[str, ...] = ("head",)
) -> Callable[[Body], Body]:
    """Register a body on tokens ``[B, 6, 16]``."""
    return _register("tokens", parts, out, refused, outputs)


def conv(read: int, made: int, size: int = 3, **options: Any) -> nn.Conv2d:
    """A convolution that keeps height and width."""
    return nn.Conv2d(read, made, size, padding=size // 2, **options)
