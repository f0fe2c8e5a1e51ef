"""Checkpoints of a run: a directory each, tensors as safetensors and the rest as JSON, there as a whole or not at all.

::

    DIRECTORY/step-00000468/tensors.safetensors    model.*, objective.*, optimizer.*, average.*, best.*, hook.*, losses
                            state.json             place in the run, what run it is, history, scalars of the optimizer
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from fxcompress.errors import PreconditionError
from fxcompress.graph.raw_bytes import raw_bytes

__all__ = [
    "Checkpoint",
    "Checkpoints",
    "copy_into",
    "fingerprint",
    "optimizer_state",
    "restore_optimizer",
    "tensors_of",
]

_FORMAT = 1
_TENSORS, _STATE = "tensors.safetensors", "state.json"
_NAME = re.compile(r"step-(\d+)")


@dataclass
class Checkpoint:
    """What one holds.

    Attributes:
        identity: what tells one run from another: option or fact → plain value.
        state: place in the run and everything else that is no tensor.
        tensors: by part and name, ``model.conv1.weight``.
    """

    identity: Mapping[str, Any]
    state: Mapping[str, Any]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def part(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of one part, by name."""
        prefix = f"{name}."
        return {key.removeprefix(prefix): tensor for key, tensor in self.tensors.items() if key.startswith(prefix)}


class Checkpoints:
    """The checkpoints of one run in a directory.

    Args:
        directory: made when the first is written.
        identity: of the run.
    """

    def __init__(self, directory: str | Path, identity: Mapping[str, Any]) -> None:
        self.directory, self.identity = Path(directory), json.loads(json.dumps(identity))

    def latest(self) -> Checkpoint | None:
        """The newest one; None where there is none.

        Raises:
            PreconditionError: it is of another model or of other options (names them), or damaged.
        """
        found = self._written()
        if not found:
            return None
        path = found[-1]
        try:
            told = json.loads((path / _STATE).read_text(encoding="utf-8"))
            if told["format"] != _FORMAT:
                raise ValueError(f"it has the format {told['format']}, this version reads {_FORMAT}")
            self._check(told["identity"], path)
            return Checkpoint(told["identity"], told["state"], load_file(path / _TENSORS))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise PreconditionError(
                f"the checkpoint cannot be read: {error}",
                where=str(path),
                remedy="remove this directory; the one before it, if there is one, is used then",
            ) from error

    def save(self, step: int, state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Path:
        """Write one and remove those before the last; a kill at any moment leaves the last one whole.

        Raises:
            PreconditionError: it cannot be written.
        """
        name = f"step-{step:08d}"
        document = {"format": _FORMAT, "identity": self.identity, "state": state}
        part: Path | None = None
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for stale in self.directory.glob(".part-*"):
                shutil.rmtree(stale, ignore_errors=True)
            part = Path(tempfile.mkdtemp(prefix=".part-", dir=self.directory))
            save_file(_savable(tensors), part / _TENSORS)
            (part / _STATE).write_text(json.dumps(document), encoding="utf-8")
            for file in (part / _TENSORS, part / _STATE, part):
                _sync(file)
            target = self.directory / name
            if target.exists():  # the run was stopped between this write and the removal of older ones
                shutil.rmtree(target)
            part.rename(target)
            _sync(self.directory)
            for old in self._written()[:-2]:
                shutil.rmtree(old)
        except (OSError, SafetensorError) as error:
            if part is not None:
                shutil.rmtree(part, ignore_errors=True)
            raise PreconditionError(
                f"the checkpoint cannot be written: {error}",
                where=str(self.directory),
                remedy="make room on the disk, or give another directory",
            ) from error
        return target

    def _written(self) -> list[Path]:
        if not self.directory.exists():
            return []
        if not self.directory.is_dir():
            raise PreconditionError(
                "it is no directory", where=str(self.directory), remedy="give another for checkpoints"
            )
        return sorted(path for path in self.directory.iterdir() if _NAME.fullmatch(path.name))

    def _check(self, told: Mapping[str, Any], path: Path) -> None:
        differing = [key for key in self.identity if told.get(key) != self.identity[key]]
        if not differing:
            return
        model = [key for key in differing if key in ("parameters", "weights")]
        remedy = "give another directory, or remove this one to start anew"
        if model:
            what = "parameters of other names or shapes" if "parameters" in model else "other weights at its start"
            raise PreconditionError(
                f"the checkpoint is of another model: it had {what}", where=str(path), remedy=remedy
            )
        said = ", ".join(f"{key} was {told.get(key)!r}, is {self.identity[key]!r}" for key in differing)
        raise PreconditionError(f"the checkpoint is of another run: {said}", where=str(path), remedy=remedy)


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers, tied ones once."""
    found: dict[str, torch.Tensor] = dict(module.named_parameters())
    found.update(module.named_buffers())
    return found


def fingerprint(module: nn.Module) -> dict[str, str]:
    """What tells a model at the start of a run from others: hashes of its parameters' shapes and of its weights."""
    tensors = tensors_of(module)
    shapes = [(name, str(tensor.dtype), list(tensor.shape)) for name, tensor in tensors.items()]
    weights = hashlib.sha256()
    for tensor in tensors.values():
        weights.update(raw_bytes(tensor).data)
    return {"parameters": hashlib.sha256(repr(shapes).encode()).hexdigest(), "weights": weights.hexdigest()}


@torch.no_grad()
def copy_into(targets: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor]) -> None:
    """Write saved values into tensors of the same names.

    Raises:
        ValueError: a name is missing or a shape differs.
    """
    for name, target in targets.items():
        if name not in saved or saved[name].shape != target.shape:
            raise ValueError(f"{name!r} is missing or of another shape")
        target.copy_(saved[name])


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and plain values of an optimizer's state, by number of the parameter and key: ``3.exp_avg``.

    Raises:
        PreconditionError: the optimizer keeps something else.
    """
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, Any] = {}
    for index, entries in optimizer.state_dict()["state"].items():
        for key, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{key}"] = value
            elif value is None or isinstance(value, (bool, int, float, str)):
                plain[f"{index}.{key}"] = value
            else:
                raise PreconditionError(
                    f"the optimizer keeps a {type(value).__name__} under {key!r}, which a checkpoint cannot hold",
                    where="optimizer",
                    remedy="train without checkpoint, or with an optimizer whose state is tensors and numbers",
                )
    return tensors, plain


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], plain: Mapping[str, Any]
) -> None:
    """Put back what :func:`optimizer_state` took; groups and their options stay as they are.

    Files hold tensors in the order of their dims: what is of a parameter's shape gets its strides again.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for name, value in [*tensors.items(), *plain.items()]:
        index, _, key = name.partition(".")
        if isinstance(value, torch.Tensor) and value.shape == parameters[int(index)].shape:
            like = parameters[int(index)].detach()
            value = torch.empty_like(like, dtype=value.dtype, device=value.device).copy_(value)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _savable(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """On the CPU, contiguous, and no two in one storage, as safetensors wants them."""
    seen: set[int] = set()
    made: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        key = plain.untyped_storage().data_ptr()
        if key in seen or plain.untyped_storage().nbytes() != plain.numel() * plain.element_size():
            plain = plain.clone()
        seen.add(key)
        made[name] = plain
    return made


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
