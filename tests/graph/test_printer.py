"""The text of a graph: golden, stable, readable."""

import re
from collections import namedtuple
from dataclasses import dataclass

import torch
from expecttest import assert_expected_inline
from torch import nn

from fxcompress.capture import capture
from fxcompress.graph.edit import GraphEditor, copy_graph
from fxcompress.graph.info import info
from fxcompress.graph.printer import describe_layer, format_graph, format_value

aten = torch.ops.aten


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.register_buffer("shift", torch.zeros(4, 1, 1))
        self.register_buffer("mask", torch.ones(8, 8), persistent=False)

    def forward(self, x, flag=None):
        y = torch.relu(self.conv(x)) * self.scale + self.shift
        return {"y": (y * self.mask).to(torch.float16), "pair": (y.mean((2, 3)), [y.flatten(0, 1)]), "three": 3}


def test_golden_text():
    graph_module = capture(Small().eval(), (torch.randn(2, 3, 8, 8),))
    assert_expected_inline(
        format_graph(graph_module),
        """\
graph(x: f32[batch, 3, 8, 8]):
  scale: f32[4, 1, 1] = parameter scale
  shift: f32[4, 1, 1] = buffer shift
  mask: f32[8, 8] = constant mask
  conv: f32[batch, 4, 8, 8] = Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False) @conv (x)
  relu: f32[batch, 4, 8, 8] = aten.relu(conv)
  mul: f32[batch, 4, 8, 8] = aten.mul.Tensor(relu, scale)
  add: f32[batch, 4, 8, 8] = aten.add.Tensor(mul, shift)
  mul_1: f32[batch, 4, 8, 8] = aten.mul.Tensor(add, mask)
  to: f16[batch, 4, 8, 8] = aten.to.dtype(mul_1, torch.float16)
  mean: f32[batch, 4] = aten.mean.dim(add, [2, 3])
  flatten: f32[4*batch, 8, 8] = aten.flatten.using_ints(add, 0, 1)
  return {'y': to, 'pair': (mean, [flatten]), 'three': 3}""",
    )


def test_without_values():
    graph_module = capture(nn.Sequential(nn.Linear(3, 2), nn.ReLU()).eval(), (torch.randn(2, 3),))
    assert_expected_inline(
        format_graph(graph_module, values=False),
        """\
graph(input_1):
  _0 = Linear(in_features=3, out_features=2, bias=True) @0 (input_1)
  relu = aten.relu(_0)
  return relu""",
    )


def test_named_dims_and_arithmetic_on_sizes():
    class Model(nn.Module):
        def forward(self, x, y):
            rows = x.shape[0] * x.shape[1]
            return x.reshape(rows, 4) @ y

    sizes = {"x": {0: "batch", 1: "tokens"}, "y": None}
    graph_module = capture(Model().eval(), (torch.randn(2, 5, 4), torch.randn(4, 3)), dynamic_shapes=sizes)
    text = format_graph(graph_module)
    names = info(graph_module).dim_names
    second = next(name for name in names.values() if name != "batch")
    assert f"graph(x: f32[batch, {second}, 4], y: f32[4, 3]):" in text
    assert f"int[batch*{second}]" in text.replace(f"{second}*batch", f"batch*{second}")
    assert not re.search(r"\bs\d+\b", text)


def test_symbols_without_a_name_are_numbered_in_order():
    graph_module = capture(nn.ReLU().eval(), (torch.randn(2, 3),))
    info(graph_module).dim_names.clear()
    assert format_graph(graph_module).startswith("graph(input_1: f32[dim0, 3]):")


def test_text_is_the_same_in_every_capture_and_copy():
    texts = set()
    for _ in range(2):
        graph_module = capture(Small().eval(), (torch.randn(3, 3, 8, 8),))
        texts |= {format_graph(graph_module), format_graph(copy_graph(graph_module))}
    assert len(texts) == 1
    assert "0x" not in texts.pop()


def test_structures_of_outputs():
    Pair = namedtuple("Pair", "left right")

    @dataclass
    class Output:
        logits: torch.Tensor
        hidden: list[torch.Tensor]

    class Model(nn.Module):
        def __init__(self, build):
            super().__init__()
            self.build = build

        def forward(self, x):
            return self.build(x.relu(), x.tanh())

    def returned(build):
        return format_graph(capture(Model(build).eval(), (torch.randn(2, 3),))).splitlines()[-1].strip()

    assert returned(lambda a, b: (a,)) == "return (relu,)"
    assert returned(lambda a, b: [a, (b, None)]) == "return [relu, (tanh, None)]"
    assert returned(lambda a, b: Pair(a, b)) == "return Pair(left=relu, right=tanh)"
    assert returned(lambda a, b: Output(a, [b])) == "return Output(logits=relu, hidden=[tanh])"


def test_tied_weights_are_told():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(7, 4)
            self.decoder = nn.Linear(4, 7, bias=False)
            self.decoder.weight = self.embedding.weight

        def forward(self, ids):
            return self.decoder(self.embedding(ids))

    text = format_graph(capture(Model().eval(), (torch.randint(0, 7, (2, 5)),)))
    assert text.endswith("  # tied: decoder.weight = embedding.weight")


def test_several_results_and_symbolic_values():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(4, 3, batch_first=True)

        def forward(self, x):
            return self.lstm(x)[0].unbind(1)[1], x.shape[0] * 2

    text = format_graph(capture(Model().eval(), (torch.randn(2, 5, 4),)))
    assert ": (f32[batch, 5, 3], (f32[1, batch, 3], f32[1, batch, 3])) = LSTM(4, 3, batch_first=True) @lstm (x)" in text
    assert re.search(r"mul\w*: int\[2\*batch\] = mul\(\w+, 2\)", text)


def test_layers_with_parts_and_long_options_stay_on_one_line():
    class Observed(nn.Linear):
        def __init__(self):
            super().__init__(3, 2)
            self.observer = nn.Identity()

        def extra_repr(self):
            return f"{super().extra_repr()},\n observer={object()!r}"

    text = describe_layer(Observed())
    assert text == "Observed(in_features=3, out_features=2, bias=True, observer=<object object>)"


def test_values():
    assert format_value(torch.zeros(2, 3, dtype=torch.bool)) == "bool[2, 3]"
    assert format_value((torch.zeros(()), None, [torch.zeros(1, dtype=torch.int8)])) == "(f32[], None, (i8[1],))"


def test_dtypes_devices_and_infinities_in_arguments():
    graph_module = capture(nn.ReLU().eval(), (torch.randn(2, 3),))
    relu = graph_module.graph.find_nodes(op="call_function", target=aten.relu.default)[0]
    with GraphEditor(graph_module) as editor:
        clamped = editor.insert_call(aten.clamp.default, (relu, -float("inf")), after=relu)
        moved = editor.insert_call(
            aten.to.device, (clamped, torch.device("cpu"), torch.float64), {"copy": True}, after=clamped
        )
        output = graph_module.graph.output_node()
        editor.set_args(output, ((moved,),))
    text = format_graph(graph_module)
    assert "aten.clamp(relu, -inf)" in text
    assert "f64[batch, 3] = aten.to.device(clamp_default, 'cpu', torch.float64, copy=True)" in text
