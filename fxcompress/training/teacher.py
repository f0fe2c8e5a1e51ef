"""A model that is asked and never changed."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import fx, nn

from fxcompress.errors import PreconditionError
from fxcompress.graph.copying import copy_graph
from fxcompress.graph.info import GraphInfo
from fxcompress.graph.ownership import own_weights
from fxcompress.training.devices import device_of, on_device
from fxcompress.training.taps import tapped

__all__ = ["Teacher"]


class Teacher:
    """Outputs and features of a model in eval mode, without gradients. A context manager: features are tapped inside.

    Args:
        model: a module in eval mode, called as the student is, or a captured graph.
        features: names of what is kept of every run.

    Raises:
        PreconditionError: it is no module, or in train mode.
    """

    def __init__(self, model: Any, features: Iterable[str] = ()) -> None:
        # A compiled model stands for its graph; it lies in a layer above this one.
        model = getattr(model, "module", model) if not isinstance(model, nn.Module) else model
        if not isinstance(model, nn.Module):
            raise PreconditionError(
                f"the teacher is a {type(model).__name__}", where="teacher", remedy="give a torch.nn.Module"
            )
        self.captured = isinstance(model, fx.GraphModule) and isinstance(model.meta.get("fxcompress"), GraphInfo)
        if self.captured:
            model = copy_graph(model).eval()  # type: ignore[arg-type]
        elif any(module.training for module in model.modules()):
            raise PreconditionError("the teacher is in train mode", where="teacher", remedy="call teacher.eval()")
        self.model, self.names = model, tuple(features)
        self.features: Any = {}
        self._stack = ExitStack()

    def __enter__(self) -> Teacher:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self, device: torch.device) -> None:
        """Go to a device; the user's model stays where it is."""
        here = next((tensor.device for tensor in [*self.model.parameters(), *self.model.buffers()]), device)
        if here != device:
            if self.captured:
                assert isinstance(self.model, fx.GraphModule)
                own_weights(self.model, [*self.model.parameters(), *self.model.buffers()])
                if device_of(self.model) != device:
                    self._stack.enter_context(on_device(self.model, device))
            else:
                self.model = copy.deepcopy(self.model).to(device)
        self.features = self._stack.enter_context(tapped(self.model, self.names))

    @torch.no_grad()
    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Its outputs; ``features`` are then those of this run.

        Raises:
            PreconditionError: it cannot be called as the student is, or a named layer did not give a tensor.
        """
        try:
            outputs = self.model(*args, **kwargs)
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
            raise PreconditionError(
                f"the teacher ({type(self.model).__name__}) cannot be called with the inputs of the student: {error}",
                where="teacher",
                remedy="give a teacher that takes the same inputs, or wrap it in a module that makes its own of them",
            ) from error
        silent = [name for name in self.names if name not in self.features]
        if silent:
            raise PreconditionError(
                f"the teacher's module {silent[0]!r} gave no tensor in a run of the teacher",
                where="features",
                remedy="name modules that are called and return a tensor",
            )
        return outputs
