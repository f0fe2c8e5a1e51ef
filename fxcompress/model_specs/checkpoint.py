"""Weights from a safetensors file into a model that has code of its own."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_model as load_safetensors
from torch import nn

from fxcompress.errors import OptionError, PreconditionError
from fxcompress.model_specs.source import similar_file

__all__ = ["load_checkpoint"]


def load_checkpoint(model: object, path: Path) -> None:
    """Put the weights of a safetensors file into ``model``; names and shapes must agree.

    Raises:
        PreconditionError: the file is missing, no safetensors, or of another model.
    """
    where = str(path)
    if not isinstance(model, nn.Module):
        raise OptionError("only a model with code of its own takes a checkpoint", where=where, remedy="leave it out")
    if path.suffix != ".safetensors":
        raise OptionError(
            f"{path.name} is no .safetensors file, and reading others unpickles, which runs code",
            where=where,
            remedy="convert it once, where you trust it: safetensors.torch.save_model(model, 'weights.safetensors')",
        )
    if not path.is_file():
        raise PreconditionError("there is no such checkpoint", where=where, remedy=similar_file(path))
    try:
        missing, unexpected = load_safetensors(model, path, strict=False)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise PreconditionError(
            f"the checkpoint does not fit the model: {_reason(error)}",
            where=where,
            remedy="give the checkpoint of this very architecture",
        ) from error
    wrong = [f"{name} is missing" for name in sorted(missing)]
    wrong += [f"{name} is unknown" for name in sorted(unexpected)]
    if wrong:
        more = f", and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise PreconditionError(
            f"the checkpoint does not fit the model: {', '.join(wrong[:4])}{more}",
            where=where,
            remedy="give the checkpoint of this very architecture",
        )


def _reason(error: Exception) -> str:
    """The first fact in a loader's message; torch puts a heading above its list."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if not line.startswith("Error(s) in loading")), type(error).__name__)
