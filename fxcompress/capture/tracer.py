"""Symbolic tracing: the user's model run on proxies, with layers left whole and nothing lost on the way.

Torch's own tracer makes ``x += y`` a new tensor although other names of ``x`` see the write, forgets where gradients
were off, and computes with parameters as if they were constants. This one keeps all three.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from traceback import StackSummary
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from fxcompress.capture.explain import is_theirs, running_line
from fxcompress.errors import CaptureError
from fxcompress.graph.serialize_layers import is_known

__all__ = ["REMEDY", "WRITES", "NothingRandom", "Tracer"]

REMEDY = "give example_inputs, such as (torch.randn(2, 3, 224, 224),)"

# Python's operators that write into their first argument → the operator that computes the value.
WRITES: dict[Any, Any] = {
    getattr(operator, "i" + name.strip("_")): getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and_", "or_", "xor", "lshift", "rshift")
}


class Tracer(fx.Tracer):
    """Traces a model whose ``forward`` takes the tensors called ``inputs``; other parameters keep their defaults."""

    def __init__(self, model: nn.Module, inputs: Iterable[str]) -> None:
        super().__init__()
        self.record_stack_traces = True
        self._inputs = list(inputs)
        self._names: dict[int, str] = {}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            self._names.setdefault(id(tensor), name)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        hooked = m._forward_hooks or m._forward_pre_hooks
        # Padding by copies is an operation of its own, and renormalising writes into the weight.
        whole = getattr(m, "padding_mode", "zeros") == "zeros" and getattr(m, "max_norm", None) is None
        return is_known(type(m)) and whole and not hooked

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        given = {name: self.create_proxy("placeholder", name, (), {}) for name in self._inputs}
        return lambda model: model.forward(**given), [self.root]

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        name = self._names.get(id(attr_val)) if isinstance(attr_val, torch.Tensor) else None
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = _Weight(self.create_node("get_attr", name, (), {}), self, attr_val)
        return parameter_proxy_cache[name]

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise CaptureError(
                "the model enables autocast, which the graph cannot hold",
                where=running_line(),
                remedy="disable autocast around the model (see ConvertPrecision)",
            )
        node = super().create_node(kind, target, *args, **kwargs)
        node.meta["gradients"] = torch.is_grad_enabled()
        if kind in ("placeholder", "output"):
            node.meta.pop("stack_trace", None)  # the line that called us
        return node

    def _filter_traceback_frames(self, user_stack_summary: StackSummary) -> StackSummary:
        theirs = [frame for frame in user_stack_summary if is_theirs(frame.filename)]
        return StackSummary.from_list(theirs[-1:])

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


class _Proxy(fx.Proxy):
    def __setitem__(self, index: Any, value: Any) -> None:
        raise CaptureError(
            "the model writes into a part of a tensor, which cannot be followed without shapes",
            where=running_line(),
            remedy=REMEDY,
        )


def _writing(function: Any) -> Callable[[Any, Any], Any]:
    def write(self: fx.Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return write


for _function in WRITES:
    setattr(_Proxy, f"__{_function.__name__.strip('_')}__", _writing(_function))


class _Weight(_Proxy):
    """A parameter or buffer: its values are symbolic, its shape and dtype are known."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, tensor: torch.Tensor) -> None:
        super().__init__(node, tracer)
        self._tensor = tensor

    shape = property(lambda self: self._tensor.shape)
    dtype = property(lambda self: self._tensor.dtype)
    device = property(lambda self: self._tensor.device)
    ndim = property(lambda self: self._tensor.ndim)
    requires_grad = property(lambda self: self._tensor.requires_grad)

    def size(self, dim: int | None = None) -> Any:
        return self._tensor.size() if dim is None else self._tensor.size(dim)

    def dim(self) -> int:
        return self._tensor.dim()

    def numel(self) -> int:
        return self._tensor.numel()

    def __len__(self) -> int:
        return len(self._tensor)


class NothingRandom(TorchFunctionMode):
    """Refuses random numbers that do not depend on the inputs: tracing would make them constants."""

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name.startswith("rand") or name.rstrip("_") in _RANDOM:
            raise CaptureError(
                f"the model draws random numbers ({name}) that do not depend on its inputs",
                where=running_line(),
                remedy=REMEDY,
            )
        return func(*args, **(kwargs or {}))


_RANDOM = {"normal", "bernoulli", "multinomial", "uniform", "exponential", "random", "poisson", "empty"}
