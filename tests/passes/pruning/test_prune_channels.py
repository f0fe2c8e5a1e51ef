"""How much goes, and which channels: ratios, targets, limits, criteria, steps; and what is refused."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress.analysis.cost import cost
from fxcompress.capture import capture
from fxcompress.compiled import latency_on
from fxcompress.errors import OptionError, PreconditionError, VerificationError
from fxcompress.graph.edit import copy_graph
from fxcompress.graph.verify import verify
from fxcompress.passes.base import PassContext
from fxcompress.passes.prune_channels import PruneChannels
from fxcompress.passes.pruning.plan import make_plan
from fxcompress.passes.pruning.remove import remove
from fxcompress.passes.pruning.select import Piece
from fxcompress.passes.pruning.target import refill
from tests.passes.pruning.oracle import dead_channels
from tests.support import kept_of, randomize


class Net(nn.Module):
    """Residual convolutions, attention with 4 heads of 8, and a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(32, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU())
        self.outer = nn.Conv2d(48, 32, 1)
        self.norm = nn.LayerNorm(32)
        self.qkv = nn.Linear(32, 96)
        self.project = nn.Linear(32, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.outer(self.inner(x))
        x = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head((x + self.project(y)).mean(1))


X = torch.randn(2, 3, 6, 6)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return randomize(Net()).eval()


@pytest.fixture(scope="module")
def captured(model):
    return capture(model, (X,))


def prune(captured, **options):
    result = PruneChannels(**options).run(copy_graph(captured), PassContext(example_inputs=[X]))
    verify(result.graph_module, shapes=True)
    assert result.graph_module(torch.randn(3, 3, 6, 6)).shape == (3, 5)
    return result


def widths(result):
    return {layer: pair for item in result.rewrites for layer, pair in item.detail["widths"].items()}


def test_local_ratio(captured):
    result = prune(captured, ratio=0.25)
    found = widths(result)
    assert found["inner.0"] == [48, 36] and found["stem.0"] == found["outer"] == found["project"] == [32, 24]
    proof = result.rewrites[0].detail["proof"]
    assert proof["applies"] and proof["relative_error"] < 1e-5 and proof["norms_over_kept_channels"] == ["norm"]
    assert result.note.startswith("proved")


def test_global_ratio_removes_as_much_in_all(captured):
    found = widths(prune(captured, ratio=0.5, scope="global"))
    removed = [1 - after / before for before, after in found.values()]
    assert max(removed) > min(removed)


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("measure", ["macs", "parameters"])
def test_targets_are_reached_and_barely(captured, scope, measure):
    before = getattr(cost(captured), measure)
    for target in (0.5, int(0.3 * before)):
        after = getattr(cost(prune(captured, scope=scope, **{measure: target}).graph_module), measure)
        allowed = target * before if target < 1 else target
        assert 0.85 * allowed < after <= allowed


def test_a_budget_that_is_left_buys_channels_back():
    gone = np.arange(6)
    pieces = [Piece(0, np.array([0, 1])), Piece(1, np.array([2, 3])), Piece(0, np.array([4])), Piece(2, np.array([5]))]

    def left(target):
        return refill(gone, pieces, lambda classes: 10 - len(classes), target).tolist()

    assert left(6) == [2, 3, 4, 5]
    assert left(4) == gone.tolist()
    assert left(7) == [2, 3, 5]  # the second piece does not fit, one of another group does
    assert left(10) == []
    assert refill(gone, [], lambda classes: 10 - len(classes), 4).tolist() == gone.tolist()


def test_a_target_in_local_scope_keeps_equal_shares():
    """No channel could return without breaking the budget, and none has a share far from the others."""
    widths_before = (32, 64, 128)
    blocks = [nn.Sequential(nn.Conv2d(a, b, 1), nn.ReLU()) for a, b in pairwise((3, *widths_before))]
    graph = capture(nn.Sequential(*blocks, nn.Conv2d(128, 5, 1)).eval(), (torch.randn(2, 3, 4, 4),))
    budget = 16 * (3 * 15 + 15 * 31 + 31 * 63 + 63 * 5)  # what the most equal shares cost
    result = PruneChannels(macs=budget).run(copy_graph(graph), PassContext())
    assert [after for _, after in widths(result).values()] == [15, 31, 63]
    assert cost(result.graph_module).macs == budget
    result = PruneChannels(macs=budget, ratios={"1.0": 0.25}, round_to=4).run(copy_graph(graph), PassContext())
    found = [after for _, after in widths(result).values()]
    assert found[1] == 48 and not any(width % 4 for width in found)
    a, b, c = found
    assert 16 * (3 * a + a * b + b * c + c * 5) <= budget < 16 * (3 * a + a * b + b * (c + 4) + (c + 4) * 5)


def test_latency_is_measured_where_compile_can(model, captured):
    with pytest.raises(PreconditionError, match="only be measured inside compile"):
        prune(captured, speedup=1.2)
    seen = []

    def latency(graph, backend):
        seen.append(backend)
        return float(cost(graph).macs)  # stands in for a clock

    pass_ = PruneChannels(speedup=2.0, backend="onnxruntime")
    result = pass_.run(copy_graph(captured), PassContext(example_inputs=[X], latency=latency))
    assert set(seen) == {"onnxruntime"} and cost(result.graph_module).macs <= cost(captured).macs / 2


def test_latency_is_that_of_an_engine(captured):
    assert latency_on([X], None, repetitions=3)(captured, "onnxruntime") > 0


def test_limits(captured):
    assert widths(prune(captured, ratio=0.4, round_to=16))["inner.0"] == [48, 32]
    by_type = widths(prune(captured, ratio=0.4, round_to={"Conv2d": 8, "Linear": 4}))
    assert by_type["inner.0"][1] % 8 == 0 and by_type["qkv"][1] % 4 == 0
    assert widths(prune(captured, ratio=0.9, min_width=20))["inner.0"] == [48, 20]
    stripped = widths(prune(captured, ratio=0.9, scope="global", max_ratio=0.5))
    assert all(after >= before / 2 for before, after in stripped.values())
    own = widths(prune(captured, ratio=0.5, ratios={"inner.*": 0.25, "stem.0": 0.0}))
    assert own["inner.0"] == [48, 36] and "stem.0" not in own


def test_ignored_layers_keep_their_channels(captured):
    result = prune(captured, ratio=0.5, ignore=("inner.*",))
    assert "inner.0" not in widths(result)
    assert {skip.code for skip in result.skipped} == {"ignored", "pinned"}
    (head,) = (skip for skip in result.skipped if skip.code == "pinned")
    assert head.site == "head" and "output of the model" in head.reason
    assert PruneChannels(ignore=["inner.*"]).ignore == ("inner.*",)


@pytest.mark.parametrize("importance", ["l1", "l2", "fpgm", "lamp", "bn_scale", "random"])
def test_criteria_of_weights(model, captured, importance):
    result = prune(captured, ratio=0.5, importance=importance, seed=3)
    again = prune(captured, ratio=0.5, importance=importance, seed=3)
    assert kept_of(result) == kept_of(again)


def test_bn_scale_keeps_the_largest_scales(model, captured):
    kept = kept_of(prune(captured, ratio=0.5, importance="bn_scale"))["inner.0.weight"][0]
    assert set(kept) == set(model.inner[1].weight.abs().topk(24).indices.tolist())


@pytest.mark.parametrize("importance", ["l1", "l2"])
def test_scales_of_norms_are_weights_of_their_channels(importance):
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    layers = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), pool, nn.Linear(6, 5)).eval()
    for weight in (layers[0].weight, layers[4].weight):
        nn.init.constant_(weight, 0.1)
    layers[1].weight.data = torch.tensor([1.0, -3.0, 0.5, 2.0, 0.1, -0.2])
    result = prune(capture(layers, (X,)), ratio=0.5, importance=importance)
    assert kept_of(result)["0.weight"][0] == [0, 1, 3]


def test_a_function_as_importance(captured):
    by_index = prune(captured, ratio=0.5, importance=lambda weight, dim: torch.arange(weight.shape[dim]))
    assert kept_of(by_index)["inner.0.weight"][0] == list(range(24, 48))
    with pytest.raises(OptionError, match=r"gave \(1,\) for 'stem.0.weight'"):
        prune(captured, importance=lambda weight, dim: torch.ones(1))
    with pytest.raises(PreconditionError, match="not finite"):
        prune(captured, importance=lambda weight, dim: torch.full((weight.shape[dim],), torch.nan))


def test_heads_or_head_size(captured):
    def sizes(result):
        (view,) = (n for n in result.graph_module.graph.nodes if n.target is torch.ops.aten.unflatten.int)
        return view.args[2]

    assert sizes(prune(captured, ratio=0.5)) == [3, 4, 4]
    assert sizes(prune(captured, ratio=0.5, attention="heads")) == [3, 2, 8]
    assert sizes(prune(captured, ratio=0.5, attention="head_size")) == [3, 4, 4]


@pytest.mark.parametrize("scope", ["local", "global"])
def test_steps_end_where_one_step_does(model, captured, scope):
    at_once, stepwise = (prune(captured, ratio=0.6, scope=scope, steps=steps) for steps in (1, 4))
    if scope == "local":
        assert widths(at_once) == widths(stepwise)
    x = torch.randn(2, 3, 6, 6)
    kept = kept_of(stepwise)
    assert max(map(max, (dims[0] for dims in kept.values() if 0 in dims))) > 30  # indices of the original model
    stepwise = prune(captured, ratio=0.6, scope=scope, steps=4, ignore=("stem.*", "outer", "project"))
    expected = dead_channels(model, kept_of(stepwise))(x)  # no norm over removed channels
    torch.testing.assert_close(stepwise.graph_module(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.0}, "outside"),
        ({"ratio": 1.0}, "outside"),
        ({"ratio": 0.5, "macs": 0.5}, "ratio and macs both"),
        ({"macs": -1.0}, "not above 0"),
        ({"speedup": 1.0}, "not above 1"),
        ({"importance": "l3"}, "no importance 'l3'"),
        ({"importance": "taylor"}, "needs data"),
        ({"reconstruct": True}, "needs data"),
        ({"round_to": 0}, "below 1"),
        ({"round_to": {"Conv": 8}}, "no type of layer 'Conv'"),
        ({"ratios": {"stem": 1.0}}, "outside"),
        ({"max_ratio": 0.0}, "outside"),
        ({"scope": "everywhere"}, "not valid"),
        ({"steps": 0}, "below 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(OptionError, match=message):
        PruneChannels(**options)


def test_what_cannot_be_done_is_refused(captured):
    with pytest.raises(OptionError, match="no layer with removable channels matches 'nowhere'"):
        prune(captured, ignore=("nowhere",))
    with pytest.raises(PreconditionError, match="cannot be reached"):
        prune(captured, macs=10)
    with pytest.raises(OptionError, match="no less than"):
        prune(captured, macs=10**12)
    broken = copy_graph(captured)
    broken.get_submodule("inner.0").weight = nn.Parameter(torch.full((48, 32, 3, 3), torch.nan))
    with pytest.raises(PreconditionError, match=r"'inner\.0\.weight' holds NaN"):
        prune(broken)


def test_nothing_to_prune_is_told():
    model = nn.Linear(4, 2).eval()
    result = PruneChannels().run(capture(model, (torch.randn(2, 4),)), PassContext())
    assert not result.changed and {skip.code for skip in result.skipped} == {"nothing_to_prune", "pinned"}


class Interleaved(nn.Module):
    """Reads every other channel: positions that a removal has to rewrite."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.head(torch.cat([x[:, 1::2], x[:, ::2]], 1))


def test_what_a_target_measures_on_a_copy_is_a_graph_that_runs():
    captured = capture(randomize(Interleaved()).eval(), (X,))
    plan = make_plan(captured)
    copied = copy_graph(captured)
    remove(copied, plan.on(copied), plan.groups[0].classes[:5])
    verify(copied, shapes=True)
    copied(X)


def test_a_target_is_refused_where_nothing_can_go():
    with pytest.raises(PreconditionError, match=r"macs|MACs.*cannot be reached: no channels"):
        fxc.compile(nn.Linear(4, 4).eval(), [PruneChannels(macs=0.5)], (torch.randn(2, 4),), progress=False)


def test_quantized_layers_stay_and_say_what_to_do(model):
    data = [torch.randn(4, 3, 6, 6) for _ in range(2)]
    passes = [fxc.passes.Quantize(data), PruneChannels()]
    report = fxc.compile(model, passes, (X,), progress=False).report.passes[-1]
    assert not report.rewrites
    told = {skip.site for skip in report.skipped if "put prune_channels before" in skip.reason}
    assert told >= {"outer", "head"}, report.skipped


class UnlikeHeads(nn.Module):
    """Queries with more heads than features per head, keys and values the other way about, a gate over all of them."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(24, 24 + 8 + 20)
        self.gate = nn.Linear(24, 60)
        self.out = nn.Linear(60, 5)

    def forward(self, x):
        q, k, v = self.qkv(x).split([24, 8, 20], -1)
        q = q.unflatten(-1, (6, 4)).transpose(1, 2)
        k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2).repeat_interleave(3, 1) for y in (k, v))
        mixed = ((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.out(mixed * torch.sigmoid(self.gate(x)))


@pytest.mark.parametrize("attention", ["auto", "heads", "head_size"])
def test_sides_that_agree_are_found(attention):
    model = randomize(UnlikeHeads()).eval()
    x = torch.randn(2, 5, 24)
    result = PruneChannels(attention=attention).run(capture(model, (x,)), PassContext())
    assert {layer for rewrite in result.rewrites for layer in rewrite.detail["widths"]} == {"qkv", "gate"}
    dead = dead_channels(model, kept_of(result))
    torch.testing.assert_close(result.graph_module(x), dead(x), rtol=1e-4, atol=1e-5)


def test_a_wrong_removal_is_caught_by_the_proof(captured, monkeypatch):
    from fxcompress.passes.pruning import shrink

    right = shrink._cut

    def wrong(tensor, indices):
        cut = right(tensor, indices)
        return nn.Parameter(cut.flip(0)) if cut.dim() == 4 else cut

    monkeypatch.setattr(shrink, "_cut", wrong)
    with pytest.raises(VerificationError, match="beyond what zeroing them does"):
        prune(captured, ratio=0.5)


def test_frozen_and_tied_weights_stay_so():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.inner, self.head = nn.Embedding(20, 16), nn.Linear(16, 24), nn.Linear(24, 16)
            self.out = nn.Linear(16, 20, bias=False)
            self.out.weight = self.embed.weight
            self.inner.weight.requires_grad_(False)

        def forward(self, tokens):
            return self.out(self.head(self.inner(self.embed(tokens)).relu()))

    model, tokens = Tied().eval(), torch.randint(0, 20, (2, 7))
    result = PruneChannels(ratio=0.5).run(capture(model, (tokens,)), PassContext(example_inputs=[tokens]))
    pruned = result.graph_module
    assert pruned.get_submodule("out").weight is pruned.get_submodule("embed").weight
    assert pruned.get_submodule("embed").weight.shape == (20, 8)
    assert not pruned.get_submodule("inner").weight.requires_grad and pruned.get_submodule("head").weight.requires_grad


def test_compile_reports_widths(model, tmp_path):
    compiled = fxc.compile(model, ["prune_channels(ratio=0.5, round_to=8)"], (X,))
    item = compiled.report.passes[0]
    assert item.text == "prune_channels(ratio=0.5, round_to=8)" and "proved" in item.note
    assert [(bar.label, bar.before, bar.after) for bar in item.widths][:1] == [("stem.0", 32, 16)]
    page = compiled.report.save(tmp_path / "report.html").read_text()
    assert "width of" in page and "32 → 16" in page
    assert fxc.reporting.Report.from_dict(compiled.report.to_dict()).passes[0].widths == item.widths


def test_halves_of_a_layer_that_go_different_ways_lose_their_share_each():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.long = nn.Conv2d(3, 16, 1), nn.Conv2d(3, 32, 1)
            self.a, self.b, self.head = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(32, 4, 1)

        def forward(self, x):
            left, right = self.stem(x).chunk(2, 1)
            both = torch.cat([left + self.a(left), right + self.b(right), left, right], 1)
            return self.head(self.long(x) + both)

    x = torch.randn(2, 3, 4, 4)
    result = PruneChannels(ratio=0.5).run(capture(Halves().eval(), (x,)), PassContext(example_inputs=[x]))
    found = widths(result)
    assert found == {"stem": [16, 8], "long": [32, 16], "a": [8, 4], "b": [8, 4]}
    assert all(item.detail["after"] * 2 == item.detail["before"] for item in result.rewrites)
