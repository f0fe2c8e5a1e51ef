"""Every invariant, broken once."""

import functools
import operator

import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fxcompress.capture import capture
from fxcompress.errors import GraphError
from fxcompress.graph.edit import copy_graph
from fxcompress.graph.info import info
from fxcompress.graph.verify import verify

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.gain = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x):
        return {"y": torch.relu(self.conv(x)) * self.gain, "n": x.shape[0] * 2}


@functools.cache
def _captured():
    return capture(Net().eval(), (torch.randn(2, 3, 8, 8),))


def net():
    return copy_graph(_captured())


def test_a_captured_graph_is_sound():
    verify(net(), shapes=True)


def op(graph_module, target):
    return graph_module.graph.find_nodes(op="call_function", target=target)[0]


def broken(graph_module, match, **options):
    with pytest.raises(GraphError, match=match) as caught:
        verify(graph_module, **options)
    return caught.value


def insert(graph_module, after, op_, target, args=(), value=None):
    """A node that the output reads, with a value, put in without the editor."""
    with graph_module.graph.inserting_after(after):
        node = graph_module.graph.create_node(op_, target, args)
    node.meta["val"] = value if value is not None else after.meta["val"]
    output = graph_module.graph.output_node()
    output.args = ((*output.args[0], node),)
    return node


def test_a_graph_of_somebody_else():
    with pytest.raises(GraphError, match="not captured by fxcompress"):
        verify(fx.symbolic_trace(nn.ReLU()))


def test_a_node_that_reads_a_later_one():
    graph_module = net()
    relu, mul = op(graph_module, aten.relu.default), op(graph_module, aten.mul.Tensor)
    relu.args = (mul,)
    broken(graph_module, "malformed")


def test_a_layer_that_is_not_there():
    graph_module = net()
    del graph_module.conv
    broken(graph_module, "malformed|conv")


def test_a_tensor_that_is_not_there():
    graph_module = net()
    del graph_module.gain
    broken(graph_module, "malformed|gain")


def test_two_nodes_of_one_name():
    graph_module = net()
    op(graph_module, aten.mul.Tensor)._rename("temporary")
    op(graph_module, aten.mul.Tensor).name = "conv"
    broken(graph_module, "malformed")


def test_an_operation_that_writes():
    graph_module = net()
    relu = op(graph_module, aten.relu.default)
    relu.target = aten.relu_.default
    error = broken(graph_module, "writes into its argument")
    assert "relu" in str(error.where)
    assert "GraphEditor" in str(error.remedy)


def test_an_operation_that_is_no_aten():
    graph_module = net()
    relu = op(graph_module, aten.relu.default)
    relu.target = torch.relu
    broken(graph_module, "is no ATen operation")


def test_a_method():
    graph_module = net()
    relu = op(graph_module, aten.relu.default)
    insert(graph_module, relu, "call_method", "tanh", (relu,))
    broken(graph_module, "calls the method 'tanh'")


def test_arithmetic_on_sizes_and_getitem_are_allowed():
    graph_module = net()
    assert graph_module.graph.find_nodes(op="call_function", target=operator.mul)
    verify(graph_module, shapes=True)


def test_an_output_that_is_no_flat_tuple():
    graph_module = net()
    output = graph_module.graph.output_node()
    leaves = output.args[0]
    output.args = ([{"y": leaves[0]}, leaves[1]],)
    broken(graph_module, "not a flat tuple")
    output.args = ((leaves,),)
    broken(graph_module, "not a flat tuple")
    single = capture(nn.ReLU().eval(), (torch.randn(2, 3),))
    output = single.graph.output_node()
    output.args = (output.args[0][0],)
    broken(single, "not a flat tuple")


def test_an_output_too_few_or_too_many():
    graph_module = net()
    output = graph_module.graph.output_node()
    leaves = tuple(output.args[0])
    output.args = ((*leaves, leaves[0]),)
    broken(graph_module, "returns 3 values where the caller is told 2")


def test_an_input_too_many():
    graph_module = net()
    (x,) = graph_module.graph.find_nodes(op="placeholder")
    with graph_module.graph.inserting_after(x):
        graph_module.graph.placeholder("extra").meta["val"] = x.meta["val"]
    broken(graph_module, "takes 2 inputs where the caller gives 1")


def test_a_node_without_a_value():
    graph_module = net()
    del op(graph_module, aten.relu.default).meta["val"]
    broken(graph_module, r"no meta\['val'\]")


def test_a_value_that_is_real_or_of_another_mode():
    graph_module = net()
    relu = op(graph_module, aten.relu.default)
    relu.meta["val"] = torch.zeros(2, 4, 6, 6)
    broken(graph_module, "not a fake tensor of this graph")
    with FakeTensorMode():
        relu.meta["val"] = torch.zeros(2, 4, 6, 6)
    broken(graph_module, "not a fake tensor of this graph")


def test_a_stale_value():
    graph_module = net()
    relu, conv = op(graph_module, aten.relu.default), graph_module.graph.find_nodes(op="call_module", target="conv")[0]
    with info(graph_module).fake_mode:
        relu.meta["val"] = conv.meta["val"].double()
    verify(graph_module)
    broken(graph_module, "is stale", shapes=True)


def test_a_batch_that_was_baked_in():
    graph_module = net()
    relu = op(graph_module, aten.relu.default)
    with info(graph_module).fake_mode:
        relu.meta["val"] = torch.empty(2, 4, 6, 6)
    broken(graph_module, "is stale", shapes=True)


def test_dead_code():
    graph_module = net()
    relu = op(graph_module, aten.relu.default)
    with graph_module.graph.inserting_after(relu):
        graph_module.graph.call_function(aten.tanh.default, (relu,)).meta["val"] = relu.meta["val"]
    broken(graph_module, "nothing reads it")


@pytest.mark.parametrize("kind", ["parameter", "buffer"])
@pytest.mark.parametrize("path", ["orphan", "conv_old.weight"])
def test_an_orphan_tensor(kind, path):
    graph_module = net()
    owner, _, name = path.rpartition(".")
    if owner:
        graph_module.add_module(owner, nn.Module())
    module = graph_module.get_submodule(owner)
    if kind == "parameter":
        module.register_parameter(name, nn.Parameter(torch.ones(1)))
    else:
        module.register_buffer(name, torch.ones(1))
    broken(graph_module, f"the {kind} '{path}' is not used")


def test_tensors_inside_a_called_layer_are_its_own():
    graph_module = net()
    graph_module.conv.add_module("observer", nn.BatchNorm1d(2))
    verify(graph_module, shapes=True)
