"""Sparse weights: which go, what the pattern is, that they stay, and what is left alone."""

import math

import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress.analysis.sparsity import follows, masks, sparse_layers, sparse_weights, sparsity
from fxcompress.capture import capture
from fxcompress.errors import OptionError, PreconditionError
from fxcompress.graph.edit import copy_graph
from fxcompress.passes import FineTune, FuseModules, PruneChannels, SparsifyWeights
from fxcompress.passes.base import PassContext
from tests.support import check_pass, randomize


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.grouped = nn.Conv2d(8, 16, 3, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.up = nn.ConvTranspose2d(16, 12, 2)
        self.fc = nn.Linear(12, 10)

    def forward(self, x):
        x = self.up(self.norm(self.grouped(self.stem(x).relu())).relu()).relu()
        return self.fc(x.mean((2, 3)))


X = torch.randn(2, 3, 10, 10)
DATA = [torch.randn(4, 3, 10, 10) for _ in range(3)]


@pytest.fixture
def model():
    return randomize(Net())


def run(pass_, graph):
    return pass_.run(copy_graph(graph), PassContext())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sparsity": 0.9, "scope": "global"},
        {"method": "wanda", "calibration": DATA},
        {"method": "wanda", "calibration": DATA, "scope": "global"},
        {"method": "sparsegpt", "calibration": DATA, "sparsity": 0.3},
        {"pattern": "2:4"},
        {"pattern": "1:2", "method": "wanda", "calibration": DATA},
        {"pattern": "2:4", "method": "sparsegpt", "calibration": DATA},
        {"sparsities": {"fc": 0.0, "stem": 0.8}, "ends": "dense"},
    ],
)
def test_every_method_keeps_what_a_pass_owes(model, options):
    check_pass(model, (X,), SparsifyWeights(**options))


def test_counts_are_exact_and_the_least_go(model):
    result = run(SparsifyWeights(sparsity=0.75), capture(model, (X,)))
    for rewrite in result.rewrites:
        old, new = (m.get_submodule(rewrite.site).weight.detach() for m in (model, result.graph_module))
        zero = new == 0
        assert int(zero.sum()) == round(0.75 * old.numel()) == rewrite.detail["zeros"]
        assert old[zero].abs().max() <= old[~zero].abs().min()
        assert torch.equal(new[~zero], old[~zero])
    assert "latency stays" in result.note and "75.0%" in result.note


def test_global_scope_ranks_all_layers_together(model):
    result = run(SparsifyWeights(sparsity=0.5, scope="global"), capture(model, (X,)))
    pairs = [
        (model.get_submodule(r.site).weight.detach().flatten(), result.graph_module.get_submodule(r.site).weight != 0)
        for r in result.rewrites
    ]
    old, kept = torch.cat([p[0] for p in pairs]).abs(), torch.cat([p[1].flatten() for p in pairs])
    assert int((~kept).sum()) == round(0.5 * len(old))
    assert old[~kept].max() <= old[kept].min()
    shares = [r.detail["sparsity"] for r in result.rewrites]
    assert max(shares) - min(shares) > 0.05


def test_no_layer_loses_all_in_global_scope(model):
    with torch.no_grad():
        model.fc.weight *= 1e-6
    result = run(SparsifyWeights(sparsity=0.5, scope="global", max_sparsity=0.9), capture(model, (X,)))
    assert sparsity(result.graph_module).layers["fc"] == 0.9
    result = run(SparsifyWeights(sparsity=0.5, scope="global", max_sparsity=1.0), capture(model, (X,)))
    assert sparsity(result.graph_module).layers["fc"] == 1
    assert "Nothing is left of 'fc'" in result.note


def test_wanda_weighs_by_the_inputs():
    layer = nn.Linear(8, 6, bias=False)
    data = torch.randn(64, 8)
    data[:, ::2] *= 100
    result = run(SparsifyWeights(method="wanda", calibration=[data]), capture(layer.eval(), (data[:2],)))
    kept = next(iter(masks(result.graph_module).values()))
    score = layer.weight.detach().abs() * data.square().mean(0).sqrt()
    assert (kept.sum(1) == 4).all()  # of every output half
    assert torch.equal(kept, torch.zeros_like(kept).scatter(1, score.topk(4, 1).indices, True))


def test_wanda_reads_the_right_group(model):
    graph = capture(model, (X,))
    result = run(SparsifyWeights(method="wanda", calibration=DATA, sparsity=0.5), graph)
    with torch.no_grad():
        seen = torch.cat([model.stem(x).relu() for x in DATA])
    norm = seen.square().mean((0, 2, 3)).sqrt()
    score = model.grouped.weight.detach().abs()
    score = score * torch.cat([norm[:4].expand(8, 4), norm[4:].expand(8, 4)])[:, :, None, None]
    kept = masks(result.graph_module)["grouped.weight"]
    expected = torch.zeros(16, 36, dtype=torch.bool).scatter(1, score.flatten(1).topk(18, 1).indices, True)
    assert torch.equal(kept.flatten(1), expected)


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_sparsegpt_loses_less_than_magnitude_on_the_data(pattern):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(16, 12)).eval()
    data = [torch.randn(256, 8, 3, 3).cumsum(1) for _ in range(4)]  # correlated, as activations are
    graph = capture(model, (data[0],))
    expected = torch.cat([model[0](x) for x in data]).detach()
    errors = {}
    for method in ("magnitude", "sparsegpt"):
        options = {"calibration": data} if method != "magnitude" else {}
        result = run(SparsifyWeights(method=method, pattern=pattern, ignore=("2",), **options), graph)
        made = result.graph_module.get_submodule("0")
        assert int((made.weight == 0).sum()) == made.weight.numel() // 2
        errors[method] = (torch.cat([made(x) for x in data]) - expected).norm() / expected.norm()
    assert errors["sparsegpt"] < 0.6 * errors["magnitude"]
    found = result.rewrites[0].detail["output_error"]  # without the bias, and with all patches
    assert 0 < found < 1


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_two_of_four_lie_along_the_inputs(model, method):
    data = {} if method == "magnitude" else {"calibration": DATA}
    result = run(SparsifyWeights(pattern="2:4", method=method, **data), capture(model, (X,)))
    weight = result.graph_module.get_submodule("grouped").weight
    assert ((weight != 0).reshape(16, 1, 4, 3, 3).sum(2) == 2).all()
    assert ((result.graph_module.get_submodule("fc").weight != 0).reshape(10, 3, 4).sum(2) == 2).all()
    assert not follows(weight, 2, 2, 4) and not follows(model.grouped.weight, 1, 2, 4)
    codes = {skip.site: skip.code for skip in result.skipped}
    assert codes["stem"] == "indivisible"
    transposed = result.graph_module.get_submodule("up").weight
    if method == "sparsegpt":
        assert codes["up"] == "transposed" and bool(transposed.all())
    else:
        assert ((transposed != 0).reshape(4, 4, -1).sum(1) == 2).all()


def test_masks_outlive_fusion_saving_and_channel_removal(model, tmp_path):
    passes = [SparsifyWeights(pattern="2:4"), FuseModules(), PruneChannels(ratio=0.5, round_to=4)]
    compiled = fxc.compile(model, passes, (X,))
    compiled.save(tmp_path / "saved")
    for module in (compiled.module, fxc.load(tmp_path / "saved").module, copy_graph(compiled.module)):
        assert sparse_weights(module)["grouped.weight"] == "2:4"
        held = masks(module)["grouped.weight"]
        assert held.shape == module.get_submodule("grouped").weight.shape
        assert 0 < held.float().mean() < 0.8
    whole = fxc.compile(model, passes[:2], (X,)).module
    assert sparse_layers(whole, 2, 4) == ["grouped", "up", "fc"]


def test_a_layer_that_is_gone_is_not_held(model):
    linear = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    passes = [SparsifyWeights(), fxc.passes.FactorizeLinear(rank=2)]
    module = fxc.compile(linear, passes, (torch.randn(2, 64),)).module
    assert set(masks(module)) <= {name for name, _ in module.named_parameters()}


def test_more_keeps_the_zeros_there_are(model):
    graph = capture(model, (X,))
    less = run(SparsifyWeights(sparsity=0.5), graph).graph_module
    more = run(SparsifyWeights(sparsity=0.8), less).graph_module
    for name, held in masks(less).items():
        assert not (masks(more)[name] & ~held).any()
    again = run(SparsifyWeights(sparsity=0.5), more)
    assert not again.changed and {skip.code for skip in again.skipped} == {"sparse_enough"}


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.weight = self.a.weight
            self.embed, self.head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens):
            return self.head(self.b(self.a(self.embed(tokens))))

    model = Tied().eval()
    tokens = torch.randint(0, 10, (2, 5))
    result = check_pass(model, (tokens,), SparsifyWeights(), rewrites=["a"], skipped={"head": "tied_weight"})
    module = result.graph_module
    assert module.get_submodule("a").weight is module.get_submodule("b").weight
    assert result.rewrites[0].detail["tied"] == ["a", "b"]
    with_data = SparsifyWeights(method="sparsegpt", calibration=[tokens], sparsity=0.25)
    assert [r.site for r in run(with_data, capture(model, (tokens,))).rewrites] == ["a"]


def test_nothing_to_do():
    check_pass(nn.ReLU().eval(), (X,), SparsifyWeights(), rewrites=0, skipped=["nothing_to_sparsify"])
    quantized = fxc.compile(nn.Linear(8, 4).eval(), [fxc.passes.Quantize([torch.randn(4, 8)])], (torch.randn(2, 8),))
    result = run(SparsifyWeights(), quantized.module)
    assert {skip.code for skip in result.skipped} == {"kind", "nothing_to_sparsify"}


def test_a_weight_that_is_not_finite_is_refused(model):
    with torch.no_grad():
        model.fc.weight[0, 0] = float("nan")
    with pytest.raises(PreconditionError, match="NaN or infinite"):
        run(SparsifyWeights(), capture(model, (X,)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "outside"),
        ({"sparsity": 0}, "outside|not valid"),
        ({"method": "wanda"}, "needs data"),
        ({"method": "sparsegpt", "calibration": DATA, "scope": "global"}, "one layer against"),
        ({"pattern": "4:2"}, "no pattern"),
        ({"pattern": "half"}, "no pattern"),
        ({"pattern": "2:4", "scope": "global"}, "everywhere"),
        ({"sparsities": {"fc": 1.0}}, "outside"),
        ({"max_sparsity": 0.0}, "outside"),
        ({"batches": 0}, "below 1"),
        ({"method": "movement"}, "not valid"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(OptionError, match=message):
        SparsifyWeights(**options)


@pytest.mark.parametrize("options", [{"ignore": ("fcc",)}, {"sparsities": {"fcc": 0.5}}])
def test_unknown_layers_get_a_suggestion(model, options):
    with pytest.raises(OptionError, match="did you mean 'fc'"):
        run(SparsifyWeights(**options), capture(model, (X,)))


def test_from_text(model):
    compiled = fxc.compile(model, ["sparsify_weights(sparsity=0.9, scope='global', ignore=('stem',))"], (X,))
    found = sparsity(compiled.module)
    assert found.layers["stem"] == 0 and found.layers["fc"] > 0.5
    assert compiled.report.passes[0].rewrites[0].detail["compressed_bytes"] > 0


# --- training -------------------------------------------------------------------------------------------------------

INPUTS = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
LOADER = [(part, part.sum(1).gt(0).long()) for part in INPUTS.split(8)]


def perceptron():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2)).eval()


@pytest.mark.parametrize("options", [{}, {"ema": 0.9}, {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.1}])
def test_zeros_stay_zeros_through_training(options):
    passes = [SparsifyWeights(sparsity=0.75), FineTune(LOADER, epochs=2, lr=1e-2, **options)]
    model = perceptron()
    sparse = fxc.compile(model, passes[:1], (INPUTS[:2],)).module
    trained = fxc.compile(model, passes, (INPUTS[:2],)).module
    for name, held in masks(sparse).items():
        weight = trained.get_parameter(name)
        assert not weight[~held].any()
        assert not torch.equal(weight, sparse.get_parameter(name))


def test_zeros_that_nobody_asked_for_are_not_held():
    model = perceptron()
    with torch.no_grad():
        model[0].weight[:8] = 0
    trained = fxc.compile(model, [FineTune(LOADER, epochs=2, lr=1e-2)], (INPUTS[:2],)).module
    assert trained.get_submodule("0").weight[:8].any()


@pytest.mark.parametrize("scope", ["local", "global"])
def test_zeros_come_while_training_runs(scope):
    seen = []
    training = FineTune(LOADER, epochs=5, lr=1e-2, callback=lambda run: seen.append(sparsity(run.graph_module).share))
    sparse = SparsifyWeights(sparsity=0.9, scope=scope, training=training, every=3, end=0.75)
    compiled = fxc.compile(perceptron(), [sparse], (INPUTS[:2],))
    assert seen == sorted(seen)
    assert len(seen) == 40 and seen[1] == 0 and seen[19] == pytest.approx(0.9 * (1 - (1 - 18 / 30) ** 3), abs=5e-3)
    assert seen[29] == seen[-1] == sparsity(compiled.module).share == pytest.approx(0.9, abs=2e-3)
    told = compiled.report.passes[0]
    assert {site.site for site in told.rewrites} == {"all", "0", "2"}
    assert set(sparse_weights(compiled.module)) == {"0.weight", "2.weight"}
    assert "40 steps" in told.note and "latency stays" in told.note


def test_a_ramp_shorter_than_every_still_comes_step_by_step_and_ends_where_it_should():
    seen = []
    training = FineTune(LOADER, epochs=3, lr=1e-2, callback=lambda run: seen.append(sparsity(run.graph_module).share))
    sparse = SparsifyWeights(sparsity=0.9, training=training, every=100, begin=0.1, end=0.8)
    fxc.compile(perceptron(), [sparse], (INPUTS[:2],))
    last = math.ceil(0.8 * 24)
    assert seen[1] == 0 and len(set(seen[:last])) >= 10
    assert seen[last // 2] < seen[last - 1] == seen[-1] == pytest.approx(0.9, abs=2e-3)


def test_gradual_zeros_need_to_know_how_long_the_run_is():
    class Endless:
        def __iter__(self):
            return iter(LOADER)

    training = FineTune(Endless(), epochs=2, schedule="constant")
    with pytest.raises(PreconditionError, match="no length") as caught:
        fxc.compile(perceptron(), [SparsifyWeights(training=training)], (INPUTS[:2],))
    assert "steps=" in caught.value.remedy


def test_gradual_resumes_where_it_was(tmp_path):
    def compiled(**options):
        training = FineTune(LOADER, epochs=3, lr=1e-2, **options)
        sparse = SparsifyWeights(sparsity=0.9, training=training, every=4)
        return fxc.compile(perceptron_again(), [sparse], (INPUTS[:2],)).module

    def perceptron_again():
        torch.manual_seed(0)
        return perceptron()

    def stop(run):
        if run.step == 14:
            raise KeyboardInterrupt

    whole = compiled()
    options = {"checkpoint": str(tmp_path), "checkpoint_every": 3}
    with pytest.raises(KeyboardInterrupt):
        compiled(callback=stop, **options)
    resumed = compiled(**options)
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"training": FineTune(LOADER, validation=LOADER, keep_best=True)}, "best weights"),
        ({"training": FuseModules()}, "does not train"),
        ({"training": FineTune(LOADER), "pattern": "2:4"}, "by magnitude"),
        ({"training": FineTune(LOADER), "every": 0}, "below 1"),
        ({"training": FineTune(LOADER), "begin": 0.8}, "no part of a training"),
        ({"every": 3}, "while training runs"),
        ({"end": 0.5}, "while training runs"),
        ({"calibration": [INPUTS]}, "looks at no data"),
    ],
)
def test_bad_options_of_gradual_zeros(options, message):
    with pytest.raises(OptionError, match=message):
        SparsifyWeights(**options)
