"""Do quantized engines run in integers, and faster? Ten models, beside ONNX Runtime's own quantizer.

Each model becomes three ONNX Runtime engines: ours in floating point, ours in 8 bits (`Quantize`, scheme
`onnxruntime`), and what `onnxruntime.quantization.quantize_static` makes of the plain export of the same model on the
same calibration data, at its best setting: pre-processed and optimized, Q/DQ, uint8 activations, int8 weights, one
scale per channel. Ours asks for an engine that is not slower than the one in floating point (`min_speedup=1.0`), so
that kinds of layers whose integers do not pay stay in floats; `chosen` tells. Where the processor lacks VNNI both have
7-bit weights (`reduce_range`), for 8-bit ones overflow in its fast kernels. Building and timing are two
commands, for only the second needs a machine at rest:

    python -m benchmarks.quantize_engines build --work /tmp/engines --model resnet18
    python -m benchmarks.quantize_engines time --work /tmp/engines --threads 2

The table goes to `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file, not with -m
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

import fxcompress as fxc
from benchmarks import _results, zoo
from fxcompress.backends.benchmark import benchmark

MODELS = (
    "resnet18",
    "resnet50",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "regnet_y_400mf",
    "vit_b_16",
    "swin_t",
    "convnext_tiny",
    "bert_base",
)
ENGINES = ("fp32", "int8", "peer")
BATCHES = (1, 8)
ROUNDS = 5
RESULTS = _results.RESULTS / "quantize_engines.json"
_INTEGER = ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "QLinearAdd")
_FLOAT = ("Conv", "FusedConv", "Gemm", "MatMul", "FusedMatMul", "Add")


def model_of(name: str) -> zoo.ZooModel:
    """One of `MODELS`, with random weights."""
    if name != "bert_base":
        return zoo.find(f"torchvision:{name}")

    def build() -> nn.Module:
        zoo.prepare_torchvision()  # transformers looks for it
        from transformers import BertConfig, BertModel

        return BertModel(BertConfig(attn_implementation="sdpa"), add_pooling_layer=False)

    def inputs(batch: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(batch)
        tokens = torch.randint(0, 30000, (batch, 128), generator=generator)
        return {"input_ids": tokens, "attention_mask": torch.ones(batch, 128, dtype=torch.int64)}

    return zoo.ZooModel(name, "transformers", lambda: zoo.seeded(build, inputs, name), inputs)


# --- building ---------------------------------------------------------------------------------------------------------


def build(name: str, work: Path) -> dict[str, Any]:
    """The three engines of one model under `work/name`; gives what is known of them without running them."""
    bits = 8 if _results.has_vnni() else 7
    entry = model_of(name)
    model, example, data = entry.build(), entry.inputs(2), [entry.inputs(batch) for batch in (4, 5)]
    folder = work / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    row: dict[str, Any] = {"model": name, "weight_bits": bits}
    fuse, quantize = fxc.passes.FuseModules(), _quantize(data, bits)
    for kind, passes in (("fp32", [fuse]), ("int8", [fuse, quantize])):
        # These weights let a rounding that falls the other way grow to the end, so the error is measured, not judged.
        compiled = fxc.compile(
            model, passes, example, backend="onnxruntime", output=folder / kind, verify=False, progress=False
        )
        row[f"{kind}_mb"] = (folder / kind / "model.onnx").stat().st_size / 1e6
        weights = folder / kind / "model.onnx.data"
        row[f"{kind}_mb"] += weights.stat().st_size / 1e6 if weights.exists() else 0.0
    told = compiled.report.passes[-1]
    refused = next((skip.reason for skip in told.skipped if skip.site == "all"), None)
    row["chosen"] = refused or told.note.rsplit("; ", 1)[-1]
    report = compiled.report.engine
    integers = report.integers if report is not None else None
    for kind_ in integers.kinds if integers is not None else ():
        row[kind_.kind] = f"{kind_.integer}/{kind_.count}"
    row["macs_percent"] = round(100 * (integers.macs_share or 0), 2) if integers is not None else 0.0
    assert compiled.engine is not None
    with torch.no_grad():
        outputs = zip(
            *(zoo.tensors_of(zoo.call(run, example)) for run in (model, compiled, compiled.engine)), strict=True
        )
        errors = [(_distance(rounded, plain), _distance(engine, rounded)) for plain, rounded, engine in outputs]
    row["rounding_error"], row["engine_error"] = (max(found) for found in zip(*errors, strict=True))
    reasons = integers.reasons() if integers is not None else {}
    row["left"] = {reason: [site.site for site in sites] for reason, sites in reasons.items()}
    try:
        row |= build_peer(model, example, data, folder / "peer", bits)
    except Exception as error:  # noqa: BLE001  (the peer's failures are a result)
        row["peer"] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    (folder / "row.json").write_text(json.dumps(row))
    return row


def _quantize(data: Sequence[Any], bits: Any) -> fxc.passes.Quantize:
    return fxc.passes.Quantize(data, weight_bits=bits, min_speedup=1.0)


def _distance(value: torch.Tensor, reference: torch.Tensor) -> float:
    """max|a − b| / max|b|."""
    return float((torch.as_tensor(value) - reference).abs().max() / reference.abs().max())


def build_peer(model: nn.Module, example: Any, data: Sequence[Any], folder: Path, bits: int) -> dict[str, Any]:
    """ONNX Runtime's quantizer on the plain export."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    folder.mkdir()
    args = () if isinstance(example, dict) else example
    kwargs = example if isinstance(example, dict) else None
    dynamic = {name: {0: "batch"} for name in example} if kwargs else ({0: "batch"},)
    plain, ready = folder / "plain.onnx", folder / "ready.onnx"
    torch.onnx.export(
        model, args, str(plain), kwargs=kwargs, dynamo=True, dynamic_shapes=dynamic, external_data=False, verbose=False
    )
    names = [value.name for value in onnx.load(plain).graph.input]
    told: dict[str, Any] = {}
    try:
        quant_pre_process(str(plain), str(ready))
    except Exception:  # noqa: BLE001
        # Its symbolic shape inference fails on some exports; onnx's own then has to do.
        quant_pre_process(str(plain), str(ready), skip_symbolic_shape=True)
        told["peer"] = "without symbolic shapes"

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds: Iterator[dict[str, np.ndarray]] = iter([_feed(names, batch) for batch in data])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.feeds, None)

    quantize_static(
        str(ready),
        str(folder / "model.onnx"),
        Reader(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        reduce_range=bits == 7,
    )
    plain.unlink()
    ready.unlink()
    counts = _optimized_counts(folder / "model.onnx")
    integer, floating = (sum(counts.get(kind, 0) for kind in kinds) for kinds in (_INTEGER, _FLOAT))
    return told | {"peer_integer_ops": f"{integer}/{integer + floating}"}


def _feed(names: Sequence[str], inputs: Any) -> dict[str, np.ndarray]:
    values = inputs if isinstance(inputs, dict) else dict(zip(names, inputs, strict=True))
    return {name: values[name].numpy() for name in names}


def _optimized_counts(path: Path) -> dict[str, int]:
    target = path.with_name("optimized.onnx")
    options = _options(1)
    options.optimized_model_filepath = str(target)
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    counts: dict[str, int] = {}
    for node in onnx.load(target).graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    target.unlink()
    return counts


# --- timing -----------------------------------------------------------------------------------------------------------


def _options(threads: int) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    return options


def timed(name: str, work: Path, threads: int, seconds: float) -> dict[str, Any]:
    """Median milliseconds of the engines, in turns, each as a bare session on the same arrays."""
    found: dict[str, Any] = {}
    kinds = [kind for kind in ENGINES if (work / name / kind / "model.onnx").exists()]
    sessions = {kind: _session(work / name / kind / "model.onnx", threads) for kind in kinds}
    for batch in BATCHES:
        inputs = model_of(name).inputs(batch)
        calls = {kind: _call(session, inputs) for kind, session in sessions.items()}
        first = benchmark(calls, repetitions=3, warmup=1, rounds=1)
        once = sum(timing.median_ms for timing in first.timings) / 1e3
        result = benchmark(calls, repetitions=max(3 * ROUNDS, int(seconds / once)), warmup=3, rounds=ROUNDS)
        medians = {kind: result[kind].median_ms for kind in kinds}
        found |= {f"{kind}_ms_{batch}": median for kind, median in medians.items()}
        found[f"repetitions_{batch}"] = result.repetitions
        found[f"int8/fp32_{batch}"] = medians["int8"] / medians["fp32"]
        if "peer" in medians:
            found[f"int8/peer_{batch}"] = medians["int8"] / medians["peer"]
    return found


def _session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), _options(threads), providers=["CPUExecutionProvider"])


def _call(session: onnxruntime.InferenceSession, inputs: Any) -> Callable[[], Any]:
    feed = _feed([value.name for value in session.get_inputs()], inputs)
    return lambda: session.run(None, feed)


def save(rows: Sequence[dict[str, Any]], threads: int) -> None:
    """Write the table."""
    order = {name: index for index, name in enumerate(MODELS)}
    rows = sorted(rows, key=lambda row: order[row["model"]])
    summary = {}
    for batch in BATCHES:
        for other in ("fp32", "peer"):
            ratios = [row[f"int8/{other}_{batch}"] for row in rows if f"int8/{other}_{batch}" in row]
            if ratios:
                mean = _results.geometric_mean(ratios)
                summary[f"int8/{other} at batch {batch}"] = (
                    f"{mean:.2f} in the geometric mean, {max(ratios):.2f} at most"
                )
    columns = [
        "model",
        "weight_bits",
        "convolution",
        "linear",
        "matrix product",
        "residual addition",
        "macs_percent",
        "rounding_error",
        "engine_error",
    ]
    columns += ["fp32_mb", "int8_mb"]
    columns += [f"{kind}_ms_{batch}" for batch in BATCHES for kind in ENGINES]
    columns += [f"int8/{kind}_{batch}" for batch in BATCHES for kind in ("fp32", "peer")]
    columns += ["peer_integer_ops", "peer", "chosen"]
    _results.write(
        RESULTS,
        title="Quantized engines of ONNX Runtime",
        rows=rows,
        columns=columns,
        summary=summary,
        notes=[
            "In integers / all, by kind, and the percentage of all multiply-accumulates in integers, read from the "
            "graph that ONNX Runtime's optimizer made; what rounding does to the outputs, and how far the engine is "
            "from the rounding graph in PyTorch, largest difference over largest value; megabytes of the ONNX file. "
            f"Milliseconds: medians of calls in {ROUNDS} turns each, one engine working at a time, at batch 1 and 8, "
            "the last figure of the column's name; the ratios are of these medians, below 1 is faster. `peer` is "
            "`quantize_static` on the plain export with uint8 activations and int8 weights per channel; its integer "
            "operations are convolutions, products and additions together. `weight_bits` is 7 for both where the "
            "processor has no VNNI. `chosen`: what was measured while compiling at batch 2, and which kinds of layers "
            "stay in floating point for it. Random weights, every layer enlivened (benchmarks/zoo.py)."
        ],
        facts=_results.machine_facts(threads),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Build or time the models asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("build", "time"))
    parser.add_argument("--work", type=Path, required=True, help="folder of the engines")
    parser.add_argument("--model", action="append", choices=MODELS, help="may be repeated; default: all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=15, help="of timing for each model and batch")
    options = parser.parse_args(arguments)
    names = options.model or MODELS
    if options.what == "build":
        for name in names:
            print(json.dumps(build(name, options.work)), flush=True)
        return 0
    rows = {row["model"]: row for row in _results.read_rows(RESULTS)}
    for name in names:
        if (options.work / name / "row.json").exists():
            rows[name] = json.loads((options.work / name / "row.json").read_text())
            rows[name] |= timed(name, options.work, options.threads, options.seconds)
            print({key: value for key, value in rows[name].items() if "/" in key or "_ms_" in key}, flush=True)
            save(list(rows.values()), options.threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
