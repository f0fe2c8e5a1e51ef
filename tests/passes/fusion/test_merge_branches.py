"""Parallel linear branches that are summed become one."""

import pytest
import torch
from torch import nn

from fxcompress.passes.fuse_modules import FuseModules
from tests.support import check_pass, randomize

MERGE = FuseModules(rules=("merge_branches",))
IMAGE = (torch.randn(2, 4, 6, 6),)


class Sum(nn.Module):
    """The sum of branches over one input; None is the identity."""

    def __init__(self, *branches, forward=None):
        super().__init__()
        self.branches = nn.ModuleList(branch for branch in branches if branch is not None)
        self.identity = None in branches
        self._forward = forward

    def forward(self, x):
        if self._forward is not None:
            return self._forward(*self.branches, x)
        values = [branch(x) for branch in self.branches] + [x] * self.identity
        total = values[0]
        for value in values[1:]:
            total = total + value
        return total.relu()


def conv(kernel, **options):
    return nn.Conv2d(4, 4, kernel, **options)


def norm(*layers):
    return nn.Sequential(*layers, nn.BatchNorm2d(4))


def test_a_repvgg_block_before_and_after():
    check_pass(
        randomize(Sum(norm(conv(3, padding=1, bias=False)), norm(conv(1, bias=False)), norm())),
        IMAGE,
        FuseModules(),
        after="""
            graph(x: f32[batch, 4, 6, 6]):
              branches_0_0: f32[batch, 4, 6, 6] = Conv2d(4, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1)) @branches.0.0 (x)
              relu: f32[batch, 4, 6, 6] = aten.relu(branches_0_0)
              return relu
        """,  # noqa: E501
        rewrites=3,
        skipped=(),
    )


def test_the_account():
    model = Sum(conv(1), conv(3, padding=1), None).eval()
    (rewrite,) = check_pass(model, IMAGE, MERGE, rewrites=["branches.1"], skipped=()).rewrites
    assert rewrite.result == "3 parallel branches became one"
    assert rewrite.detail == {
        "rule": "merge_branches",
        "layers": ["branches.1", "branches.0", "x"],
        "identity": True,
        "weight": [4, 4, 3, 3],
    }


@pytest.mark.parametrize(
    "branches",
    [
        pytest.param((conv((3, 3), padding=1), conv((1, 3), padding=(0, 1)), conv((3, 1), padding=(1, 0))), id="ACNet"),
        pytest.param((conv(5, padding=2), conv(3, padding=1), conv(1)), id="nested kernels"),
        pytest.param((conv(3, padding=2), conv(1, padding=1)), id="more padding"),
        pytest.param((conv(3, stride=2, padding=1), conv(1, stride=2)), id="stride"),
        pytest.param((conv(3, padding=2, dilation=2), conv(1), None), id="dilation"),
        pytest.param((conv(5, padding=4, dilation=2), conv(3, padding=2, dilation=2)), id="one dilation, two kernels"),
        pytest.param((conv(3, padding=1, groups=2), conv(1, groups=2), None), id="groups"),
        pytest.param((conv(3, padding=1, groups=4, bias=False), norm(), None), id="depthwise, norm and identity"),
        pytest.param((conv(1, bias=False), conv(1, bias=False)), id="no bias anywhere"),
        pytest.param((conv(3, padding=1), None), id="residual around one convolution"),
    ],
)
def test_kernels_that_nest(branches):
    result = check_pass(randomize(Sum(*branches)), IMAGE, MERGE, rewrites=1, skipped=())
    assert len([node for node in result.graph_module.graph.nodes if node.op == "call_module"]) == 1


@pytest.mark.parametrize("rank", [1, 3])
def test_other_ranks(rank):
    kind = getattr(nn, f"Conv{rank}d")
    model = Sum(kind(4, 4, 3, padding=1), kind(4, 4, 1), None)
    check_pass(model.eval(), (torch.randn(2, 4, *(5,) * rank),), MERGE, rewrites=1, skipped=())


def test_sums_of_sums():
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = Sum(conv(3, padding=1), conv(1)), Sum(conv(3, padding=1), conv(1))

        def forward(self, x):
            y = self.one.branches[0](x) + self.one.branches[1](x)
            z = y.tanh()
            return y + self.two.branches[0](z) + self.two.branches[1](z)  # y is a sum that is merged, too

    check_pass(Stack().eval(), IMAGE, MERGE, rewrites=2, skipped=())


def test_the_identity_may_be_what_another_layer_made():
    model = Sum(conv(1), conv(3, padding=1), forward=lambda a, b, x: (y := a(x)) + b(y))
    check_pass(model.eval(), IMAGE, MERGE, rewrites=["branches.1"], skipped=())


def test_linear_layers():
    model = Sum(nn.Linear(5, 5), nn.Linear(5, 5, bias=False), None)
    check_pass(model.eval(), (torch.randn(2, 3, 5),), MERGE, rewrites=1, skipped=())


@pytest.mark.parametrize(
    "forward",
    [
        pytest.param(lambda a, b, x: a(x) - b(x), id="difference"),
        pytest.param(lambda a, b, x: torch.sub(x.relu(), torch.add(a(x), b(x), alpha=3), alpha=2), id="factors"),
        pytest.param(lambda a, b, x: (x.relu() + a(x)) + (x.tanh() - b(x)) + x + x, id="terms in between"),
        pytest.param(lambda a, b, x: (y := a(x) + b(x)) + y, id="a sum added to itself"),
    ],
)
def test_sums_of_every_form(forward):
    result = check_pass(Sum(conv(1), conv(3, padding=1), forward=forward).eval(), IMAGE, MERGE, rewrites=1, skipped=())
    assert len([node for node in result.graph_module.graph.nodes if node.op == "call_module"]) == 1


def tied():
    net = Sum(conv(1), conv(1), conv(1))
    net.branches[1].weight = net.branches[0].weight
    return net


def read_outside():
    return Sum(conv(3, padding=1), conv(1), forward=lambda a, b, x: ((y := b(x)) + a(x)) * y)


def called_elsewhere():
    return Sum(conv(3, padding=1), conv(1), forward=lambda a, b, x: (a(x) + b(x)) * b(x.relu()))


@pytest.mark.parametrize(
    ("model", "rewrites", "skipped"),
    [
        (Sum(conv((1, 7), padding=(0, 3)), conv((7, 1), padding=(3, 0))), 0, {"branches.1": "geometry"}),
        (Sum(conv(3, padding=1), conv(3, padding=2, dilation=2)), 0, {"branches.1": "geometry"}),
        (Sum(conv(3, padding=1), conv(1, groups=2)), 0, {"branches.1": "geometry"}),
        (Sum(conv(3, padding=1), nn.Linear(6, 6)), 0, {"branches.1": "geometry"}),
        (Sum(conv(3, padding="same"), conv(1)), 0, {"branches.1": "geometry"}),
        (Sum(conv(3, padding=1), nn.BatchNorm2d(4, track_running_stats=False)), 0, {"branches.1": "batch_statistics"}),
        (read_outside(), 0, {"branches.1": "shared_value"}),
        (called_elsewhere(), 0, {"branches.1": "shared_layer"}),
        (tied(), 0, {"branches.0": "tied_weight", "branches.1": "tied_weight"}),
        (Sum(conv(3, padding=1), forward=lambda a, x: a(x) + x.relu()), 0, {"graph": "nothing_to_fuse"}),
        (Sum(conv(3, padding=1), conv(1), tied()), 1, None),
    ],
)
def test_not_legal(model, rewrites, skipped):
    check_pass(model.eval(), IMAGE, MERGE, rewrites=rewrites, skipped=skipped)


def test_branches_that_broadcast_are_left():
    model = Sum(conv(3, padding=1), nn.Conv2d(4, 1, 1), conv(1))
    check_pass(model.eval(), IMAGE, MERGE, rewrites=1, skipped={"branches.1": "broadcast"})


def test_frozen_branches_stay_frozen():
    model = Sum(conv(3, padding=1), conv(1)).requires_grad_(False).eval()
    graph_module = check_pass(model, IMAGE, MERGE, rewrites=1).graph_module
    assert not any(p.requires_grad for p in graph_module.parameters())
