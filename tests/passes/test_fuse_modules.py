"""The pass as a whole: options, rules together, architectures, random graphs, time."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from benchmarks import zoo
from fxcompress.capture import capture
from fxcompress.errors import OptionError
from fxcompress.graph.running import max_relative_error, outputs_of
from fxcompress.graph.verify import verify
from fxcompress.passes.base import Numerics, PassContext
from fxcompress.passes.fuse_modules import FuseModules
from tests.support import check_pass, randomize

IMAGE = (torch.randn(2, 4, 8, 8),)


def small():
    return randomize(
        nn.Sequential(
            nn.Conv2d(4, 8, 3, padding="same", bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Dropout(0.2),
            nn.ZeroPad2d(1),
            nn.Conv2d(8, 4, 3),
            nn.BatchNorm2d(4),
            nn.Flatten(),
            nn.Linear(256, 3),
            nn.BatchNorm1d(3),
        )
    )


# --- options --------------------------------------------------------------------------------------------------------


def test_what_the_pass_is():
    pass_ = FuseModules()
    assert (pass_.name, pass_.numerics, str(pass_)) == ("fuse_modules", Numerics.REASSOCIATED, "fuse_modules")
    assert pass_.options == {"rules": None, "ignore": []}
    assert FuseModules(rules=["fold_padding"]) == FuseModules(rules=("fold_padding",))
    assert FuseModules(ignore="head").ignore == ("head",)


def test_an_unknown_rule_is_refused_with_the_nearest_name():
    with pytest.raises(OptionError, match="did you mean 'fold_padding'"):
        FuseModules(rules=("fold_pading",))


def test_all_rules_together():
    result = check_pass(small(), IMAGE, FuseModules(), skipped=())
    assert [rewrite.site for rewrite in result.rewrites] == ["0", "3", "1", "6", "9", "pad"]
    assert list(result.graph_module.state_dict()) == ["0.weight", "0.bias", "5.weight", "5.bias", "8.weight", "8.bias"]


def test_chosen_rules_only():
    check_pass(small(), IMAGE, FuseModules(rules=("fold_padding",)), rewrites=["pad"], skipped=())


@pytest.mark.parametrize(
    ("pattern", "left"), [("0", ["0", "1"]), ("[01]", ["0", "1"]), ("pad*", ["pad"]), ("3", ["3"]), ("9", ["9"])]
)
def test_what_is_to_be_ignored(pattern, left):
    result = check_pass(small(), IMAGE, FuseModules(ignore=(pattern,)))
    assert {skip.site for skip in result.skipped if skip.code == "ignored"} == set(left)
    assert {rewrite.site for rewrite in result.rewrites} == {"0", "3", "1", "6", "9", "pad"} - set(left)


def test_a_container_can_be_ignored():
    model = nn.Sequential(small(), nn.Identity()).eval()
    result = check_pass(model, IMAGE, FuseModules(ignore=("0",)), rewrites=0)
    assert {skip.code for skip in result.skipped} == {"ignored"}


def test_a_pattern_that_names_nothing_is_refused():
    with pytest.raises(OptionError, match="no layer or node is called"):
        FuseModules(ignore=("convolution",)).run(capture(small(), IMAGE), PassContext())


# --- what every pass owes -------------------------------------------------------------------------------------------


def test_an_empty_graph():
    check_pass(nn.Identity().eval(), IMAGE, FuseModules(), rewrites=0, skipped={"graph": "nothing_to_fuse"})


def test_a_training_graph_keeps_what_it_learns():
    graph_module = capture(small(), IMAGE).train()
    result = FuseModules().run(graph_module, PassContext())
    assert not result.changed
    assert {skip.code for skip in result.skipped} == {"training"}


class Structured(nn.Module):
    """Several inputs, nested outputs, a keyword: what is around the rewrites must stay as it was."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x, *, scale):
        y = self.norm(self.conv(x))
        return {"y": y, "parts": (y * scale, [y.clone(), x])}


def test_inputs_and_outputs_keep_their_structure():
    inputs = {"x": IMAGE[0], "scale": torch.rand(2, 1, 1, 1)}
    result = check_pass(randomize(Structured()), inputs, FuseModules(), rewrites=["norm", "clone"])
    outputs = result.graph_module(**inputs)
    assert set(outputs) == {"y", "parts"}
    assert isinstance(outputs["parts"][1], list)


def test_a_graph_without_shapes_is_fused_where_shapes_do_not_matter():
    model = small()
    graph_module = capture(model)
    result = FuseModules().run(graph_module, PassContext())
    verify(result.graph_module)
    assert [rewrite.site for rewrite in result.rewrites] == ["0", "3", "1", "6", "pad"]
    assert {skip.site: skip.code for skip in result.skipped} == {"9": "channel_mismatch", "graph": "no_shapes"}
    error, _ = max_relative_error(outputs_of(model, IMAGE, {}), outputs_of(result.graph_module, IMAGE, {}))
    assert error < 1e-5


# --- architectures --------------------------------------------------------------------------------------------------


def count(graph_module, kind):
    return sum(isinstance(module, kind) for module in graph_module.modules())


@pytest.mark.slow
def test_a_residual_network():
    zoo.prepare_torchvision()
    torchvision = pytest.importorskip("torchvision")
    model = randomize(torchvision.models.resnet18())
    graph_module = check_pass(model, (torch.randn(2, 3, 32, 32),), FuseModules(), rewrites=20, skipped=()).graph_module
    assert (count(graph_module, nn.Conv2d), count(graph_module, nn.BatchNorm2d)) == (20, 0)


@pytest.mark.slow
def test_a_network_of_parallel_branches():
    zoo.prepare_torchvision()
    timm = pytest.importorskip("timm")
    model = randomize(timm.create_model("repvgg_a0"))
    graph_module = check_pass(model, (torch.randn(2, 3, 32, 32),), FuseModules(), skipped=()).graph_module
    kernels = {m.kernel_size for m in graph_module.modules() if isinstance(m, nn.Conv2d)}
    assert (count(graph_module, nn.Conv2d), count(graph_module, nn.BatchNorm2d), kernels) == (22, 0, {(3, 3)})


# --- random graphs --------------------------------------------------------------------------------------------------

STEPS = (
    *("conv", "norm", "scale", "shift", "pad", "relu", "branch", "skip"),
    *("identity", "view", "twice", "standardise", "save"),
)


class Random(nn.Module):
    """A chain of what the rules look for, in any order; "save" and "twice" give values more than one reader."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps
        self.layers = nn.ModuleList()
        self.constants = nn.ParameterList()
        for step in steps:
            self.layers.append({"conv": conv, "branch": branch, "skip": branch, "norm": norm}.get(step, nn.Identity)())
            self.constants.append(
                nn.Parameter(torch.rand(4, 4, 1, 1) if step == "standardise" else torch.rand(4, 1, 1))
            )

    def forward(self, x):
        saved = []
        for index, step in enumerate(self.steps):
            layer, constant = self.layers[index], self.constants[index]
            if step in ("conv", "norm"):
                x = layer(x)
            elif step == "branch":
                x = layer[0](x) + layer[1](x) + x
            elif step == "skip":
                x = x + layer[0](x.relu()) + layer[1](x.relu())
            elif step == "scale":
                x = x * (constant + 0.5)
            elif step == "shift":
                x = 1 - (x + constant)
            elif step == "pad":
                x = F.pad(x, (1, 1, 1, 1))[:, :, :8, :8]
            elif step == "relu":
                x = F.relu(x, inplace=True) if index else F.relu(x)
            elif step == "identity":
                x = F.dropout(x * 1, 0.5, self.training).contiguous()
            elif step == "view":
                x = x.permute(0, 2, 3, 1).contiguous().view(-1, 64, 4).transpose(1, 2).reshape(-1, 4, 8, 8)
            elif step == "twice":
                x = x.sigmoid() + x.sigmoid()
            elif step == "standardise":
                x = F.conv2d(x, (constant - constant.mean()) / constant.std())
            elif step == "save":
                saved.append(x.clone())
        return x, *saved


def conv():
    return nn.Conv2d(4, 4, 3, padding=1, bias=False)


def norm():
    return nn.BatchNorm2d(4)


def branch():
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding="same"), nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))


@settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.sampled_from(STEPS), min_size=2, max_size=8))
def test_random_graphs(steps):
    check_pass(randomize(Random(steps)), IMAGE, FuseModules())
