"""Devices, processes and precision, by Hugging Face Accelerate: the one module that knows it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from fxcompress.errors import PreconditionError

__all__ = ["Engine", "engine"]

_PRECISION = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


class Engine:
    """One run's share of Accelerate: it wraps the module and the optimizer, and knows the other processes."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self.device: torch.device = accelerator.device
        self.processes: int = accelerator.num_processes
        self.process: int = accelerator.process_index
        self.main: bool = accelerator.is_main_process
        self._wrapped: nn.Module | None = None
        self._optimizer: Any = None
        self._parameters: list[nn.Parameter] = []

    def wrap(self, step: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Take the module that computes the loss, on its device already, and what steps its parameters."""
        self._wrapped = self._accelerator.prepare_model(step)
        prepared = self._accelerator.prepare_optimizer(optimizer)
        # What it adds is the scale of float16 losses; without one it only looks for packages at every step.
        self._optimizer = optimizer if self._accelerator.scaler is None else prepared
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def loss(self, *inputs: Any) -> torch.Tensor:
        """Forward."""
        assert self._wrapped is not None
        return self._wrapped(*inputs)

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients, summed over processes' means unless inside :meth:`unsynced`."""
        self._accelerator.backward(loss)

    def unsynced(self, wanted: bool) -> AbstractContextManager[Any]:
        """Inside, gradients are added up in this process only."""
        return self._accelerator.no_sync(self._wrapped) if wanted else nullcontext()

    def step(self, clip: float | None) -> None:
        """Clip, step, clear the gradients. With float16 a step whose gradients overflow is left out."""
        if clip is not None:
            self._accelerator.clip_grad_norm_(self._parameters, clip)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def total(self, sums: torch.Tensor) -> torch.Tensor:
        """Sums over all processes."""
        if self.processes == 1:
            return sums
        return self._accelerator.reduce(sums.to(self.device), "sum")

    def same(self, module: nn.Module) -> None:
        """Give every process the buffers of the first: statistics of norms, which each collects on its own data."""
        if self.processes > 1:
            from accelerate.utils import broadcast

            for buffer in module.buffers():
                buffer.copy_(broadcast(buffer.clone()))

    def wait(self) -> None:
        """Until all processes are here."""
        self._accelerator.wait_for_everyone()

    @property
    def scaler(self) -> dict[str, float]:
        """State of the scale of float16 losses; empty without one."""
        scaler = self._accelerator.scaler
        return scaler.state_dict() if scaler is not None else {}

    @scaler.setter
    def scaler(self, state: dict[str, float]) -> None:
        if self._accelerator.scaler is not None and state:
            self._accelerator.scaler.load_state_dict(state)


@contextmanager
def engine(precision: str, device: str) -> Iterator[Engine]:
    """Accelerate set up for one run; whatever else in this process uses it finds it as it left it.

    Raises:
        PreconditionError: it is not installed, or cannot do this here.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, GradientState
    except ImportError as error:
        raise PreconditionError(
            "training needs Accelerate, which is not installed", remedy="pip install 'fxcompress[train]'"
        ) from error
    # Its state is one per process and would refuse a second precision.
    kept = [(state, dict(state._shared_state)) for state in (AcceleratorState, GradientState)]
    for state, _ in kept:
        state._reset_state()
    try:
        try:
            accelerator = Accelerator(
                mixed_precision=_PRECISION[precision], cpu=device == "cpu", gradient_accumulation_steps=1
            )
        except (ValueError, RuntimeError, ImportError) as error:
            raise PreconditionError(
                f"precision {precision} on device {device} is not possible here: {error}",
                where="precision",
                remedy="use float32, or bfloat16 on a CPU",
            ) from error
        if precision == "float16" and accelerator.device.type == "cpu":  # it would compute in float32 without a word
            raise PreconditionError(
                "precision float16 needs a GPU", where="precision", remedy="use float32, or bfloat16 on a CPU"
            )
        yield Engine(accelerator)
    finally:
        for state, before in kept:
            state._reset_state()
            state._shared_state.update(before)
