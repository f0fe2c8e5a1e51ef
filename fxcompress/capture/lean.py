"""``torch.export`` without the work whose results nobody reads here: a fifth of an export.

Three private places of torch are stood in for while a model is exported. Each is looked up first, and left alone where
another release of torch has something else there: then an export merely takes longer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from torch import fx
from torch.fx import proxy as fx_proxy
from torch.fx.experimental import proxy_tensor

from fxcompress.heap import without_collections

__all__ = ["lean_export"]


@contextmanager
def lean_export() -> Iterator[None]:
    """Inside the block ``torch.export`` keeps to the graph, its fake values, and the source lines of operations."""
    with ExitStack() as stack:
        stack.enter_context(without_collections())
        for owner, name, stand_in in (
            (proxy_tensor, "_extract_tensor_metadata", _no_metadata),
            (fx_proxy.TracerBase, "create_node", _without_traces_of_placeholders()),
            (fx.GraphModule, "recompile", _compiled_when_called()),
        ):
            if callable(getattr(owner, name, None)):
                stack.enter_context(mock.patch.object(owner, name, stand_in))
        yield


def _no_metadata(*args: Any, **kwargs: Any) -> None:
    """``meta["tensor_meta"]`` repeats what the fake value says, and asks symbolic sizes for every memory format."""


def _without_traces_of_placeholders() -> Any:
    """Every weight is a placeholder; torch reads its stack trace from the sources, and throws it away at the end."""
    original = fx_proxy.TracerBase.create_node

    def create_node(self: Any, kind: str, *args: Any, **kwargs: Any) -> Any:
        recorded = getattr(self, "record_stack_traces", False)
        if kind != "placeholder" or not recorded:
            return original(self, kind, *args, **kwargs)
        self.record_stack_traces = False
        try:
            return original(self, kind, *args, **kwargs)
        finally:
            self.record_stack_traces = recorded

    return create_node


def _compiled_when_called() -> Any:
    """A graph module's code is written when it is first called: export writes it after each of its passes."""
    original = fx.GraphModule.recompile

    def recompile(self: Any) -> Any:
        def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
            original(module)
            return type(module).forward(module, *args, **kwargs)

        type(self).forward = forward
        self._code = ""

    return recompile
