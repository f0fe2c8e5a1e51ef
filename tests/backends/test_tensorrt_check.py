"""The importability check: each rule on a model that breaks it, and against the parser itself."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto as T
from onnx import helper, numpy_helper
from torch import nn

from fxcompress.backends.onnx_export import write_onnx
from fxcompress.backends.signature import TensorSpec
from fxcompress.backends.tensorrt_build import Settings, build_plan
from fxcompress.backends.tensorrt_check import check_onnx
from fxcompress.backends.tensorrt_graph import layer_of
from fxcompress.backends.tensorrt_library import find_library
from fxcompress.backends.tensorrt_origin import Origins
from fxcompress.backends.tensorrt_profiles import settle_profiles
from fxcompress.capture import capture
from fxcompress.errors import BackendError
from tests.support import randomize

needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx")

Shape = list[int | str]
DTYPES = {T.FLOAT: "float32", T.FLOAT16: "float16", T.INT8: "int8", T.INT64: "int64", T.INT32: "int32"}


def value(name: str, kind: int = T.FLOAT, shape: Shape | None = None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, ["batch", 4] if shape is None else shape)


def node(op: str, inputs: str, outputs: str, layer: str = "layer", **attributes: Any) -> onnx.NodeProto:
    given = [name.strip("_") for name in inputs.split()]
    return helper.make_node(op, given, outputs.split(), name=f"{layer}/{op}", **attributes)


def model(
    nodes: list[onnx.NodeProto],
    x: onnx.ValueInfoProto | None = None,
    y: onnx.ValueInfoProto | None = None,
    **constants: Any,
) -> onnx.ModelProto:
    held = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "g", [x or value("x")], [y or value("y")], held)
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def quantized(zero: Any, scale: float = 0.1) -> onnx.ModelProto:
    nodes = [node("QuantizeLinear", "x s z", "q"), node("DequantizeLinear", "q s z", "y")]
    return model(nodes, s=np.float32(scale), z=zero)


SQUARE, PICTURE = value("x", T.FLOAT, ["batch", 4, 4]), value("x", T.FLOAT, ["batch", 3, 8, 8])
ONES = np.ones((4, 4), np.float32)


def counted(condition: str) -> onnx.NodeProto:
    """Three times twice as much, under a condition or none."""
    ends = [helper.make_tensor_value_info(name, T.FLOAT, ["batch", 4]) for name in ("v", "w")]
    flags = [helper.make_tensor_value_info(name, T.BOOL, []) for name in ("go", "on")]
    index = helper.make_tensor_value_info("i", T.INT64, [])
    inner = [helper.make_node("Identity", ["go"], ["on"], "inner/Identity")]
    inner += [helper.make_node("Add", ["v", "v"], ["w"], "inner/Add")]
    body = helper.make_graph(inner, "body", [index, flags[0], ends[0]], [flags[1], ends[1]])
    return node("Loop", f"n {condition} x", "y", body=body)


def sized(op: str, size: str) -> list[onnx.NodeProto]:
    """Nodes of which the last one makes as many as an input says."""
    if op == "Expand":
        return [node("Expand", f"s {size}", "y")]
    return [node("Squeeze", size, "s1"), node("Range", "a s1 b", "y")]


COUNT = value("x", T.INT64, [1])

# What breaks a rule: its code, the model, and whether the parser (or builder) refuses it too. It does not where it
# takes something for something else.
BROKEN: dict[str, tuple[str, onnx.ModelProto, bool]] = {
    "an operator that it lacks": (
        "unsupported_op",
        model([node("Det", "x", "y")], SQUARE, value("y", shape=["batch"])),
        True,
    ),
    "a custom operator": (
        "custom_op",
        model([helper.make_node("Own", ["x"], ["y"], domain="own", name="layer/Own")]),
        True,
    ),
    "integer operators": (
        "integer_op",
        model([node("DynamicQuantizeLinear", "x", "q s z"), node("DequantizeLinear", "q s z", "y")]),
        True,
    ),
    "sizes that depend on the data": (
        "data_dependent",
        model([node("NonZero", "x", "y")], None, value("y", T.INT64, [2, "n"])),
        True,
    ),
    "an int32 bias": (
        "integer_bias",
        model(
            [node("DequantizeLinear", "b s", "d"), node("Add", "x d", "y")],
            s=np.float32(0.1),
            b=np.arange(4, dtype=np.int32),
        ),
        True,
    ),
    "a zero point that is not zero": ("zero_point", quantized(np.int8(3)), True),
    "uint8 with a zero point": ("zero_point", quantized(np.uint8(128)), True),
    "uint8, which it takes for int8": ("uint8", quantized(np.uint8(0)), False),
    "no zero point, which is uint8": (
        "uint8",
        model([node("QuantizeLinear", "x s", "q"), node("DequantizeLinear", "q s", "y")], s=np.float32(0.1)),
        False,
    ),
    "int16 quantization": ("type", quantized(np.int16(0)), True),
    "a scale of zero": ("scale", quantized(np.int8(0), 0.0), True),
    "float64 ends, which it takes for float32": (
        "float64",
        model([node("Relu", "x", "y")], value("x", T.DOUBLE), value("y", T.DOUBLE)),
        False,
    ),
    "float64 inside, which it takes for float32": (
        "float64",
        model([node("Cast", "x", "d", to=T.DOUBLE), node("Cast", "d", "y", to=T.FLOAT)]),
        False,
    ),
    "int16 inside": ("type", model([node("Cast", "x", "d", to=T.INT16), node("Cast", "d", "y", to=T.FLOAT)]), True),
    "uint8 inside": ("uint8", model([node("Cast", "x", "d", to=T.UINT8), node("Cast", "d", "y", to=T.FLOAT)]), True),
    "a product of integers": (
        "integer_math",
        model([node("MatMul", "x w", "y")], value("x", T.INT64), value("y", T.INT64), w=np.ones((4, 4), np.int64)),
        True,
    ),
    "int8 arithmetic": (
        "int8_constant",
        model([node("Add", "x c", "y")], value("x", T.INT8), value("y", T.INT8), c=np.ones(4, np.int8)),
        True,
    ),
    "antialiasing": (
        "antialias",
        model(
            [node("Resize", "x _ s", "y", mode="linear", antialias=1)],
            PICTURE,
            value("y", shape=["batch", 3, 4, 4]),
            s=np.array([1, 1, 0.5, 0.5], np.float32),
        ),
        True,
    ),
    "indices of a pooling": (
        "pool_indices",
        model([node("MaxPool", "x", "y i", kernel_shape=[2, 2])], PICTURE, value("y", shape=["batch", 3, 7, 7])),
        True,
    ),
    "scattering with a sum": (
        "scatter_reduction",
        model([node("ScatterElements", "x i x", "y", reduction="add")], i=np.zeros((1, 4), np.int64)),
        True,
    ),
    "scattering slices with a sum": (
        "scatter_reduction",
        model(
            [node("ScatterND", "x i u", "y", reduction="max")], i=np.zeros((1, 1), np.int64), u=np.ones((1, 4), "f4")
        ),
        True,
    ),
    "a loop without a condition": ("loop_condition", model([counted("_")], n=np.array(3)), True),
    "a size that is an input": (
        "data_dependent",
        model(sized("Range", "x"), COUNT, value("y", T.INT64, ["n"]), a=np.array(0), b=np.array(1)),
        True,
    ),
    "a size computed from an input": (
        "data_dependent",
        model([node("Add", "x x", "two"), *sized("Expand", "two")], COUNT, value("y", shape=["n"]), s=np.ones(1, "f4")),
        True,
    ),
    "blocks of 8 bits with zero points": (
        "block_weights",
        model(
            [
                helper.make_node(
                    "MatMulNBits",
                    ["x", "w", "s"],
                    ["y"],
                    "layer/MatMulNBits",
                    "",
                    "com.microsoft",
                    K=32,
                    N=4,
                    bits=8,
                    block_size=32,
                )
            ],
            value("x", T.FLOAT16, ["batch", 32]),
            value("y", T.FLOAT16),
            w=np.zeros((4, 1, 32), np.uint8),
            s=np.ones(4, np.float16),
        ),
        True,
    ),
    "quantization under one name": (
        "duplicate_name",
        model(
            [
                node("QuantizeLinear", "x s z", "q"),
                node("DequantizeLinear", "q s z", "a"),
                node("DequantizeLinear", "q s z", "b"),
                node("Add", "a b", "y"),
            ],
            s=np.float32(0.1),
            z=np.int8(0),
        ),
        True,
    ),
    "nine dims": (
        "rank",
        model([node("Relu", "x", "y")], value("x", shape=[1] * 9), value("y", shape=[1] * 9)),
        True,
    ),
}


def saved(folder: Path, made: onnx.ModelProto) -> Path:
    path = folder / "model.onnx"
    onnx.save(made, path)
    return path


def build(path: Path) -> None:
    """By the library itself, without the check."""
    library = find_library("tensorrt_rtx")
    graph = onnx.load(path, load_external_data=False).graph
    ends = []
    for values in (graph.input, graph.output):
        specs = []
        for item in values:
            dims = item.type.tensor_type.shape.dim
            shape = tuple(dim.dim_param or dim.dim_value for dim in dims)
            kind = DTYPES.get(item.type.tensor_type.elem_type, "float32")
            example = tuple(size if isinstance(size, int) else 2 for size in shape)
            specs.append(TensorSpec(item.name, shape, kind, example=example))
        ends.append(specs)
    origins = Origins(None, [item.name for item in graph.node])
    profiles = settle_profiles(ends[0])
    plan = path.with_suffix(".engine")
    build_plan(library, path, plan, Settings(("sm86",)), profiles, *ends, origins)
    assert plan.stat().st_size > 0


@pytest.mark.parametrize("name", BROKEN)
def test_each_rule_is_told_with_layer_and_remedy(name: str, tmp_path: Path) -> None:
    code, made, _ = BROKEN[name]
    found = [finding for finding in check_onnx(saved(tmp_path, made)) if finding.code == code]
    assert found and all(finding.refused and finding.problem and finding.remedy for finding in found)
    assert all(finding.layer == "layer" for finding in found if finding.op)
    assert found[0].remedy in str(found[0])


@needs_rtx
@pytest.mark.parametrize("name", BROKEN)
def test_the_parser_agrees(name: str, tmp_path: Path) -> None:
    _, made, refused = BROKEN[name]
    path = saved(tmp_path, made)
    if refused:
        with pytest.raises(BackendError, match=r"cannot import the model|cannot build the engine"):
            build(path)
    else:
        build(path)


@needs_rtx
def test_what_is_refused_by_name_is_what_the_library_has_no_importer_for() -> None:
    from fxcompress.backends.tensorrt_operators import INTEGER_QUANTIZATION, UNSUPPORTED

    library = find_library("tensorrt_rtx")
    with library.log():
        builder = library.module.Builder(library.logger())
        parser = library.module.OnnxParser(builder.create_network(0), library.logger())
        operators = {schema.name for schema in onnx.defs.get_all_schemas() if not schema.domain}
        lacking = {name for name in operators if not parser.supports_operator(name)}
    assert lacking == (UNSUPPORTED | INTEGER_QUANTIZATION) & operators


def symmetric() -> onnx.ModelProto:
    """conv(dq(q(x)), dq(w)) + bias in float, weights per channel: as TensorRT wants it."""
    nodes = [
        node("QuantizeLinear", "x s z", "q"),
        node("DequantizeLinear", "q s z", "xq"),
        node("DequantizeLinear", "w ws wz", "wq", "weight", axis=0),
        node("Conv", "xq wq b", "y"),
    ]
    weight = np.random.default_rng(0).integers(-127, 128, (4, 3, 3, 3)).astype(np.int8)
    constants = {"s": np.float32(0.05), "z": np.int8(0), "w": weight, "b": np.ones(4, np.float32)}
    constants |= {"ws": np.full(4, 0.01, np.float32), "wz": np.zeros(4, np.int8)}
    return model(nodes, PICTURE, value("y", shape=["batch", 4, 6, 6]), **constants)


def test_symmetric_quantization_with_float_biases_is_right(tmp_path: Path) -> None:
    assert check_onnx(saved(tmp_path, symmetric())) == []


@needs_rtx
def test_symmetric_quantization_with_float_biases_builds(tmp_path: Path) -> None:
    build(saved(tmp_path, symmetric()))


def convnet() -> nn.Module:
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)]
    return randomize(nn.Sequential(*layers))


@pytest.fixture
def quantized_by_onnxruntime(tmp_path: Path) -> Callable[[bool], Path]:
    """ONNX Runtime's own static quantization, in its default form or with symmetric int8 activations."""
    tools = pytest.importorskip("onnxruntime.quantization")

    class Reader(tools.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = [{"input": np.random.default_rng(i).normal(size=(2, 3, 8, 8))} for i in range(3)]

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = self.batches.pop() if self.batches else None
            return batch and {name: array.astype(np.float32) for name, array in batch.items()}

    def make(symmetric: bool) -> Path:
        plain, path = tmp_path / "plain.onnx", tmp_path / "quantized.onnx"
        write_onnx(capture(convnet(), (torch.randn(2, 3, 8, 8),)), plain)
        kind = tools.QuantType.QInt8 if symmetric else tools.QuantType.QUInt8
        options = {"ActivationSymmetric": symmetric}
        tools.quantize_static(plain, path, Reader(), activation_type=kind, per_channel=True, extra_options=options)
        return path

    return make


@pytest.mark.parametrize("symmetric", [False, True])
def test_models_quantized_by_onnxruntime_are_explained(
    quantized_by_onnxruntime: Callable[[bool], Path], symmetric: bool
) -> None:
    found = check_onnx(quantized_by_onnxruntime(symmetric))
    biases = [finding for finding in found if finding.code == "integer_bias"]
    assert {finding.layer for finding in biases} == {"0", "4"}
    assert "leave biases in float" in biases[0].remedy
    assert {finding.code for finding in found} == (
        {"integer_bias"} if symmetric else {"integer_bias", "uint8", "zero_point"}
    )


@needs_rtx
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_parser_refuses_models_quantized_by_onnxruntime(
    quantized_by_onnxruntime: Callable[[bool], Path], symmetric: bool
) -> None:
    with pytest.raises(BackendError, match="input has type Int32 but must have type") as caught:
        build(quantized_by_onnxruntime(symmetric))
    assert "bias_DequantizeLinear" in str(caught.value.where)


def test_findings_of_quantization_are_told_once_with_the_layer(
    quantized_by_onnxruntime: Callable[[bool], Path], tmp_path: Path
) -> None:
    """The input's own quantization belongs to the layer that reads it, and a zero point is told by its node alone."""
    found = check_onnx(quantized_by_onnxruntime(False))
    (first,) = [finding for finding in found if finding.node == "input_QuantizeLinear" and finding.code == "zero_point"]
    assert first.layer == "0"
    assert all(finding.op for finding in found)
    tools = pytest.importorskip("onnxruntime.quantization")
    tools.quantize_dynamic(tmp_path / "plain.onnx", tmp_path / "dynamic.onnx")
    found = check_onnx(tmp_path / "dynamic.onnx")
    assert {finding.code for finding in found} == {"integer_op"} and {finding.layer for finding in found} == {"0", "4"}
    assert all("scheme='tensorrt'" in finding.remedy for finding in found)


def test_sizes_that_come_from_computed_data_are_told_but_not_refused(tmp_path: Path) -> None:
    """TensorRT builds them; how large the output is, nobody knows before it has run."""
    nodes = [node("ReduceMax", "x", "m", keepdims=0), node("Cast", "m", "n", to=T.INT64), node("Range", "a n b", "y")]
    made = model(nodes, None, value("y", T.INT64, ["n"]), a=np.array(0), b=np.array(1))
    (finding,) = check_onnx(saved(tmp_path, made))
    assert (finding.code, finding.refused, finding.layer) == ("data_dependent", False, "layer")
    assert "values of 'x'" in finding.problem


def test_sizes_that_come_from_shapes_are_right(tmp_path: Path) -> None:
    nodes = [node("Shape", "x", "s"), node("ConstantOfShape", "s", "c"), node("Add", "x c", "y")]
    assert check_onnx(saved(tmp_path, model(nodes))) == []
    nodes = [node("Cast", "x", "i", to=T.INT64), node("Gather", "t i", "y")]  # an index is no size
    made = model(nodes, value("x", T.INT32, ["batch"]), value("y"), t=np.ones((5, 4), np.float32))
    assert check_onnx(saved(tmp_path, made)) == []


@needs_rtx
def test_what_the_parser_does_not_place_is_placed_by_its_operator(tmp_path: Path) -> None:
    """Of a scattering with a sum it says neither the node nor the operator."""
    made = model([node("ScatterElements", "x i x", "y", reduction="add")], i=np.zeros((1, 4), np.int64))
    with pytest.raises(BackendError, match="Unsupported reduction type") as caught:
        build(saved(tmp_path, made))
    assert "ONNX node 'layer/ScatterElements' (ScatterElements) of layer 'layer'" in str(caught.value.where)


def test_text_has_a_remedy_that_fits(tmp_path: Path) -> None:
    made = model([node("Identity", "x", "y")], value("x", T.STRING), value("y", T.STRING))
    found = check_onnx(saved(tmp_path, made))
    assert "make numbers of it" in found[0].remedy and {finding.code for finding in found} == {"type"}


def test_control_flow_is_told_but_not_refused(tmp_path: Path) -> None:
    outs = [helper.make_tensor_value_info(name, T.FLOAT, None) for name in ("t", "e")]
    yes = helper.make_graph([helper.make_node("Identity", ["x"], ["t"])], "t", [], outs[:1])
    no = helper.make_graph([helper.make_node("Det", ["x"], ["e"], name="inner/Det")], "e", [], outs[1:])
    made = model([node("If", "c", "y", then_branch=yes, else_branch=no)], SQUARE, SQUARE, c=np.array(True))
    findings = check_onnx(saved(tmp_path, made))
    assert [(finding.code, finding.refused) for finding in findings] == [
        ("control_flow", False),
        ("unsupported_op", True),
    ]
    assert findings[1].layer == "inner"


def test_zero_points_in_a_file_of_weights(tmp_path: Path) -> None:
    nodes = [node("DequantizeLinear", "w s z", "wq", axis=0), node("MatMul", "x wq", "y")]
    made = model(nodes, w=np.ones((4, 4), np.int8), s=np.ones(4, np.float32), z=np.array([0, 0, 1, 0], np.int8))
    onnx.save(made, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    assert [finding.code for finding in check_onnx(tmp_path / "m.onnx")] == ["zero_point"]


@pytest.mark.parametrize("content", [b"not onnx", b"\xff\xff\xff"])
def test_what_is_no_onnx_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.onnx"
    with pytest.raises(BackendError, match="cannot be read") as caught:
        check_onnx(path)
    assert caught.value.where == str(path)
    path.write_bytes(content)
    with pytest.raises(BackendError, match="no ONNX file"):
        check_onnx(path)


def test_layers_are_in_the_names() -> None:
    assert [layer_of(name) for name in ("layer1.0.conv1/Conv", "Relu_3", "")] == ["layer1.0.conv1", "", ""]
