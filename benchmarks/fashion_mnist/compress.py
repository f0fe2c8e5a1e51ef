"""The whole way on Fashion-MNIST: channels removed, distilled, quantized, trained quantized; and a pipeline of peers.

Ours: `PruneChannels` to widths in multiples of 16, distillation by the loop of `train`, `FuseModules`, `Quantize` with
the first convolution in float (with one input channel its integer kernel is the slower one), `TrainQuantized`. Peers:
Torch-Pruning, global, l2, to at most our multiply-accumulates; the same distillation; ONNX Runtime's `quantize_static`.
All are measured against the float32 teacher in one run: file, accuracy of the engine on the test images, latency.

    python -m benchmarks.fashion_mnist.compress                  # trains what has no checkpoint yet, then measures
    python -m benchmarks.fashion_mnist.compress --without-peers  # ours alone

Training goes on where it was: every stage leaves its weights beside this file.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import fxcompress as fxc
from benchmarks import _results
from benchmarks.fashion_mnist.data import Split, load, normalize
from benchmarks.fashion_mnist.distill import Batches
from benchmarks.fashion_mnist.network import save, trained
from benchmarks.fashion_mnist.prune import Method, Setting, macs
from benchmarks.fashion_mnist.train import accuracy, fit
from fxcompress.passes import FuseModules, PruneChannels, Quantize, TrainQuantized

RESULTS = _results.RESULTS / "compress_fashion_mnist.json"
FOLDER = Path(__file__).parent
STUDENT, INTEGER, FOUR_BITS, PEER = (
    FOLDER / f"{name}.safetensors" for name in ("student", "student_int8", "student_int4", "peer")
)
INPUTS = (torch.zeros(2, 1, 28, 28),)
PRUNING = PruneChannels(ratio=0.5, ratios={"stages.1*": 0.25}, round_to=16)
EPOCHS, RATE = 6.0, 0.05  # of the distillation, for both pipelines
QUANTIZED_EPOCHS, QUANTIZED_RATE = 0.3, 0.005
CALIBRATION = 16  # batches of 64 training images
THREADS = 2
COLUMNS = (
    *("engine", "parameters", "macs", "bytes", "smaller", "accuracy", "lost"),
    *("ms_1", "faster_1", "ms_64", "throughput_64", "trained_s"),
)

Row = dict[str, Any]


def pruned() -> fxc.Compiled:
    """The teacher without half of its channels, a quarter of the middle stage's; not trained since."""
    return fxc.compile(trained(), [PRUNING], INPUTS)


def student(train: Split, seed: int = 0) -> tuple[nn.Module, float]:
    """The pruned network, distilled, and the seconds that took when it was done."""
    return _trained(pruned().module, STUDENT, lambda model: _distil(model, train, seed))


def peer(train: Split, budget: int, seed: int = 0) -> tuple[nn.Module, float]:
    """Torch-Pruning's network with at most that many multiply-accumulates, distilled by the same loop."""
    from benchmarks.fashion_mnist.prune import _theirs

    setting = Setting("global", 0, 1, INPUTS[0], [])
    made = _theirs(trained(), budget, setting, Method("Torch-Pruning")).eval()
    return _trained(made, PEER, lambda model: _distil(model, train, seed))


def _distil(model: nn.Module, train: Split, seed: int) -> None:
    options = {"epochs": EPOCHS, "lr": RATE, "warm_up": 0.2, "seed": seed}
    fit(model, train, teacher=trained(), log=lambda line: print(line, flush=True), **options)


def _trained(model: nn.Module, path: Path, train: Callable[[nn.Module], None]) -> tuple[nn.Module, float]:
    if not path.exists():
        started = time.perf_counter()
        train(model)
        save(model, path, {"seconds": f"{time.perf_counter() - started:.0f}"})
    model.load_state_dict(load_file(path))
    return model.eval(), _seconds(path)


def _seconds(path: Path) -> float:
    with safe_open(path, "pt") as file:
        return float((file.metadata() or {}).get("seconds", "nan"))


def calibration(train: Split) -> list[torch.Tensor]:
    """Batches that nothing is learned from but ranges."""
    return [normalize(train.images[64 * i : 64 * (i + 1)]) for i in range(CALIBRATION)]


def quantized(model: nn.Module, train: Split, path: Path | None = None, **options: Any) -> tuple[fxc.Compiled, float]:
    """The network in integers; with a path also trained as such, or with the weights that lie there."""
    passes: list[Any] = [FuseModules(), Quantize(calibration(train), ignore=("conv1",))]
    if path is None:
        return fxc.compile(model, passes, INPUTS), 0.0
    training = TrainQuantized(
        Batches(train, 1),
        epochs=QUANTIZED_EPOCHS,
        optimizer="sgd",
        lr=QUANTIZED_RATE,
        schedule="cosine",
        teacher=trained(),
        alpha=0.9,
        **options,
    )
    if not path.exists():
        compiled = fxc.compile(model, [*passes, training], INPUTS)
        save(compiled.module, path, {"seconds": f"{compiled.report.passes[-1].seconds:.0f}"})
        return compiled, _seconds(path)
    # The same stubs without training; then what training made of weights and grids.
    idle = TrainQuantized(Batches(train, 1), steps=1, lr=1e-12, optimizer="sgd", **options)
    compiled = fxc.compile(model, [*passes, idle], INPUTS)
    compiled.module.load_state_dict(load_file(path))
    return fxc.compile(compiled.module, [], INPUTS), _seconds(path)


def static_onnx(model: nn.Module, train: Split, folder: Path) -> Path:
    """The peers' integers: ONNX Runtime's `quantize_static`, per channel, on the same calibration images."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = iter([{"input": batch.numpy()} for batch in calibration(train)])

        def get_next(self) -> Any:
            return next(self.rest, None)

    floating, made = folder / "peer.onnx", folder / "peer_int8.onnx"
    names = {"input_names": ["input"], "output_names": ["logits"]}
    torch.onnx.export(
        model,
        INPUTS,
        floating,
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
        external_data=False,
        **names,
    )
    formats = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(floating, made, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, **formats)
    return made


class OnnxFile:
    """An ONNX file on ONNX Runtime, or on OpenVINO, with the benchmark's threads."""

    def __init__(self, path: Path, runtime: str) -> None:
        self.path, self.runtime = path, runtime

    def open(self) -> Callable[[np.ndarray], np.ndarray]:
        """A function of a batch of images."""
        if self.runtime == "openvino":
            import openvino

            core = openvino.Core()
            model = core.compile_model(
                str(self.path), "CPU", {"INFERENCE_NUM_THREADS": THREADS, "PERFORMANCE_HINT": "LATENCY"}
            )
            return lambda images: model([images])[0]
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS
        session = onnxruntime.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda images: session.run(None, {name: images})[0]

    def accuracy(self, test: Split) -> float:
        """Percent of the test images that it classifies correctly."""
        run = self.open()
        hits = sum(int((run(images.numpy()).argmax(1) == labels.numpy()).sum()) for images, labels in test.batches(500))
        return 100 * hits / len(test)


def time_all(files: Sequence[OnnxFile], rounds: int, calls: dict[int, int]) -> list[dict[int, float]]:
    """Median milliseconds per batch size. One engine is open at a time, for idle ones keep processors busy."""
    found: list[dict[int, list[float]]] = [{batch: [] for batch in calls} for _ in files]
    for _ in range(rounds):
        for index, file in enumerate(files):
            run = file.open()
            for batch, count in calls.items():
                images = np.random.default_rng(0).standard_normal((batch, 1, 28, 28)).astype(np.float32)
                for call in range(count + 5):
                    started = time.perf_counter()
                    run(images)
                    if call >= 5:
                        found[index][batch].append(1e3 * (time.perf_counter() - started))
            del run
            gc.collect()
    return [{batch: statistics.median(times) for batch, times in item.items()} for item in found]


def main(arguments: list[str] | None = None) -> None:
    """Train what is missing, measure, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--without-peers", action="store_true")
    parser.add_argument("--train-only", action="store_true", help="stop when every stage has its weights")
    parser.add_argument("--threads", type=int, default=THREADS, help="of training")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    train, test = load("train"), load("test")
    teacher, (small, seconds) = trained(), student(train)
    trained_q, seconds_q = quantized(small, train, INTEGER)
    four, seconds_4 = quantized(small, train, FOUR_BITS, weight_bits=4)
    entries: list[tuple[str, nn.Module, Any, str, float]] = [
        ("teacher, float32", teacher, fxc.compile(teacher, [FuseModules()], INPUTS), "onnxruntime", 0.0),
        ("teacher, Quantize", teacher, quantized(teacher, train)[0], "onnxruntime", 0.0),
        ("student, float32", small, fxc.compile(small, [FuseModules()], INPUTS), "onnxruntime", seconds),
        ("student, Quantize", small, quantized(small, train)[0], "onnxruntime", seconds),
        ("student, TrainQuantized", small, trained_q, "onnxruntime", seconds + seconds_q),
        ("student, TrainQuantized, 4-bit weights", small, four, "onnxruntime", seconds + seconds_4),
    ]
    theirs = None
    if not options.without_peers:
        theirs, seconds_p = peer(train, macs(small))
    if options.train_only:
        return
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        rows: list[Row] = []
        files: list[OnnxFile] = []
        for index, (name, model, compiled, runtime, spent) in enumerate(entries):
            engine = compiled.export(runtime, folder / str(index))
            files.append(OnnxFile(next(engine.path.glob("*.onnx")), runtime))
            rows.append(_row(name, model, spent))
        if theirs is not None:
            files.append(OnnxFile(static_onnx(theirs, train, folder), "onnxruntime"))
            rows.append(_row("peers: Torch-Pruning, quantize_static", theirs, seconds_p))
        for name, index in (("teacher, float32", 0), ("student, TrainQuantized", 4)):
            files.append(OnnxFile(files[index].path, "openvino"))
            rows.append(_row(f"OpenVINO: {name}", entries[index][1], entries[index][4]))
        for row, file in zip(rows, files, strict=True):
            row["bytes"], row["accuracy"] = file.path.stat().st_size, file.accuracy(test)
            print(f"{row['engine']}: {row['accuracy']:.2f}%, {row['bytes']:,} bytes", flush=True)
        times = time_all(files, options.rounds, {1: 200, 64: 40})
    for row, own in zip(rows, times, strict=True):
        row |= {f"ms_{batch}": value for batch, value in own.items()}
        row["smaller"], row["lost"] = rows[0]["bytes"] / row["bytes"], rows[0]["accuracy"] - row["accuracy"]
        row["faster_1"], row["throughput_64"] = times[0][1] / own[1], times[0][64] / own[64]
    rows[2]["accuracy_eager"] = accuracy(small, test)
    write(options.output, rows, options)


def _row(name: str, model: nn.Module, seconds: float) -> Row:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"engine": name, "parameters": parameters, "macs": macs(model), "trained_s": round(seconds)}


def write(path: Path, rows: Sequence[Row], options: argparse.Namespace) -> None:
    """The table, and what was measured how."""
    ours = next(row for row in rows if row["engine"] == "student, TrainQuantized")
    summary = {name: ours[name] for name in ("smaller", "throughput_64", "faster_1", "lost")}
    _results.write(
        path,
        title="The whole pipeline on Fashion-MNIST, against the float32 teacher",
        rows=rows,
        columns=COLUMNS,
        summary=summary,
        notes=[
            f"Widths 16, 48 and 64 of 32, 64 and 128; {EPOCHS:g} epochs of distillation for ours and for the peers, by "
            f"the same loop; {QUANTIZED_EPOCHS:g} epochs of quantization-aware training for ours. Accuracy is of the "
            "engine, on all 10,000 test images; `lost` in points against the teacher.",
            f"Latency: {THREADS} threads, median over {options.rounds} rounds, one engine open at a time. `smaller` is of "
            "the ONNX file. `trained_s` is the wall time of the training in seconds, on a machine that others used too.",
            "4-bit weights are stored in 8 bits: the file is as large, deflated it is smaller.",
        ],
        facts=_results.machine_facts(THREADS),
    )
    print(f"wrote {path} and its table")


if __name__ == "__main__":
    main()
