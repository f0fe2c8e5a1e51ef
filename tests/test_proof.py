"""How far an engine may be from PyTorch: by dtype, and in integers by what roundings on a border do to this graph."""

import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress.errors import VerificationError
from fxcompress.graph.copying import copy_graph
from fxcompress.graph.ownership import own_weights
from fxcompress.passes import FuseModules, Quantize, QuantizeDynamic
from fxcompress.proof import Proof
from fxcompress.quantization.borders import border_noise
from tests.support import randomize

X = torch.randn(4, 3, 12, 12)


def network():
    return randomize(
        nn.Sequential(
            nn.Conv2d(3, 16, 3),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3),
            nn.ReLU(),
            nn.AvgPool2d(8),
            nn.Flatten(),
            nn.Linear(16, 5),
        )
    ).eval()


@pytest.fixture(scope="module")
def compiled():
    return fxc.compile(network(), [FuseModules(), Quantize([X], weight_bits=7)], (X[:2],), progress=False)


def test_noise_is_small_reproducible_and_leaves_the_graph_alone(compiled):
    graph, inputs = compiled.module, X[:2]
    with torch.no_grad():
        outputs = [graph(inputs)]

        def run():
            return [graph(inputs)]

        first, again = (border_noise(graph, outputs, run) for _ in range(2))
        assert 0 < first == again < 0.05
        assert torch.equal(graph(inputs), outputs[0])


def test_a_graph_in_floating_point_has_none():
    graph = fxc.compile(network(), [], (X[:2],), progress=False).module
    proof = Proof(graph, [X[:2]], None, None)
    assert proof.noise is None and proof.allowed == 1e-4
    assert border_noise(graph, [torch.ones(1)], lambda: [torch.ones(1)]) == 0


def test_what_integers_allow_follows_the_noise(compiled, monkeypatch):
    for noise, allowed in ((0.0, 1e-2), (0.005, 2e-2), (0.02, 5e-2), (0.04, 8e-2), (0.5, 0.2), (float("inf"), 0.2)):
        monkeypatch.setattr("fxcompress.proof.border_noise", lambda *_, noise=noise: noise)
        assert Proof(compiled.module, [X[:2]], None, None).allowed == pytest.approx(allowed)


def test_ranges_found_while_running_keep_their_own():
    graph = fxc.compile(network(), [QuantizeDynamic()], (X[:2],), progress=False).module
    assert Proof(graph, [X[:2]], None, None).allowed == 5e-2


def test_an_engine_of_other_weights_is_refused_and_told_apart_from_noise(compiled):
    engine = compiled.export("onnxruntime")
    Proof(compiled.module, [X[:2]], None, None).of(engine)
    other = copy_graph(compiled.module)
    own_weights(other, other.parameters())
    with torch.no_grad():
        other.get_submodule("2").weight.mul_(0.8)
    proof = Proof(other, [X[:2]], None, None)
    with pytest.raises(VerificationError, match="differs from PyTorch") as found:
        proof.of(engine)
    assert "the engine's kernels compute something else; compile with verify=False" in str(found.value)
    assert f"{proof.noise:.2g} in PyTorch itself" in str(found.value)


def test_a_network_that_multiplies_roundings_is_named_as_the_cause(compiled, monkeypatch):
    monkeypatch.setattr("fxcompress.proof.border_noise", lambda *_: 0.6)
    other = copy_graph(compiled.module)
    own_weights(other, other.parameters())
    with torch.no_grad():
        other.get_submodule("6").weight.neg_()
        other.get_submodule("6").bias.neg_()
    with pytest.raises(VerificationError, match="the network multiplies them") as found:
        Proof(other, [X[:2]], None, None).of(compiled.export("onnxruntime"))
    assert "max_drop" in str(found.value)
