"""Importance from data: gradients are of the loss asked for, and the user's model is not touched."""

import pytest
import torch
from torch import nn

from fxcompress.capture import capture
from fxcompress.errors import PreconditionError
from fxcompress.graph.edit import copy_graph
from fxcompress.passes.base import PassContext
from fxcompress.passes.prune_channels import PruneChannels
from fxcompress.passes.pruning.data_importance import data_criterion
from tests.support import kept_of


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).eval()


@pytest.fixture
def captured(model):
    return capture(model, (torch.randn(2, 6),))


def labelled(count, size=8):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 6, generator=generator), torch.randint(0, 3, (size,), generator=generator))
        for _ in range(count)
    ]


def test_taylor_is_the_first_order_change_of_the_loss(model, captured):
    data = labelled(3)
    score = data_criterion("taylor", captured, data, None, None)("0.weight", model[0].weight, 0)
    losses = torch.stack([nn.functional.cross_entropy(model(x), y) for x, y in data]).mean()
    (gradient,) = torch.autograd.grad(losses, model[0].weight)
    torch.testing.assert_close(score, (gradient * model[0].weight).sum(1).abs().detach())


def test_obd_takes_the_mean_square(model, captured):
    data = labelled(3)
    score = data_criterion("obd", captured, data, None, 2)("2.weight", model[2].weight, 1)
    squares = []
    for x, y in data[:2]:
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), model[2].weight)
        squares.append(gradient.square())
    expected = 0.5 * (model[2].weight.square() * torch.stack(squares).mean(0)).sum(0)
    torch.testing.assert_close(score, expected.detach())


def test_dead_channels_go_first(model):
    with torch.no_grad():
        model[2].weight[:, 8:] = 0  # nobody reads these
        model[0].weight[8:] *= 100  # though their weights are large
    captured = capture(model, (torch.randn(2, 6),))
    for importance in ("taylor", "activation"):
        pass_ = PruneChannels(importance=importance, calibration=labelled(2))
        result = pass_.run(copy_graph(captured), PassContext())
        assert kept_of(result)["0.weight"][0] == list(range(8))


def test_frozen_weights_score_and_no_gradient_is_left(model, captured):
    model.requires_grad_(False)
    result = PruneChannels(importance="taylor", calibration=labelled(1)).run(copy_graph(captured), PassContext())
    assert result.changed and all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_a_loss_of_ones_own(captured):
    seen = []

    def loss(outputs, batch):
        seen.append(batch)
        return (outputs - batch["target"]).square().mean()

    data = [{"input": torch.randn(4, 6), "target": torch.randn(4, 3)}]
    assert PruneChannels(importance="taylor", calibration=data, loss=loss).run(copy_graph(captured), PassContext())
    assert seen == data
    with pytest.raises(PreconditionError, match="no scalar"):
        data_criterion("taylor", captured, data, lambda outputs, batch: outputs.detach().sum(), None)
    with pytest.raises(PreconditionError, match="the loss is nan"):
        data_criterion("taylor", captured, data, lambda outputs, batch: outputs.sum() * torch.nan, None)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "holds no batch"),
        (torch.randn(4, 6), "not a series of batches"),
        (3, "cannot be iterated"),
        ([torch.randn(4, 7)], "captured with"),
        ([{"image": torch.randn(4, 6)}], "gives no inputs"),
        ([torch.randn(4, 6, dtype=torch.float64)], "captured with"),
    ],
)
def test_data_that_does_not_fit(captured, data, message):
    with pytest.raises(PreconditionError, match=message):
        data_criterion("obd", captured, data, None, None)


def test_a_generator_is_read_once(captured):
    data = (batch for batch in labelled(2))
    data_criterion("obd", captured, data, None, None)
    with pytest.raises(PreconditionError, match="read once is empty"):
        data_criterion("obd", captured, data, None, None)


def test_reconstruction_comes_closer(captured):
    torch.manual_seed(2)
    base = torch.randn(64, 3)
    data = [torch.cat([base @ torch.randn(3, 6) for _ in range(1)], 1) for _ in range(4)]
    outputs = [captured(batch) for batch in data]

    def error(**options):
        result = PruneChannels(ratio=0.5, importance="l1", **options).run(copy_graph(captured), PassContext())
        found = [(result.graph_module(x) - y).square().mean() for x, y in zip(data, outputs, strict=True)]
        return torch.stack(found).mean().item(), result

    plain, _ = error()
    fitted, result = error(calibration=data, reconstruct=True)
    assert fitted < 0.5 * plain
    assert "1 layers refitted" in result.note
    (told,) = (item.detail["refitted"] for item in result.rewrites if "refitted" in item.detail)
    assert told["2"][1] < told["2"][0]


def test_reconstruction_of_convolutions_is_the_least_squares_fit():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3, padding=1, stride=2, bias=False)).eval()
    x = torch.randn(16, 3, 9, 9)
    pass_ = PruneChannels(ratio=0.5, calibration=(b for b in [x[:8], x[8:]]), reconstruct=True)
    result = pass_.run(capture(model, (x,)), PassContext())
    pruned = result.graph_module
    patches = nn.functional.unfold(pruned.get_submodule("0")(x).relu(), 3, padding=1, stride=2)
    rows = patches.transpose(1, 2).reshape(-1, patches.shape[1])
    wanted = model(x).flatten(2).transpose(1, 2).reshape(-1, 5)
    expected = torch.linalg.lstsq(rows.double(), wanted.double()).solution.T
    torch.testing.assert_close(pruned.get_submodule("2").weight.flatten(1).double(), expected, rtol=1e-3, atol=1e-4)
