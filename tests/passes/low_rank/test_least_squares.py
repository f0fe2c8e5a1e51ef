import pytest
import torch
from torch import nn

from fxcompress.capture import capture
from fxcompress.passes import FactorizeConv, PassContext, SubstituteDepthwiseSeparable
from fxcompress.passes.low_rank.least_squares import Sums, fit


def sums(y: torch.Tensor, z: torch.Tensor, half: int | None = None) -> Sums:
    fold = None if half is None else sums(y[:half], z[:half])
    return Sums(y.T @ z, z.T @ z, float(y.square().sum()), fold)


def case(rows: int, noise: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What is true, what is known of it, and rows."""
    torch.manual_seed(0)
    true = torch.randn(6, 12, dtype=torch.float64)
    z = torch.randn(rows, 12, dtype=torch.float64)
    return true, true + 0.1 * torch.randn_like(true), z, z @ true.T + noise * torch.randn(rows, 6, dtype=torch.float64)


def test_many_rows_are_fitted_and_few_are_not():
    true, now, z, y = case(4000, noise=0.1)
    made = fit(sums(y, z, 2000), now)
    assert made.strength is not None and made.strength < 1e-2
    assert float((made.factor - true).norm()) < 0.1 * float((now - true).norm())
    assert made.held_out_error == pytest.approx(0.1 * 6**0.5 / float(y.norm() / 4000**0.5), rel=0.05)

    true, now, z, y = case(16, noise=3.0)
    made = fit(sums(y, z, 8), now)
    assert made.strength is None and torch.equal(made.factor, now)
    weak = sums(y, z).fitted(now, 1e-6)
    assert float((weak - true).norm()) > 3 * float((now - true).norm())


def test_one_sample_fits_nothing():
    _, now, z, y = case(50, noise=0.0)
    made = fit(sums(y, z), now)
    assert made.factor is now and made.detail == {"ridge": None, "held_out_error": None}


def test_the_held_out_error_is_that_of_halves_on_each_other():
    _, now, z, y = case(60, noise=1.0)
    made = fit(sums(y, z, 30), now)
    assert made.strength is not None
    ends = [(y[:30], z[:30]), (y[30:], z[30:])]
    lost = 0.0
    for (y_fit, z_fit), (y_held, z_held) in (ends, ends[::-1]):
        ridge = made.strength * float(z_fit.square().sum()) / 12
        change = torch.linalg.lstsq(
            torch.cat([z_fit, ridge**0.5 * torch.eye(12, dtype=torch.float64)]),
            torch.cat([y_fit - z_fit @ now.T, torch.zeros(12, 6, dtype=torch.float64)]),
        ).solution.T
        lost += float((y_held - z_held @ (now + change).T).square().sum())
    assert made.held_out_error == pytest.approx((lost / float(y.square().sum())) ** 0.5, rel=1e-9)


def test_rows_that_are_all_zero():
    nothing = sums(torch.zeros(4, 3, dtype=torch.float64), torch.zeros(4, 5, dtype=torch.float64), 2)
    now = torch.ones(3, 5, dtype=torch.float64)
    assert torch.equal(fit(nothing, now).factor, now)


@pytest.mark.parametrize(
    "make", [SubstituteDepthwiseSeparable, lambda **options: FactorizeConv(method="tucker2", **options)]
)
def test_a_few_samples_do_not_blow_up_a_deep_network(make):
    """With 16 rows for layers of 288 features a fit to them gave outputs a thousand times too large."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4)]
    for _ in range(12):
        layers += [nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()]
        nn.init.kaiming_normal_(layers[-2].weight)
    model = nn.Sequential(*layers).eval()
    data = [torch.randn(2, 3, 8, 8) for _ in range(2)]
    x = torch.randn(8, 3, 8, 8)
    with torch.no_grad():
        expected = model(x)
        moved = []
        for calibration in (None, data):
            graph = capture(model, (x,), dynamic_shapes="batch")
            made = make(ratio=0.5, calibration=calibration).run(graph, PassContext())
            moved.append(float((made.graph_module(x) - expected).norm() / expected.norm()))
    assert moved[1] < 1.0 and moved[1] < 1.2 * moved[0]
    details = [rewrite.detail for rewrite in made.rewrites]
    assert len(details) >= 12
    told = [detail for detail in details if detail["held_out_error"] is not None and detail["ridge"] is not None]
    assert all(detail["held_out_error"] > detail["output_error"] for detail in told)


def test_a_half_that_is_almost_nothing_is_not_fitted_by_force():
    """The other half is what is left after subtraction: rounding of the large one may leave no positive matrix."""
    torch.manual_seed(0)
    z = torch.randn(400, 12, dtype=torch.float64) @ torch.diag(torch.logspace(0, -7, 12, dtype=torch.float64))
    z[200:] *= 1e-7
    y = z @ torch.randn(12, 6, dtype=torch.float64)
    made = fit(sums(y, z, 200), torch.zeros(6, 12, dtype=torch.float64))
    assert bool(made.factor.isfinite().all())


def test_one_sample_is_fitted_with_a_given_strength():
    _, now, z, y = case(50, noise=0.1)
    made = fit(sums(y, z), now, unproven=0.1)
    assert (made.strength, made.held_out_error) == (0.1, None)
    assert sums(y, z).loss(made.factor) < sums(y, z).loss(now)


@pytest.mark.parametrize("method", ["spatial", "tucker2", "cp"])
def test_inputs_without_a_batch_dimension(method):
    torch.manual_seed(0)
    data = [torch.randn(8, 12, 12) for _ in range(6)]
    for pass_ in (
        FactorizeConv(method=method, ratio=0.5, calibration=data),
        SubstituteDepthwiseSeparable(calibration=data),
    ):
        model = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1)).eval()
        made = pass_.run(capture(model, (data[0],), dynamic_shapes=None), PassContext())
        with torch.no_grad():
            bias = model[0].bias[:, None, None]
            lost = sum(float((made.graph_module(x) - model(x)).square().sum()) for x in data)
            whole = sum(float((model(x) - bias).square().sum()) for x in data)
        detail = made.rewrites[0].detail
        assert detail["output_error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-4)
        assert (detail["held_out_error"] is None) == (detail.get("method") == "tucker2")


def test_sums_of_two_calls_are_those_of_all_rows():
    _, now, z, y = case(60, noise=1.0)
    order = [*range(15), *range(30, 45), *range(15, 30), *range(45, 60)]
    both = sums(y[:30], z[:30], 15)
    both += sums(y[30:], z[30:], 15)
    every = fit(sums(y[order], z[order], 30), now)
    made = fit(both, now)
    assert made.strength == every.strength
    torch.testing.assert_close(made.factor, every.factor)


def test_wide_factors_are_fitted_in_pieces():
    torch.manual_seed(0)
    true, z = torch.randn(700, 40), torch.randn(400, 40)
    y = z @ true.T
    given = Sums(y.double().T @ z.double(), z.double().T @ z.double(), float(y.double().square().sum()))
    given.fold = sums(y[:200].double(), z[:200].double())
    made = fit(given, torch.zeros(700, 40))
    assert made.factor.dtype == torch.float32 and given.fold is None
    torch.testing.assert_close(made.factor, true, rtol=1e-4, atol=1e-4)
    assert given.loss(made.factor) < 1e-8 * given.energy
