"""The whole way on Fashion-MNIST: channels removed, distilled, quantized, trained quantized; and a pipeline of peers.

Ours starts from half of the teacher's blocks, with its weights; the stem halves the image, so that every layer behind
it has a quarter of the pixels that the teacher's stem has. `PruneChannels` takes widths to multiples of 16, `Distill`
wins back, `FuseModules` and `Quantize` follow (the first convolution stays in float: with one input channel its integer
kernel is the slower one), `TrainQuantized` last. Peers: the teacher without channels by Torch-Pruning, global, l2, to
at most our multiply-accumulates; the same distillation; ONNX Runtime's `quantize_static`. All are measured against the
float32 teacher in one run: file, accuracy of the engine on the test images, latency.

    python -m benchmarks.fashion_mnist.compress --train-only     # trains what has no checkpoint yet
    python -m benchmarks.fashion_mnist.compress                  # the same, then measures; trains nothing that is there
    python -m benchmarks.fashion_mnist.compress --without-peers  # ours alone

Training goes on where it was: every stage leaves its weights beside this file.
"""

from __future__ import annotations

import argparse
import tempfile
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
from benchmarks.fashion_mnist.network import ResNet, save, trained
from benchmarks.fashion_mnist.prune import Method, Setting, macs, prune_theirs
from benchmarks.fashion_mnist.train import PRECISION
from fxcompress.backends.benchmark import benchmark
from fxcompress.passes import Distill, FuseModules, PruneChannels, Quantize, TrainQuantized

RESULTS = _results.RESULTS / "compress_fashion_mnist.json"
FOLDER = Path(__file__).parent
OURS = "student, TrainQuantized"
INPUTS = (torch.zeros(2, 1, 28, 28),)
PRUNING = PruneChannels(
    ratios={
        "conv1": 0.5,  # 16 of 32 channels
        "stages.0.0.conv1": 0.5,  # 16 of 32, inside the block
        "stages.0.0.conv2": 0,
        "stages.1.0.conv1": 0.25,  # 48 of 64
        "stages.1.0.conv2": 0,
        "stages.2.0.conv1": 0.5,  # 64 of 128
        "stages.2.0.conv2": 0.25,  # 96 of 128
    },
    ratio=0.25,
    round_to=16,
)
EPOCHS = 24.0  # of the distillation, for both pipelines
DISTILLING: dict[str, Any] = {
    "optimizer": "sgd",
    "lr": 0.05,
    "weight_decay": 5e-4,
    "schedule": "one_cycle",
    "precision": PRECISION,
    "alpha": 0.9,
}
QUANTIZED_EPOCHS, QUANTIZED_RATE = 0.4, 5e-4  # of the training in integers
CALIBRATION = 16  # batches of 64 training images
THREADS = 2
COLUMNS = (
    *("engine", "parameters", "macs", "bytes", "smaller", "accuracy", "lost"),
    *("ms_1", "faster_1", "ms_64", "throughput_64", "trained_s"),
)

Row = dict[str, Any]


def shallow() -> ResNet:
    """The first block of every stage of the teacher, and a stem that halves the image in place of the first stage."""
    model = ResNet(blocks=1)
    known = trained().state_dict()
    model.load_state_dict({name: known[name] for name in model.state_dict()})
    block: Any = model.stages[0][0]  # type: ignore[index]
    model.conv1.stride = (2, 2)
    block.conv1.stride = block.downsample[0].stride = (1, 1)
    return model.eval()


def pruned() -> fxc.Compiled:
    """The shallow network with fewer channels, most of them inside the blocks; not trained."""
    return fxc.compile(shallow(), [PRUNING], INPUTS)


class Stages:
    """Networks whose weights lie in a folder, trained where they do not.

    Args:
        folder: of the weights.
        train: the training images.
        epochs: of the distillation.
        quantized_epochs: of the training in integers.
    """

    def __init__(self, folder: Path, train: Split, epochs: float, quantized_epochs: float) -> None:
        self.folder, self.train, self.epochs, self.quantized_epochs = folder, train, epochs, quantized_epochs
        self.seconds: dict[str, float] = {}

    def student(self) -> nn.Module:
        """The pruned network, distilled."""
        return self._distilled("student", pruned().module)

    def peer(self, budget: int) -> nn.Module:
        """Torch-Pruning's network with at most that many multiply-accumulates, distilled by the same loop."""
        setting = Setting("global", INPUTS[0], [])
        return self._distilled("peer", prune_theirs(trained(), budget, setting, Method("Torch-Pruning")).eval())

    def _distilled(self, name: str, model: nn.Module) -> nn.Module:
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            model, teacher = (m.to(memory_format=torch.channels_last) for m in (model, trained()))
            training = Distill(Batches(self.train, 1), epochs=self.epochs, teacher=teacher, **DISTILLING)
            compiled = fxc.compile(model, [training], INPUTS)
            save(compiled.module, path, {"seconds": f"{compiled.report.passes[-1].seconds:.0f}"})
        model.load_state_dict(load_file(path))
        self.seconds[name] = _seconds(path)
        return model.eval()

    def integers(self, model: nn.Module, name: str | None = None, **options: Any) -> fxc.Compiled:
        """The network in integers; with a name also trained as such."""
        passes: list[Any] = [FuseModules(), Quantize(calibration(self.train), ignore=("conv1",))]
        if name is None:
            return fxc.compile(model, passes, INPUTS)
        path = self.folder / f"{name}.safetensors"
        options |= {"teacher": trained(), "alpha": 0.9}
        rate = {"lr": QUANTIZED_RATE}
        if not path.exists():
            training = TrainQuantized(Batches(self.train, 1), epochs=self.quantized_epochs, **rate, **options)
            compiled = fxc.compile(model, [*passes, training], INPUTS)
            save(compiled.module, path, {"seconds": f"{compiled.report.passes[-1].seconds:.0f}"})
        # The same stubs, not trained to speak of; then what training made of weights and grids.
        idle = TrainQuantized(Batches(self.train, 1), steps=1, lr=1e-12, **options)
        compiled = fxc.compile(model, [*passes, idle], INPUTS)
        compiled.module.load_state_dict(load_file(path))
        self.seconds[name] = _seconds(path)
        return compiled


def _seconds(path: Path) -> float:
    with safe_open(path, "pt") as file:
        return float((file.metadata() or {}).get("seconds", "nan"))


def calibration(train: Split) -> list[torch.Tensor]:
    """Batches that nothing is learned from but ranges."""
    return [normalize(train.images[64 * i : 64 * (i + 1)]) for i in range(CALIBRATION)]


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
    """Median milliseconds per batch size, of so many calls in each of the rounds."""
    opened = {str(index): file.open() for index, file in enumerate(files)}
    found: list[dict[int, float]] = [{} for _ in files]
    for batch, count in calls.items():
        images = np.random.default_rng(0).standard_normal((batch, 1, 28, 28)).astype(np.float32)
        result = benchmark(opened, (images,), repetitions=rounds * count, rounds=rounds)
        for own, timing in zip(found, result.timings, strict=True):
            own[batch] = timing.median_ms
    return found


def main(arguments: list[str] | None = None) -> None:
    """Train what is missing, measure, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--without-peers", action="store_true")
    parser.add_argument("--train-only", action="store_true", help="stop when every stage has its weights")
    parser.add_argument("--epochs", type=float, default=EPOCHS)
    parser.add_argument("--quantized-epochs", type=float, default=QUANTIZED_EPOCHS)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the weights of every stage")
    parser.add_argument("--threads", type=int, default=THREADS, help="of training")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    train, test = load("train"), load("test")
    stages = Stages(options.folder, train, options.epochs, options.quantized_epochs)
    teacher, small = trained(), stages.student()
    entries: list[tuple[str, nn.Module, fxc.Compiled, tuple[str, ...]]] = [
        ("teacher, float32", teacher, fxc.compile(teacher, [FuseModules()], INPUTS), ()),
        ("teacher, Quantize", teacher, stages.integers(teacher), ()),
        ("student, float32", small, fxc.compile(small, [FuseModules()], INPUTS), ("student",)),
        ("student, Quantize", small, stages.integers(small), ("student",)),
        (OURS, small, stages.integers(small, "student_int8"), ("student", "student_int8")),
        (
            f"{OURS}, 4-bit weights",
            small,
            stages.integers(small, "student_int4", weight_bits=4),
            ("student", "student_int4"),
        ),
    ]
    theirs = None if options.without_peers else stages.peer(macs(small))
    if options.train_only:
        return
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        rows: list[Row] = []
        files: list[OnnxFile] = []
        for index, (name, model, compiled, trainings) in enumerate(entries):
            engine = compiled.export("onnxruntime", folder / str(index))
            files.append(OnnxFile(next(engine.path.glob("*.onnx")), "onnxruntime"))
            rows.append(_row(name, model, sum(stages.seconds[training] for training in trainings)))
        if theirs is not None:
            files.append(OnnxFile(static_onnx(theirs, train, folder), "onnxruntime"))
            rows.append(_row("peers: Torch-Pruning, quantize_static", theirs, stages.seconds["peer"]))
        for index in (0, 4):
            files.append(OnnxFile(files[index].path, "openvino"))
            rows.append(rows[index] | {"engine": f"OpenVINO: {rows[index]['engine']}"})
        for row, file in zip(rows, files, strict=True):
            row["bytes"], row["accuracy"] = file.path.stat().st_size, file.accuracy(test)
            print(f"{row['engine']}: {row['accuracy']:.2f}%, {row['bytes']:,} bytes", flush=True)
        times = time_all(files, options.rounds, {1: 200, 64: 40})
    for row, own in zip(rows, times, strict=True):
        row |= {f"ms_{batch}": value for batch, value in own.items()}
        row["smaller"], row["lost"] = rows[0]["bytes"] / row["bytes"], rows[0]["accuracy"] - row["accuracy"]
        row["faster_1"], row["throughput_64"] = times[0][1] / own[1], times[0][64] / own[64]
    write(options.output, rows, options)


def _row(name: str, model: nn.Module, seconds: float) -> Row:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"engine": name, "parameters": parameters, "macs": macs(model), "trained_s": round(seconds)}


def write(path: Path, rows: Sequence[Row], options: argparse.Namespace) -> None:
    """The table, and what was measured how."""
    ours = next(row for row in rows if row["engine"] == OURS)
    summary = {name: ours[name] for name in ("smaller", "throughput_64", "faster_1", "lost")}
    _results.write(
        path,
        title="The whole pipeline on Fashion-MNIST, against the float32 teacher",
        rows=rows,
        columns=COLUMNS,
        summary=summary,
        notes=[
            "Student: one block of two in every stage, 16 of 32 channels in the stem, inside the blocks 16 of 32, 48 "
            "of 64 and 64 of 128, 96 of 128 at the end; "
            f"its stem halves the image. {options.epochs:g} epochs of distillation for ours and for the peers, by the "
            f"same pass; {options.quantized_epochs:g} epochs of training in integers for ours. "
            "Accuracy is of the engine, on all 10,000 test images; `lost` in points against the teacher.",
            f"Latency: {THREADS} threads, median over {options.rounds} turns each, one engine working at a time. "
            "`smaller` is of the ONNX file. `trained_s`: wall time of all training, on a machine that others used too.",
            "4-bit weights are stored in 8 bits: the file is as large, deflated it is smaller.",
        ],
        facts=_results.machine_facts(THREADS),
    )
    print(f"wrote {path} and its table")


if __name__ == "__main__":
    main()
