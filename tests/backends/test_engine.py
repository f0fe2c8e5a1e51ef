"""Running engines: every way of calling, checks of what is handed in, structures and dtypes of what comes back."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from onnx import helper

from fxcompress.backends.bundle import Manifest
from fxcompress.backends.bundle_writer import BundleWriter
from fxcompress.backends.engine import Engine
from fxcompress.backends.onnxruntime import MODEL_FILE, OnnxRuntimeEngine
from fxcompress.backends.registry import load_engine
from fxcompress.backends.signature import TensorSpec
from fxcompress.backends.tensors import Array
from fxcompress.errors import BackendError, PreconditionError
from fxcompress.graph.structure import Record, Structure

Open = Callable[..., OnnxRuntimeEngine]

A = TensorSpec("a", ("batch", 3), "float32")
B = TensorSpec("b", ("batch", 3), "float32")
SUM = TensorSpec("sum", ("batch", 3), "float32")
DIFFERENCE = TensorSpec("difference", ("batch", 3), "float32")
NODES = [helper.make_node("Add", ["a", "b"], ["sum"]), helper.make_node("Sub", ["a", "b"], ["difference"])]


@pytest.fixture
def relu(relu_bundle: Path) -> Engine:
    return load_engine(relu_bundle)


@pytest.fixture
def arithmetic(open_engine: Open) -> OnnxRuntimeEngine:
    """forward(a, b) → {"sum": a + b, "parts": (a - b,)}"""
    return open_engine(NODES, [A, B], [SUM, DIFFERENCE], result={"sum": 0, "parts": (0,)})


@pytest.mark.parametrize("batch", [1, 4])
def test_tensors_in_tensors_out(relu: Engine, batch: int) -> None:
    x = torch.randn(batch, 3, requires_grad=True)
    y = relu(x)
    assert isinstance(y, torch.Tensor) and not y.requires_grad
    assert torch.equal(y, x.detach().relu())
    y.add_(1)  # the result is the caller's to write to


@pytest.mark.parametrize("batch", [1, 4])
def test_arrays_in_arrays_out(relu: Engine, batch: int) -> None:
    x = np.random.randn(batch, 3).astype(np.float32)
    y = relu.run(x)
    assert isinstance(y, np.ndarray) and y.dtype == np.float32
    np.testing.assert_array_equal(y, np.maximum(x, 0))


def test_every_way_of_calling(arithmetic: Engine) -> None:
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((a, b), {}),
        ((a,), {"b": b}),
        ((), {"b": b, "a": a}),
        (({"a": a, "b": b},), {}),
    ]
    for args, kwargs in calls:
        result = arithmetic.run(*args, **kwargs)
        assert torch.equal(result["sum"], a + b) and torch.equal(result["parts"][0], a - b)
        assert type(result["parts"]) is tuple and list(result) == ["sum", "parts"]


def test_a_single_input_by_name(relu: Engine) -> None:
    x = np.ones((1, 3), np.float32)
    for y in (relu(x=x), relu({"x": x})):
        np.testing.assert_array_equal(y, x)


def test_one_tensor_among_arrays_makes_tensors(arithmetic: Engine) -> None:
    a, b = torch.ones(1, 3), np.ones((1, 3), np.float32)
    assert isinstance(arithmetic(a, b)["sum"], torch.Tensor)
    assert isinstance(arithmetic(b, a)["sum"], torch.Tensor)
    assert isinstance(arithmetic(b, b)["sum"], np.ndarray)


def test_strided_read_only_and_backward_memory(relu: Engine) -> None:
    base = torch.randn(3, 4)
    assert torch.equal(relu(base.t()), base.t().relu())
    array = np.random.randn(2, 3).astype(np.float32)
    np.testing.assert_array_equal(relu(array[::-1, ::-1]), np.maximum(array[::-1, ::-1], 0))
    array.flags.writeable = False
    np.testing.assert_array_equal(relu(array), np.maximum(array, 0))
    with torch.inference_mode():
        assert torch.equal(relu(base.t()), base.t().relu())


def test_constants_and_records_in_the_structure(open_engine: Open) -> None:
    engine = open_engine(NODES, [A, B], [SUM, DIFFERENCE])
    leaf = Structure("leaf")
    inputs = Structure(
        "tuple",
        children=(
            Structure(
                "tuple", ("pair", "flag"), (Structure("tuple", (), (leaf, leaf)), Structure("constant", value=True))
            ),
            Structure("dict"),
        ),
    )
    outputs = Structure("record", ("sum", "n", "rest"), (leaf, Structure("constant", value=7), leaf), type_name="m.Out")
    manifest = Manifest("engine", "onnxruntime", (A, B), (SUM, DIFFERENCE), inputs, outputs)
    engine = OnnxRuntimeEngine(engine.path, manifest, engine.backend)
    a, b = torch.ones(1, 3), torch.ones(1, 3)
    for result in (engine((a, b), True), engine([a, b]), engine(pair=(a, b)), engine(a, b), engine(a=a, b=b)):
        assert isinstance(result, Record) and result.n == 7
        assert torch.equal(result.sum, a + b) and torch.equal(result.rest, a - b)
    with pytest.raises(PreconditionError, match="expected True, which capture made part of the graph, got False"):
        engine((a, b), False)


@pytest.mark.parametrize(
    ("given", "message", "remedy"),
    [
        (torch.ones(2, 3, dtype=torch.float64), r"float32\[batch, 3\], given float64\[2, 3\]", "to(torch.float32)"),
        (np.ones((2, 3)), r"given float64\[2, 3\]", "astype(np.float32)"),
        (np.ones((2, 3), ">f4"), r"given float32\[2, 3\]", "astype(np.float32)"),
        (torch.ones(2, 3, dtype=torch.bfloat16), r"given bfloat16\[2, 3\]", "to(torch.float32)"),
        (torch.ones(3), r"given float32\[3\]", "needs 2 dimensions, this has 1"),
        (np.ones((1, 2, 3), np.float32), r"given float32\[1, 2, 3\]", "needs 2 dimensions, this has 3"),
        (torch.ones(2, 4), r"given float32\[2, 4\]", "dimension 1 is fixed at 3"),
        (3.0, "given a float", "hand in a torch tensor or a numpy array"),
    ],
)
def test_misfits_say_expected_and_given(relu: Engine, given: Any, message: str, remedy: str) -> None:
    with pytest.raises(PreconditionError, match=message) as caught:
        relu(given)
    assert caught.value.where == "input 'x'" and remedy in str(caught.value.remedy)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, r"missing 'a', 'b'; expected \(a, b\), given \(\)"),
        ((torch.ones(1, 3),), {}, r"missing 'b'; expected \(a, b\), given \(Tensor\)"),
        ((torch.ones(1, 3),) * 3, {}, "3 positional arguments are more than the 2"),
        ((torch.ones(1, 3),), {"c": torch.ones(1, 3)}, r"unknown argument 'c'; .* given \(Tensor, c=Tensor\)"),
        ((torch.ones(1, 3), None), {}, "expected a tensor, got None|given a NoneType"),
        ((torch.ones(2, 3), torch.ones(1, 3)), {}, r"disagree on 'batch': a.shape\[0\] = 2, b.shape\[0\] = 1"),
    ],
)
def test_wrong_calls(arithmetic: Engine, args: tuple[Any, ...], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(PreconditionError, match=message):
        arithmetic(*args, **kwargs)


def test_flat_runs_count(arithmetic: Engine) -> None:
    a = torch.ones(1, 3)
    total, difference = arithmetic.run_flat([a, a])
    assert torch.equal(total, a + a) and torch.equal(difference, a - a)
    with pytest.raises(PreconditionError, match=r"expected 2 inputs \(a, b\), given 1"):
        arithmetic.run_flat([a])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool])
@pytest.mark.parametrize("batch", [1, 3])
def test_dtypes(open_engine: Open, dtype: torch.dtype, batch: int) -> None:
    name = str(dtype).removeprefix("torch.")
    x, y = TensorSpec("x", ("batch", 2), name), TensorSpec("y", ("batch", 2), name)
    engine = open_engine([helper.make_node("Concat", ["x"], ["y"], axis=0)], [x], [y])
    given = torch.tensor([[1.5, -2.0]]).repeat(batch, 1).to(dtype)
    result = engine(given)
    assert result.dtype is dtype and torch.equal(result, given)
    assert torch.equal(engine(given.repeat(1, 2)[:, ::2][:, [0, 0]].t().contiguous().t()), given[:, [0, 0]])
    if dtype is torch.bfloat16:
        array: np.ndarray = given.float().numpy().astype(ml_dtypes.bfloat16)
    else:
        array = given.numpy()
    back = engine(array)
    assert isinstance(back, np.ndarray) and back.dtype == array.dtype
    np.testing.assert_array_equal(back.astype(np.float32), array.astype(np.float32))


def test_bfloat16_results_outlive_the_engine(open_engine: Open) -> None:
    x, y = TensorSpec("x", ("batch", 2), "bfloat16"), TensorSpec("y", ("batch", 2), "float32")
    z = TensorSpec("z", ("batch", 2), "bfloat16")
    nodes = [helper.make_node("Cast", ["x"], ["y"], to=1), helper.make_node("Concat", ["x", "x"], ["z"], axis=0)]
    engine = open_engine(nodes, [x], [y, TensorSpec("z", ("2*batch", 2), z.dtype)], result=(0, 0))
    given = torch.randn(500, 2).bfloat16()
    wide, twice = engine(given)
    del engine
    gc.collect()
    torch.randn(100_000)
    assert torch.equal(wide, given.float()) and torch.equal(twice, torch.cat([given, given]))


def test_scalars_and_no_inputs(open_engine: Open) -> None:
    y = TensorSpec("y", (), "float32")
    node = helper.make_node("Constant", [], ["y"], value_float=2.5)
    engine = open_engine([node], [], [y])
    assert engine() == np.float32(2.5) and engine().shape == ()
    with pytest.raises(PreconditionError, match="1 positional arguments are more than the 0"):
        engine(np.ones(1))


def test_an_input_that_nothing_reads(open_engine: Open) -> None:
    engine = open_engine([helper.make_node("Neg", ["a"], ["sum"])], [A], [SUM])
    manifest = Manifest(
        "engine",
        "onnxruntime",
        (A, B),
        (SUM,),
        Structure("tuple", (), (Structure("tuple", (), (Structure("leaf"), Structure("leaf"))), Structure("dict"))),
        Structure("leaf"),
    )
    engine = OnnxRuntimeEngine(engine.path, manifest, engine.backend)
    a = torch.ones(1, 3)
    assert torch.equal(engine(a, a), -a)


def test_close_is_final_and_repeatable(relu_bundle: Path) -> None:
    with load_engine(relu_bundle) as engine:
        engine(torch.ones(1, 3))
    engine.close()
    with pytest.raises(BackendError, match="this engine is closed"):
        engine(torch.ones(1, 3))
    assert relu_bundle.exists()


@pytest.mark.parametrize("how", ["close", "collect"])
def test_temporary_bundles_go_with_their_engine(relu_bundle: Path, how: str) -> None:
    model = (relu_bundle / MODEL_FILE).read_bytes()
    loaded = load_engine(relu_bundle)
    with BundleWriter(None) as writer:
        (writer.directory / MODEL_FILE).write_bytes(model)
        path, manifest = writer.commit(loaded.manifest)
    engine = load_engine(path)
    engine._settle(path, manifest, writer.temporary)
    assert path.exists()
    if how == "close":
        engine.close()
    del engine
    gc.collect()
    assert not path.parent.exists()


class Torchlike(Engine):
    """A backend whose library takes torch tensors."""

    native = "torch"

    def _execute(self, inputs: list[Array]) -> Sequence[Array]:
        assert all(isinstance(value, torch.Tensor) and not value.requires_grad for value in inputs)
        return [torch.as_tensor(value) + 1 for value in inputs]


def torchlike(dtype: str = "float32", **kwargs: Any) -> Torchlike:
    inputs = Structure("tuple", (), (Structure("tuple", (), (Structure("leaf"),)), Structure("dict")))
    spec = TensorSpec("x", ("batch", 3), dtype)
    manifest = Manifest(
        "engine", "torchlike", (spec,), (TensorSpec("y", ("batch", 3), dtype),), inputs, Structure("leaf")
    )
    return Torchlike("nowhere", manifest, **kwargs)


def test_engines_that_work_on_tensors() -> None:
    x = torch.zeros(2, 3, requires_grad=True)
    assert torch.equal(torchlike()(x), torch.ones(2, 3))
    array = np.zeros((2, 3), np.float32)
    array.flags.writeable = False
    for given in (array, array[::-1]):
        result = torchlike()(given)
        assert isinstance(result, np.ndarray) and (result == 1).all()
    narrow = torchlike("bfloat16")(np.zeros((2, 3), ml_dtypes.bfloat16))
    assert narrow.dtype == ml_dtypes.bfloat16 and (narrow == 1).all()
    eighth = torchlike("float8_e4m3fn")
    with pytest.raises(PreconditionError, match=r"given uint8\[2, 3\]"):
        eighth(np.zeros((2, 3), np.uint8))


def test_engines_that_cannot_run_here() -> None:
    engine = torchlike(unavailable="it needs a GPU")
    with pytest.raises(BackendError, match="cannot run here: it needs a GPU"):
        engine(torch.zeros(1, 3))


def test_threads_share_an_engine(arithmetic: Engine) -> None:
    def work(seed: int) -> bool:
        generator = torch.Generator().manual_seed(seed)
        a, b = torch.randn(1 + seed % 3, 3, generator=generator), torch.randn(1 + seed % 3, 3, generator=generator)
        result = arithmetic(a, b)
        return torch.equal(result["sum"], a + b) and torch.equal(result["parts"][0], a - b)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(200)))


def test_repr_tells_the_call(arithmetic: Engine) -> None:
    text = repr(arithmetic)
    assert "OnnxRuntimeEngine (a, b)" in text and "a: float32[batch, 3]" in text and "difference: float32" in text


def test_random_inputs(open_engine: Open) -> None:
    ids = TensorSpec("ids", ("batch", "length"), "int64", (2, 7), 5, 9)
    mask = TensorSpec("mask", ("batch", "length"), "bool", (2, 7))
    x = TensorSpec("x", ("batch", 3), "float16")
    plain = TensorSpec("plain", ("batch",), "int64")
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in ("ids", "mask", "x", "plain")]
    specs = [ids, mask, x, plain]
    outputs = [TensorSpec(f"{spec.name}_out", spec.shape, spec.dtype) for spec in specs]
    engine = open_engine(nodes, specs, outputs, result=(0,) * 4)
    drawn = engine.random_inputs(batch=4)
    assert [tuple(tensor.shape) for tensor in drawn] == [(4, 7), (4, 7), (4, 3), (4,)]
    assert int(drawn[0].min()) >= 5 and int(drawn[0].max()) <= 9
    assert bool(drawn[1].all()) and drawn[2].dtype is torch.float16 and not drawn[3].any()
    assert all(map(torch.equal, drawn, engine.random_inputs(batch=4)))
    assert not torch.equal(drawn[2], engine.random_inputs(batch=4, seed=1)[2])
    assert engine.random_inputs(sizes={"length": 2, "batch": 3})[0].shape == (3, 2)
    with pytest.raises(PreconditionError, match="at least 1"):
        engine.random_inputs(batch=0)
    engine.run_flat(drawn)


def test_engine_benchmark(arithmetic: Engine) -> None:
    a, b = torch.ones(2, 3), torch.ones(2, 3)
    seen: list[tuple[int, ...]] = []

    def reference(a: torch.Tensor, b: torch.Tensor) -> None:
        seen.append(tuple(a.shape))

    alone = arithmetic.benchmark(repetitions=3, warmup=1)
    assert [timing.name for timing in alone.timings] == ["engine"] and alone.median_ms > 0
    result = arithmetic.benchmark((a, b), against=reference, repetitions=3, warmup=1)
    assert [timing.name for timing in result.timings] == ["engine", "against"] and seen == [(2, 3)] * 6
    seen.clear()
    result = arithmetic.benchmark(against={"eager": reference, "other": arithmetic}, batch=5, repetitions=2, warmup=0)
    assert [timing.name for timing in result.timings] == ["engine", "eager", "other"] and seen == [(5, 3)] * 2
    arithmetic.benchmark({"a": a, "b": b}, repetitions=1)
    with pytest.raises(PreconditionError, match="missing 'b'"):
        arithmetic.benchmark(a, repetitions=1)
