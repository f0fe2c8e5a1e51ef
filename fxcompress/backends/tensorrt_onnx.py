"""The ONNX file on its way to TensorRT: refused with the layer and the line to blame, or held against PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
from torch import fx

from fxcompress.backends.base import BuildContext, Signature
from fxcompress.backends.bundle import Manifest
from fxcompress.backends.engine import Engine
from fxcompress.backends.registry import backend_class
from fxcompress.backends.tensorrt_check import Finding
from fxcompress.backends.tensorrt_device import default_tolerance, expected_outputs, sized_inputs
from fxcompress.backends.tensorrt_origin import Origins
from fxcompress.backends.tensorrt_profiles import Profile
from fxcompress.backends.verification import verify_engine
from fxcompress.errors import BackendError, VerificationError

__all__ = ["node_names", "refuse", "verify_inside", "verify_onnx"]

_SHOWN = 5  # findings in one message


def node_names(path: Path) -> list[str]:
    """Of the nodes of an ONNX file, in order."""
    return [node.name for node in onnx.load(path, load_external_data=False).graph.node]


def refuse(findings: Sequence[Finding], origins: Origins) -> None:
    """Raise what the importability check found, if it is a reason not to build.

    Raises:
        BackendError: names the ONNX nodes, the layers and the lines.
    """
    refused = [finding for finding in findings if finding.refused]
    if refused:
        shown = "; ".join(str(finding) for finding in refused[:_SHOWN])
        more = f"; and {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else ""
        nodes = [f"ONNX node {f.node!r} ({f.op}) of {origins.tell(f.node, f.op)}" for f in refused[:_SHOWN] if f.op]
        raise BackendError(
            f"TensorRT will not import this model: {shown}{more}",
            where="; ".join(dict.fromkeys(nodes)) or ", ".join(finding.node for finding in refused[:_SHOWN]),
            remedy=refused[0].remedy,
        )


def verify_onnx(directory: Path, signature: Signature, context: BuildContext) -> None:
    """Compare the ONNX file that the engine is made of with PyTorch, in ONNX Runtime, since the engine cannot run here.

    What ONNX Runtime cannot run is noted; a difference is an error.
    """
    assert context.verify is not None
    runtime = backend_class("onnxruntime")
    manifest = Manifest(
        "engine",
        runtime.name,
        signature.inputs,
        signature.outputs,
        signature.input_structure,
        signature.output_structure,
    )
    try:
        # As the file stands: ONNX Runtime's further fusions round the inputs of weight-only products to 8 bits.
        with runtime.load(directory, manifest, optimization_level="basic") as engine:
            found = dict(context.verify(engine))
    except VerificationError as error:
        raise VerificationError(
            f"the ONNX file that the engine is made of is wrong, as run in ONNX Runtime: {error.problem}",
            where=error.where,
            remedy=error.remedy,
        ) from error
    except BackendError as error:
        context.instead = f"ONNX Runtime cannot run the ONNX file either: {error.problem}"
        return
    worst = max(found.get("relative_error", {}).values(), default=0.0)
    context.measurements["onnx_verification"] = found
    context.instead = (
        f"the ONNX file that it is made of was run in ONNX Runtime instead: relative error {worst:.2g}, "
        f"{found.get('tolerance', 0.0):.0e} allowed"
    )


def verify_inside(
    graph_module: fx.GraphModule, signature: Signature, profiles: Sequence[Profile], context: BuildContext
) -> None:
    """Have the engine verified at the sizes that its profiles are tuned for, since they leave out the examples' own."""
    tolerance = float(
        context.measurements.get("onnx_verification", {}).get("tolerance", default_tolerance(graph_module))
    )
    sets = [sized_inputs(graph_module, signature, profile, context.example_inputs) for profile in profiles]

    def verify(engine: Engine) -> Mapping[str, Any]:
        errors = verify_engine(engine, lambda *leaves: expected_outputs(graph_module, leaves), sets, tolerance)
        shapes = [[list(leaf.shape) for leaf in leaves] for leaves in sets]
        return {"relative_error": errors, "tolerance": tolerance, "input_shapes": shapes}

    context.verify = verify
