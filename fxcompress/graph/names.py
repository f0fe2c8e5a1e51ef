"""The user's parameter names, kept where a raised layer had to call a tensor otherwise.

``nn.MultiheadAttention`` holds its projection as ``in_proj_weight``; raised to an ``nn.Linear`` the same tensor is
``in_proj.weight``. State-dict hooks on the graph write and read the user's names, so that checkpoints of the user's
model load into the graph and the other way round.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn

__all__ = ["keep_original_names", "original_name"]


def _names(module: nn.Module) -> dict[str, str]:
    facts = module.meta.get("fxcompress") if isinstance(module, fx.GraphModule) else None
    return getattr(facts, "original_names", {})


def _save(module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
    for own, theirs in _names(module).items():
        if prefix + own in state:
            state[prefix + theirs] = state.pop(prefix + own)


def _load(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    names = _names(module)
    # One original name may serve several layers (a tied weight), so all are read before any is taken out.
    found = {prefix + own: state[prefix + theirs] for own, theirs in names.items() if prefix + theirs in state}
    own_names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    own_names |= {name for name, _ in module.named_buffers(remove_duplicate=False)}
    for theirs in set(names.values()) - own_names:
        state.pop(prefix + theirs, None)
    state.update(found)


def keep_original_names(graph_module: fx.GraphModule) -> None:
    """Let ``state_dict()`` and ``load_state_dict()`` of the graph use the user's names. Idempotent."""
    if _save not in graph_module._state_dict_hooks.values():
        graph_module._register_state_dict_hook(_save)
        graph_module.register_load_state_dict_pre_hook(_load)


def original_name(graph_module: fx.GraphModule, path: str) -> str:
    """The user's name of the parameter or buffer at ``path`` of the graph: ``attention.in_proj_weight``."""
    return _names(graph_module).get(path, path)
