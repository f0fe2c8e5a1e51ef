"""How large is a TensorRT engine after each kind of compression, and does it still build?

    python -m benchmarks.tensorrt_sizes --model resnet50
    python -m benchmarks.tensorrt_sizes                      # resnet50 and vit_b_16

Each recipe of a model goes through `fxcompress.compile` from the start and to a TensorRT for RTX engine, which is built
for sm86 and sm89 with a dynamic batch, without a GPU, and not run. Before it is built, the ONNX file that it is made of
is run in ONNX Runtime and held against the rewritten graph in PyTorch. Weights are random; sizes do not depend on them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file, not with -m
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

import fxcompress as fxc
from benchmarks import _results, zoo
from fxcompress.analysis.cost import cost
from fxcompress.errors import FxCompressError, VerificationError

CAPABILITIES = ("sm86", "sm89")
MODELS = ("resnet50", "vit_b_16")
RECIPES = (
    "fuse",
    "float16",
    "quantize",
    "prune",
    "prune, factorize",
    "prune, factorize, quantize",
    "weights in 4 bits",
)


def passes(recipe: str, data: list[Any]) -> list[Any]:
    """The passes of a recipe."""
    made: list[Any] = ["fuse_modules"]
    if recipe.startswith("prune"):
        made.append(fxc.passes.PruneChannels(ratio=0.5, round_to=16))
    if "factorize" in recipe:
        made += [fxc.passes.FactorizeConv(ratio=0.6, round_to=16), fxc.passes.FactorizeLinear(ratio=0.6, round_to=16)]
    if "quantize" in recipe:
        made.append(fxc.passes.Quantize(data, scheme="tensorrt", observer="minmax"))
    if recipe == "float16":
        made.append("convert_precision(dtype='float16')")
    if recipe == "weights in 4 bits":
        made.append("quantize_weights(bits=4)")
    return made


def measure(name: str, recipe: str) -> dict[str, Any]:
    """The row of one model and recipe; what cannot be built is told with its reason."""
    model = zoo.find(f"torchvision:{name}").build()
    data = [zoo.images((3, 224, 224), 2)]
    row: dict[str, Any] = {"model": name, "recipe": recipe}
    try:
        compiled = fxc.compile(model, passes(recipe, data), data[0], verify=False, progress=False)
        total = cost(compiled.module)
        row |= {"parameters_m": round(total.parameters / 1e6, 3), "gmacs": round((total.macs or 0) / 1e9, 3)}
        row["weights_mb"] = round(total.bytes / 1e6, 2)
        if "quantize" in recipe:
            row["own_noise"] = _own_noise(compiled, *data[0])
        try:
            row |= _built(compiled, verify=True)
        except VerificationError as error:  # sizes are what this is about
            row |= _built(compiled, verify=False) | {"note": f"not verified: {error.problem}"}
    except FxCompressError as error:
        row["failure"] = f"{type(error).__name__}: {error.problem}"
    return row


@torch.no_grad()
def _own_noise(compiled: Any, x: torch.Tensor) -> float:
    """How far the rewritten graph is from itself, in PyTorch, when its input grows by a millionth of its size."""
    wanted, given = compiled(x), compiled(x * (1 + 1e-6))
    return float((given - wanted).abs().max() / wanted.abs().max())


def _built(compiled: Any, *, verify: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        backend = fxc.backends.TensorRT(compute_capabilities=CAPABILITIES)
        with compiled.export(backend, Path(folder) / "bundle", verify=verify) as engine:
            found = engine.manifest.measurements
    verified = found.get("onnx_verification", {})
    return {
        "engine_mb": round(found["tensorrt"]["bytes"] / 1e6, 2),
        "build_s": round(found["tensorrt"]["seconds"], 1),
        "onnx_error": max(verified.get("relative_error", {}).values(), default=None),
        "allowed": verified.get("tolerance"),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and store; 1 if something was not built."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=MODELS, help="may be repeated; default: both")
    parser.add_argument("--recipe", action="append", choices=RECIPES, help="may be repeated; default: all")
    parser.add_argument("--json", type=Path, default=_results.RESULTS / "tensorrt_sizes.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    known = {(row["model"], row["recipe"]): row for row in _results.read_rows(options.json)}
    for name in options.model or MODELS:
        for recipe in options.recipe or RECIPES:
            row = known[name, recipe] = measure(name, recipe)
            print(row, flush=True)
            _save(options.json, known)
    return int(any("failure" in row for row in known.values()))


def _save(path: Path, known: dict[tuple[str, str], dict[str, Any]]) -> None:
    rows = [known[name, recipe] for name in MODELS for recipe in RECIPES if (name, recipe) in known]
    for row in rows:
        first = known.get((row["model"], RECIPES[0]), {}).get("engine_mb")
        if first and "engine_mb" in row:
            row["times_smaller"] = round(first / row["engine_mb"], 2)
    columns = ["model", "recipe", "parameters_m", "gmacs", "weights_mb", "engine_mb", "times_smaller", "build_s"]
    _results.write(
        path,
        title="TensorRT engines after compression",
        rows=rows,
        columns=[*columns, "onnx_error", "allowed", "own_noise", "note", "failure"],
        notes=[
            f"One engine for {' and '.join(CAPABILITIES)}, dynamic batch, built without a GPU and not run; "
            "`onnx_error`: of its ONNX file in ONNX Runtime against the rewritten graph in PyTorch. "
            "`own_noise`: of that graph against itself, its input times 1.000001: roundings that fall the other way, "
            "which networks with random weights amplify. prune: half of the channels, rounded to 16; factorize: 0.6 of "
            "each layer's cost; quantize: int8, `scheme='tensorrt'`."
        ],
        facts=_results.machine_facts(1) | {"tensorrt-rtx": metadata.version("tensorrt-rtx")},
    )


if __name__ == "__main__":
    sys.exit(main())
