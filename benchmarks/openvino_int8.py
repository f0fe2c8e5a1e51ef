"""Is an int8 engine of ours as fast in OpenVINO as one of NNCF, OpenVINO's own tool? Both in one run, in turns.

For each model: `quantize(scheme="openvino")` and NNCF's post-training quantization of the float ONNX file, on the same
calibration data, with NNCF's defaults for the kind of model (transformers: `ModelType.TRANSFORMER`, and with it the
mixed preset). Where the processor lacks VNNI, 8-bit products overflow in OpenVINO; there both take 7 bits for weights,
each by its own option. Both are compiled by one OpenVINO with the same properties and called through the same kind of
requests. Beside the latency: how many layers run in integers, and how far the outputs are from the float model's.

    python -m benchmarks.openvino_int8 --build FOLDER     # needs nncf, which lies outside of constraints.txt
    python -m benchmarks.openvino_int8 --race FOLDER      # measures, and writes the table

Weights are random (benchmarks/zoo.py), which times do not depend on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file, not with -m
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import openvino
import torch

from benchmarks import _results, zoo

MODELS = {"resnet50": "cnn", "mobilenet_v2": "cnn", "vit_b_16": "transformer"}
OURS, THEIRS, FLOAT = "fxcompress", "nncf", "float32"
IMAGES = 16


def images(count: int, start: int = 0) -> list[torch.Tensor]:
    """Smooth random images, one a batch: noise at several scales, as in photographs."""
    made = []
    for seed in range(start, start + count):
        generator = torch.Generator().manual_seed(seed)
        image = torch.zeros(1, 3, 224, 224)
        for side in (4, 14, 56, 224):
            noise = torch.randn(1, 3, side, side, generator=generator)
            image += torch.nn.functional.interpolate(noise, (224, 224), mode="bilinear") / 2
        made.append(image)
    return made


def build(folder: Path, names: Sequence[str]) -> None:
    """The three forms of each model, as files that OpenVINO reads."""
    import nncf

    import fxcompress as fxc

    bits: Any = 8 if _results.has_vnni() else 7
    for name in names:
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        model = zoo.find(f"torchvision:{name}").build()
        data = [(image,) for image in images(IMAGES)]
        example = (torch.cat([image for (image,) in data[:2]]),)
        plain = fxc.compile(model, ["fuse_modules"], example, verify=False, progress=False)
        plain.export("openvino", place / FLOAT, verify=False).close()
        started = time.perf_counter()
        passes = ["fuse_modules", fxc.passes.Quantize(data, scheme="openvino", weight_bits=bits)]
        ours = fxc.compile(model, passes, example, verify=False, progress=False)
        ours.export("openvino", place / OURS, verify=False).close()
        seconds = {OURS: time.perf_counter() - started}
        started = time.perf_counter()
        options: dict[str, Any] = {}
        if MODELS[name] == "transformer":
            options["model_type"] = nncf.ModelType.TRANSFORMER
        if bits == 7:
            options["advanced_parameters"] = nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE)
        theirs = nncf.quantize(
            openvino.Core().read_model(place / FLOAT / "model.onnx"),
            nncf.Dataset([image.numpy() for (image,) in data]),
            subset_size=IMAGES,
            **options,
        )
        (place / THEIRS).mkdir()
        openvino.save_model(theirs, place / THEIRS / "model.xml")
        seconds[THEIRS] = time.perf_counter() - started
        (place / "build.json").write_text(
            json.dumps({"nncf": nncf.__version__, "weight_bits": bits, "seconds": seconds})
        )
        print(name, seconds, flush=True)


def race(folder: Path, names: Sequence[str], precision: str, threads: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each model: latency of the three in turns, their ratio, and what runs in integers."""
    from fxcompress.backends.benchmark import benchmark

    rows = []
    for name in names:
        compiled = {kind: compiled_model(folder / name / kind, precision, threads) for kind in (OURS, THEIRS, FLOAT)}
        calls = {kind: _call(model) for kind, model in compiled.items()}
        image = images(1, start=1000)[0].numpy()
        result = benchmark({kind: calls[kind] for kind in (THEIRS, OURS, FLOAT)}, (image,), repetitions=rounds)
        told = json.loads((folder / name / "build.json").read_text())
        row = {"model": name, "precision": precision, **{fact: told[fact] for fact in ("weight_bits", "nncf")}}
        for kind in (OURS, THEIRS, FLOAT):
            row[f"{kind}_ms"] = round(result[kind].median_ms, 3)
        ours = result[OURS]
        row |= {"ratio": round(ours.ratio, 3), "low": round(ours.ratio_low, 3), "high": round(ours.ratio_high, 3)}
        for kind in (OURS, THEIRS):
            counts = precisions(compiled[kind])
            row[f"{kind}_int8"] = sum(n for (_, p), n in counts.items() if p in ("i8", "u8"))
            row[f"{kind}_layers"] = {f"{layer} {p}": n for (layer, p), n in sorted(counts.items())}
            row[f"{kind}_error"] = max(_error(calls[kind], calls[FLOAT], image) for image in images(4, start=2000))
        rows.append(row)
        print({key: value for key, value in row.items() if not key.endswith("layers")}, flush=True)
    return rows


def compiled_model(place: Path, precision: str, threads: int) -> Any:
    """The model in a folder, compiled for latency."""
    file = next(file for file in (place / "model.xml", place / "model.onnx") if file.exists())
    properties = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": threads,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    }
    core = openvino.Core()
    return core.compile_model(core.read_model(file), "CPU", properties)


def _has(precision: str) -> bool:
    return precision.upper() in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _call(compiled: Any) -> Any:
    request = compiled.create_infer_request()

    def call(image: np.ndarray) -> np.ndarray:
        request.set_input_tensor(0, openvino.Tensor(image, True))
        request.infer()
        output: np.ndarray = request.get_output_tensor(0).data
        return output

    return call


def _error(call: Any, reference: Any, image: torch.Tensor) -> float:
    """Of the logits: the norm of the difference over the norm."""
    wanted, given = reference(image.numpy()).copy(), call(image.numpy())
    return float(np.linalg.norm(given - wanted) / np.linalg.norm(wanted))


def precisions(compiled: Any) -> Counter[tuple[str, str]]:
    """How often each type of layer runs in each precision."""
    found: Counter[tuple[str, str]] = Counter()
    for operation in compiled.get_runtime_model().get_ordered_ops():
        facts = operation.get_rt_info()
        kind, precision = (facts[key].astype(str) for key in ("layerType", "runtimePrecision"))
        if kind not in ("Const", "Output", "Input"):
            found[kind, precision] += 1
    return found


def main() -> None:
    """Build or race."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, metavar="FOLDER")
    parser.add_argument("--race", type=Path, metavar="FOLDER")
    parser.add_argument("--model", action="append", choices=list(MODELS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path, default=_results.RESULTS / "openvino_int8.json")
    options = parser.parse_args()
    names = options.model or list(MODELS)
    if options.build:
        build(options.build, names)
    if not options.race:
        return
    chosen = [p for p in ("f32", "bf16") if p == "f32" or _has(p)]
    rows = [row for p in chosen for row in race(options.race, names, p, options.threads, options.rounds)]
    summary = {
        f"geometric mean of our latency over NNCF's, {p}": _results.geometric_mean(
            row["ratio"] for row in rows if row["precision"] == p
        )
        for p in chosen
    }
    columns = ["model", "precision", "weight_bits", f"{OURS}_ms", f"{THEIRS}_ms", f"{FLOAT}_ms", "ratio", "low", "high"]
    columns += [f"{kind}_{what}" for what in ("int8", "error") for kind in (OURS, THEIRS)]
    _results.write(
        options.json,
        title="int8 in OpenVINO: our Q/DQ against NNCF's",
        rows=rows,
        columns=columns,
        summary=summary,
        notes=[
            f"Batch 1, median of {options.rounds} calls in turns. `ratio`: ours over NNCF's, with its 95% interval. "
            "`precision`: that OpenVINO may take for what is not quantized, bf16 where the processor has it. "
            "`weight_bits`: 7 for both where the processor has no VNNI. `_int8`: layers that run in integers, as "
            f"OpenVINO tells. `_error`: of the logits against float32, the worst of 4 images. Both calibrated on "
            f"{IMAGES} images; random weights."
        ],
        facts=_results.machine_facts(options.threads)
        | {name: metadata.version(name) for name in ("openvino",)}
        | {"nncf": rows[0]["nncf"]},
    )


if __name__ == "__main__":
    main()
