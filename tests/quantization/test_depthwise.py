"""Channels that depthwise convolutions read are brought to one range, and nothing else changes."""

import pytest
import torch
from torch import fx, nn

import fxcompress as fxc
from fxcompress.capture import capture
from fxcompress.graph.copying import copy_graph
from fxcompress.graph.verify import verify
from fxcompress.passes import Quantize
from fxcompress.passes.base import PassContext
from fxcompress.quantization.calibrate import calibrate
from fxcompress.quantization.depthwise import equalize_depthwise, without_limits
from fxcompress.quantization.insert import insert_stubs
from fxcompress.quantization.noise import switched_off
from fxcompress.quantization.schemes import scheme_of

X = torch.rand(4, 3, 10, 10, generator=torch.Generator().manual_seed(0))
CLAMP, RELU = torch.ops.aten.clamp.Tensor, torch.ops.aten.relu.default


class Block(nn.Module):
    """A pointwise convolution whose channels differ a hundredfold, a clip, and a depthwise convolution."""

    def __init__(self, clip=torch.relu, both=False):
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.deep = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.narrow = nn.Conv2d(8, 4, 1)
        self.beside = nn.Conv2d(8, 4, 3, padding=1) if both else None
        self.clip = clip
        with torch.no_grad():
            self.wide.weight.abs_()
            self.wide.bias.abs_()
            for part in (self.wide.weight, self.wide.bias):
                part.mul_(torch.logspace(-1, 1, 8).reshape(-1, *[1] * (part.dim() - 1)))
            self.deep.weight.div_(torch.logspace(-1, 1, 8).reshape(-1, 1, 1, 1))

    def forward(self, x):
        x = self.clip(self.wide(x))
        out = self.narrow(self.deep(x).relu())
        return out if self.beside is None else out + self.beside(x)


def ranges(graph):
    """Largest value of each channel that the depthwise convolution reads."""
    seen = []

    class Watch(fx.Interpreter):
        def run_node(self, n):
            value = super().run_node(n)
            if n.op == "call_module" and n.target == "deep":
                seen.append(self.env[n.args[0]].amax((0, 2, 3)))
            return value

    with torch.no_grad():
        Watch(graph).run(X, enable_io_processing=False)
    return seen[0]


def equalized(model):
    graph = capture(model.eval(), (X,))
    expected = graph(X)
    paths = equalize_depthwise(graph, [X])
    verify(graph, shapes=True)
    torch.testing.assert_close(graph(X), expected, rtol=1e-5, atol=1e-6)
    return graph, paths


def test_channels_get_one_range_and_the_function_stays():
    model = Block()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert ranges(capture(model.eval(), (X,))).max() > 50 * ranges(capture(model.eval(), (X,))).min()
    graph, paths = equalized(model)
    found = ranges(graph)
    assert paths == ["deep"] and found.max() <= 1.001 * found.min()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_clip_gets_limits_for_each_channel():
    graph, paths = equalized(Block(nn.functional.relu6))
    assert paths == ["deep"]
    (clip,) = graph.graph.find_nodes(op="call_function", target=CLAMP)
    high = graph.get_buffer(str(clip.args[2].target))
    assert high.numel() == 8 and high.max() > 30 * high.min()


@pytest.mark.parametrize(("shrink", "left"), [(1.0, 0), (4.0, 1)])
def test_limits_go_where_the_grid_ends_before_them(shrink, left):
    """A grid that ends at the largest value makes the limits of the clip superfluous; a wider one does not."""
    graph, _ = equalized(Block(nn.functional.relu6))
    insert_stubs(graph, scheme_of("onnxruntime"), lambda path: None)
    calibrate(graph, [X], observer="minmax")
    for module in graph.modules():
        if hasattr(module, "zero_point") and not module.scale.dim():
            module.scale = module.scale * shrink
    expected = graph(X * 50)  # far outside of what was seen: the limits cut
    graph = without_limits(graph)
    verify(graph, shapes=True)
    assert len(graph.graph.find_nodes(op="call_function", target=CLAMP)) == left
    assert len(graph.graph.find_nodes(op="call_function", target=RELU)) == 2 - left
    torch.testing.assert_close(graph(X * 50), expected)


def test_limits_stay_before_calibration():
    graph, _ = equalized(Block(nn.functional.relu6))
    insert_stubs(graph, scheme_of("onnxruntime"), lambda path: None)
    graph = without_limits(graph)
    assert len(graph.graph.find_nodes(op="call_function", target=CLAMP)) == 1


def test_channels_that_other_layers_read_stay():
    graph, paths = equalized(Block(both=True))
    assert not paths and ranges(graph).max() > 50 * ranges(graph).min()


def test_a_dead_channel_keeps_its_scale():
    model = Block()
    with torch.no_grad():
        model.wide.weight[3] = 0
        model.wide.bias[3] = 0
    graph, paths = equalized(model)
    found = ranges(graph)
    assert paths == ["deep"] and found[3] == 0 and found[[0, 1, 2, 4, 5, 6, 7]].min() > 0.99 * found.max()
    assert all(bool(torch.isfinite(value).all()) for value in graph.state_dict().values())


def test_nothing_happens_without_depthwise_convolutions():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    graph = capture(model, (X,))
    assert equalize_depthwise(graph, [X]) == []
    assert torch.equal(graph(X), model(X))


def test_quantize_loses_less_with_it():
    graph = capture(Block(nn.functional.relu6).eval(), (X,))

    def decibels(equalize):
        result = Quantize([X], equalize=equalize, observer="minmax").run(copy_graph(graph), PassContext())
        assert ("have one range" in result.note) is equalize
        return next(item.detail["signal_to_noise_db"] for item in result.rewrites if item.site == "deep")

    assert decibels(True) > decibels(False) + 10


def test_the_network_in_floating_point_keeps_its_limits_and_the_engine_a_relu(tmp_path):
    """Biases are corrected towards the network with its clips, not towards one without."""
    graph = capture(Block(nn.functional.relu6).eval(), (X,))
    result = Quantize([X]).run(copy_graph(graph), PassContext())
    torch.testing.assert_close(switched_off(result.graph_module)(X), graph(X), rtol=1e-5, atol=1e-5)
    compiled = fxc.compile(
        Block(nn.functional.relu6).eval(), [Quantize([X])], (X,), backend="onnxruntime", output=tmp_path / "b"
    )
    found = compiled.engine.optimized_op_counts()
    assert found["QLinearConv"] == 3 and not {"Clip", "Min", "Max", "Relu"} & set(found)
