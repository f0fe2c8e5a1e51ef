"""Graph → ONNX file: outputs, names, sizes, weights, refusals."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import fxcompress as fxc
from benchmarks import zoo
from fxcompress.backends import onnx_export, onnx_weights
from fxcompress.backends.onnx_export import OnnxFile, write_onnx
from fxcompress.capture import capture
from fxcompress.errors import BackendError
from fxcompress.graph.edit import GraphEditor
from fxcompress.graph.verify import verify

aten = torch.ops.aten


def seeded(make: Callable[[int], Any]) -> Callable[[int], Any]:
    def inputs(batch: int) -> Any:
        torch.manual_seed(batch)
        return make(batch)

    return inputs


def run(file: OnnxFile, inputs: Any) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file.path, options)
    leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
    feed = {spec.name: leaf.numpy() for spec, leaf in zip(file.inputs, leaves, strict=True)}
    return list(session.run([spec.name for spec in file.outputs], feed))


def check(
    model: nn.Module, make: Callable[[int], Any], path: Path, tolerance: float = 1e-4, **options: Any
) -> OnnxFile:
    """The file gives what the model gives, at the batch size of the example and at another."""
    dynamic = options.pop("dynamic_shapes", "batch")
    graph = capture(model.eval(), make(2), dynamic_shapes=dynamic)
    file = write_onnx(graph, path / "model.onnx", **options)
    for batch in (2, 3) if dynamic is not None else (2,):
        inputs = make(batch)
        with torch.no_grad():
            results = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
        kinds = torch.Tensor if dynamic is None else (torch.Tensor, int)  # a fixed size is no output
        expected = [leaf for leaf in pytree.tree_leaves(results) if isinstance(leaf, kinds)]
        for spec, wanted, found in zip(file.outputs, expected, run(file, inputs), strict=True):
            wanted = np.asarray(torch.as_tensor(wanted).detach().float())
            assert wanted.shape == found.shape, spec
            limit = tolerance * max(np.abs(wanted).max(initial=0), 1e-30)
            np.testing.assert_allclose(np.float32(found), wanted, rtol=0, atol=limit, err_msg=str(spec))
    return file


def operations(file: OnnxFile) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(file.path, load_external_data=False).graph.node)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.block = nn.Sequential(nn.Linear(8, 600), nn.GELU(), nn.Linear(600, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> Any:
        x = F.relu6(self.norm(self.conv(x)))
        x = x + self.block(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return {"logits": self.head(x.mean((2, 3))), "maps": (x, None)}


IMAGE = seeded(lambda batch: (torch.randn(batch, 3, 8, 8),))


# --- the file ------------------------------------------------------------------------------------------------------


def test_names_and_sizes(tmp_path: Path) -> None:
    file = check(Net(), IMAGE, tmp_path)
    model = onnx.load(file.path)
    onnx.checker.check_model(model, full_check=True)
    sizes = {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert sizes == {"x": ["batch", 3, 8, 8], "logits": ["batch", 5], "maps_0": ["batch", 8, 8, 8]}
    assert [spec.name for spec in file.outputs] == ["logits", "maps_0"] and file.notes == ()
    names = [node.name for node in model.graph.node]
    assert {"conv/Conv", "norm/BatchNormalization", "block.0/MatMul", "head/Gemm"} <= set(names)
    assert len(set(names)) == len(names)
    assert {"conv.weight", "head.weight"} <= {tensor.name for tensor in model.graph.initializer}
    assert not any(node.metadata_props for node in model.graph.node)


def test_nothing_is_left_that_could_be_computed_beforehand(tmp_path: Path) -> None:
    found = operations(check(Net(), IMAGE, tmp_path))
    assert not {"Identity", "Constant", "Shape", "Cast", "CastLike", "Gather", "Expand"} & set(found)
    assert found["Transpose"] == 2  # of the data; those of the weights are done
    assert found["GlobalAveragePool"] == 1  # engines have integer kernels for it, and none for ReduceMean


def test_without_simplification(tmp_path: Path) -> None:
    file = check(Net(), IMAGE, tmp_path, simplify=False)
    assert operations(file)["Constant"] > 0


def test_names_can_be_given(tmp_path: Path) -> None:
    class Swap(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> Any:
            return a - b, b, b

    make = seeded(lambda batch: (torch.randn(batch, 2), torch.randn(batch, 2)))
    file = check(Swap(), make, tmp_path, input_names=["b", "a"], output_names=["sub", "view", "output"])
    assert [spec.name for spec in (*file.inputs, *file.outputs)] == ["b", "a", "sub", "view", "output"]
    with pytest.raises(BackendError, match="1 names for 2 inputs"):
        check(Swap(), make, tmp_path, input_names=["a"])


@pytest.mark.parametrize("opset", [18, 20, 22])
def test_opset(opset: int, tmp_path: Path) -> None:
    file = check(
        nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.RMSNorm(4)),
        seeded(lambda b: (torch.randn(b, 4),)),
        tmp_path,
        opset=opset,
    )
    assert file.opset == opset == onnx.load(file.path).opset_import[0].version
    assert operations(file)["Gelu"] == (opset >= 20)


def test_many_weights_are_a_file_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_weights, "_EMBED", 10_000)
    file = check(Net(), IMAGE, tmp_path)
    assert file.weights == tmp_path / "model.onnx.data"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert file.path.stat().st_size < 10_000 < file.weights.stat().st_size
    beside = [t for t in onnx.load(file.path, load_external_data=False).graph.initializer if t.external_data]
    places = [{entry.key: entry.value for entry in tensor.external_data} for tensor in beside]
    large = [int(place["offset"]) for place in places if int(place["length"]) > 4096]
    assert len(large) == 2 and all(offset % 4096 == 0 for offset in large)


def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="cannot be written"):
        write_onnx(capture(nn.ReLU().eval(), (torch.randn(2, 3),)), tmp_path / "none" / "model.onnx")


def test_steps_are_told(tmp_path: Path) -> None:
    told: list[str] = []
    write_onnx(capture(nn.ReLU().eval(), (torch.randn(2, 3),)), tmp_path / "model.onnx", progress=told.append)
    assert told == ["translate to ONNX", "simplify ONNX", "write ONNX"]


# --- dtypes and sizes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float16, 10), (torch.bfloat16, 16)])
def test_narrow_floats(dtype: torch.dtype, kind: int, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.RMSNorm(64), nn.Linear(64, 4)).to(dtype).eval()
    x = torch.randn(2, 3, 64, dtype=dtype)
    file = write_onnx(capture(model, (x,)), tmp_path / "model.onnx")
    loaded = onnx.load(file.path)
    assert loaded.graph.input[0].type.tensor_type.elem_type == kind
    assert {t.data_type for t in loaded.graph.initializer if len(t.dims) == 2} == {kind}
    assert file.inputs[0].dtype == str(dtype).removeprefix("torch.")
    assert not any(n.op_type == "Transpose" for n in loaded.graph.node)
    if dtype is torch.float16:
        with torch.no_grad():
            np.testing.assert_allclose(run(file, (x,))[0], model(x).numpy(), rtol=2e-2, atol=2e-3)


def test_fixed_and_several_dynamic_sizes(tmp_path: Path) -> None:
    class Sizes(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return x.flatten(1, 2), x.reshape(-1, 2), x.view(x.shape[0], x.shape[1], 2, 2), x.shape[0] * 2

    make = seeded(lambda batch: (torch.randn(batch, batch + 3, 4),))
    fixed = check(Sizes(), make, tmp_path, dynamic_shapes=None)
    assert fixed.outputs[0].shape == (2, 20)
    file = check(Sizes(), make, tmp_path, dynamic_shapes={"x": {0: "batch", 1: "length"}})
    dims = [d.dim_param or d.dim_value for d in onnx.load(file.path).graph.output[0].type.tensor_type.shape.dim]
    assert dims[0] == "batch" and isinstance(dims[1], str) and dims[1].startswith("4*")


def test_a_size_that_was_fixed_is_refused(tmp_path: Path) -> None:
    graph = capture(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval(), (torch.randn(2, 3, 4),))
    flatten = graph.graph.find_nodes(op="call_function", target=aten.flatten.using_ints)[0]
    with GraphEditor(graph) as editor:
        fixed = editor.insert_call(aten.reshape.default, (flatten.args[0], [2, 12]), before=flatten)
        editor.replace(flatten, fixed, reshaped=True)
    for user in graph.graph.nodes:  # as a pass that forgets to propagate leaves it
        if user.op in ("call_module", "call_function"):
            user.meta["val"] = user.meta["val"].new_empty(
                (graph.graph.find_nodes(op="placeholder")[0].meta["val"].shape[0], *user.meta["val"].shape[1:])
            )
    with pytest.raises(BackendError, match=r"'output' has a fixed size of 2 in dim 0, which shall be 'batch'"):
        write_onnx(graph, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


# --- operations ----------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 24, 2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(48, 20)
        self.tanh = nn.RNN(20, 6, bidirectional=True)
        self.relu = nn.RNN(12, 5, 2, nonlinearity="relu", bias=False)
        self.cell = nn.LSTMCell(16, 5)

    def forward(self, x: torch.Tensor, hidden: torch.Tensor) -> Any:
        y, (_, cell) = self.lstm(x, (hidden, hidden + 1))
        y, state = self.gru(y.transpose(0, 1))
        y, last = self.tanh(y)
        return self.relu(y), self.cell(x[:, 0]), cell, state, last


def test_recurrent_layers(tmp_path: Path) -> None:
    make = seeded(lambda batch: (torch.randn(batch, 5, 16), torch.randn(4, batch, 24)))
    file = check(Recurrent(), make, tmp_path, dynamic_shapes={"x": {0: "batch"}, "hidden": {1: "batch"}})
    found = operations(file)
    assert (found["LSTM"], found["GRU"], found["RNN"]) == (2, 1, 3)
    assert found["Slice"] == 4  # of the states; the gates are in order already


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
def test_a_loop_over_a_dynamic_size_is_refused(tmp_path: Path) -> None:
    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 6, proj_size=3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lstm(x)[0]

    check(Projected(), seeded(lambda batch: (torch.randn(3, batch, 4),)), tmp_path, dynamic_shapes={"x": {1: "batch"}})
    graph = capture(Projected().eval(), (torch.randn(4, 2, 4),))  # the first dim is the sequence
    with pytest.raises(BackendError, match=r"aten\.lstm\.input has no ONNX form where a size varies") as caught:
        write_onnx(graph, tmp_path / "model.onnx")
    assert "node 'lstm" in str(caught.value.where)
    verify(graph, shapes=True)
    (x,) = graph.graph.find_nodes(op="placeholder")
    assert isinstance(x.meta["val"].shape[0], torch.SymInt) and not x.meta["val"].shape[0].node.expr.is_number


class Attention(nn.Module):
    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, picks: torch.Tensor, adds: torch.Tensor
    ) -> Any:
        attend = F.scaled_dot_product_attention
        return (
            attend(q, k, v),
            attend(q, k, v, is_causal=True),
            attend(q, k, v, attn_mask=picks),
            attend(q, k, v, attn_mask=adds, scale=0.3),
            attend(q, k[:, :2], v[:, :2], enable_gqa=True),
            attend(q, k[:, :2], v[:, :2], enable_gqa=True, is_causal=True),
            attend(q[:, 0], k[:, 0], v[:, 0]),
        )


def _attention(batch: int) -> tuple[torch.Tensor, ...]:
    picks = torch.rand(batch, 1, 5, 6) > 0.4
    picks[0, 0, 1] = False  # PyTorch gives zeros where nothing is picked
    adds = torch.randn(batch, 1, 5, 6)
    adds[:, :, 2, 1:4] = -torch.inf
    return torch.randn(batch, 4, 5, 8), torch.randn(batch, 4, 6, 8), torch.randn(batch, 4, 6, 8), picks, adds


def test_attention(tmp_path: Path) -> None:
    file = check(Attention(), seeded(_attention), tmp_path)
    assert not {"Shape", "Cast", "Sqrt"} & set(operations(file))


class Various(nn.Module):
    """Operations that ONNX has no function for, that change types, or that look otherwise there."""

    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Conv2d(3, 8, 3, padding="same", dilation=2)
        self.live = nn.BatchNorm2d(8, track_running_stats=False)
        self.plain = nn.BatchNorm2d(8, affine=False)
        self.back = nn.ConvTranspose2d(8, 4, 3, 2, 1, output_padding=1, groups=2)
        self.group = nn.GroupNorm(2, 4)
        self.reflect = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")

    def forward(self, x: torch.Tensor) -> Any:
        y = self.plain(self.reflect(self.live(self.same(x))))
        z = self.group(self.back(y))
        z = z + F.hardtanh(z) + F.hardswish(z) + F.silu(z) + F.elu(z)
        written = x.clone()
        written[:, 0, :2] = 0
        return (
            [F.adaptive_avg_pool2d(y, size) for size in (1, 8, 3, (4, 5))],
            F.adaptive_max_pool2d(y, 1),
            F.interpolate(z, scale_factor=2, mode="bilinear"),
            F.interpolate(z, size=(10, 12), mode="bicubic", align_corners=False),
            F.pixel_shuffle(z, 2),
            [part * 2 for part in z.chunk(3, 1)],
            torch.split(x, [1, 2], 1),
            x.unbind(1)[1],
            written,
            x.to(torch.float64).to(torch.float32),
            x.std(dim=(2, 3)),
            F.normalize(x.flatten(1)),
            torch.roll(x, (1, 2), (2, 3)),
            (x > 0).sum(1) + 1.5,
            x.new_zeros(x.shape[0], 2) + x.mean((1, 2, 3)).view(-1, 1),
            torch.einsum("bchw,bdhw->bcd", x, x),
            F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False),
            torch.topk(x.flatten(1), 3)[0],
            x.argmax(1),
            torch.where(x > 0, x, 0),
            torch.tril(x),
            x.movedim(1, -1),
        )


def test_various_operations(tmp_path: Path) -> None:
    file = check(Various(), seeded(lambda batch: (torch.randn(batch, 3, 16, 16),)), tmp_path)
    found = operations(file)
    assert found["Conv"] == 2 and found["GlobalAveragePool"] == 1 and not found["SequenceAt"]
    assert file.notes == ()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 64)
        self.head = nn.Linear(64, 100, bias=False)
        self.head.weight = self.embedding.weight
        self.position = nn.Parameter(torch.randn(1, 4, 64))

    def forward(self, ids: torch.Tensor) -> Any:
        return self.head(self.embedding(ids) + self.position), self.position, ids


@torch.no_grad()
def test_quantized_weights_are_stored_as_integers_however_wide_the_layer_is(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 600), nn.ReLU(), nn.Linear(600, 600), nn.ReLU(), nn.Linear(600, 8)).eval()
    passes = [fxc.passes.Quantize([torch.randn(4, 64)], observer="minmax")]
    compiled = fxc.compile(model, passes, (torch.randn(2, 64),), progress=False)
    path = write_onnx(compiled.module, tmp_path / "model.onnx").path
    held = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer if len(tensor.dims) == 2}
    assert {tensor.data_type for tensor in held.values()} == {onnx.TensorProto.INT8} and len(held) == 3
    assert path.stat().st_size < 1.2 * sum(parameter.numel() for parameter in model.parameters())


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    file = check(Tied(), seeded(lambda batch: (torch.randint(0, 100, (batch, 4)),)), tmp_path)
    model = onnx.load(file.path)
    assert [tuple(t.dims) for t in model.graph.initializer if len(t.dims) == 2] == [(100, 64)]


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_transformers(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model = zoo.find(f"transformers:{name}")
    file = check(model.build(), model.inputs, tmp_path)
    assert file.outputs[0].name == "logits" and file.notes == ()


def test_torchvision(tmp_path: Path) -> None:
    zoo.prepare_torchvision()
    models = pytest.importorskip("torchvision").models
    model = zoo.seeded(models.resnet18, lambda batch: zoo.images((3, 64, 64), batch), "resnet18")
    file = check(model, lambda batch: zoo.images((3, 64, 64), batch), tmp_path)
    assert set(operations(file)) == {
        "Conv", "BatchNormalization", "Relu", "MaxPool", "Add", "GlobalAveragePool", "Reshape", "Gemm",
    }  # fmt: skip


class Outputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(30, 40))

    def forward(self, x: torch.Tensor, unused: torch.Tensor) -> Any:
        return self.weight, self.weight.t(), x @ self.weight, x, x, 3, None


def test_outputs_that_are_inputs_weights_or_given_twice(tmp_path: Path) -> None:
    make = seeded(lambda batch: (torch.randn(batch, 30), torch.randn(batch)))
    graph = capture(Outputs().eval(), make(2))
    file = write_onnx(graph, tmp_path / "model.onnx")
    inputs = make(3)
    model = onnx.load(file.path)
    onnx.checker.check_model(model, full_check=True)
    assert [value.name for value in model.graph.input] == ["x", "unused"]
    session = onnxruntime.InferenceSession(file.path)
    feed = {"x": inputs[0].numpy(), **({"unused": inputs[1].numpy()} if len(session.get_inputs()) == 2 else {})}
    expected = [value for value in graph(*inputs) if isinstance(value, torch.Tensor)]
    for found, wanted in zip(session.run(None, feed), expected, strict=True):
        np.testing.assert_allclose(found, wanted.detach().numpy(), atol=1e-5)


# --- what cannot be had --------------------------------------------------------------------------------------------


class Exotic(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x)


def test_an_operation_without_onnx_form_is_named(tmp_path: Path) -> None:
    graph = capture(Exotic().eval(), (torch.randn(2, 3),))
    with pytest.raises(BackendError, match=r"ONNX has no form for aten\.special_bessel_j0\.default") as caught:
        write_onnx(graph, tmp_path / "model.onnx")
    assert "test_onnx_export.py" in str(caught.value.where) and "bessel_j0(x)" in str(caught.value.where)
    assert not list(tmp_path.iterdir())


def test_torchs_own_decomposition_is_the_second_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no rule")

    monkeypatch.setattr("fxcompress.backends.onnx_decompose.RULES", {aten.relu.default: broken})
    file = check(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), seeded(lambda batch: (torch.randn(batch, 4),)), tmp_path)
    assert len(file.notes) == 1 and "no rule" in file.notes[0]


def test_the_graph_is_not_changed(tmp_path: Path) -> None:
    graph = capture(Net().eval(), IMAGE(2))
    before = str(graph.graph), {name: tensor.clone() for name, tensor in graph.state_dict().items()}
    write_onnx(graph, tmp_path / "model.onnx")
    assert str(graph.graph) == before[0]
    assert all(torch.equal(graph.state_dict()[name], tensor) for name, tensor in before[1].items())
    assert onnx_export.OnnxFile.__dataclass_params__.frozen


# -- 16-bit numbers, and what onnxsim says -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reduce",
    [
        lambda x: x.sum((2, 3)),
        lambda x: x.sum(),
        lambda x: x.amax(1),
        lambda x: x.amin((1, 2), keepdim=True),
        lambda x: x.cumsum(1) + x,
        lambda x: x.prod(1),
    ],
    ids=["sum", "sum_all", "amax", "amin", "cumsum", "prod"],
)
def test_reductions_in_float16_stay_in_float16(reduce: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path) -> None:
    class Reduces(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return reduce(x)

    check(Reduces(), seeded(lambda batch: (torch.randn(batch, 3, 4, 5).half(),)), tmp_path, tolerance=2e-2)


def test_onnxsim_is_quiet_about_what_it_leaves(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.GroupNorm(2, 4)).bfloat16().eval()
    write_onnx(capture(model, (torch.randn(2, 4).bfloat16(),)), tmp_path / "model.onnx")
    assert capfd.readouterr() == ("", "")


def test_what_onnxsim_says_before_it_fails_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(model: onnx.ModelProto) -> None:
        os.write(2, b"said in C++\n")
        raise RuntimeError("no such luck")

    monkeypatch.setattr("fxcompress.backends.onnx_simplify.onnxsim.simplify", fail)
    file = write_onnx(capture(nn.Linear(4, 4).eval(), (torch.randn(2, 4),)), tmp_path / "model.onnx")
    assert "said in C++" in capfd.readouterr().err
    assert any("no such luck" in note for note in file.notes)


def test_an_operation_that_is_taken_apart_keeps_its_operands_apart(tmp_path: Path) -> None:
    """Equal shapes are traced once, whether one value was given twice or two nodes share a fake value."""

    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(4, 6)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> Any:
            x, y = self.encoder(a), self.encoder(b)
            return F.cosine_similarity(x, x), F.cosine_similarity(x, y), F.cosine_similarity(y, x + 1)

    a, b = torch.randn(3, 4), torch.randn(3, 4)
    model = Twins().eval()
    passes = ["prune_channels(ratio=0.5)"]  # it sets the shapes of both calls of the layer at once
    engine = fxc.compile(model, passes, (a, b), backend="onnxruntime", output=tmp_path / "b").engine
    assert engine is not None and len(engine(a, b)) == 3
    same, other, _ = engine(a, b)
    assert (torch.as_tensor(same) > 0.999).all() and (torch.as_tensor(other) < 0.999).any()
