"""Weights from a safetensors file into a model that has code of its own."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_model as load_safetensors
from torch import nn

from fxcompress.errors import OptionError, PreconditionError
from fxcompress.model_specs.source import first_line, similar_file

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
            f"a checkpoint is a .safetensors file, not {path.suffix or 'without a suffix'}: others unpickle, which runs code",
            where=where,
            remedy="convert it once, where you trust it: safetensors.torch.save_model(model, 'weights.safetensors')",
        )
    if not path.is_file():
        raise PreconditionError("there is no such checkpoint", where=where, remedy=similar_file(path))
    try:
        missing, unexpected = load_safetensors(model, path, strict=False)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise PreconditionError(
            f"the checkpoint does not fit the model: {first_line(error)}",
            where=where,
            remedy="give the checkpoint of this very architecture",
        ) from error
    wrong = [
        *(f"{name} is missing" for name in sorted(missing)),
        *(f"{name} is unknown" for name in sorted(unexpected)),
    ]
    if wrong:
        raise PreconditionError(
            f"the checkpoint does not fit the model: {', '.join(wrong[:4])}{f', and {len(wrong) - 4} more' * (len(wrong) > 4)}",
            where=where,
            remedy="give the checkpoint of this very architecture",
        )
