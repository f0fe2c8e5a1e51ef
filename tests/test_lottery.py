"""The lottery ticket experiment: masks nested, weights rewound, controls over other weights, one curve."""

import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress.errors import OptionError, PreconditionError
from fxcompress.passes import Distill, FineTune, FuseModules

GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(256, 8, generator=GENERATOR)
LABELS = (INPUTS @ torch.randn(8, 3, generator=GENERATOR)).argmax(1)
LOADER = [(INPUTS[i : i + 32], LABELS[i : i + 32]) for i in range(0, 256, 32)]
X = (INPUTS[:2],)


def make():
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))


class Watched(FineTune):
    """Keeps the weights that every training begins and ends with."""

    seen: list = []  # noqa: RUF012

    def run(self, graph_module, context):
        before = {name: p.detach().clone() for name, p in graph_module.named_parameters()}
        result = super().run(graph_module, context)
        Watched.seen.append((before, {name: p.detach().clone() for name, p in graph_module.named_parameters()}))
        return result


@pytest.mark.parametrize("rewind", [0, 3])
def test_a_ticket_is_the_first_weights_under_a_mask(rewind):
    Watched.seen = []
    kept = {}

    def callback(run):
        if run.step == 3:
            kept.setdefault("first", {n: p.detach().clone() for n, p in run.graph_module.named_parameters()})

    training = Watched(LOADER, epochs=2, lr=1e-2, validation=LOADER, callback=callback if rewind else None)
    curve = fxc.lottery_ticket(make, training, X, rounds=2, rate=0.5, rewind=rewind)
    assert [(p.kind, p.round) for p in curve.points] == [
        ("dense", 0), ("ticket", 1), ("reinitialized", 1), ("ticket", 2), ("reinitialized", 2)
    ]  # fmt: skip
    assert [round(p.sparsity, 2) for p in curve.points] == [0, 0.5, 0.5, 0.75, 0.75]
    (start, trained), (one, one_end), (other, other_end), (two, _), _ = Watched.seen
    for name in ("0.weight", "2.weight"):
        first = start[name]
        mask = one[name] != 0
        if not rewind:
            assert torch.equal(one[name], first * mask)
        assert torch.equal(one_end[name] != 0, mask) and torch.equal(other_end[name] != 0, mask)
        assert torch.equal(other[name] != 0, mask) and not torch.equal(other[name], one[name])
        assert not (two[name] != 0)[~mask].any()
        smallest_kept = trained[name].abs()[mask].min()
        assert trained[name].abs()[~mask].max() <= max(smallest_kept, trained[name].abs().max())
    everything = torch.cat([trained[name].abs().flatten() for name in ("0.weight", "2.weight")])
    kept_mask = torch.cat([(one[name] != 0).flatten() for name in ("0.weight", "2.weight")])
    assert everything[~kept_mask].max() <= everything[kept_mask].min()
    rows = curve.rows()
    assert [row["round"] for row in rows] == [0, 1, 2] and "reinitialized" not in rows[0]
    assert "50.0%" in str(curve) and curve.to_dict()["rewind"] == rewind


def test_seeds_are_repeatable_and_differ():
    training = FineTune(LOADER, lr=1e-2, validation=LOADER)
    curve = fxc.lottery_ticket(make, training, X, rounds=1, seeds=(0, 1, 0))
    metrics = [(p.seed, p.kind, p.metric) for p in curve.points]
    assert metrics[:3] == metrics[6:] and [m[2] for m in metrics[:3]] != [m[2] for m in metrics[3:6]]
    assert curve.rows()[1]["ticket_spread"] >= 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0.0}, "outside"),
        ({"rounds": 0}, "below 1"),
        ({"rewind": -1}, "below 0"),
        ({"seeds": ()}, "below 1"),
        ({"training": FineTune(LOADER)}, "validation="),
        ({"training": FuseModules()}, "does not train"),
        ({"training": FineTune(LOADER, validation=LOADER, checkpoint="x")}, "share one checkpoint"),
        ({"training": Distill(LOADER, validation=LOADER)}, "no teacher"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(OptionError, match=message):
        fxc.lottery_ticket(make, **({"training": FineTune(LOADER, validation=LOADER), "example_inputs": X} | options))


def test_a_model_that_is_not_random_has_nothing_to_be_held_against():
    model = make()
    with pytest.raises(PreconditionError, match="same weights under every seed"):
        fxc.lottery_ticket(lambda: model, FineTune(LOADER, validation=LOADER), X, rounds=1)


def test_a_model_without_weights_that_can_go_is_refused():
    with pytest.raises(PreconditionError, match="no weight of the model"):
        fxc.lottery_ticket(lambda: nn.LayerNorm(X[0].shape[1]), FineTune(LOADER, validation=LOADER), X, rounds=1)


def test_rewinding_behind_the_end_is_refused():
    with pytest.raises(PreconditionError, match="ended before step 99"):
        fxc.lottery_ticket(make, FineTune(LOADER, validation=LOADER), X, rewind=99)
