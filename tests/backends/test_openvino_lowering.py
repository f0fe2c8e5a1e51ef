"""Products that OpenVINO would move into the weights of a convolution, though they differ from place to place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress.backends.onnx_export import write_onnx
from fxcompress.backends.openvino_lowering import lower_operators
from fxcompress.capture import capture

CONVOLUTIONS = {
    "1d": (lambda: nn.Conv1d(4, 2, 3, padding=1), (3,)),
    "2d": (lambda: nn.Conv2d(4, 2, (3, 5), padding=2), (3, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), (3, 3)),
    "3d": (lambda: nn.Conv3d(4, 2, 2, padding=1), (2, 2, 2)),
}


class Weighed(nn.Module):
    """Each place of an image times or over a factor of its own, before a convolution."""

    def __init__(self, layer: nn.Module, factor: torch.Tensor, divides: bool = False) -> None:
        super().__init__()
        self.layer, self.divides = layer, divides
        self.register_buffer("factor", factor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x / self.factor if self.divides else x * self.factor)


def written(model: nn.Module, x: torch.Tensor, path: Path) -> Path:
    write_onnx(capture(model.eval(), (x,)), path)
    return path


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("divides", [False, True])
def test_a_factor_as_large_as_the_kernel(kind: str, divides: bool) -> None:
    """Right at other batch sizes too; OpenVINO's own reading of the file as it was is checked to be wrong below."""
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    layer, sizes = CONVOLUTIONS[kind]
    model = Weighed(layer(), torch.rand(sizes) + 0.5, divides).eval()
    compiled = fxc.compile(model, example_inputs=(torch.randn(2, 4, *sizes),), progress=False)
    with compiled.export("openvino") as engine:
        for batch in (1, 3):
            x = torch.randn(batch, 4, *sizes)
            torch.testing.assert_close(engine(x), model(x), rtol=1e-5, atol=1e-5)


def test_the_file_as_it_was_is_read_wrongly(tmp_path: Path) -> None:
    """The reason for the rewrite: where this fails, OpenVINO has been repaired and the rewrite may go."""
    openvino: Any = pytest.importorskip("openvino", reason="OpenVINO is not installed")
    model = Weighed(nn.Conv2d(4, 2, 3, padding=1), torch.rand(3, 3) + 0.5).eval()
    x = torch.randn(2, 4, 3, 3)
    path = written(model, x, tmp_path / "model.onnx")
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(str(path)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    (output,) = compiled([x.numpy()]).values()
    assert (torch.from_numpy(output) - model(x)).abs().max() > 1e-3


def test_only_what_differs_from_place_to_place_is_rewritten(tmp_path: Path) -> None:
    x = torch.randn(2, 4, 3, 3)
    path = tmp_path / "model.onnx"
    for factor in (torch.tensor(2.0), torch.rand(4, 1, 1), torch.rand(1, 4, 1, 1)):
        written(Weighed(nn.Conv2d(4, 2, 3), factor), x, path)
        before = path.read_bytes()
        assert lower_operators(path) == 0 and path.read_bytes() == before
    written(Weighed(nn.ReLU(), torch.rand(3, 3)), x, path)
    assert lower_operators(path) == 0
    written(Weighed(nn.Conv2d(4, 2, 3), torch.rand(4, 1, 3)), x, path)
    assert lower_operators(path) == 1
    operators = [node.op_type for node in onnx.load(path).graph.node]
    assert operators == ["Unsqueeze", "Mul", "Squeeze", "Conv"]
    onnx.checker.check_model(onnx.load(path), full_check=True)
    assert lower_operators(path) == 0


class Shared(nn.Module):
    """What a recurrent layer reads is read by another one too, or transposed."""

    def __init__(self, kinds: list[type[nn.RNNBase]]) -> None:
        super().__init__()
        self.embed, self.layers = nn.Linear(8, 8), nn.ModuleList([kind(8, 6) for kind in kinds])

    def forward(self, x: torch.Tensor) -> Any:
        x = self.embed(x)
        return [layer(x)[0] for layer in self.layers], x.transpose(0, 1).amax(1)


@pytest.mark.parametrize(
    "layers", [[nn.GRU], [nn.LSTM], [nn.RNN], [nn.GRU, nn.GRU], [nn.LSTM, nn.GRU, nn.RNN]], ids=str
)
def test_what_a_recurrent_layer_reads_is_right_for_others(layers: Any) -> None:
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    model = Shared(layers).eval()
    sizes = ({1: "batch"},)
    compiled = fxc.compile(model, example_inputs=(torch.randn(7, 2, 8),), dynamic_shapes=sizes, progress=False)
    with compiled.export("openvino") as engine:
        for batch in (1, 3):
            x = torch.randn(7, batch, 8)
            torch.testing.assert_close(engine(x), model(x), rtol=1e-5, atol=1e-5)


def test_attention_that_a_maximum_and_a_recurrent_layer_read() -> None:
    pytest.importorskip("openvino", reason="OpenVINO is not installed")

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend, self.gru = nn.MultiheadAttention(8, 2, batch_first=True), nn.GRU(8, 6, batch_first=True)

        def forward(self, x: torch.Tensor) -> Any:
            found = self.attend(x, x, x, need_weights=False)[0]
            return found.amax(1), self.gru(found)[0]

    model = Pooled().eval()
    with fxc.compile(model, example_inputs=(torch.randn(2, 7, 8),), progress=False).export("openvino") as engine:
        x = torch.randn(3, 7, 8)
        for got, want in zip(engine(x), model(x), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_recurrent_layer_that_reads_alone_is_left(tmp_path: Path) -> None:
    path = written(nn.GRU(8, 6, batch_first=True), torch.randn(2, 7, 8), tmp_path / "model.onnx")
    assert lower_operators(path) == 0


@pytest.mark.parametrize("padding", [(2, 1), (1, 0, 2, 3), (0, 0, 1, 1), (0, 0)], ids=str)
def test_circular_padding(tmp_path: Path, padding: tuple[int, ...]) -> None:
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    rank = len(padding) // 2

    class Circular(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.pad(x, padding, mode="circular") * 2

    sizes = (4, 5)[:rank]
    compiled = fxc.compile(Circular().eval(), example_inputs=(torch.randn(2, 3, *sizes),), progress=False)
    with compiled.export("openvino") as engine:
        for batch in (1, 3):
            x = torch.randn(batch, 3, *sizes)
            torch.testing.assert_close(engine(x), Circular()(x), rtol=0, atol=0)
