"""Tiny ONNX models, bundles around them, and captured graphs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import Dim
from torch.utils import _pytree as pytree

from fxcompress.backends.bundle import Manifest
from fxcompress.backends.bundle_writer import BundleWriter
from fxcompress.backends.onnxruntime import MODEL_FILE, OnnxRuntime, OnnxRuntimeEngine
from fxcompress.backends.signature import TensorSpec
from fxcompress.graph.info import GraphInfo
from fxcompress.graph.structure import Structure

_ONNX_DTYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "float64": TensorProto.DOUBLE,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
}

Specs = list[TensorSpec]


def _value(spec: TensorSpec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(spec.name, _ONNX_DTYPES[spec.dtype], list(spec.shape))


def onnx_model(nodes: list[onnx.NodeProto], inputs: Specs, outputs: Specs) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "tiny", list(map(_value, inputs)), list(map(_value, outputs)))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def manifest_for(
    inputs: Specs,
    outputs: Specs,
    call: Any = None,
    result: Any = 0,
    parameters: list[str] | None = None,
    **rest: Any,
) -> Manifest:
    """A manifest; ``call`` is ``(args, kwargs)`` with anything as leaves, ``result`` the structure of the output."""
    call = call or ((0,) * len(inputs), {})
    structure = Structure.from_spec(pytree.tree_structure(call))
    structure = structure.with_parameters(parameters or [spec.name for spec in inputs])
    result_structure = Structure.from_spec(pytree.tree_structure(result))
    return Manifest("engine", "onnxruntime", tuple(inputs), tuple(outputs), structure, result_structure, **rest)


def write_bundle(output: Path, model: onnx.ModelProto, manifest: Manifest) -> Path:
    with BundleWriter(output) as writer:
        onnx.save(model, writer.directory / MODEL_FILE)
        path, _ = writer.commit(manifest)
    return path


@pytest.fixture
def onnx_bundle(tmp_path: Path) -> Callable[..., Path]:
    """``onnx_bundle(nodes, inputs, outputs, **manifest)`` → path of a bundle."""

    def make(nodes: list[onnx.NodeProto], inputs: Specs, outputs: Specs, **manifest: Any) -> Path:
        model = onnx_model(nodes, inputs, outputs)
        return write_bundle(
            tmp_path / f"bundle{len(list(tmp_path.iterdir()))}", model, manifest_for(inputs, outputs, **manifest)
        )

    return make


@pytest.fixture
def relu_bundle(onnx_bundle: Callable[..., Path]) -> Path:
    """y = relu(x), float32 [batch, 3]."""
    x, y = TensorSpec("x", ("batch", 3), "float32"), TensorSpec("y", ("batch", 3), "float32")
    return onnx_bundle([helper.make_node("Relu", ["x"], ["y"])], [x], [y])


@pytest.fixture
def open_engine(onnx_bundle: Callable[..., Path]) -> Callable[..., OnnxRuntimeEngine]:
    """As ``onnx_bundle``, loaded with default options."""

    def make(*args: Any, **kwargs: Any) -> OnnxRuntimeEngine:
        from fxcompress.backends.registry import load_engine

        engine = load_engine(onnx_bundle(*args, **kwargs))
        assert isinstance(engine, OnnxRuntimeEngine)
        assert isinstance(engine.backend, OnnxRuntime)
        return engine

    return make


@pytest.fixture
def captured() -> Callable[..., fx.GraphModule]:
    """An exported graph with the facts that capture attaches; every tensor's first dimension is dynamic."""

    def capture(model: nn.Module, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> fx.GraphModule:
        kwargs = kwargs or {}

        def dynamic(leaf: Any) -> Any:
            return {0: Dim.DYNAMIC} if isinstance(leaf, torch.Tensor) and leaf.ndim else None

        parameters = list(inspect.signature(model.forward).parameters)
        named = dict(zip(parameters, args, strict=False)) | kwargs
        shapes = {name: pytree.tree_map(dynamic, value) for name, value in named.items()}
        program = torch.export.export(model.eval(), args, kwargs, dynamic_shapes=shapes)
        module = program.module(check_guards=False)
        assert isinstance(module, fx.GraphModule)
        values = [node.meta.get("val") for node in module.graph.find_nodes(op="placeholder")]
        mode = next(value.fake_mode for value in values if isinstance(value, FakeTensor))
        symbols = {str(v.shape[0]) for v in values if isinstance(v, torch.Tensor) and v.ndim}
        facts = GraphInfo(
            tuple(named), program.call_spec.in_spec, program.call_spec.out_spec, mode, dict.fromkeys(symbols, "batch")
        )
        module.meta["fxcompress"] = facts
        return module

    return capture
