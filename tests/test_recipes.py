"""Recipes: what YAML and the command line say, as passes, a backend and inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fxcompress.backends import OnnxRuntime
from fxcompress.errors import FxCompressError, OptionError, PreconditionError
from fxcompress.passes import FuseModules
from fxcompress.recipes import Recipe, dynamic_shapes_of, read_recipe

RECIPE = """
model: torchvision:mobilenet_v2
checkpoint: weights.safetensors
inputs: {x: 2x3x8x8, mask: "2x8:bool"}
dynamic_shapes: {x: {0: batch, 2: height}, mask: null}
passes:
  - fuse_modules
  - fuse_modules(ignore=('head',))
  - fuse_modules: {rules: [fold_norm_after], ignore: [stem.*]}
  - fuse_modules:
backend: onnx
backend_options: {threads: 2, providers: [CPUExecutionProvider], simplify: no}
output: out
verify: false
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_every_key(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, RECIPE))
    assert recipe.model == "torchvision:mobilenet_v2"
    assert recipe.checkpoint == Path("weights.safetensors")
    assert recipe.dynamic_shapes == {"x": {0: "batch", 2: "height"}, "mask": None}
    assert recipe.make_passes() == (
        FuseModules(),
        FuseModules(ignore=("head",)),
        FuseModules(rules=("fold_norm_after",), ignore=("stem.*",)),
        FuseModules(),
    )
    assert recipe.make_backend() == OnnxRuntime(threads=2, simplify=False)
    inputs = recipe.make_inputs()
    assert inputs is not None
    assert {name: (tuple(value.shape), value.dtype) for name, value in inputs.kwargs.items()} == {
        "x": ((2, 3, 8, 8), torch.float32),
        "mask": ((2, 8), torch.bool),
    }
    assert recipe.output == Path("out")
    assert recipe.verify is False


def test_defaults(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, "model: net.py:build"))
    assert (recipe.make_passes(), recipe.make_backend(), recipe.make_inputs()) == ((), None, None)
    assert (recipe.dynamic_shapes, recipe.verify) == ("batch", True)
    assert read_recipe(write(tmp_path, "dynamic_shapes: null")).dynamic_shapes is None


def test_what_is_typed_takes_precedence() -> None:
    recipe = Recipe(model="a", passes=["fuse_modules"], backend="onnx", backend_options={"threads": 2, "opset": 20})
    typed = recipe.overridden(model="b", passes=None, inputs=[], backend_options=["threads=3"], dynamic=False)
    assert typed.model == "b"
    assert typed.passes == ["fuse_modules"]
    assert typed.backend_options == {"threads": 3, "opset": 20}
    assert typed.dynamic_shapes is None
    assert recipe.model == "a"
    assert recipe.overridden(dynamic_shapes='{"x": {"0": "batch"}}').dynamic_shapes == {"x": {0: "batch"}}
    assert Recipe(dynamic_shapes=None).overridden(dynamic=True).dynamic_shapes == "batch"


def test_a_list_is_an_option_typed_with_commas() -> None:
    recipe = Recipe(backend="onnxruntime").overridden(
        backend_options=["providers=CUDAExecutionProvider,CPUExecutionProvider"]
    )
    assert recipe.make_backend() == OnnxRuntime(providers=("CUDAExecutionProvider", "CPUExecutionProvider"))


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", OptionError, "no mapping"),
        ("- fuse_modules", OptionError, "no mapping"),
        ("model: [", PreconditionError, "cannot be read"),
        ("modle: x", OptionError, "did you mean 'model'"),
        ("verify: maybe", OptionError, "'verify'"),
        ("passes: fuse_modules", OptionError, "'passes'"),
        ("passes: [{fuse_modules: 3}]", OptionError, "passes: fuse_modules"),
    ],
)
def test_malformed(text: str, error: type[FxCompressError], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message) as caught:
        read_recipe(write(tmp_path, text))
    assert "recipe.yaml" in caught.value.where
    assert caught.value.remedy


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(PreconditionError, match="no such recipe"):
        read_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe(passes=["fuse_module"]), "did you mean 'fuse_modules'"),
        (Recipe(passes=[{"fuse_modules": {"ignor": []}}]), "did you mean 'ignore'"),
        (Recipe(passes=[{"fuse_modules": None, "prune": None}]), "names 2 passes"),
        (Recipe(backend="onxruntime"), "did you mean 'onnxruntime'"),
        (Recipe(backend="onnx", backend_options={"thread": 2}), "did you mean 'threads'"),
        (Recipe(backend="onnx", backend_options={"threads": "two"}), "threads"),
        (Recipe(backend_options={"threads": 2}), "no backend"),
        (Recipe(inputs=["2x3xq"]), "cannot be read"),
        (Recipe(inputs=["2x0"]), "a size is 0"),
        (Recipe(inputs=["2x3:float31"]), "did you mean 'float32'"),
        (Recipe(inputs=["x=2", "x=2"]), "given twice"),
        (Recipe(inputs=["x=2", "2"]), "has no name"),
        (Recipe(inputs=["x y=2"]), "no name of an argument"),
    ],
)
def test_unknown_names_and_values(recipe: Recipe, message: str) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        recipe.make_passes(), recipe.make_backend(), recipe.make_inputs()
    assert caught.value.remedy or caught.value.where


def test_dynamic_shapes_as_json() -> None:
    assert dynamic_shapes_of(None, None) == dynamic_shapes_of(True, None) == "batch"
    assert dynamic_shapes_of(False, None) is None
    assert dynamic_shapes_of(True, '[{"0": "n"}, null]') == [{0: "n"}, None]
    with pytest.raises(OptionError, match="no JSON"):
        dynamic_shapes_of(None, "{x: 1}")
    with pytest.raises(OptionError, match="fixes all sizes"):
        dynamic_shapes_of(False, "{}")


def test_input_values_are_safe_and_repeatable() -> None:
    inputs = Recipe(inputs=["2x3", "4:int64", "1x2:float16"]).make_inputs()
    again = Recipe(inputs=["2x3", "4:int64", "1x2:float16"]).make_inputs()
    assert inputs is not None
    assert again is not None
    assert all(torch.equal(a, b) for a, b in zip(inputs.args, again.args, strict=True))
    assert set(inputs.args[1].tolist()) <= {0, 1}
    assert inputs.args[2].dtype is torch.float16
    named = Recipe(inputs=["attention_mask=2x3:int64"]).make_inputs()
    assert named is not None
    assert named.kwargs["attention_mask"].min() == 1
