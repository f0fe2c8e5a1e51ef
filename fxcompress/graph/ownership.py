"""Whose memory a graph's weights are."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx, nn

__all__ = ["own_weights", "shared_weights"]


def shared_weights(graph_module: fx.GraphModule, theirs: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Those of ``theirs`` (the user's tensors) whose memory the graph's weights lie in."""
    ours = {_key(t) for t in [*graph_module.parameters(), *graph_module.buffers()] if t.device.type != "meta"}
    return [tensor for tensor in theirs if tensor.device.type != "meta" and _key(tensor) in ours]


def own_weights(graph_module: fx.GraphModule, shared_with: Iterable[torch.Tensor]) -> None:
    """Copy every weight of the graph that still lies in the memory of ``shared_with`` (the user's tensors).

    Passes share weights until they have to write. At the end the graph is handed out to be trained, so what is still
    shared is copied once: per storage, so that tied weights and views of one storage stay tied.
    """
    theirs = {_key(tensor) for tensor in shared_with if tensor.device.type != "meta"}
    copies: dict[tuple[int, str], torch.UntypedStorage] = {}
    replaced: dict[int, torch.Tensor] = {}
    for module in graph_module.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is None or tensor.device.type == "meta" or _key(tensor) not in theirs:
                    continue
                if id(tensor) not in replaced:
                    replaced[id(tensor)] = _moved(tensor, copies)
                store[name] = replaced[id(tensor)]  # type: ignore[assignment]
        if isinstance(module, nn.RNNBase):
            module._flat_weights = [getattr(module, name, None) for name in module._flat_weights_names]


def _moved(tensor: torch.Tensor, copies: dict[tuple[int, str], torch.UntypedStorage]) -> torch.Tensor:
    key = _key(tensor)
    if key not in copies:
        copies[key] = tensor.untyped_storage().clone()
    fresh = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    fresh.set_(copies[key], tensor.storage_offset(), tensor.shape, tensor.stride())
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(fresh, requires_grad=tensor.requires_grad)
    return fresh


def _key(tensor: torch.Tensor) -> tuple[int, str]:
    return tensor.untyped_storage().data_ptr(), str(tensor.device)
