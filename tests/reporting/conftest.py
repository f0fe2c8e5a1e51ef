"""A report with something of everything, made by hand."""

import pytest

from fxcompress.analysis.cost import Cost, NodeCost
from fxcompress.passes.base import Rewrite, Skip
from fxcompress.reporting.model import CaptureReport, EngineReport, Latency, PassReport, Report

CAPTURED = Cost(parameters=11_689_512, macs=1_814_073_344, bytes=46_796_608, activation_peak_bytes=6_422_528)
FUSED = Cost(parameters=11_684_712, macs=1_814_073_344, bytes=46_738_848, activation_peak_bytes=4_014_080)
PRUNED = Cost(parameters=3_060_000, macs=487_000_000, bytes=12_240_000, activation_peak_bytes=2_007_040)


@pytest.fixture
def report() -> Report:
    fuse = PassReport(
        name="fuse_modules",
        text="fuse_modules",
        options={},
        numerics="reassociated",
        seconds=0.213,
        rewrites=[
            Rewrite("bn1", "folded into conv1", {"rule": "conv_batch_norm", "max_scale": 2.25}),
            Rewrite("layer1.0.bn1", "folded into layer1.0.conv1", {"rule": "conv_batch_norm"}),
        ],
        skipped=[
            Skip("head.bn", "shared_value", "the convolution's output has another reader", ("add_3",)),
            Skip("stem.bn", "tied_weight", "the weight is also that of decoder.weight"),
            *[Skip(f"blocks.{n}.bn", "shared_value", "the convolution's output has another reader") for n in range(4)],
        ],
        before=CAPTURED,
        after=FUSED,
        error=1.2e-6,
        tolerance=1e-4,
    )
    prune = PassReport(
        name="prune_channels",
        text="prune_channels(ratio=0.5)",
        options={"ratio": 0.5, "importance": "l2", "ignore": []},
        numerics="lossy",
        seconds=1.6,
        rewrites=[
            Rewrite("layer1.0.conv1", "64 → 32 channels", {"kept": {"layer1.0.conv1.weight": {0: [0, 2, 5], 1: [1]}}})
        ],
        skipped=[],
        before=FUSED,
        after=PRUNED,
        error=0.31,
        note="fine-tune to recover accuracy",
    )
    engine = EngineReport(
        backend="onnxruntime",
        path="/tmp/resnet18-engine",
        size_bytes=12_345_678,
        options={"opset": 20},
        errors={"logits": 3.1e-7, "features": 9e-8},
        tolerance=1e-4,
        verified=["x[2, 3, 224, 224]", "x[3, 3, 224, 224]"],
        latency=[
            Latency("onnxruntime", 4.1, 4.9, 1),
            Latency("eager PyTorch", 12.3, 15.0, 1),
            Latency("torch.onnx.export", 6.15, 7.0, 1),
        ],
    )
    return Report(
        model="ResNet",
        capture=CaptureReport(1.61, 71, {"batch=2": 0.0, "batch=3": 0.0}, ["the input 'x' is left alone"]),
        passes=[fuse, prune],
        engine=engine,
        inputs=["x: f32[batch, 3, 224, 224]"],
        outputs=["fc: f32[batch, 1000]"],
        layers=[
            NodeCost("x", None, "placeholder", (1, 3, 224, 224), 0, 0, 0, 602_112),
            NodeCost("conv1", "conv1", "Conv2d", (1, 64, 112, 112), 118_013_952, 9_472, 37_888, 3_211_264),
            NodeCost("relu", None, "aten.relu", (1, 64, 112, 112), 0, 0, 0, 3_211_264),
            NodeCost("fc", "fc", "Linear", (1, 1000), 512_000, 513_000, 2_052_000, 4_000),
        ],
        versions={"fxcompress": "0.1.0", "python": "3.11.2", "torch": "2.13.0", "platform": "Linux"},
    )
