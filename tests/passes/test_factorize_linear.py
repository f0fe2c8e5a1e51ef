import copy

import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress.capture import capture
from fxcompress.errors import OptionError, PreconditionError
from fxcompress.graph.edit import GraphEditor
from fxcompress.passes import FactorizeLinear, FuseModules, PruneChannels
from fxcompress.passes.base import PassContext
from tests.support import check_pass


def mlp(bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32, bias=bias), nn.ReLU(), nn.Linear(32, 16, bias=bias)).eval()


def weight_of(graph_module, path):
    first, second = graph_module.get_submodule(f"{path}.0"), graph_module.get_submodule(f"{path}.1")
    return (second.weight.flatten(1) @ first.weight.flatten(1)).detach()


def test_becomes_two_layers_under_stable_names():
    result = check_pass(
        mlp(),
        (torch.randn(2, 24),),
        FactorizeLinear(rank=4, only="0"),
        rewrites=["0"],
        skipped=(),
    )
    graph_module = result.graph_module
    assert [node.target for node in graph_module.graph.nodes if node.op == "call_module"] == ["0.0", "0.1", "2"]
    assert set(graph_module.state_dict()) == {"0.0.weight", "0.1.weight", "0.1.bias", "2.weight", "2.bias"}
    detail = result.rewrites[0].detail
    assert (detail["rank"], detail["shape"]) == (4, [32, 24])
    assert (detail["parameters_before"], detail["parameters_after"]) == (24 * 32 + 32, 4 * (24 + 32) + 32)
    assert (detail["macs_before"], detail["macs_after"]) == (24 * 32, 4 * (24 + 32))


def test_plain_error_is_that_of_eckart_and_young():
    model = mlp()
    result = check_pass(model, (torch.randn(2, 24),), FactorizeLinear(rank=5), rewrites=2)
    for path, rewrite in zip(("0", "2"), result.rewrites, strict=True):
        weight = model.get_submodule(path).weight.detach()
        error = (weight - weight_of(result.graph_module, path)).double().norm()
        values = torch.linalg.svdvals(weight.double())
        assert abs(float(error / values[5:].norm()) - 1) < 1e-5
        assert abs(rewrite.detail["weight_error"] - float(values[5:].norm() / values.norm())) < 1e-5


def test_on_data_the_loss_equals_the_tail_of_the_spectrum():
    model = mlp()
    x = torch.randn(300, 24) @ torch.randn(24, 24)
    result = check_pass(model, (x[:2],), FactorizeLinear(rank=6, calibration=x.split(64)), rewrites=2)
    with torch.no_grad():
        inputs = {"0": x, "2": torch.relu(model[0](x))}
    for rewrite in result.rewrites:
        rows, weight = inputs[rewrite.site].double(), model.get_submodule(rewrite.site).weight.detach().double()
        error = weight - weight_of(result.graph_module, rewrite.site).double()
        loss = float((rows @ error.T).square().sum())
        second = rows.T @ rows
        tail = float(torch.linalg.eigvalsh(weight @ second @ weight.T).flip(0)[6:].sum())
        assert abs(loss - tail) / tail < 1e-4
        assert abs(rewrite.detail["loss"] - loss) / loss < 1e-4
        assert abs(rewrite.detail["tail"] - tail) / tail < 1e-4
        assert rewrite.detail["calibration_rows"] == 300


@pytest.mark.parametrize(
    ("method", "correct_bias"),
    [("whitened", False), ("whitened", True), ("asvd", False), ("asvd", True), ("svd", True)],
)
def test_wide_layers_are_measured_by_their_outputs(method, correct_bias):
    torch.manual_seed(0)
    layer = nn.Linear(40, 12)
    nn.init.constant_(layer.bias, 3.0)
    conv = nn.Conv2d(40, 12, 1, stride=2, padding=1)
    x, image = torch.randn(300, 40) * torch.logspace(0, -2, 40) + 0.3, torch.randn(6, 40, 5, 5) + 0.5
    for model, data in ((nn.Sequential(layer), x), (nn.Sequential(conv), image)):
        options = {"rank": 4, "method": method, "correct_bias": correct_bias, "calibration": data.split(100)}
        result = check_pass(model.eval(), (data[:2],), FactorizeLinear(**options), rewrites=["0"])
        graph_module, detail = result.graph_module, result.rewrites[0].detail
        with torch.no_grad():
            error = (graph_module(data) - model(data)).double().movedim(1, -1).flatten(0, -2)
            whole = (model(data) - model[0].bias.view(-1, *[1] * (data.dim() - 2))).double().movedim(1, -1)
        assert abs(float(error.square().sum()) / detail["loss"] - 1) < 1e-4
        if not correct_bias:
            assert abs(detail["output_error"] ** 2 - detail["loss"] / float(whole.square().sum())) < 1e-6
        assert float(error.mean(0).abs().max()) < 1e-5 or not correct_bias
        if method == "whitened":
            assert abs(detail["tail"] / detail["loss"] - 1) < 1e-4
            weight = model[0].weight.detach().double().flatten(1)
            rows = data.double() if data.dim() == 2 else None
            if rows is not None:
                rows = rows - rows.mean(0) if correct_bias else rows
                best = torch.linalg.svdvals(rows @ weight.T)[4:].square().sum()
                assert abs(float(best) / detail["loss"] - 1) < 1e-4


def test_on_data_the_output_is_closer_than_without():
    model, mix = mlp(), torch.randn(24, 24) * torch.logspace(0, -2, 24)
    x, fresh = torch.randn(500, 24) @ mix, torch.randn(200, 24) @ mix

    def error(pass_):
        module = fxc.compile(model, [pass_], (x[:2],)).module
        with torch.no_grad():
            return float((module(fresh) - model(fresh)).norm())

    plain = error(FactorizeLinear(ratio=0.5))
    whitened = error(FactorizeLinear(ratio=0.5, calibration=[x]))
    assert whitened < plain
    assert error(FactorizeLinear(ratio=0.5, calibration=[x], correct_bias=True)) < plain
    assert error(FactorizeLinear(ratio=0.5, calibration=[x], refit=True)) < plain
    assert error(FactorizeLinear(ratio=0.5, calibration=[x], method="asvd")) < plain


def test_correcting_the_bias_removes_the_mean_of_the_error():
    model, x = mlp(), torch.randn(400, 24) + 2
    result = check_pass(
        model, (x[:2],), FactorizeLinear(rank=6, calibration=[x], correct_bias=True, only="0"), rewrites=1
    )
    graph_module = result.graph_module
    with torch.no_grad():
        made = graph_module.get_submodule("0.1")(graph_module.get_submodule("0.0")(x))
        error = made - model[0](x)
    assert float(error.mean(0).abs().max()) < 1e-4
    plain = check_pass(model, (x[:2],), FactorizeLinear(rank=6, calibration=[x], only="0")).rewrites[0]
    assert float(error.double().square().sum()) < plain.detail["loss"]


@pytest.mark.parametrize(
    ("option", "limit"), [({"energy": 0.8}, 0.2**0.5), ({"error": 0.4}, 0.4), ({"error": 0.4, "round_to": 4}, 0.4)]
)
@pytest.mark.parametrize("data", [False, True])
def test_bounds_are_kept_by_the_least_rank(option, limit, data):
    x = torch.randn(200, 24)
    result = check_pass(
        mlp(), (x[:2],), FactorizeLinear(**option, calibration=[x] if data else None, force=True), rewrites=2
    )
    for rewrite in result.rewrites:
        detail = rewrite.detail
        assert detail["output_error" if data else "weight_error"] <= limit + 1e-6
        assert detail["rank"] % option.get("round_to", 1) == 0
        if not data and "round_to" not in option:
            weight = mlp().get_submodule(rewrite.site).weight.detach().double()
            values = torch.linalg.svdvals(weight)
            assert float(values[detail["rank"] - 1 :].norm() / values.norm()) > limit


@pytest.mark.parametrize("ratio", [0.3, 0.6])
def test_a_global_ratio_is_kept_and_loses_no_more_than_the_same_for_all(ratio):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)), nn.ReLU()).eval()
    with torch.no_grad():
        for index in range(4):
            u, s, v = torch.linalg.svd(model[index].weight)
            model[index].weight.copy_(u * s.pow(1 + 2 * index) @ v)
    x = torch.randn(2, 32)
    shared = check_pass(model, (x,), FactorizeLinear(ratio=ratio, scope="global"), idempotent=False)
    same = check_pass(model, (x,), FactorizeLinear(ratio=ratio))
    weights = [p for name, p in shared.graph_module.named_parameters() if name.endswith("weight")]
    assert sum(p.numel() for p in weights) <= ratio * 4 * 32 * 32

    def loss(result):
        return sum(rewrite.detail["weight_error"] ** 2 for rewrite in result.rewrites)

    assert loss(shared) <= loss(same) + 1e-9


def test_pointwise_convolutions():
    torch.manual_seed(0)
    for layer, x in (
        (nn.Conv2d(16, 24, 1, stride=2, padding=1), torch.randn(2, 16, 7, 7)),
        (nn.Conv1d(16, 24, 1, bias=False), torch.randn(2, 16, 9)),
        (nn.Conv3d(16, 24, 1), torch.randn(2, 16, 3, 3, 3)),
    ):
        model = nn.Sequential(layer, nn.ReLU()).eval()
        for calibration in (None, [x]):
            result = check_pass(model, (x,), FactorizeLinear(rank=6, calibration=calibration), rewrites=["0"])
            error = layer.weight.detach().flatten(1) - weight_of(result.graph_module, "0")
            measured = float(error.norm() / layer.weight.detach().norm())
            assert abs(measured - result.rewrites[0].detail["weight_error"]) < 1e-5


def test_attention_projections_and_fused_ones():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    x = torch.randn(3, 6, 32)
    result = check_pass(model, (x,), FactorizeLinear(ratio=0.5, calibration=[x, x + 1]), rewrites=4)
    assert "self_attn.in_proj" in [rewrite.site for rewrite in result.rewrites]
    assert "self_attn.in_proj_weight" not in result.graph_module.state_dict()


def test_a_layer_called_twice_is_factored_once_on_the_data_of_all_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(20, 20)

        def forward(self, x):
            return self.fc(torch.relu(self.fc(x)))

    torch.manual_seed(0)
    x = torch.randn(50, 20)
    result = check_pass(Twice().eval(), (x[:2],), FactorizeLinear(rank=4, calibration=[x]), rewrites=["fc"])
    assert result.rewrites[0].detail["calibration_rows"] == 100
    calls = [node.target for node in result.graph_module.graph.nodes if node.op == "call_module"]
    assert calls == ["fc.0", "fc.1"] * 2


class Language(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.table, self.body, self.head = nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 50, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, tokens):
        return self.head(torch.relu(self.body(self.table(tokens))))


def test_tied_weights_are_left_or_factored_together():
    torch.manual_seed(0)
    tokens = torch.randint(0, 50, (3, 7))
    check_pass(
        Language(True).eval(),
        (tokens,),
        FactorizeLinear(rank=4),
        rewrites=["body"],
        skipped={"head": "tied_weight"},
    )
    result = check_pass(
        Language(True).eval(),
        (tokens,),
        FactorizeLinear(rank=4, embeddings=True),
        rewrites=["table", "head", "body"],
        skipped=(),
    )
    graph_module = result.graph_module
    assert graph_module.get_submodule("table.0").weight is graph_module.get_submodule("head.1").weight
    first = next(rewrite for rewrite in result.rewrites if rewrite.site == "table")
    assert first.detail["tied_with"] == ["head"]
    total = sum(p.numel() for p in graph_module.parameters())
    assert total == 4 * (50 + 16) + 4 * 16 + 4 * 32 + 16


def test_embeddings_on_request():
    torch.manual_seed(0)
    model, tokens = Language(False).eval(), torch.randint(0, 50, (3, 7))
    result = check_pass(
        model,
        (tokens,),
        FactorizeLinear(rank=6, embeddings=True, calibration=[tokens], only="table"),
        rewrites=["table"],
    )
    table = result.graph_module.get_submodule("table.0").weight @ result.graph_module.get_submodule("table.1").weight.T
    values = torch.linalg.svdvals(model.table.weight.detach().double())
    error = float((table - model.table.weight).detach().double().norm())
    assert abs(error / float(values[6:].norm()) - 1) < 1e-5
    kept = FactorizeLinear(rank=6, embeddings=True, cost="macs", only="table")
    check_pass(model, (tokens,), kept, rewrites=0, skipped={"table": "does_not_pay"})


@pytest.mark.parametrize(
    ("pass_", "codes"),
    [
        (FactorizeLinear(rank=16), {"0": "does_not_pay", "2": "full_rank"}),
        (FactorizeLinear(rank=24), {"0": "full_rank", "2": "full_rank"}),
        (FactorizeLinear(rank=14), {"0": "does_not_pay", "2": "does_not_pay"}),
        (FactorizeLinear(energy=0.9999), {"0": "full_rank", "2": "full_rank"}),
        (FactorizeLinear(rank=4, ignore=("*",)), {"0": "ignored", "2": "ignored"}),
    ],
)
def test_what_is_not_worth_it_is_skipped_with_the_reason(pass_, codes):
    check_pass(mlp(), (torch.randn(2, 24),), pass_, rewrites=0, skipped=codes)


def test_forced_beyond_break_even():
    result = check_pass(mlp(), (torch.randn(2, 24),), FactorizeLinear(rank=15, force=True), rewrites=2)
    assert result.rewrites[0].detail["parameters_after"] > result.rewrites[0].detail["parameters_before"]


def test_no_linear_layer_tiny_ones_and_zeros():
    x = torch.randn(2, 3, 8, 8)
    check_pass(nn.Conv2d(3, 4, 3).eval(), (x,), FactorizeLinear(), rewrites=0, skipped=["nothing_to_factorize"])
    check_pass(nn.Sequential(nn.Linear(8, 1)).eval(), (torch.randn(2, 8),), FactorizeLinear(), skipped=["too_small"])
    check_pass(nn.Sequential(nn.Linear(2, 2)).eval(), (torch.randn(2, 2),), FactorizeLinear(), skipped=["does_not_pay"])
    grouped = nn.Sequential(nn.Conv2d(8, 8, 1, groups=2)).eval()
    check_pass(grouped, (torch.randn(2, 8, 3, 3),), FactorizeLinear(), skipped=["grouped"])
    zero = nn.Sequential(nn.Linear(20, 20)).eval()
    nn.init.zeros_(zero[0].weight)
    for option in ({"rank": 3}, {"energy": 0.9}, {"error": 0.1}, {"rank": 3, "calibration": [torch.randn(50, 20)]}):
        result = check_pass(zero, (torch.randn(2, 20),), FactorizeLinear(**option), rewrites=1)
        assert result.rewrites[0].detail["weight_error"] == 0


def test_weights_that_are_no_numbers_are_left():
    graph_module = capture(mlp(), (torch.randn(2, 24),), dynamic_shapes="batch")
    with GraphEditor(graph_module) as editor:
        editor.set_tensor("0.weight", torch.full((32, 24), float("nan")))
    result = FactorizeLinear(rank=4).run(graph_module, PassContext())
    assert {skip.site: skip.code for skip in result.skipped} == {"0": "not_finite"}
    assert [rewrite.site for rewrite in result.rewrites] == ["2"]


def test_refit_reads_the_data_once_for_layers_side_by_side():
    class Data(list):
        read = 0

        def __iter__(self):
            self.read += 1
            return super().__iter__()

    torch.manual_seed(0)
    data = Data([torch.randn(32, 6, 32) for _ in range(4)])

    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))

        def forward(self, x):
            return self.o(torch.softmax(self.q(x) @ self.k(x).mT, -1) @ self.v(x))

    model = Three().eval()
    plain = check_pass(model, (data[0],), FactorizeLinear(ratio=0.5, calibration=data), rewrites=4, idempotent=False)
    data.read = 0
    pass_ = FactorizeLinear(ratio=0.5, calibration=data, refit=True)
    fitted = pass_.run(capture(model, (data[0],), dynamic_shapes="batch"), PassContext())
    assert data.read == 1 + 2  # moments, then q, k and v, then o
    assert all(rewrite.detail["refitted"] for rewrite in fitted.rewrites)
    with torch.no_grad():
        errors = [
            sum(float((made.graph_module(x) - model(x)).square().sum()) for x in data) for made in (plain, fitted)
        ]
    assert errors[1] < errors[0]
    for rewrite in fitted.rewrites:
        weight = model.get_submodule(rewrite.site).weight.detach()
        left = weight - weight_of(fitted.graph_module, rewrite.site)
        assert abs(rewrite.detail["weight_error"] - float(left.norm() / weight.norm())) < 1e-5
    q = fitted.rewrites[0]  # reads what it read before, so that its loss is that of its new weight on the data
    rows = torch.cat(list(data)).flatten(0, 1)
    left = model.q.weight.detach() - weight_of(fitted.graph_module, "q")
    assert q.site == "q"
    assert abs(q.detail["loss"] / float((rows @ left.T).square().sum()) - 1) < 1e-4
    whole = float((rows @ model.q.weight.detach().T).square().sum())
    assert abs(q.detail["output_error"] ** 2 - q.detail["loss"] / whole) < 1e-5


def test_fewer_rows_than_features_are_told():
    x = torch.randn(5, 24)
    result = check_pass(mlp(), (x[:2],), FactorizeLinear(rank=8, calibration=[x], only="0"), rewrites=1)
    detail = result.rewrites[0].detail
    assert detail["jitter"] > 0
    assert detail["calibration_rows"] == 5
    assert detail["output_error"] < 1e-3


def test_a_generator_serves_once_and_refit_needs_more():
    x = torch.randn(40, 24)
    check_pass(mlp(), (x[:2],), FactorizeLinear(rank=4), rewrites=2)
    graph_module = capture(mlp(), (x[:2],), dynamic_shapes="batch")
    data = (part for part in x.split(8))
    assert FactorizeLinear(rank=4, calibration=data).run(graph_module, PassContext()).changed
    graph_module = capture(mlp(), (x[:2],), dynamic_shapes="batch")
    with pytest.raises(PreconditionError, match="no batch"):
        FactorizeLinear(rank=4, calibration=data).run(graph_module, PassContext())
    with pytest.raises(OptionError, match="read only once"):
        FactorizeLinear(rank=4, calibration=(part for part in x.split(8)), refit=True).run(graph_module, PassContext())


def test_quantized_layers_are_left_with_the_reason():
    model, x = mlp(), torch.randn(4, 24)
    for first, codes in (
        (fxc.passes.Quantize([x]), {"0": "quantized", "2": "quantized"}),
        (fxc.passes.QuantizeDynamic(), {"0": "quantized", "2": "quantized"}),
    ):
        result = fxc.compile(model, [first, FactorizeLinear(rank=4)], (x,)).report.passes[1]
        assert {skip.site: skip.code for skip in result.skipped} == codes
        assert not result.rewrites


def test_an_embedding_says_that_it_was_factored_without_data():
    torch.manual_seed(0)
    tokens = torch.randint(0, 50, (3, 7))
    pass_ = FactorizeLinear(rank=4, embeddings=True, calibration=[tokens])
    result = check_pass(Language(False).eval(), (tokens,), pass_, rewrites=["table", "body", "head"])
    assert {r.site: r.detail["method"] for r in result.rewrites} == {
        "table": "svd",
        "body": "whitened",
        "head": "whitened",
    }


def test_options_are_checked():
    for options in (
        {"rank": 4, "ratio": 0.5},
        {"rank": 0},
        {"ratio": 1.0},
        {"energy": 0.0},
        {"error": 1.0},
        {"round_to": 0},
        {"method": "whitened"},
        {"refit": True},
        {"scope": "global", "rank": 3},
        {"method": "unknown"},
        {"cost": "latency_"},
    ):
        with pytest.raises(OptionError):
            FactorizeLinear(**options)
    graph_module = capture(mlp(), (torch.randn(2, 24),), dynamic_shapes="batch")
    with pytest.raises(OptionError, match="no layer of the graph"):
        FactorizeLinear(ignore=("nothing",)).run(graph_module, PassContext())
    with pytest.raises(OptionError, match="latency cannot be measured"):
        FactorizeLinear(cost="latency").run(graph_module, PassContext())


def test_latency_decides_where_it_is_asked_for():
    graph_module = capture(mlp(), (torch.randn(2, 24),), dynamic_shapes="batch")

    def latency(graph, backend, inputs):
        return float(sum(p.numel() for p in graph.parameters()) if len(list(graph.parameters())) > 2 else 100)

    result = FactorizeLinear(rank=2, cost="latency").run(graph_module, PassContext(latency=latency))
    assert {skip.site: skip.code for skip in result.skipped} == {"0": "does_not_pay", "2": "does_not_pay"}
    conv, x = nn.Sequential(nn.Conv2d(24, 32, 1)).eval(), torch.randn(2, 24, 5, 5)
    result = FactorizeLinear(rank=2, cost="latency").run(capture(conv, (x,)), PassContext(latency=latency))
    assert {skip.site: skip.code for skip in result.skipped} == {"0": "does_not_pay"}


class Blocks(nn.Module):
    """Layers of two shapes, several times."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 16)) for _ in range(3)))

    def forward(self, x):
        return self.layers(x)


def test_latency_of_equal_layers_is_measured_once():
    measured = []

    def latency(graph, backend, inputs):
        measured.append((backend, tuple(inputs[0].shape), tuple(tuple(p.shape) for p in graph.parameters())))
        return float(-len(list(graph.parameters())))

    context = PassContext(latency=latency)
    for _ in range(2):
        graph_module = capture(Blocks().eval(), (torch.randn(2, 5, 16),), dynamic_shapes="batch")
        result = FactorizeLinear(rank=4, cost="latency").run(graph_module, context)
        assert len(result.rewrites) == 6
        assert len(measured) == len(set(measured)) == 4
    FactorizeLinear(rank=5, cost="latency").run(
        capture(Blocks().eval(), (torch.randn(2, 5, 16),), dynamic_shapes="batch"), context
    )
    assert len(measured) == 6  # the layers as they were are known


def test_an_unknown_backend_is_refused_before_data_is_read():
    class Unread(list):
        def __iter__(self):
            raise AssertionError("the data was read")

    pass_ = FactorizeLinear(ratio=0.5, cost="latency", backend="onnxruntim", calibration=Unread([torch.randn(4, 24)]))
    with pytest.raises(OptionError, match="did you mean 'onnxruntime'"):
        fxc.compile(mlp(), [pass_], (torch.randn(2, 24),))


@pytest.mark.parametrize("before", [True, False])
def test_together_with_fusion_and_pruning(before):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(24, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)
    ).eval()
    x = torch.randn(6, 24)
    low = FactorizeLinear(ratio=0.5, calibration=[x])
    others = [FuseModules(), PruneChannels(ratio=0.25)]
    compiled = fxc.compile(model, [low, *others] if before else [*others, low], (x,))
    again = fxc.compile(compiled.module, [FactorizeLinear(ratio=0.5)], (x,))
    assert compiled(x).shape == (6, 10)
    assert bool(torch.isfinite(again(x)).all())


def test_the_result_trains_saves_and_exports(tmp_path):
    model, x = mlp(), torch.randn(4, 24)
    compiled = fxc.compile(model, [FactorizeLinear(ratio=0.5)], (x,))
    compiled.module.train()
    optimizer = torch.optim.SGD(compiled.module.parameters(), lr=0.05)
    goal = model(x).detach()
    losses = []
    for _ in range(30):
        loss = (compiled.module(x) - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    compiled.module.eval()
    fresh = fxc.compile(model, [FactorizeLinear(ratio=0.5)], (x,))
    engine = fresh.export("onnxruntime", tmp_path / "engine")
    with torch.no_grad():
        torch.testing.assert_close(torch.as_tensor(engine(x)), fresh.module(x), rtol=1e-4, atol=1e-5)
    fresh.save(tmp_path / "saved")
    loaded = fxc.load(tmp_path / "saved")
    torch.testing.assert_close(loaded(x), fresh(x))
    assert not fxc.compile(loaded.module, [FactorizeLinear(ratio=0.5)], (x,)).report.passes[0].rewrites


def test_frozen_and_half_weights_stay_so():
    model = copy.deepcopy(mlp()).requires_grad_(False).bfloat16()
    result = check_pass(model, (torch.randn(2, 24).bfloat16(),), FactorizeLinear(rank=4), rewrites=2)
    for parameter in result.graph_module.parameters():
        assert parameter.dtype == torch.bfloat16
        assert not parameter.requires_grad
