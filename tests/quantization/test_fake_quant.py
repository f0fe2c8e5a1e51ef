"""The stub rounds as the engines do, lets gradients through, and learns its scale."""

import pytest
import torch
from torch import nn

from fxcompress.errors import PreconditionError
from fxcompress.quantization.fake_quant import Quantizer
from fxcompress.quantization.layers import quantized_layer
from fxcompress.quantization.types import QuantType, parameters_of_range

UINT8, INT8 = QuantType(8, signed=False, symmetric=False), QuantType(8, narrow=True)


def calibrated(low=-1.0, high=3.0, kind=UINT8):
    quantizer = Quantizer(kind)
    quantizer.set(*parameters_of_range(torch.tensor(low), torch.tensor(high), kind))
    return quantizer


def test_it_does_nothing_before_calibration():
    x = torch.randn(5)
    assert Quantizer(UINT8)(x) is x


def test_both_ways_of_computing_agree():
    quantizer = calibrated()
    x = torch.linspace(-2, 4, 1001)
    fast = quantizer(x)
    assert fast.unique().numel() <= 256 and (fast - x.clamp(-1, 3)).abs().max() <= quantizer.scale / 2 + 1e-6
    torch.testing.assert_close(quantizer(x.clone().requires_grad_()).detach(), fast)
    torch.testing.assert_close((quantizer.integers(x) - quantizer.zero_point) * quantizer.scale, fast)


def test_gradients_pass_where_values_are_not_clipped():
    x = torch.tensor([-5.0, 0.5, 5.0], requires_grad=True)
    calibrated()(x).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 0.0]


def test_a_learned_scale_gets_nearer_to_the_best():
    torch.manual_seed(0)
    x = torch.randn(4096)
    quantizer = calibrated(-30.0, 30.0, QuantType(4))  # far too wide
    quantizer.learn()
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.05)
    before = (quantizer(x) - x).square().mean().item()
    for _ in range(100):
        optimizer.zero_grad()
        (quantizer(x) - x).square().mean().backward()
        optimizer.step()
    assert (quantizer(x) - x).square().mean().item() < before / 4


def test_a_scale_must_be_positive():
    with pytest.raises(PreconditionError, match="is no scale"):
        Quantizer(UINT8).set(torch.tensor(torch.nan), torch.tensor(0))


@pytest.mark.parametrize(
    "layer", [nn.Linear(6, 4), nn.Conv1d(6, 4, 3), nn.Conv2d(6, 4, 3, stride=2), nn.Conv3d(6, 4, 1)]
)
def test_quantized_layers_share_the_weight(layer):
    made = quantized_layer(layer, INT8, per_channel=True)
    assert made.weight is layer.weight and made.bias is layer.bias and isinstance(made, type(layer))
    x = torch.randn(2, 6, *[5] * (layer.weight.dim() - 2))
    assert torch.equal(made(x), layer(x))
    rows = layer.weight.detach().flatten(1)
    made.weight_quantizer.set(*parameters_of_range(rows.amin(1), rows.amax(1), INT8))
    assert 0 < (made(x) - layer(x)).abs().max() < 0.1
    assert "weight_quantizer" not in dict(layer.named_modules())
