"""What cannot be captured is refused with an error that says what, where, and what to do."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fxcompress.capture import capture
from fxcompress.errors import CaptureError, FxCompressError, OptionError, PreconditionError
from tests.capture.helpers import targets

T = torch.Tensor
X = torch.randn(2, 4)


def refused(kind: type[FxCompressError], match: str, model: Any, inputs: Any = (X,), **options: Any) -> FxCompressError:
    with pytest.raises(kind, match=match) as caught:
        capture(model, inputs, **options)
    assert caught.value.remedy, "an error says what to do"
    return caught.value


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()


@pytest.mark.parametrize("model", [None, "resnet18", nn.Linear, lambda x: x, torch.ones(2), {"weight": torch.ones(1)}])
def test_not_a_module(model: Any) -> None:
    refused(PreconditionError, "not a torch.nn.Module", model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript() -> None:
    refused(PreconditionError, "TorchScript", torch.jit.script(nn.Linear(4, 4).eval()))


def test_training_mode() -> None:
    refused(PreconditionError, "in training mode .*the model itself", net().train())
    model = net()
    model[1].train()
    error = refused(PreconditionError, r"training mode \(1\)", model)
    assert "eval()" in str(error)
    assert model[1].training and not model[0].training


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.running_var", "1.weight"])
def test_weights_that_are_not_finite(name: str, value: float) -> None:
    model = net()
    with torch.no_grad():
        model.state_dict()[name].view(-1)[1] = value
    assert refused(PreconditionError, "NaN or infinite", model).where == name


def test_buffers_may_be_infinite() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.full((4,), -math.inf))

        def forward(self, x: T) -> T:
            return torch.softmax(torch.maximum(x, self.mask), -1)

    capture(Masked().eval(), (X,))


class Two(nn.Module):
    def forward(self, x: T, y: T, *, scale: float = 1.0) -> T:
        return x + y * scale


@pytest.mark.parametrize(
    "inputs",
    [(X,), (X, X, X), {"x": X}, {"x": X, "z": X}, {"x": X, "y": X, "wrong": X}],
    ids=["one", "three", "missing", "unknown", "extra"],
)
def test_wrong_arguments(inputs: Any) -> None:
    error = refused(PreconditionError, r"forward\(x", Two().eval(), inputs)
    assert error.where == "example_inputs"


@pytest.mark.parametrize("inputs", [(), [], {}, (1, 2), ({"a": None},)])
def test_no_tensor(inputs: Any) -> None:
    refused(PreconditionError, "holds no tensor", net(), inputs)


@pytest.mark.parametrize("inputs", [3, "x", X.numpy(), object()])
def test_inputs_of_another_kind(inputs: Any) -> None:
    refused(PreconditionError, "example_inputs is a", net(), inputs)


def test_a_single_tensor_is_the_only_argument() -> None:
    assert targets(capture(nn.Linear(4, 4).eval(), X)) == ["Linear"]


@pytest.mark.parametrize(
    "inputs", [(torch.randn(2, 5),), (torch.ones(2, 4, dtype=torch.int64),), (torch.randn(2, 4).double(),)]
)
def test_inputs_that_the_model_itself_does_not_take(inputs: Any) -> None:
    refused(PreconditionError, "does not take these example inputs", net(), inputs)


# --- the user's code -------------------------------------------------------------------------------------------


class Branches(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: T) -> T:
        if self.how == "if":
            if x.sum() > 0:  # branch on a value
                x = x * 2
        elif self.how == "while":
            while x.norm() > 1:  # loop on a value
                x = x / 2
        elif self.how == "item":
            x = x[: int(x.argmax().item())]  # a size from a value
            x = x.view(-1, 2)
        return x


@pytest.mark.parametrize(("how", "line"), [("if", "branch on a value"), ("while", "loop on a value")])
def test_control_flow_that_depends_on_data(how: str, line: str) -> None:
    error = refused(CaptureError, "depend on the values of tensors", Branches(how).eval())
    assert error.where is not None and line in error.where and "test_bad_input.py" in error.where
    assert "torch.where" in str(error.remedy)


def test_a_batch_that_is_baked_in() -> None:
    class Baked(nn.Module):
        def forward(self, x: T) -> T:
            return x.reshape(2, 2, 2).sum(0)

    error = refused(CaptureError, "fixes a size that should be dynamic", Baked().eval())
    assert "dynamic_shapes=None" in str(error.remedy)
    capture(Baked().eval(), (X,), dynamic_shapes=None)


def test_an_error_of_the_users_own_code() -> None:
    class Broken(nn.Module):
        def forward(self, x: T) -> T:
            raise ZeroDivisionError("the user's own mistake")

    error = refused(PreconditionError, "the user's own mistake", Broken().eval())
    assert "test_bad_input.py" in str(error.where)


def test_control_flow_operators() -> None:
    class Cond(nn.Module):
        def forward(self, x: T) -> T:
            return torch.cond(x.sum() > 0, lambda x: x * 2, lambda x: x - 1, (x,))

    error = refused(CaptureError, "cond", Cond().eval())
    assert "torch.where" in str(error.remedy)


def test_enabled_autocast() -> None:
    class Auto(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: T) -> T:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.fc(x)

    refused(CaptureError, "autocast", Auto().eval())


@pytest.mark.parametrize("inputs", [(X,), None])
def test_names_that_fx_needs(inputs: Any) -> None:
    class Taken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.graph = nn.Linear(4, 4)

        def forward(self, x: T) -> T:
            return self.graph(x)

    refused(CaptureError, "a part called 'graph'", Taken().eval(), inputs)


def test_a_failed_capture_leaves_the_model_as_it_was() -> None:
    class Leaves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.seen = None

        def forward(self, x: T) -> T:
            self.seen = x = self.fc(x)
            return x * 2 if x.sum() > 0 else x

    model = Leaves().eval()
    before, attributes = copy.deepcopy(model.state_dict()), set(vars(model))
    refused(CaptureError, "depend on the values", model)
    assert model.seen is None and set(vars(model)) == attributes and not model._forward_hooks
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not isinstance(model(X), torch._subclasses.FakeTensor)


# --- dynamic shapes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "match"),
    [
        ("height", "'height' is not known"),
        (3, "3 is not known"),
        ({"z": {0: "batch"}}, "names 'z'"),
        (({0: "n"},), "1 entries for 2 arguments"),
        ({"x": {7: "n"}}, "for an argument of 2 dims"),
        ({"x": "batch"}, "for an argument of 2 dims"),
        ({"x": {"batch": 0}}, "for an argument of 2 dims"),
        ({"x": [{0: "n"}, None, None]}, "for an argument of 2 dims"),
    ],
    ids=str,
)
def test_dynamic_shapes_that_do_not_fit(shapes: Any, match: str) -> None:
    refused(OptionError, match, Two().eval(), (X, X), dynamic_shapes=shapes)


# --- exported programs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)),
        lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)),
        lambda: nn.LSTM(4, 4, num_layers=2, dropout=0.5),
    ],
    ids=["dropout", "batch_norm", "lstm"],
)
def test_programs_exported_in_training_mode(make: Callable[[], nn.Module]) -> None:
    program = torch.export.export(make().train(), (torch.randn(3, 4),), strict=False)
    error = refused(CaptureError, "training mode", program, None)
    assert "eval()" in str(error.remedy)


def test_programs_that_write_into_their_buffers() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: T) -> T:
            self.count.add_(1)
            return x + self.count

    refused(CaptureError, "writes into", torch.export.export(Counts().eval(), (X,), strict=False), None)
    program = torch.export.export(Counts().eval(), (X,), strict=False).run_decompositions({})
    refused(CaptureError, "writes into 'count'", program, None)


def test_graph_modules_in_training_mode() -> None:
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train())
    refused(PreconditionError, "training mode", traced)
