"""Rounds of passes: schedules that compose, targets, undoing, records, and text."""

import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress.analysis.sparsity import sparsity
from fxcompress.errors import OptionError
from fxcompress.passes import FineTune, FuseModules, Iterate, PruneChannels, SparsifyWeights

X = torch.randn(2, 16)
GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(128, 16, generator=GENERATOR)
LABELS = (INPUTS @ torch.randn(16, 4, generator=GENERATOR)).argmax(1)
LOADER = [(INPUTS[i : i + 32], LABELS[i : i + 32]) for i in range(0, 128, 32)]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)).eval()


def test_prune_and_recover_until_a_target(model):
    rounds = Iterate(
        [PruneChannels(ratio=0.25), FineTune(LOADER, epochs=1, lr=1e-2)],
        steps=8,
        until={"parameters": 0.5},
        validation=LOADER,
    )
    compiled = fxc.compile(model, [FuseModules(), rounds], (X,))
    told = compiled.report.passes[1]
    assert told.after.parameters <= 0.5 * told.before.parameters
    assert "the target was reached in round 2" in told.note
    assert [site.detail["kept_round"] for site in told.rewrites] == [True, True]
    assert told.rewrites[1].detail["metric"] > told.rewrites[0].detail["metric"] - 0.5
    assert [curve.name for curve in told.curves] == ["parameters", "accuracy"] and len(told.curves[1].points) == 3
    assert [step.text.partition(":")[0] for step in told.steps] == ["round 1"] * 2 + ["round 2"] * 2
    assert told.steps[0].after.parameters < told.steps[0].before.parameters
    assert fxc.Report.from_dict(compiled.report.to_dict()).passes[1].steps[3].name == "fine_tune"
    assert "round 2: prune_channels" in str(compiled.report)
    assert told.text.startswith(
        f"iterate(passes=(prune_channels(ratio=0.25), fine_tune(lr=0.01, loader=<{len(LOADER)} batches>))"
    )
    assert told.options["passes"][0]["prune_channels"]["ratio"] == 0.25


def test_compound_shares_come_to_the_whole(model):
    rounds = Iterate([PruneChannels(ratio=0.75)], steps=2, schedule={"ratio": "compound"})
    made = fxc.compile(model, [rounds], (X,)).module
    assert [made.get_submodule(name).out_features for name in "02"] == [16, 16]


@pytest.mark.parametrize(
    ("ramp", "expected"),
    [
        ("linear", [0.3, 0.6, 0.9]),
        ("cubic", [0.633, 0.867, 0.9]),
        ("geometric", [0.536, 0.785, 0.9]),
        ((0.2, 0.5, 0.8),) * 2,
    ],
)
def test_ramps(model, ramp, expected):
    seen = []
    rounds = Iterate(
        [SparsifyWeights(sparsity=0.9)],
        steps=3,
        schedule={"sparsity": ramp},
        until=lambda told: seen.append(told.sparsity) or False,
    )
    fxc.compile(model, [rounds], (X,))
    assert seen == pytest.approx(list(expected), abs=2e-3)


def test_zeros_stay_through_all_rounds(model):
    rounds = Iterate(
        [SparsifyWeights(sparsity=0.9), FineTune(LOADER, lr=1e-2)],
        steps=4,
        schedule={"sparsity": "cubic"},
        until={"sparsity": 0.85},
    )
    compiled = fxc.compile(model, [rounds], (X,))
    assert 0.85 <= sparsity(compiled.module).share < 0.9
    assert "round 3" in compiled.report.passes[0].note


def test_a_round_that_loses_too_much_is_undone(model):
    figures = iter([0.9, 0.88, 0.7])
    rounds = Iterate(
        [PruneChannels(ratio=0.25)], steps=5, until={"drop": 0.05}, validation=lambda _: next(figures), better="higher"
    )
    compiled = fxc.compile(model, [rounds], (X,))
    told = compiled.report.passes[0]
    assert compiled.module.get_submodule("0").out_features == 48
    assert [site.result for site in told.rewrites] == ["kept", "undone"]
    assert "was undone" in told.note and len(told.steps) == 2


def test_a_metric_that_is_no_number_is_a_loss_and_a_target_missed_is_said(model):
    passes = [PruneChannels(ratio=0.25)]
    found = iter([1.0, float("nan")])
    undone = Iterate(passes, steps=2, validation=lambda _: next(found), better="higher", until={"drop": 0.5})
    told = fxc.compile(model, [undone], (X,)).report.passes[0]
    assert "lost too much" in told.note and [skip.code for skip in told.skipped][-1] == "no_round_kept"
    missed = Iterate(passes, steps=1, until={"parameters": 0.01})
    assert "the target was not reached" in fxc.compile(model, [missed], (X,)).report.passes[0].note


def test_nothing_is_kept_where_the_first_round_loses_too_much(model):
    figures = iter([0.9, 0.1])
    rounds = Iterate(
        [PruneChannels(ratio=0.5)], until={"drop": 0.05}, validation=lambda _: next(figures), better="higher"
    )
    told = fxc.compile(model, [rounds], (X,)).report.passes[0]
    assert not told.rewrites and told.skipped[-1].code == "no_round_kept"
    assert told.after.parameters == told.before.parameters


def test_stops_where_nothing_changes():
    told = fxc.compile(nn.Linear(4, 4).eval(), [Iterate(["fuse_modules"], steps=3)], (torch.randn(2, 4),))
    assert len(told.report.passes[0].steps) == 1
    assert {skip.code for skip in told.report.passes[0].skipped} >= {"no_round_kept"}


def test_each_round_has_checkpoints_of_its_own(model, tmp_path):
    rounds = Iterate([PruneChannels(ratio=0.25), FineTune(LOADER, checkpoint=str(tmp_path))], steps=2)
    for _ in range(2):  # the second time every round finds its own
        fxc.compile(model, [rounds], (X,))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-1", "round-2"]


def test_from_text(model):
    rounds = Iterate(["prune_channels(ratio=0.5)", {"sparsify_weights": {"sparsity": 0.5}}], steps=1)
    compiled = fxc.compile(model, [rounds], (X,))
    assert compiled.module.get_submodule("0").out_features == 32
    text = "iterate(passes=('prune_channels(ratio=0.5)',), steps=2, until={'macs': 0.5})"
    assert fxc.compile(model, [text], (X,)).module.get_submodule("0").out_features == 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"passes": []}, "no pass to repeat"),
        ({"steps": 0}, "below 1"),
        ({"until": {"mac": 0.5}}, "did you mean 'macs'"),
        ({"until": {"macs": -1.0}}, "not above 0"),
        ({"until": {"drop": 0.1}}, "needs data"),
        ({"schedule": {"rate": "cubic"}}, "did you mean 'ratio'"),
        ({"schedule": {"ratio": "square"}}, "no ramp"),
        ({"schedule": {"ratio": (0.1,)}}, "1 values for 3 steps"),
        ({"schedule": {"macs": "cubic"}}, "to lead to"),
        ({"metric": "acuracy"}, "did you mean 'accuracy'"),
        ({"better": "more"}, "unknown"),
        ({"passes": ["prune_chanels"]}, "did you mean 'prune_channels'"),
        ({"passes": [3]}, "is no pass"),
        ({"until": {"drop": 0.1}, "validation": lambda _: 1.0}, "which way"),
        ({"metric": "top5"}, "nothing to measure on"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(OptionError, match=message):
        Iterate(**({"passes": [PruneChannels(ratio=0.5)]} | options))
