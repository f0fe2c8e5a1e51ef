"""The report says on which processors the products of an engine's weights come out right."""

import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress.backends import byte_products
from fxcompress.passes import FuseModules, Quantize, QuantizeDynamic

X = torch.randn(4, 8)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize(
    ("backend", "told"), [("onnxruntime", byte_products.in_onnxruntime), ("openvino", byte_products.in_openvino)]
)
def test_the_report_says_it(backend, told, bits, tmp_path):
    pytest.importorskip(backend)
    passes = [FuseModules(), Quantize([X], scheme=backend, weight_bits=bits)]
    compiled = fxc.compile(network(), passes, (X,), progress=False)
    compiled.export(backend, tmp_path / "bundle", verify=False)
    assert compiled.report.engine.notes == [told(bits)]
    assert f"weights of {bits} bits: " in str(compiled.report)
    assert fxc.load_engine(tmp_path / "bundle").manifest.measurements["notes"] == [told(bits)]


def test_dynamic_weights_have_8_bits(tmp_path):
    compiled = fxc.compile(network(), [QuantizeDynamic()], (X,), progress=False)
    compiled.export("onnxruntime", tmp_path / "bundle")
    assert compiled.report.engine.notes == [byte_products.in_onnxruntime(8)]


def test_nothing_is_said_of_floats(tmp_path):
    compiled = fxc.compile(network(), [FuseModules()], (X,), progress=False)
    compiled.export("onnxruntime", tmp_path / "bundle")
    assert compiled.report.engine.notes == []
