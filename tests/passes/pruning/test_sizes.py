"""What half of the channels leaves of well-known networks: as much as others report for their tools."""

import pytest
import torch

from benchmarks import zoo
from fxcompress.analysis.cost import cost
from fxcompress.capture import capture
from fxcompress.passes.base import PassContext
from fxcompress.passes.prune_channels import PruneChannels


@pytest.mark.parametrize(
    ("name", "parameters", "macs"),
    [
        ("resnet18", 3_060_000, 487_000_000),
        pytest.param("vit_b_16", 22_100_000, 4_610_000_000, marks=pytest.mark.slow),
    ],
)
def test_half_of_the_channels(name, parameters, macs):
    """Published with one decimal less; multiplications inside norms are counted there and not here."""
    zoo.prepare_torchvision()
    torchvision = pytest.importorskip("torchvision")
    graph_module = capture(torchvision.models.get_model(name, weights=None).eval(), (torch.randn(2, 3, 224, 224),))
    result = PruneChannels(ratio=0.5).run(graph_module, PassContext())
    found = cost(result.graph_module)
    assert found.parameters == pytest.approx(parameters, rel=0.005)
    assert found.macs == pytest.approx(macs, rel=0.01)
