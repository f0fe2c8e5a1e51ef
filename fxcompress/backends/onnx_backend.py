"""What the backends that take ONNX have in common: the options of the file, how it is written, how it is recognised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import onnx
from torch import fx

from fxcompress.backends.base import Backend, BuildContext, Signature
from fxcompress.errors import OptionError

__all__ = ["MODEL_FILE", "OnnxBackend", "shapes_agree", "whole"]

MODEL_FILE = "model.onnx"
_LEAST_OPSET = 18  # of torch.onnx.export(dynamo=True)


@dataclass(frozen=True)
class OnnxBackend(Backend):
    """Base of the backends whose road goes through an ONNX file.

    Attributes:
        opset: of the ONNX file; None takes the exporter's default.
        simplify: run onnxsim over the ONNX file.

    Raises:
        OptionError: an option is of the wrong type, or outside its range.
    """

    built_in: ClassVar[tuple[str, ...]] = ("opset", "simplify")

    opset: int | None = field(default=None, kw_only=True)
    simplify: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        newest = onnx.defs.onnx_opset_version()
        fits = self.opset is None or (whole(self.opset, _LEAST_OPSET) and self.opset <= newest)
        self._require(fits, "opset", self.opset, f"give {_LEAST_OPSET} to {newest}, or None")
        self._require(isinstance(self.simplify, bool), "simplify", self.simplify, "give True or False")

    def write(self, graph_module: fx.GraphModule, directory: Path, signature: Signature, context: BuildContext) -> None:
        # Loading an engine shall not need the exporter, so it is imported where a graph is lowered.
        from fxcompress.backends.onnx_export import write_onnx

        written = write_onnx(
            graph_module,
            directory / MODEL_FILE,
            input_names=[spec.name for spec in signature.inputs],
            output_names=[spec.name for spec in signature.outputs],
            opset=self.opset,
            simplify=self.simplify,
            onnxruntime_only=self.onnxruntime_only(graph_module),
            progress=context.progress,
        )
        context.sources = written.sources
        for note in written.notes:
            context.note(note)

    def onnxruntime_only(self, graph_module: fx.GraphModule) -> bool:
        """Whether the file may hold operators that only ONNX Runtime has."""
        return False

    def _require(self, right: bool, option: str, value: Any, remedy: str) -> None:
        if not right:
            where = f"{type(self).__name__}.{option}"
            raise OptionError(f"option {option} is {value!r}", where=where, remedy=remedy)


def whole(value: Any, least: int) -> bool:
    """Whether this is an integer of ``least`` or more; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def shapes_agree(model: Sequence[int | str | None], manifest: Sequence[int | str]) -> bool:
    """Same rank, and every size that is fixed in the model is the same in the manifest."""
    pairs = zip(model, manifest, strict=False)
    return len(model) == len(manifest) and all(not isinstance(a, int) or a == b for a, b in pairs)
