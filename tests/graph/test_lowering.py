"""The raised graph back to a flat ATen program: same outputs, same names, nothing traced but what has to be."""

from __future__ import annotations

import inspect
import io
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from benchmarks import zoo
from fxcompress.capture import capture
from fxcompress.errors import GraphError
from fxcompress.graph import lower_layers, lowering
from fxcompress.graph.edit import GraphEditor
from fxcompress.graph.lowering import Lowering, to_exported_program

aten = torch.ops.aten


def _call(function: Callable[..., Any], inputs: Any) -> list[Any]:
    with torch.no_grad():
        return pytree.tree_leaves(function(**inputs) if isinstance(inputs, dict) else function(*inputs))


def _seeded(make: Callable[..., Any]) -> Callable[[int], Any]:
    def inputs(batch: int) -> Any:
        torch.manual_seed(batch)
        return make(batch)

    return inputs


def check(model: nn.Module, make: Callable[[int], Any]) -> ExportedProgram:
    """Outputs of the program are the model's, bit for bit, at three batch sizes."""
    graph = capture(model.eval(), make(2))
    program = to_exported_program(graph)
    module = program.module()
    for batch in (2, 3, 1):
        inputs = make(batch)
        for expected, actual in zip(_call(model, inputs), _call(module, inputs), strict=True):
            if isinstance(expected, torch.Tensor):
                torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
            else:
                assert expected == actual
    return program


def targets(program: ExportedProgram) -> list[str]:
    return [str(n.target) for n in program.graph.nodes if n.op == "call_function" and n.target is not operator.getitem]


IMAGE = _seeded(lambda batch: (torch.randn(batch, 3, 64, 64),))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "vit"])
def test_torchvision(name: str) -> None:
    zoo.prepare_torchvision()
    models = pytest.importorskip("torchvision").models
    model = models.VisionTransformer(64, 16, 2, 2, 32, 64) if name == "vit" else getattr(models, name)()
    program = check(model, IMAGE)
    state = model.state_dict()
    assert set(program.state_dict) == {key for key in state if not key.endswith("num_batches_tracked")}
    for key, _ in program.named_parameters():
        assert program.state_dict[key].data_ptr() == state[key].data_ptr()  # shared, not copied


class Layers(nn.Module):
    """One of each layer that a rule lowers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1, groups=1),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 3, padding="same", dilation=2, groups=2, bias=False),
            nn.BatchNorm2d(8, affine=False),
            nn.ConvTranspose2d(8, 4, 3, 2, 1, output_padding=1, groups=2, dilation=1),
            nn.GroupNorm(2, 4),
            nn.InstanceNorm2d(4, affine=True),
            nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
            nn.BatchNorm2d(4, momentum=None),
            nn.BatchNorm2d(4, track_running_stats=False),
            nn.PReLU(4),
            nn.Dropout2d(),
            nn.RReLU(),
        )
        self.norms = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm([4, 8], bias=False), nn.RMSNorm(8, eps=1e-3))
        self.line = nn.Sequential(nn.Conv1d(4, 4, 3), nn.ConvTranspose1d(4, 4, 3, bias=False), nn.BatchNorm1d(4))
        self.volume = nn.Sequential(nn.Conv3d(1, 2, 3), nn.ConvTranspose3d(2, 1, 3))
        self.mix = nn.Bilinear(8, 8, 5)
        self.head = nn.Sequential(nn.Dropout(), nn.Linear(5, 6, bias=False), nn.AlphaDropout())

    def forward(self, x: torch.Tensor) -> Any:
        y = self.conv(x)
        y = self.norms(y[:, :, :4, :8].flatten(0, 1)).view(-1, 4, 4, 8)
        z = self.line(y[:, 0])
        return self.head(self.mix(z, z)), self.volume(y.unsqueeze(1))


def test_every_rule_is_the_inverse_of_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "trace", None)  # no layer needs tracing
    program = check(Layers(), _seeded(lambda batch: (torch.randn(batch, 3, 16, 16),)))
    assert "aten.dropout.default" not in targets(program)
    assert "aten.conv2d.padding" in targets(program)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 6, 2, bidirectional=True, batch_first=True, dropout=0.5)
        self.projected = nn.LSTM(12, 8, proj_size=3)
        self.gru = nn.GRU(3, 4)
        self.rnn = nn.RNN(4, 4, nonlinearity="relu", bias=False)

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> Any:
        y, (hidden, cell) = self.lstm(x)
        y, (_, last) = self.projected(y.transpose(0, 1))
        y, state = self.gru(y, h)
        y, _ = self.rnn(y)
        return {"y": y, "states": [hidden, (cell, state)], "last": last, "none": None, "input": x}


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
def test_recurrent_layers_and_nested_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "trace", None)
    make = _seeded(lambda batch: {"x": torch.randn(batch, 5, 8), "h": torch.randn(1, batch, 4)})
    model = Recurrent().eval()
    graph = capture(model, make(2), dynamic_shapes={"x": {0: "batch"}, "h": {1: "batch"}})
    program = to_exported_program(graph)
    for batch in (2, 3):
        expected, actual = model(**make(batch)), program.module()(**make(batch))
        assert list(actual) == list(expected) and actual["none"] is None
        torch.testing.assert_close(actual, expected)
    assert targets(program).count("aten.lstm.input") == 2


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8, padding_idx=3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight
        self.position = nn.Parameter(torch.randn(1, 4, 8))
        self.shift = nn.Buffer(torch.randn(20), persistent=False)
        self.scale = nn.Buffer(torch.randn(20))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids) + self.position
        x = x + self.attention(x, x, x)[0]
        return self.head(x) * self.scale + self.shift + torch.arange(20)


IDS = _seeded(lambda batch: (torch.randint(0, 20, (batch, 4)),))


def test_weights_are_inputs_of_their_kind_under_the_users_names() -> None:
    program = check(Tied(), IDS)
    specs = program.graph_signature.input_specs
    kinds = [spec.kind for spec in specs]
    order = [InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR, InputKind.USER_INPUT]
    assert kinds == sorted(kinds, key=order.index)
    held = {spec.target: spec for spec in specs if spec.target}
    assert "embedding.weight" in held and "head.weight" not in held  # one placeholder for the tied pair
    assert held["attention.in_proj_weight"].arg.name == "p_attention_in_proj_weight"
    assert held["scale"].persistent is True and held["shift"].persistent is False
    assert "shift" not in program.state_dict and "shift" in program.constants


def test_it_can_be_saved_and_loaded() -> None:
    program = check(Tied(), IDS)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    (inputs,) = IDS(3)
    torch.testing.assert_close(torch.export.load(file).module()(inputs), program.module()(inputs))


def test_metadata_stays_on_the_nodes() -> None:
    program = check(Tied(), IDS)
    call = next(n for n in program.graph.nodes if n.target is aten.embedding.default)
    assert call.name.startswith("embedding") and "test_lowering.py" in call.meta["stack_trace"]
    assert next(reversed(call.meta["nn_module_stack"].values()))[0] == "embedding"
    assert str(call.meta["val"].shape[0]).startswith("s")


class Sized(nn.Module):
    def forward(self, x: torch.Tensor, factor: int) -> Any:
        return x.shape[0], x * factor, x


def test_sizes_and_constants_among_inputs_and_outputs() -> None:
    program = check(Sized(), lambda batch: (torch.randn(batch, 2), 3))
    kinds = [type(spec.arg).__name__ for spec in program.graph_signature.output_specs]
    assert kinds == ["SymIntArgument", "TensorArgument", "TensorArgument"]
    assert type(program.graph_signature.input_specs[1].arg).__name__ == "ConstantArgument"


# --- layers without a rule -----------------------------------------------------------------------------------------


class Gate(nn.Module):
    """A layer of somebody else's: a parameter, a buffer, a write into a value of its own, two results."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(4))
        self.register_buffer("steps", torch.linspace(0, 1, 4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = F.linear(x, torch.diag(self.gain))
        y[:, 0] += 1
        y.relu_()
        return y.view(x.shape[0], 2, 2), y + self.steps


def with_layer(layer: nn.Module, results: int = 1) -> Any:
    """A graph that calls ``layer`` between two linear layers."""
    graph = capture(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval(), (torch.randn(2, 4),))
    with GraphEditor(graph) as editor:
        second = graph.graph.find_nodes(op="call_module", target="1")[0]
        new = editor.insert_module(editor.add_module("layer", layer), (second.args[0],), before=second)
        if results > 1:
            new = editor.insert_call(operator.getitem, (new, 1), before=second)
        editor.set_args(second, (new,))
    return graph


def test_a_layer_without_a_rule_is_traced_alone() -> None:
    graph = with_layer(Gate(), results=2)
    program = to_exported_program(graph)
    assert {"layer.gain", "layer.steps"} <= set(program.state_dict)
    assert not any(target.endswith("_.default") for target in targets(program))
    x = torch.randn(5, 4)
    torch.testing.assert_close(program.module()(x), graph(x))
    traced = next(n for n in program.graph.nodes if n.target is aten.relu.default)
    assert next(reversed(traced.meta["nn_module_stack"].values()))[0] == "layer"


def test_padding_modes_become_a_pad() -> None:
    for mode, padding in (("reflect", 1), ("circular", "same"), ("replicate", "valid"), ("zeros", "same")):
        conv = nn.Conv1d(1, 1, 3, padding=padding, padding_mode=mode)
        graph = capture(nn.Sequential(nn.Conv1d(1, 1, 1)).eval(), (torch.randn(2, 1, 6),))
        with GraphEditor(graph) as editor:
            editor.set_module("0", conv)
        x = torch.randn(3, 1, 6)
        torch.testing.assert_close(to_exported_program(graph).module()(x), conv(x))


def test_layers_with_hooks_are_traced() -> None:
    linear = nn.Linear(4, 4)
    linear.register_forward_hook(lambda module, args, result: result * 2)
    graph = with_layer(linear)
    x = torch.randn(3, 4)
    torch.testing.assert_close(to_exported_program(graph).module()(x), graph(x))


def test_a_layer_that_cannot_be_traced_is_named() -> None:
    class Branch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    graph = with_layer(nn.Identity())
    graph.layer = Branch().eval()
    with pytest.raises(GraphError, match=r"the layer 'layer', a Branch, cannot be traced"):
        to_exported_program(graph)


def test_a_layer_in_training_mode_is_refused() -> None:
    graph = capture(nn.Sequential(nn.BatchNorm1d(4)).eval(), (torch.randn(2, 4),))
    with pytest.raises(GraphError, match="'0' is in training mode") as caught:
        to_exported_program(graph.train())
    assert ".eval()" in str(caught.value)


# --- rewriting -----------------------------------------------------------------------------------------------------


def test_a_rewrite_replaces_single_operations() -> None:
    def relu_is_clamp(lowering: Lowering, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is not aten.relu.default:
            return NotImplemented
        return lowering.emit(aten.clamp.default, (args[0], 0), value=lowering.value)

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
    program = to_exported_program(capture(model, (torch.randn(2, 4),)), rewrite=relu_is_clamp)
    assert targets(program) == ["aten.linear.default", "aten.clamp.default"]
    x = torch.randn(3, 4)
    torch.testing.assert_close(program.module()(x), model(x))


def test_the_graph_is_not_changed() -> None:
    graph = capture(Tied().eval(), IDS(2))
    before = str(graph.graph), set(graph.state_dict())
    to_exported_program(graph)
    assert (str(graph.graph), set(graph.state_dict())) == before


def test_every_layer_that_capture_makes_has_a_rule() -> None:
    from fxcompress.capture import layers

    source = inspect.getsource(layers)
    made = {getattr(nn, name) for name in dir(nn) if f"nn.{name}(" in source or f"nn.{name}," in source}
    made = {kind for kind in made if isinstance(kind, type) and issubclass(kind, nn.Module)} - {nn.Module}
    assert made <= set(lower_layers.LOWERINGS)
