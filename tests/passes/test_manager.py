"""The manager proves, measures, records, and fails with names."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

from fxcompress.capture import capture
from fxcompress.errors import OptionError, PassError, PreconditionError, VerificationError
from fxcompress.graph.edit import GraphEditor
from fxcompress.passes import FuseModules
from fxcompress.passes.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from fxcompress.passes.manager import PassManager
from tests.support import randomize

aten = torch.ops.aten


@dataclass(frozen=True)
class ScaleLinears(Pass):
    """Multiplies every linear weight: a wrong pass if it claims to keep outputs."""

    name: ClassVar[str] = "scale_linears"
    numerics: ClassVar[Numerics] = Numerics.LOSSY
    factor: float = 1.0

    def run(self, graph_module, context):
        rewrites = []
        with GraphEditor(graph_module) as editor:
            for node in graph_module.graph.find_nodes(op="call_module"):
                layer = graph_module.get_submodule(node.target)
                if isinstance(layer, nn.Linear):
                    editor.set_tensor(f"{node.target}.weight", layer.weight * self.factor)
                    rewrites.append(Rewrite(node.target, "scaled", {"factor": self.factor}))
        return PassResult(graph_module, tuple(rewrites))


@dataclass(frozen=True)
class Claims(ScaleLinears):
    name: ClassVar[str] = "claims"
    numerics: ClassVar[Numerics] = Numerics.REASSOCIATED


@dataclass(frozen=True)
class ClaimsExact(ScaleLinears):
    name: ClassVar[str] = "claims_exact"
    numerics: ClassVar[Numerics] = Numerics.EXACT


@dataclass(frozen=True)
class Idle(Pass):
    name: ClassVar[str] = "idle"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, graph_module, context):
        return PassResult(graph_module, skipped=(Skip("all", "nothing_to_do", "there is nothing to do"),))


@dataclass(frozen=True)
class Breaks(Pass):
    name: ClassVar[str] = "breaks"
    numerics: ClassVar[Numerics] = Numerics.EXACT
    how: str = "raise"
    seen: list = field(default_factory=list)

    def run(self, graph_module, context):
        relu = next(iter(graph_module.graph.find_nodes(op="call_function", target=aten.relu.default)))
        if self.how == "raise":
            raise ValueError("did not expect this")
        if self.how == "invariant":
            with graph_module.graph.inserting_after(relu):
                graph_module.graph.call_function(aten.neg.default, (relu,))
        if self.how == "unrunnable":  # the shape it claims is right, the call is out of range
            with graph_module.graph.inserting_after(relu):
                narrow = graph_module.graph.call_function(aten.narrow.default, (relu, 1, 5, 8))
            narrow.meta.update(relu.meta)
            relu.replace_all_uses_with(narrow, delete_user_cb=lambda user: user is not narrow)
            graph_module.recompile()
        if self.how == "nothing":
            return None
        return PassResult(graph_module, (Rewrite("x", "broken"),))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 3)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


@pytest.fixture
def graph_module():
    return capture(Net().eval(), (torch.randn(2, 4),))


@pytest.fixture
def context():
    return PassContext(example_inputs=[torch.randn(2, 4)])


def test_passes_run_in_order_and_are_recorded(graph_module, context):
    seen = []
    manager = PassManager([ScaleLinears(factor=2.0), Idle()])
    run = manager.run(graph_module, context, on_step=lambda index, pass_: seen.append((index, pass_.name)))
    assert seen == [(0, "scale_linears"), (1, "idle")]
    first, second = run.records
    assert [rewrite.site for rewrite in first.result.rewrites] == ["first", "second"]
    assert first.tolerance is None and first.error > 0.1
    assert first.before.parameters == first.after.parameters == 4 * 8 + 8 + 8 * 3 + 3
    assert not second.result.changed and second.result.skipped[0].code == "nothing_to_do"
    assert second.error == 0.0


def test_the_graph_that_was_given_stays_as_it_was(graph_module, context):
    x = torch.randn(3, 4)
    before = graph_module(x)
    run = PassManager([ScaleLinears(factor=2.0)]).run(graph_module, context)
    assert torch.equal(graph_module(x), before)
    assert not torch.allclose(run.graph_module(x), before)
    untouched = run.graph_module.get_submodule("first").bias
    assert untouched.data_ptr() == graph_module.get_submodule("first").bias.data_ptr()


@pytest.mark.parametrize("pass_", [Claims(factor=1.01), ClaimsExact(factor=1.00001)])
def test_a_pass_that_breaks_its_promise_is_refused(graph_module, context, pass_):
    with pytest.raises(VerificationError) as caught:
        PassManager([pass_]).run(graph_module, context)
    assert pass_.name in str(caught.value) and "output 0 of 1" in str(caught.value)


def test_a_promise_within_rounding_is_kept(graph_module, context):
    run = PassManager([Claims(factor=1.0 + 1e-6)]).run(graph_module, context)
    assert 0 < run.records[0].error <= run.records[0].tolerance == 1e-4


def test_without_inputs_there_is_no_proof(graph_module):
    run = PassManager([Claims(factor=2.0)]).run(graph_module, PassContext())
    assert run.records[0].error is None and run.outputs is None


def test_proof_can_be_switched_off(graph_module, context):
    run = PassManager([Claims(factor=2.0)], prove=False).run(graph_module, context)
    assert run.records[0].error is None


def test_a_failure_names_the_pass_the_node_and_a_dump(graph_module, context):
    with pytest.raises(PassError) as caught:
        PassManager([Breaks()]).run(graph_module, context)
    text = str(caught.value)
    assert "breaks" in text and "did not expect this" in text
    assert "torch.relu(self.first(x))" in caught.value.where
    dump = Path(caught.value.remedy.split(" is in ")[1].split(";")[0])
    assert "aten.relu" in dump.read_text()
    dump.unlink()


@pytest.mark.parametrize("how", ["invariant", "nothing"])
def test_a_broken_result_is_refused(graph_module, context, how):
    with pytest.raises(PassError, match="breaks"):
        PassManager([Breaks(how=how)]).run(graph_module, context)


def test_a_graph_that_no_longer_runs_is_refused(graph_module, context):
    with pytest.raises(PassError, match=r"breaks.*left a graph that does not run"):
        PassManager([Breaks(how="unrunnable")]).run(graph_module, context)


def test_a_pass_that_needs_inputs_says_so(graph_module):
    class Needs(Idle):
        name = "needs"
        needs_inputs = True

    with pytest.raises(PreconditionError, match="example inputs"):
        PassManager([Needs()]).run(graph_module, PassContext())


def test_train_mode_is_proved_without_touching_statistics():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).eval()
    graph_module = capture(model, (torch.randn(2, 4),)).train()
    mean = model[1].running_mean.clone()
    PassManager([ScaleLinears(factor=1.0)]).run(graph_module, PassContext(example_inputs=[torch.randn(2, 4)]))
    assert torch.equal(model[1].running_mean, mean)
    assert graph_module.training


def test_options_of_the_wrong_type_are_refused():
    with pytest.raises(OptionError, match="factor"):
        ScaleLinears(factor="much")


class Chaotic(nn.Module):
    """Amplifies the rounding of its layers beyond any bound that would catch a wrong rewrite."""

    def __init__(self, amplification):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8)
        self.amplification = amplification

    def forward(self, x):
        return torch.sin(self.norm(self.conv(x)) * self.amplification)


def test_amplified_rounding_is_proved_in_float64():
    x = torch.randn(2, 3, 9)
    graph = capture(randomize(Chaotic(3e5)).eval(), (x,))
    run = PassManager([FuseModules()]).run(graph, PassContext(example_inputs=[x]))
    (record,) = run.records
    assert record.result.changed and record.error <= record.tolerance == 1e-9
    assert run.outputs[0].dtype == torch.float32
    moved = (run.outputs[0] - graph(x)).abs().max()
    assert moved > 1e-4  # more than a float32 proof would let pass


def test_a_wrong_rewrite_of_a_chaotic_model_is_refused(graph_module):
    class Wrong(Chaotic):
        def __init__(self):
            super().__init__(3e5)
            self.head = nn.Linear(7, 2)

        def forward(self, x):
            return self.head(super().forward(x))

    x = torch.randn(2, 3, 9)
    with pytest.raises(VerificationError, match="claims"):
        PassManager([Claims(factor=1.01)]).run(capture(Wrong().eval(), (x,)), PassContext(example_inputs=[x]))
