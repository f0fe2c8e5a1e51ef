"""Optimizer state follows the weights that were cut."""

import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress.errors import PreconditionError
from fxcompress.training.optimizer import kept_channels, prune_optimizer


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(128, 4)
    )


X, Y = torch.randn(6, 3, 8, 8), torch.randint(0, 4, (6,))


def step(model, optimizer):
    model.train()
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(X), Y).backward()
    optimizer.step()


MAKERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_state_is_cut_as_the_weights_were(kind):
    model = net()
    optimizer = MAKERS[kind]([{"params": model[0].parameters(), "lr": 0.02}, {"params": model[1:].parameters()}])
    for _ in range(3):
        step(model, optimizer)
    before = {id(p): dict(state) for p, state in optimizer.state.items()}
    compiled = fxc.compile(model.eval(), [fxc.passes.PruneChannels(ratio=0.5)], (X,))
    rewrites = compiled.report.passes[0].rewrites
    pruned = prune_optimizer(optimizer, model, compiled.module, rewrites)
    assert type(pruned) is type(optimizer) and pruned.param_groups[0]["lr"] == 0.02
    kept = kept_channels(rewrites)["0.weight"][0]
    weight, old = compiled.module.get_submodule("0").weight, model[0].weight
    for key, value in pruned.state[weight].items():
        expected = before[id(old)][key]
        assert torch.equal(value, expected[kept] if expected.dim() else expected)
    step(compiled.module, pruned)
    assert all(
        torch.equal(a, b)
        for p in model.parameters()
        for a, b in zip(optimizer.state[p].values(), before[id(p)].values(), strict=True)
        if isinstance(a, torch.Tensor)
    )


def test_strangers_and_factored_state_are_refused():
    model = net().eval()
    compiled = fxc.compile(model, [fxc.passes.PruneChannels(ratio=0.5)], (X,))
    rewrites = compiled.report.passes[0].rewrites
    with pytest.raises(PreconditionError, match="is not the model's"):
        prune_optimizer(torch.optim.SGD(net().parameters(), lr=0.1), model, compiled.module, rewrites)
    factored = torch.optim.Adafactor(model.parameters(), lr=0.1)
    step(model, factored)
    with pytest.raises(PreconditionError, match="cannot be cut"):
        prune_optimizer(factored, model, compiled.module, rewrites)


def test_state_follows_two_passes():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer)
    for parameter in model.parameters():  # told apart by what they are: state that equals its weight
        optimizer.state[parameter]["momentum_buffer"] = parameter.detach().clone()
    twice = [fxc.passes.PruneChannels(ratio=0.5), fxc.passes.PruneChannels(ratio=0.25)]
    compiled = fxc.compile(model.eval(), twice, (X,))
    rewrites = [rewrite for done in compiled.report.passes for rewrite in done.rewrites]
    pruned = prune_optimizer(optimizer, model, compiled.module, rewrites)
    assert compiled.module.get_submodule("0").weight.shape[0] == 6
    for parameter, state in pruned.state.items():
        assert torch.equal(state["momentum_buffer"], parameter)
