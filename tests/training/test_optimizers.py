"""Optimizers of runs: one kernel per step where that is right, and the same weights as without it everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

from fxcompress.capture import capture
from fxcompress.training.loop import train
from fxcompress.training.objective import Objective
from fxcompress.training.options import TrainingOptions

BATCHES = [
    (torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(index)), torch.tensor([0, 1, 2, 1]))
    for index in range(3)
]
BY_HAND: dict[str, Any] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, fused=False),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.1, fused=False, foreach=False),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.1, fused=False, foreach=False),
}


def _network(form: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )
    if form == "channels_last":
        model.to(memory_format=torch.channels_last)
    if form == "not_dense":  # every second column of a wider tensor
        model[3].weight = nn.Parameter(torch.randn(3, 4, 3, 6)[..., ::2])
    return model.eval()


def _trained(form: str, optimizer: Any, **options: Any) -> tuple[fx.GraphModule, list[torch.optim.Optimizer]]:
    graph = capture(_network(form), (torch.zeros(2, 3, 5, 5),))
    used: list[torch.optim.Optimizer] = []
    told: dict[str, Any] = {"epochs": 2, "lr": 0.1, "weight_decay": 0.01, "schedule": "constant", **options}
    before = told.pop("callback", None)

    def callback(run: Any) -> None:
        used[:] = [run.optimizer]
        if before is not None:
            before(run)

    train(graph, BATCHES, Objective(), TrainingOptions(optimizer=optimizer, callback=callback, **told))
    return graph, used


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("form", ["contiguous", "channels_last", "not_dense"])
def test_the_weights_do_not_depend_on_the_kernel(name: str, form: str) -> None:
    ours, used = _trained(form, name)
    other, _ = _trained(form, BY_HAND[name])
    assert used[0].param_groups[0]["fused"] is (True if form != "not_dense" else None)
    theirs = other.state_dict()
    for path, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, theirs[path], rtol=1e-4, atol=1e-5, msg=path)


@pytest.mark.parametrize("name", BY_HAND)
def test_a_checkpoint_keeps_the_layout_of_momenta(name: str, tmp_path: Path) -> None:
    """Files hold tensors in the order of their dims; a kernel that reads by place would mix channels up."""

    class Stop(Exception):
        pass

    def stop(run: Any) -> None:
        if run.step == 4:
            raise Stop

    kept: dict[str, Any] = {"checkpoint_every": 1}
    whole, _ = _trained("channels_last", name, checkpoint=tmp_path / "whole", **kept)
    with pytest.raises(Stop):
        _trained("channels_last", name, checkpoint=tmp_path / "cut", callback=stop, **kept)
    resumed, _ = _trained("channels_last", name, checkpoint=tmp_path / "cut", **kept)
    theirs = resumed.state_dict()
    for path, tensor in whole.state_dict().items():
        assert torch.equal(tensor, theirs[path]), path


def test_sparse_gradients_train() -> None:
    """Few rows of an embedding are read; SGD takes such gradients as they are."""

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(20, 4, sparse=True), nn.Linear(4, 2)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.head(self.table(tokens).mean(1))

    torch.manual_seed(0)
    model = Words().eval()
    graph = capture(model, (torch.zeros(2, 3, dtype=torch.int64),))
    data = [(torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([0, 1]))]
    options = TrainingOptions(optimizer="sgd", lr=0.1, momentum=0.0, steps=3, epochs=3, schedule="constant")
    train(graph, data, Objective(), options)
    moved = (graph.get_parameter("table.weight") != model.table.weight).any(1)
    assert moved.nonzero().flatten().tolist() == [1, 2, 3, 4, 5, 6]
