"""A layer's place in the graph taken by several, called one after another as ``<name>.0``, ``<name>.1``, …"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxcompress.graph.edit import GraphEditor
from fxcompress.passes.low_rank.sites import Site

__all__ = ["conv_like", "linear", "splice"]


def splice(
    editor: GraphEditor,
    site: Site,
    layers: Sequence[nn.Module],
    calls: Mapping[int, tuple[Any, tuple[Any, ...]]] | None = None,
) -> list[fx.Node]:
    """Put ``layers`` in the place of the site's layer, at every call of it.

    Args:
        editor: of the graph.
        site: what is replaced.
        layers: one after another.
        calls: index of a layer → an operation on what it produces, with its further arguments.

    Returns:
        the nodes of the first call.
    """
    editor.set_module(site.path, nn.Sequential(*layers), reshaped=False)
    first: list[fx.Node] = []
    for call in site.nodes:
        made: list[fx.Node] = []
        value: Any = call.args[0]
        for index in range(len(layers)):
            value = editor.insert_module(f"{site.path}.{index}", (value,), before=call, like=call)
            made.append(value)
            if calls and index in calls:
                operation, more = calls[index]
                value = editor.insert_call(operation, (value, *more), before=call, like=call)
        editor.replace(call, value)
        first = first or made
    return first


def linear(weight: torch.Tensor, bias: torch.Tensor | None, like: nn.Module) -> nn.Linear:
    """A linear layer of a weight ``[out, in]``, as trainable as ``like``."""
    layer = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    return _filled(layer, weight, bias, like)


def conv_like(
    like: Any,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    groups: int = 1,
    transposed: bool = False,
    **geometry: Any,
) -> Any:
    """A convolution of a weight, with kernel 1, stride 1 and no padding but for what ``geometry`` says.

    Args:
        like: a convolution of the same rank; says what is trainable.
        weight: ``[out, in / groups, kernel…]``, of a transposed one ``[in, out / groups, kernel…]``.
        bias: or None.
        groups: of the new layer.
        transposed: whether it is a transposed convolution.
        geometry: stride, padding, dilation, padding_mode, output_padding.
    """
    rank = weight.dim() - 2
    family = (
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        if transposed
        else (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    )
    first, second = weight.shape[0], weight.shape[1] * groups
    inputs, outputs = (first, second) if transposed else (second, first)
    layer = nn.utils.skip_init(
        family[rank - 1],
        inputs,
        outputs,
        tuple(weight.shape[2:]),
        groups=groups,
        bias=bias is not None,
        device="meta",
        **geometry,
    )
    return _filled(layer, weight, bias, like)


def _filled(layer: Any, weight: torch.Tensor, bias: torch.Tensor | None, like: Any) -> Any:
    old: nn.Parameter = like.weight
    layer.weight = nn.Parameter(weight.to(old.dtype).contiguous(), old.requires_grad)
    if bias is not None:
        learns = like.bias.requires_grad if getattr(like, "bias", None) is not None else old.requires_grad
        layer.bias = nn.Parameter(bias.detach().to(old.dtype).clone(), learns)
    return layer
