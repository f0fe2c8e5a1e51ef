"""Capture keeps the model's calls: structure, constants, sizes; and leaves the model itself as it was."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fxcompress.capture import capture
from fxcompress.errors import PreconditionError
from fxcompress.graph.info import info
from fxcompress.graph.verify import verify
from tests.capture.helpers import Batch, Keywords, Nested, Of, Pair, Structured, call, check, targets

T = torch.Tensor
IMAGE = (torch.randn(2, 4, 8, 8),)


# --- structure -------------------------------------------------------------------------------------------------


def test_keyword_arguments_in_any_order() -> None:
    x, minus, times = (torch.randn(2, 4) for _ in range(3))
    given = {"times": times, "x": x, "minus": minus}
    graph = check(Keywords(), given, {name: torch.randn(3, 4) for name in given})
    assert info(graph).parameter_names == ("x", "minus", "times")
    assert torch.equal(graph(x, minus=minus, times=times), graph(**given))
    assert [node.name for node in graph.graph.find_nodes(op="placeholder")] == ["x", "minus", "times"]


def test_nested_inputs_and_outputs() -> None:
    def inputs(n: int) -> tuple[Any, ...]:
        return {"a": torch.randn(n, 3), "b": {"c": torch.randn(n, 2)}}, (torch.randn(n, 3), [torch.randn(n, 1)])

    graph = check(Nested(), inputs(2), inputs(3))
    assert type(call(graph, inputs(2))) is OrderedDict


def test_dataclasses_and_namedtuples() -> None:
    def inputs(n: int) -> tuple[Any, ...]:
        return Batch(torch.randn(n, 3), torch.randn(n, 3)), Pair(torch.randn(n, 3), torch.randn(n, 3))

    graph = check(Structured(), inputs(2), inputs(3))
    assert isinstance(call(graph, inputs(2)), Batch)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x,
        lambda m, x: (x, x),
        lambda m, x: [x * 2],
        lambda m, x: {"y": x + 1, "x": x},
        lambda m, x: Pair(x, x + 1),
        lambda m, x: torch.max(x, 1),
        lambda m, x: (x.shape[0], x.shape[1], x),
        lambda m, x: ({"a": [x, (x, None)]}, 3, "text", None, True),
        lambda m, x: m.weight,
        lambda m, x: (x * m.weight, m.weight),
    ],
    ids=["input", "twice", "list", "dict", "namedtuple", "return_types", "sizes", "nested", "weight", "weight_too"],
)
def test_outputs(function: Callable[..., Any]) -> None:
    check(Of(function, weight=nn.Parameter(torch.randn(4))), (torch.randn(2, 4),), (torch.randn(3, 4),))


class Variadic(nn.Module):
    def forward(self, *tensors: T, **named: T) -> T:
        return tensors[0] + 2 * tensors[1] - named["a"] * named["b"]


def test_variadic_arguments() -> None:
    model = Variadic().eval()
    x, y, a, b = (torch.randn(2, 3) for _ in range(4))
    from fxcompress.capture.inputs import ExampleInputs

    graph = capture(model, ExampleInputs((x, y), {"b": b, "a": a}))
    verify(graph, shapes=True)
    assert torch.equal(graph(x, y, a=a, b=b), model(x, y, a=a, b=b))


class Switch(nn.Module):
    def forward(self, x: T, power: int = 1, mask: T | None = None, mode: str = "add") -> T:
        x = x**power if mode == "add" else -x
        return x if mask is None else x * mask


def test_values_that_are_no_tensors_become_part_of_the_graph() -> None:
    graph = check(Switch(), (torch.randn(2, 3), 2, None, "add"), (torch.randn(3, 3), 2, None, "add"))
    x = torch.randn(2, 3)
    for wrong in ((x, 3, None, "add"), (x, 2, torch.ones(2, 3), "add"), (x, 2, None, "other")):
        with pytest.raises(PreconditionError, match="captured with"):
            graph(*wrong)
    with pytest.raises(PreconditionError, match="captured with"):
        copy.deepcopy(graph)(x, 3, None, "add")


def test_a_call_of_another_structure_is_refused() -> None:
    pair = (torch.randn(2, 3), [torch.randn(2, 1)])
    graph = capture(Nested().eval(), ({"a": torch.randn(2, 3), "b": {"c": torch.randn(2, 2)}}, pair))
    with pytest.raises(PreconditionError, match="nested"):
        graph({"a": pair[0], "b": {}}, pair)
    with pytest.raises(PreconditionError, match="nested"):
        graph({"a": pair[0], "b": {"c": pair[0]}}, (*pair, pair[0]))


# --- sizes -----------------------------------------------------------------------------------------------------


def test_an_example_of_batch_one_still_gives_a_dynamic_batch() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(144, 3))
    graph = check(model, (torch.randn(1, 4, 8, 8),), (torch.randn(5, 4, 8, 8),))
    assert list(info(graph).dim_names.values()) == ["batch"]
    check(model, (torch.randn(2, 4, 8, 8),), (torch.randn(1, 4, 8, 8),))


def test_dims_on_request() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    shapes = {"input": {0: "batch", 2: "height", 3: "width"}}
    graph = check(model, (torch.randn(2, 4, 16, 24),), (torch.randn(3, 4, 32, 8),), dynamic_shapes=shapes)
    assert list(info(graph).dim_names.values()) == ["batch", "height", "width"]
    (x,) = graph.graph.find_nodes(op="placeholder")
    assert [type(size) for size in x.meta["val"].shape] == [torch.SymInt, int, torch.SymInt, torch.SymInt]


class Add(nn.Module):
    def forward(self, x: T, y: T) -> T:
        return x + y


def test_dims_of_one_name_are_one_symbol() -> None:
    shapes = {"x": {0: "batch", 1: "time"}, "y": {0: "batch", 1: "time"}}
    inputs, other = (torch.randn(2, 5), torch.randn(2, 5)), (torch.randn(4, 7), torch.randn(4, 7))
    graph = check(Add(), inputs, other, dynamic_shapes=shapes)
    assert list(info(graph).dim_names.values()) == ["batch", "time"]


def test_dims_of_parts() -> None:
    inputs = ({"a": torch.randn(2, 3), "b": {"c": torch.randn(4, 2)}}, (torch.randn(2, 3), [torch.randn(2, 1)]))
    shapes = {"tree": {"a": {0: "n"}, "b": None}, "pair": ({0: "n"}, [{0: "rows"}])}
    graph = capture(Nested().eval(), inputs, dynamic_shapes=shapes)
    assert list(info(graph).dim_names.values()) == ["n", "rows"]
    batch = (Batch(torch.randn(2, 3), torch.randn(4, 3)), Pair(torch.randn(2, 3), torch.randn(4, 3)))
    graph = capture(Structured().eval(), batch, dynamic_shapes=([{0: "n"}, {0: "m"}], ({0: "n"}, {0: "m"})))
    assert list(info(graph).dim_names.values()) == ["n", "m"]


def test_fixed_sizes() -> None:
    graph = check(nn.Linear(4, 3), (torch.randn(2, 4),), dynamic_shapes=None)
    assert info(graph).dim_names == {}
    assert all(
        isinstance(size, int) for node in graph.graph.nodes if node.op != "output" for size in node.meta["val"].shape
    )


def test_a_second_input_may_be_fixed_although_it_is_as_long_as_the_batch() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 4)

        def forward(self, x: T, table: T) -> T:
            return x @ self.fc(table.t()).t().reshape(4, 2, 2).sum(1)

    graph = capture(Fixed().eval(), (torch.randn(2, 4), torch.randn(2, 4)))
    x, table = (node.meta["val"] for node in graph.graph.find_nodes(op="placeholder"))
    assert isinstance(x.shape[0], torch.SymInt) and isinstance(table.shape[0], int)


# --- the user's model ------------------------------------------------------------------------------------------


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.noise = nn.Dropout(0.5)
        self.cache: dict[str, Any] = {}
        self.last: T | None = None

    def forward(self, x: T) -> T:
        self.last = x
        self.cache["x"] = x
        self.calls = getattr(self, "calls", 0) + 1
        return self.noise(self.fc(x))


def test_the_users_model_is_left_as_it_was() -> None:
    model = Remembers().eval()
    seen: list[str] = []
    handle = model.fc.register_forward_hook(lambda *_: seen.append("hook"))
    model.fc.bias.requires_grad_(False)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    before = {name: (id(p), p._version, p.requires_grad) for name, p in model.named_parameters()}
    attributes = set(vars(model))
    torch.manual_seed(11)
    state = torch.get_rng_state()
    graph = capture(model, (torch.randn(2, 4),))
    torch.manual_seed(11)
    assert torch.equal(torch.get_rng_state(), state)
    capture(model, (torch.ones(2, 4),))
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: (id(p), p._version, p.requires_grad) for name, p in model.named_parameters()} == before
    assert set(vars(model)) == attributes and model.last is None and model.cache == {}
    assert list(model.fc._forward_hooks) == [handle.id] and not model._forward_hooks
    assert not model.training and torch.equal(model.fc.weight.grad, torch.ones(4, 4))
    assert graph.fc.weight.grad is None and not graph.fc.bias.requires_grad and graph.fc.weight.requires_grad
    assert graph.fc.weight.data_ptr() == model.fc.weight.data_ptr() and graph.fc.weight is not model.fc.weight


def test_example_inputs_that_require_gradients() -> None:
    x = torch.randn(2, 4, requires_grad=True)
    graph = check(nn.Linear(4, 4), (x,))
    graph(x).sum().backward()
    assert x.grad is not None


def test_sizes_that_depend_on_data() -> None:
    check(Of(lambda m, x: x[x > 0].sum() + torch.nonzero(x).sum()), (torch.randn(2, 4),), (torch.randn(3, 4),))


def test_hooks_take_part() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model[0].register_forward_hook(lambda module, args, output: output * 3)
    assert targets(check(model, (torch.randn(2, 4),))) == ["Linear", "aten.mul.Tensor", "aten.relu.default"]


def test_parametrizations_take_part() -> None:
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    check(model, (torch.randn(2, 4),), (torch.randn(3, 4),))


def test_constants_and_plain_tensors() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain = torch.randn(4)
            self.register_buffer("hidden", torch.randn(4), persistent=False)

        def forward(self, x: T) -> T:
            return x * self.plain + torch.tensor([1.0, 2, 3, 4]) + self.hidden

    model = Plain()
    graph = check(model, (torch.randn(2, 4),), (torch.randn(3, 4),))
    assert not graph.state_dict() and "hidden" in dict(graph.named_buffers())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).to(dtype)
    check(model, (IMAGE[0].to(dtype),), (torch.randn(3, 4, 8, 8).to(dtype),))


def test_the_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))
    graph = capture(model.eval(), (torch.randn(2, 4, 8, 8, device="meta"),))
    verify(graph, shapes=True)
    assert graph(torch.randn(3, 4, 8, 8, device="meta")).shape == (3, 3)
