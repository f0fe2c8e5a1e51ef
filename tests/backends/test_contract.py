"""The contract of all backends: each test runs for every one of them, and fills a cell of the table in the docs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress.backends.bundle import MANIFEST
from fxcompress.backends.registry import backend_class, backend_names
from fxcompress.errors import BackendError, BundleError, OptionError, PreconditionError, VerificationError
from tests.backends import contract

each = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.skipif(not contract.available(name), reason=f"{name} is not installed"))
        for name in contract.BACKENDS
    ],
)


def built(name: str, model: nn.Module, inputs: Any, output: Path | None = None, **options: Any) -> fxc.backends.Engine:
    """An engine of the model, which compile() has verified at two batch sizes."""
    compiled = fxc.compile(model.eval(), example_inputs=inputs, progress=False)
    engine = compiled.export(contract.backend(name, **options), output)
    verified = engine.manifest.measurements["verification"]
    assert verified["relative_error"] and max(verified["relative_error"].values()) <= verified["tolerance"]
    return engine


def close(engine_output: Any, expected: Any, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(engine_output, expected, rtol=tolerance, atol=tolerance)


# -- inputs and outputs ----------------------------------------------------------------------------------------------


@each
@torch.no_grad()
def test_nested_inputs_and_outputs(name: str) -> None:
    feature(name, "dict and keyword inputs")

    def call(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x, a, b, by = torch.randn(4, batch, 3).unbind()
        return (x, (a, [b])), {"scale": {"by": by}}

    args, kwargs = call(2)
    names = dict(zip(("x", "pair"), args, strict=True)) | kwargs
    engine = built(name, contract.Nested(), names)
    for batch in (1, 2, 5):
        args, kwargs = call(batch)
        wanted, got = contract.Nested()(*args, **kwargs), engine(*args, **kwargs)
        assert list(got) == ["sum", "size", "none", "same"] and got["none"] is None
        assert isinstance(got["sum"], tuple) and isinstance(got["sum"][1], list)
        close(got["sum"][0], wanted["sum"][0])
        close(got["sum"][1][0], wanted["sum"][1][0])
        assert int(got["size"]) == batch
        assert torch.equal(got["same"], args[0])
    leaves = [spec.name for spec in engine.manifest.inputs]
    flat = engine.run(**dict(zip(leaves, [args[0], args[1][0], args[1][1][0], kwargs["scale"]["by"]], strict=True)))
    assert torch.equal(flat["same"], args[0])


@each
def test_outputs_are_the_callers_own(name: str) -> None:
    """Writing into an output changes neither the inputs, nor the weights, nor an earlier output."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return x, x.T, self.weight, self.weight.view(3, 1), x * 2

    engine = built(name, Model(), (torch.randn(2, 3),))
    x = torch.randn(4, 3)
    before, first = x.clone(), engine(x)
    for output in first:
        assert not output.requires_grad
        output.zero_()
    assert torch.equal(x, before)
    second = engine(x)
    assert torch.equal(second[0], x) and torch.equal(second[2], torch.ones(3)) and torch.equal(second[4], x * 2)
    kept = second[4].clone()
    engine(torch.randn(4, 3))
    assert torch.equal(second[4], kept)


@each
@torch.no_grad()
def test_dtypes(name: str) -> None:
    def inputs(batch: int) -> tuple[torch.Tensor, ...]:
        return torch.randn(batch, 4), torch.randint(0, 4, (batch, 4)), torch.rand(batch, 4) > 0.5

    engine = built(name, contract.Dtypes(), inputs(2))
    given = inputs(5)
    wanted = contract.Dtypes()(*given)
    for got, want in zip(engine(*given), wanted, strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)
    arrays = engine(*(value.numpy() for value in given))
    for got, want in zip(arrays, wanted, strict=True):
        assert isinstance(got, np.ndarray) and np.array_equal(got, want.numpy())


@each
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "channels_last", "read-only", "negative"])
@torch.no_grad()
def test_memory_layouts(name: str, layout: str) -> None:
    model = nn.Conv2d(3, 4, 3).eval()
    engine = built(name, model, (torch.randn(2, 3, 6, 6),))
    x = torch.randn(4, 3, 6, 6)
    value: Any = {
        "transposed": x.transpose(2, 3),
        "strided": torch.randn(4, 3, 12, 12)[:, :, ::2, ::2],
        "expanded": x[:1].expand(4, 3, 6, 6),
        "channels_last": x.to(memory_format=torch.channels_last),
    }.get(layout, x)
    close(engine(value), model(value))
    if layout in ("read-only", "negative"):
        array = x.numpy()[::-1] if layout == "negative" else x.numpy().copy()
        array.setflags(write=False)
        close(torch.from_numpy(engine(array)), model(torch.from_numpy(array.copy())))


# -- features --------------------------------------------------------------------------------------------------------


def feature(name: str, title: str) -> None:
    assert name in contract.FEATURES[title], "what a backend has not is tried in the test itself"


@each
@torch.no_grad()
def test_dynamic_dims(name: str) -> None:
    feature(name, "dynamic dims")
    engine = built(name, contract.Sizes(), (torch.randn(3, 4),))
    assert engine.manifest.inputs[0].shape == ("batch", 4)
    for batch in (1, 2, 7):
        x = torch.randn(batch, 4)
        close(engine(x), contract.Sizes()(x))


@each
@torch.no_grad()
def test_convolutional(name: str, tmp_path: Path) -> None:
    model = contract.Convolutional().eval()
    engine = built(name, model, (torch.randn(2, 3, 8, 8),), tmp_path / "b")
    for batch in (1, 6):
        x = torch.randn(batch, 3, 8, 8)
        close(engine(x), model(x))


@each
@torch.no_grad()
def test_attention(name: str) -> None:
    feature(name, "attention")
    model = contract.Attention().eval()

    def inputs(batch: int) -> tuple[torch.Tensor, ...]:
        return torch.randint(0, 50, (batch, 7)), torch.arange(7)[None, :] < 7 - torch.arange(batch)[:, None] % 3

    engine = built(name, model, inputs(2))
    given = inputs(5)
    close(engine(*given), model(*given))


@each
@torch.no_grad()
def test_recurrent_layers(name: str) -> None:
    feature(name, "recurrent layers")
    model = nn.LSTM(6, 8, num_layers=2, batch_first=True, bidirectional=True).eval()
    engine = built(name, model, (torch.randn(2, 5, 6),))
    x = torch.randn(3, 5, 6)
    (y, (h, c)), (y_, (h_, c_)) = engine(x), model(x)
    for got, want in ((y, y_), (h, h_), (c, c_)):
        close(got, want)


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval().to(dtype)
    if name not in contract.FEATURES[str(dtype).removeprefix("torch.")]:
        with pytest.raises((BackendError, VerificationError)):
            built(name, model, (torch.randn(2, 8).to(dtype),))
        return
    engine = built(name, model, (torch.randn(2, 8).to(dtype),))
    x = torch.randn(5, 8).to(dtype)
    got = engine(x)
    assert got.dtype is dtype
    close(got, model(x), 2e-2 if dtype is torch.float16 else 1e-1)


@each
@torch.no_grad()
def test_double_precision(name: str) -> None:
    """What a backend cannot compute in float64 it refuses: verification allows float64 no more than 1e-6."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)).eval().double()
    if name not in contract.FEATURES["float64"]:
        with pytest.raises((BackendError, VerificationError)):
            built(name, model, (torch.randn(2, 64).double(),))
        return
    x = torch.randn(5, 64).double()
    close(built(name, model, (torch.randn(2, 64).double(),))(x), model(x), 1e-12)


@each
def test_large_integers(name: str) -> None:
    class Increment(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    engine = built(name, Increment(), (torch.tensor([1, 2]),))
    large = torch.tensor([2**40, -(2**40)])
    if name in contract.FEATURES["integers of 64 bits"]:
        assert torch.equal(engine(large), large + 1)
    else:
        with pytest.raises(PreconditionError, match="32 bits"):
            engine(large)


@each
@torch.no_grad()
def test_int8(name: str) -> None:
    """A quantized graph runs everywhere; where the table says so, in integers."""
    model, data = contract.Convolutional().eval(), [(torch.randn(4, 3, 8, 8),) for _ in range(4)]
    scheme = "onnxruntime" if name == "onnxruntime" else "openvino"
    bits: Any = 7 if name == "openvino" else 8  # its kernels overflow with 8 on processors without VNNI
    passes = ["fuse_modules", fxc.passes.Quantize(data, scheme=scheme, weight_bits=bits)]
    compiled = fxc.compile(model, passes, example_inputs=(torch.randn(2, 3, 8, 8),), progress=False)
    engine: Any = compiled.export(contract.backend(name))
    x = torch.randn(3, 3, 8, 8)
    close(engine(x), compiled(x), 5e-2)
    counted = name in contract.FEATURES["int8 in integer kernels"]
    assert counted == (hasattr(engine, "optimized_op_counts") or hasattr(engine, "executed_precisions"))
    if name == "onnxruntime":
        assert engine.optimized_op_counts()["QLinearConv"] == 2
    if name == "openvino":
        assert engine.executed_precisions()["Convolution"].keys() <= {"u8", "i8"}


@each
@torch.no_grad()
def test_weights_in_4_bits(name: str, tmp_path: Path) -> None:
    """Weights of integers in blocks stay small on disk, and are computed with as PyTorch does."""
    feature(name, "weights stored in 4 bits")
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 64)).eval()
    compiled = fxc.compile(model, [fxc.passes.QuantizeWeights()], (torch.randn(2, 256),), progress=False)
    engine = compiled.export(contract.backend(name), tmp_path / "b")
    x = torch.randn(5, 256)
    close(engine(x), compiled(x))
    stored = sum(record.bytes for file, record in engine.manifest.files.items() if file != "reference.safetensors")
    assert stored < 0.25 * 4 * sum(parameter.numel() for parameter in model.parameters())


@each
@torch.no_grad()
def test_dynamic_quantization(name: str) -> None:
    feature(name, "dynamic quantization")
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    compiled = fxc.compile(model, [fxc.passes.QuantizeDynamic()], (torch.randn(2, 64),), progress=False)
    engine = compiled.export(contract.backend(name))
    x = torch.randn(5, 64)
    close(engine(x), compiled(x), 1e-2)


@each
def test_sparse_kernels(name: str) -> None:
    """They are asked for by an option, which TensorRT alone has."""
    told = "sparse_weights" in backend_class(name)().options()
    assert told == (name in contract.FEATURES["kernels for 2:4 sparse weights"])


# -- bundles ---------------------------------------------------------------------------------------------------------


@each
def test_bundles(name: str, tmp_path: Path) -> None:
    model = contract.Convolutional().eval()
    example = torch.randn(2, 3, 8, 8)
    engine = built(name, model, (example,), tmp_path / "b")
    x = torch.randn(3, 3, 8, 8)
    wanted = engine(x)
    assert engine.path == tmp_path / "b"
    manifest = engine.manifest
    assert manifest.backend == name and manifest.options == json.loads(json.dumps(contract.backend(name).options()))
    assert {"torch", "python"} <= manifest.versions.keys()
    assert set(manifest.files) == {p.relative_to(engine.path).as_posix() for p in engine.path.rglob("*")} - {MANIFEST}
    assert not any(file.read_bytes().find(b"/contract.py") >= 0 for file in engine.path.iterdir()), "source paths"
    engine.close()
    engine.close()
    with pytest.raises(BackendError, match="closed"):
        engine(x)
    with fxc.load_engine(tmp_path / "b") as again:
        assert torch.equal(again(x), wanted)
        assert type(again) is type(engine)
        result = again.benchmark((x,), against=model, repetitions=3, warmup=1)
        assert [timing.name for timing in result.timings] == ["engine", "against"] and result.median_ms > 0
        assert again.benchmark(repetitions=2, warmup=0).median_ms > 0, "with inputs of its own"


@each
def test_temporary_bundles_go_with_the_engine(name: str) -> None:
    engine = built(name, nn.Linear(3, 2), (torch.randn(2, 3),))
    assert engine.path.exists()
    engine.close()
    assert not engine.path.exists()


@each
def test_tampering(name: str, tmp_path: Path) -> None:
    built(name, contract.Convolutional(), (torch.randn(2, 3, 8, 8),), tmp_path / "b").close()
    for file in sorted((tmp_path / "b").iterdir()):
        if file.name == MANIFEST:
            continue
        before = file.read_bytes()
        middle = len(before) // 2
        file.write_bytes(before[:middle] + bytes([before[middle] ^ 1]) + before[middle + 1 :])
        with pytest.raises(BundleError, match="altered"):
            fxc.load_engine(tmp_path / "b")
        file.write_bytes(before)
    (tmp_path / "b" / "extra").write_text("")
    with pytest.raises(BundleError, match="does not list"):
        fxc.load_engine(tmp_path / "b")


# -- errors ----------------------------------------------------------------------------------------------------------


@each
def test_wrong_inputs(name: str) -> None:
    engine = built(name, nn.Linear(3, 2), (torch.randn(2, 3),))
    for wrong, message in (
        (torch.randn(2, 4), "dimension 1 is fixed at 3"),
        (torch.randn(2, 3, 1), "2 dimensions"),
        (torch.randn(2, 3).double(), "expected float32"),
        ("text", "a str"),
    ):
        with pytest.raises(PreconditionError) as caught:
            engine(wrong)
        assert message in str(caught.value)


@each
def test_failures_at_run_time(name: str) -> None:
    """What the library refuses is a BackendError, and the engine runs on."""
    table = nn.Embedding(4, 3).eval()
    engine = built(name, table, (torch.tensor([[0, 1], [2, 3]]),))
    if name not in contract.FEATURES["refuses an index out of range"]:
        assert engine(torch.tensor([[0, 9]])).shape == (1, 2, 3)  # of zeros or garbage, as the docs say
        return
    with pytest.raises(BackendError) as caught:
        engine(torch.tensor([[0, 9]]))
    assert caught.value.where == str(engine.path) and caught.value.__cause__ is not None
    close(engine(torch.tensor([[3, 1]])), table(torch.tensor([[3, 1]])).detach())


@each
def test_a_wrong_engine_is_not_handed_out(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine_class = type(built(name, nn.Linear(3, 2), (torch.randn(2, 3),)))
    right = engine_class._execute
    monkeypatch.setattr(engine_class, "_execute", lambda self, inputs: [y + 1 for y in right(self, inputs)])
    compiled = fxc.compile(nn.Linear(3, 2).eval(), example_inputs=(torch.randn(2, 3),), progress=False)
    with pytest.raises(VerificationError, match="differs from PyTorch"):
        compiled.export(contract.backend(name), tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


@each
def test_options(name: str, tmp_path: Path) -> None:
    built(name, nn.Linear(3, 2), (torch.randn(2, 3),), tmp_path / "b").close()
    with pytest.raises(OptionError, match="has no option 'thread_count'"):
        fxc.load_engine(tmp_path / "b", thread_count=2)
    cls = backend_class(name)
    for option in cls().options():
        with pytest.raises(OptionError) as caught:
            cls(**{option: object()})  # type: ignore[call-arg]
        assert caught.value.where == f"{cls.__name__}.{option}" and caught.value.remedy


# -- the table -------------------------------------------------------------------------------------------------------


def test_every_backend_is_held_to_the_contract() -> None:
    built_in = {backend_class(name).name for name in backend_names()}
    assert built_in - {"tensorrt"} >= set(contract.BACKENDS)
    ours = {cls.name for cls in map(backend_class, backend_names()) if cls.__module__.startswith("fxcompress.")}
    assert ours == {*contract.BUILT_IN, "tensorrt"}
    for name, cls in contract.CLASSES.items():
        assert getattr(fxc.backends, cls) is backend_class(name)


def test_the_table_in_the_docs() -> None:
    text = contract.DOCS.read_text(encoding="utf-8")
    assert contract.table() in text, "python -m tests.backends.contract writes it"
