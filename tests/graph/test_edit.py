"""The editor: safe mutation of nodes and names, clean-up in one place."""

import pytest
import torch
from torch import nn

from fxcompress.capture import capture
from fxcompress.errors import GraphError
from fxcompress.graph.edit import GraphEditor
from fxcompress.graph.printer import format_graph
from fxcompress.graph.verify import verify
from tests.graph.nets import Net, X, call, net, op

aten = torch.ops.aten

# --- inserting and replacing ---------------------------------------------------------------------------------------


def test_insert_and_replace_keep_everything_in_order():
    graph_module = net()
    relu = op(graph_module, aten.relu.default)
    with GraphEditor(graph_module) as editor:
        new = editor.insert_call(aten.sigmoid.default, relu.args, before=relu, name="squash")
        editor.replace(relu, new)
    verify(graph_module, shapes=True)
    assert relu not in graph_module.graph.nodes
    assert new.name == "squash"
    assert new.meta["stack_trace"] == relu.meta["stack_trace"]
    reference = Net().eval()
    reference.load_state_dict(graph_module.state_dict())
    expected = reference.head((torch.sigmoid(reference.norm(reference.conv(X))) * reference.gain).mean((2, 3)))
    torch.testing.assert_close(graph_module(X), expected)


def test_a_new_node_tells_the_line_of_the_node_it_stands_for():
    graph_module = net()
    relu, conv = op(graph_module, aten.relu.default), call(graph_module, "conv")
    conv.meta["stack_trace"] = 'File "model.py", line 3, in forward\n    x = self.conv(x)'
    with GraphEditor(graph_module) as editor:
        new = editor.insert_call(aten.tanh.default, relu.args, before=relu, like=conv)
        editor.replace(relu, new)
    assert new.meta["stack_trace"] == conv.meta["stack_trace"]


@pytest.mark.parametrize(
    ("target", "extra"), [(aten.flatten.using_ints, (1,)), (aten.to.dtype, (torch.float64,)), (aten.sum.default, ())]
)
def test_a_replacement_that_changes_shape_or_dtype_is_refused(target, extra):
    graph_module = net()
    relu = op(graph_module, aten.relu.default)
    editor = GraphEditor(graph_module)
    new = editor.insert_call(target, (relu.args[0], *extra), before=relu)
    with pytest.raises(GraphError, match="would change its shape or dtype from float32") as caught:
        editor.replace(relu, new)
    assert "relu" in str(caught.value.where)
    assert "reshaped=True" in str(caught.value.remedy)
    assert list(relu.users)


def test_an_announced_change_of_shape_reaches_every_reader():
    graph_module = capture(Call(lambda s, x: (x.relu().tanh(), x.relu().sum(1))).eval(), (torch.randn(2, 6),))
    with GraphEditor(graph_module) as editor:
        for relu in graph_module.graph.find_nodes(op="call_function", target=aten.relu.default):
            half = editor.insert_call(aten.narrow.default, (relu.args[0], 1, 0, 3), before=relu)
            editor.replace(relu, half, reshaped=True)
    verify(graph_module, shapes=True)
    assert list(op(graph_module, aten.tanh.default).meta["val"].shape)[1] == 3


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(self, *args)


def test_a_change_of_shape_that_a_reader_cannot_take_names_it():
    graph_module = net()
    conv = call(graph_module, "conv")
    editor = GraphEditor(graph_module)
    editor.set_tensor("conv.weight", graph_module.conv.weight[:3])
    editor.set_tensor("conv.bias", graph_module.conv.bias[:3])
    with pytest.raises(GraphError, match="does not accept its inputs") as caught:
        editor.clean_up()
    assert "norm" in str(caught.value.where)
    assert conv.meta["val"].shape[1] == 3


def test_a_replacement_built_on_what_it_replaces_is_no_loop():
    graph_module = net()
    relu = op(graph_module, aten.relu.default)
    with GraphEditor(graph_module) as editor:
        editor.replace(relu, editor.insert_call(aten.mul.Tensor, (relu, 2.0), after=relu))
    verify(graph_module, shapes=True)
    assert op(graph_module, aten.mul.Tensor).args == (relu, 2.0)


def test_a_loop_through_other_nodes_is_refused():
    graph_module = net()
    relu = op(graph_module, aten.relu.default)
    editor = GraphEditor(graph_module)
    between = editor.insert_call(aten.tanh.default, (relu,), after=relu)
    editor.replace(relu, editor.insert_call(aten.mul.Tensor, (between, 2.0), after=between))
    with pytest.raises(GraphError, match="not sound"):
        editor.clean_up()


def test_a_node_before_its_input_is_refused():
    graph_module = net()
    relu = op(graph_module, aten.relu.default)
    editor = GraphEditor(graph_module)
    editor.replace(relu, editor.insert_call(aten.tanh.default, (relu,), before=call(graph_module, "conv")))
    with pytest.raises(GraphError, match="not sound"):
        editor.clean_up()


def test_an_error_inside_the_block_is_the_one_that_is_raised():
    graph_module = net()

    def edit():
        with GraphEditor(graph_module) as editor:
            editor.set_tensor("head.weight", torch.zeros(1, 1))  # would fail on leaving the block
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        edit()


def test_exactly_one_place_is_wanted():
    graph_module = net()
    relu = op(graph_module, aten.relu.default)
    editor = GraphEditor(graph_module)
    with pytest.raises(ValueError, match="exactly one"):
        editor.insert_call(aten.tanh.default, (relu,))
    with pytest.raises(ValueError, match="exactly one"):
        editor.insert_call(aten.tanh.default, (relu,), before=relu, after=relu)


def test_an_operation_that_refuses_its_inputs_is_named():
    graph_module = net()
    relu = op(graph_module, aten.relu.default)
    with pytest.raises(GraphError, match=r"aten\.mm\.default does not accept its inputs"):
        GraphEditor(graph_module).insert_call(aten.mm.default, (relu, relu), after=relu)


def test_a_node_in_use_cannot_be_erased():
    graph_module = net()
    with pytest.raises(GraphError, match="still read by 'norm'"):
        GraphEditor(graph_module).erase(call(graph_module, "conv"))


def test_inputs_and_output_cannot_be_erased():
    graph_module = capture(Call(lambda s, x, unused: x.relu()).eval(), (X, X))
    unused = graph_module.graph.find_nodes(op="placeholder")[1]
    for node in (unused, graph_module.graph.output_node()):
        with pytest.raises(GraphError, match="part of how the graph is called"):
            GraphEditor(graph_module).erase(node)


def test_nothing_done_changes_nothing():
    graph_module = net()
    before, code = format_graph(graph_module), graph_module.code
    with GraphEditor(graph_module):
        pass
    assert (format_graph(graph_module), graph_module.code) == (before, code)


def test_code_is_recompiled():
    graph_module = net()
    relu = op(graph_module, aten.relu.default)
    before = graph_module(X)
    with GraphEditor(graph_module) as editor:
        editor.replace(relu, relu.args[0])
    assert not torch.equal(graph_module(X), before)


# --- names ---------------------------------------------------------------------------------------------------------


def test_a_taken_name_is_never_overwritten():
    graph_module = net()
    conv, gain = graph_module.conv, graph_module.gain
    with GraphEditor(graph_module) as editor:
        assert editor.add_module("conv", nn.Identity()) == "conv_1"
        assert editor.add_module("conv", nn.Identity()) == "conv_2"
        assert editor.add_module("conv.extra", nn.Identity()) == "conv.extra"
        assert editor.add_module("gain", nn.Identity()) == "gain_1"
        assert editor.add_tensor("conv.weight", torch.ones(1)) == "conv.weight_1"
        assert editor.add_tensor("gain", torch.ones(1), parameter=True) == "gain_2"
        assert editor.add_module("forward", nn.Identity()) == "forward_1"
        assert editor.add_module("new.deep.path", nn.Identity()) == "new.deep.path"
        assert graph_module.conv is conv
        assert graph_module.gain is gain


def test_a_name_under_a_tensor_finds_another_place():
    graph_module = net()
    with GraphEditor(graph_module) as editor:
        path = editor.add_module("gain.inner", nn.Identity())
        assert not path.startswith("gain.")
        assert isinstance(graph_module.get_submodule(path), nn.Identity)
        path = editor.add_module("graph.inner", nn.Identity())
        assert isinstance(graph_module.get_submodule(path), nn.Identity)


def test_added_layers_take_the_mode_of_the_graph():
    graph_module = net()
    relu = op(graph_module, aten.relu.default)
    with GraphEditor(graph_module) as editor:
        path = editor.add_module("drop", nn.Dropout())
        editor.replace(relu, editor.insert_module(path, (relu,), after=relu))
    assert not graph_module.drop.training
    assert graph_module.train().drop.training


# --- clean-up ------------------------------------------------------------------------------------------------------


def test_what_is_unused_goes():
    graph_module = net()
    norm, relu = call(graph_module, "norm"), op(graph_module, aten.relu.default)
    with GraphEditor(graph_module) as editor:
        editor.add_module("never", nn.Linear(2, 2))
        editor.add_tensor("also.never", torch.ones(1))
        tanh = editor.insert_call(aten.tanh.default, (relu,), after=relu)
        editor.insert_call(aten.exp.default, (tanh,), after=tanh)
        editor.replace(norm, norm.args[0])
    verify(graph_module, shapes=True)
    assert set(graph_module.state_dict()) == {"conv.weight", "conv.bias", "head.weight", "head.bias", "gain"}
    assert {name for name, _ in graph_module.named_modules()} == {"", "conv", "head"}
    assert not graph_module.graph.find_nodes(op="call_function", target=aten.exp.default)


def test_a_tensor_still_read_outlives_its_layer():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(x) * self.fc.weight.sum()

    graph_module = capture(Model().eval(), (torch.randn(2, 4),))
    fc = call(graph_module, "fc")
    with GraphEditor(graph_module) as editor:
        editor.replace(fc, fc.args[0])
    verify(graph_module, shapes=True)
    assert set(graph_module.state_dict()) == {"fc.weight"}


def test_an_unused_input_stays():
    graph_module = capture(Call(lambda s, x, y: x + y).eval(), (X, X))
    add = op(graph_module, aten.add.Tensor)
    with GraphEditor(graph_module) as editor:
        editor.replace(add, add.args[0])
    verify(graph_module)
    assert torch.equal(graph_module(X, X), X)
