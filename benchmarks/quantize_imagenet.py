"""Static int8 of two ImageNet networks: does the quantized engine still say what the network says?

fxcompress, `onnxruntime.quantization` and NNCF get the same network, the same calibration pictures and, where they have
any, their default settings; all engines run in ONNX Runtime. Top-1 agreement and the error of the logits are against
the network in floating point, on pictures that none has seen (benchmarks/imagenet.py says which).

    python -m benchmarks.quantize_imagenet
    python -m benchmarks.quantize_imagenet --network MobileNetV2 --method "fxcompress" --dry    # writes nothing

NNCF takes part where it is installed (`pip install nncf`).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file, not with -m
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

import fxcompress as fxc
from benchmarks import _results, imagenet
from fxcompress.passes import FuseModules, Pass, Quantize, RoundAdaptively

RESULTS = _results.RESULTS / "quantize_imagenet.json"
COLUMNS = (
    "network",
    "method",
    "photos_agree",
    "photos_right",
    "stamps_agree",
    "photos_error",
    "stamps_error",
    "megabytes",
    "seconds",
)
BATCH = 16

Row = dict[str, Any]
Logits = Callable[[Tensor], Tensor]


def calibration() -> list[Tensor]:
    """Batches of pictures that are not evaluated on."""
    return list(imagenet.stamps("calibration").split(BATCH))


# --- the methods: each writes an ONNX file and returns its path ---------------------------------------------------


def ours(passes: Callable[[list[Tensor]], list[Pass]]) -> Callable[[nn.Module, Path, Path], Path]:
    """Our own with these passes after fusion."""

    def build(model: nn.Module, folder: Path, floating: Path) -> Path:
        example = (calibration()[0][:2],)
        bundle = folder / "bundle"
        fxc.compile(
            model,
            [FuseModules(), *passes(calibration())],
            example,
            backend="onnxruntime",
            output=bundle,
            verify=False,
            progress=False,
        )
        return bundle / "model.onnx"

    return build


def onnxruntime_static(**options: Any) -> Callable[[nn.Module, Path, Path], Path]:
    """`quantize_static` on the fused network as ONNX."""

    def build(model: nn.Module, folder: Path, floating: Path) -> Path:
        from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

        class Reader(CalibrationDataReader):
            def __init__(self) -> None:
                self.batches: Iterator[Tensor] = iter(calibration())
                self.name = onnxruntime.InferenceSession(floating).get_inputs()[0].name

            def get_next(self) -> dict[str, np.ndarray] | None:
                batch = next(self.batches, None)
                return None if batch is None else {self.name: batch.numpy()}

        given = dict(options)
        if given.pop("unsigned", False):
            given["activation_type"] = QuantType.QUInt8
        path = folder / "onnxruntime.onnx"
        quantize_static(floating, path, Reader(), **given)
        return path

    return build


def nncf(model: nn.Module, folder: Path, floating: Path) -> Path:
    """`nncf.quantize` on the fused network as ONNX."""
    import nncf
    import onnx

    graph = onnx.load(floating)
    name = graph.graph.input[0].name
    images = [image[None].numpy() for batch in calibration() for image in batch]
    quantized = nncf.quantize(graph, nncf.Dataset(images, lambda image: {name: image}), subset_size=len(images))
    path = folder / "nncf.onnx"
    onnx.save(quantized, path)
    return path


METHODS: dict[str, Callable[[nn.Module, Path, Path], Path]] = {
    "fxcompress": ours(lambda data: [Quantize(data)]),
    "fxcompress, mse": ours(lambda data: [Quantize(data, observer="mse")]),
    "fxcompress, mse, biases kept": ours(lambda data: [Quantize(data, observer="mse", correct_bias=False)]),
    "fxcompress, roundings learned": ours(
        lambda data: [Quantize(data), RoundAdaptively(data, samples=64, iterations=300)]
    ),
    "onnxruntime": onnxruntime_static(),
    "onnxruntime, uint8 and per channel": onnxruntime_static(unsigned=True, per_channel=True),
    "nncf": nncf,
}


# --- measuring ----------------------------------------------------------------------------------------------------


def logits(path: Path, images: Tensor) -> Tensor:
    """What an engine says of the images, whoever wrote it: with products that do not overflow without VNNI either."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(
        path, options, providers=["CPUExecutionProvider"], disabled_optimizers=["ConstantSharing"]
    )
    name = session.get_inputs()[0].name
    return torch.cat([torch.from_numpy(session.run(None, {name: part.numpy()})[0]) for part in images.split(BATCH)])


def measure(network: str, methods: Sequence[str], report: Callable[[Row], None]) -> None:
    """The rows of one network, each handed on as soon as it is there."""
    photos, labels = imagenet.photos()
    stamps = imagenet.stamps("evaluation")
    images = torch.cat([photos, stamps])
    model = imagenet.NETWORKS[network]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        floating = folder / "floating" / "model.onnx"
        fxc.compile(
            model,
            [FuseModules()],
            (images[:2],),
            backend="onnxruntime",
            output=floating.parent,
            verify=False,
            progress=False,
        )
        expected = logits(floating, images)
        report(figures(network, "float32", expected, expected, labels, floating, 0.0))
        for method in methods:
            with tempfile.TemporaryDirectory() as place:
                started = time.perf_counter()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    path = METHODS[method](model, Path(place), floating)
                seconds = time.perf_counter() - started
                report(figures(network, method, expected, logits(path, images), labels, path, seconds))


def figures(
    network: str, method: str, expected: Tensor, found: Tensor, labels: Tensor, path: Path, seconds: float
) -> Row:
    """Agreement and error of one engine."""
    count = len(labels)
    same = expected.argmax(1) == found.argmax(1)
    difference = (found - expected).double()

    def error(part: slice) -> float:
        return float(difference[part].norm() / expected[part].double().norm())

    return {
        "network": network,
        "method": method,
        "photos_agree": int(same[:count].sum()),
        "photos_right": int((found[:count].argmax(1) == labels).sum()),
        "stamps_agree": int(same[count:].sum()),
        "photos_error": error(slice(None, count)),
        "stamps_error": error(slice(count, None)),
        "megabytes": path.stat().st_size / 1e6,
        "seconds": round(seconds, 1),
    }


def save(rows: Sequence[Row], path: Path = RESULTS) -> None:
    """Write the table."""
    networks, methods = list(imagenet.NETWORKS), ["float32", *METHODS]
    order = {(network, method): (i, j) for i, network in enumerate(networks) for j, method in enumerate(methods)}
    _results.write(
        path,
        title="Static int8 of ImageNet networks",
        rows=sorted(rows, key=lambda row: order[row["network"], row["method"]]),
        columns=COLUMNS,
        notes=[
            f"Agreement of the top class with the network in float32, on 20 labelled photos and {imagenet.STAMPS} "
            "pictures of Tux Paint; photos_right counts the photos whose label is the top class. Errors are "
            "‖quantized − float32‖ / ‖float32‖ of the logits. Calibrated on "
            f"{imagenet.CALIBRATION} other pictures of Tux Paint. Every engine runs in ONNX Runtime, with exact "
            "products of bytes on any processor (session.x64quantprecision); seconds are those of quantization and "
            "export on a shared machine."
        ],
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the networks and methods asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=imagenet.NETWORKS, action="append", help="may be repeated; default: all")
    parser.add_argument("--method", choices=METHODS, action="append", help="may be repeated; default: all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dry", action="store_true", help="print only")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    kept = [] if chosen.dry else _results.read_rows(RESULTS)
    rows: list[Row] = list(kept)

    def report(row: Row) -> None:
        rows[:] = [old for old in rows if (old["network"], old["method"]) != (row["network"], row["method"])] + [row]
        print(_results.table([row], COLUMNS), flush=True)
        if not chosen.dry:
            save(rows)

    for network in chosen.network or imagenet.NETWORKS:
        measure(network, chosen.method or list(METHODS), report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
