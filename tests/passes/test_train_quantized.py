"""Quantization-aware training: the same integer engine, grids that learn or follow, bits, norms, refusals."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress.errors import OptionError, PreconditionError
from fxcompress.passes import FuseModules, InsertQuantStubs, Quantize, SparsifyWeights, TrainQuantized
from fxcompress.quantization.layers import QuantizedConv2d
from fxcompress.training.quantized import norms_of, quantized_layers, quantizers_of
from tests.support import randomize


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        x = self.norm1(self.conv1(x)).relu()
        x = (self.norm2(self.conv2(x)) + x).relu()
        return self.fc(x.mean((2, 3)))


GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randn(96, 1, 8, 8, generator=GENERATOR)
LABELS = torch.randint(0, 3, (96,), generator=GENERATOR)
IMAGES += LABELS[:, None, None, None]
LOADER = [(IMAGES[i : i + 16], LABELS[i : i + 16]) for i in range(0, 96, 16)]
X = IMAGES[:2]


@pytest.fixture
def model():
    return randomize(Net())


def compiled(model, training, *, backend=None, passes=("fuse_modules",)):
    return fxc.compile(model, [*passes, Quantize(LOADER), training], (X,), backend=backend)


@pytest.mark.parametrize("options", [{}, {"grids": "observed"}, {"optimizer": "sgd", "lr": 0.01}])
def test_the_engine_is_that_of_calibration(model, options):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = fxc.compile(model, [FuseModules(), Quantize(LOADER)], (X,), backend="onnxruntime")
    trained = compiled(model, TrainQuantized(LOADER, epochs=4, **({"lr": 1e-2} | options)), backend="onnxruntime")
    assert trained.engine.optimized_op_counts() == plain.engine.optimized_op_counts()
    assert trained.engine.optimized_op_counts()["QLinearConv"] == 2
    losses = [loss for _, loss in trained.report.passes[2].rewrites[0].detail["curves"]["loss"]]
    assert sum(losses[-3:]) < sum(losses[:3])
    found = torch.as_tensor(trained.engine(IMAGES)).argmax(1)
    assert (found == trained(IMAGES).argmax(1)).float().mean() > 0.98
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_learned_grids_move_and_are_plain_numbers_again(model):
    plain = fxc.compile(model, [FuseModules(), Quantize(LOADER)], (X,)).module
    made = compiled(model, TrainQuantized(LOADER, epochs=3, lr=1e-2)).module
    before, after = quantizers_of(plain), quantizers_of(made)
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[path].scale, after[path].scale) for path in before)
    assert not any(name.endswith("scale") for name, _ in made.named_parameters())
    assert all(bool((stub.scale > 0).all()) for stub in after.values())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_scales_learn_relative_to_their_size(model, optimizer):
    """A channel with weights of a thousandth has a scale of a thousandth, which no step may throw off."""
    with torch.no_grad():
        model.norm1.weight[0] *= 1e-3
        model.conv2.weight[:, 0] *= 1e3
    plain = fxc.compile(model, [FuseModules(), Quantize(LOADER)], (X,)).module
    training = TrainQuantized(LOADER, epochs=3, lr=0.01, optimizer=optimizer, warmup=0.0)
    before, after = quantizers_of(plain), quantizers_of(compiled(model, training).module)
    scales = before["conv1.weight_quantizer"].scale
    assert scales.min() < scales.max() / 100
    for path, stub in before.items():
        ratios = after[path].scale / stub.scale
        assert float(ratios.min()) > 0.6 and float(ratios.max()) < 1.6, path


@pytest.mark.parametrize("grids", ["learned", "observed"])
def test_frozen_grids_stand_still(model, grids):
    seen = []

    def watch(run):
        seen.append({path: stub.scale.detach().clone() for path, stub in quantizers_of(run.graph_module).items()})

    compiled(model, TrainQuantized(LOADER, epochs=2, lr=1e-2, grids=grids, freeze_grids=0.5, callback=watch))
    assert len(seen) == 12
    moved = [any(not torch.equal(a[p], b[p]) for p in a) for a, b in pairwise(seen)]
    assert all(moved[:5]) and not any(moved[6:])


def test_weights_end_on_their_grids(model):
    made = compiled(model, TrainQuantized(LOADER, epochs=2, lr=1e-2)).module
    for layer in quantized_layers(made).values():
        torch.testing.assert_close(layer.weight_quantizer(layer.weight), layer.weight, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("ends", "expected"), [("keep", [8, 4, 8]), ("same", [4, 4, 4])])
def test_four_bits_reach_the_engine(model, ends, expected):
    training = TrainQuantized(LOADER, epochs=3, lr=1e-2, weight_bits=4, ends=ends)
    trained = compiled(model, training, backend="onnxruntime")
    detail = trained.report.passes[2].rewrites[0].detail
    assert list(detail["weight_bits"].values()) == expected
    layer = trained.module.get_submodule("conv2")
    assert layer.weight_quantizer.integers(layer.weight).unique().numel() <= 15
    assert trained.engine.optimized_op_counts()["QLinearConv"] == 2
    assert (torch.as_tensor(trained.engine(IMAGES)) - trained(IMAGES)).abs().max() < 0.1 * trained(IMAGES).abs().max()


def test_a_teacher_may_help(model):
    for loader in (LOADER, [images for images, _ in LOADER]):
        training = TrainQuantized(loader, epochs=4, lr=3e-3, alpha=1.0, weight_bits=2, ends="same")
        told = compiled(model, training).report.passes[2]
        curve = [loss for _, loss in told.rewrites[0].detail["curves"]["loss"]]
        assert sum(curve[-6:]) < 0.7 * sum(curve[:6])


class PreActivation(nn.Module):
    """A norm that nothing can fold: it stands before its convolution, behind an activation."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm, self.conv2 = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        x = nn.functional.gelu(self.norm(nn.functional.gelu(self.conv1(x))))
        return self.fc(self.conv2(x).mean((2, 3)))


def test_norms_that_are_left_freeze_and_are_estimated_anew():
    model = randomize(PreActivation())
    means = []

    def watch(run):
        means.append(norms_of(run.graph_module)["norm"].running_mean.clone())

    training = TrainQuantized(LOADER, epochs=2, lr=1e-3, freeze_norms=0.5, callback=watch)
    made = compiled(model, training, passes=())
    assert not torch.equal(means[0], means[5]) and torch.equal(means[6], means[-1])
    torch.testing.assert_close(made.module.get_buffer("norm.running_mean"), means[-1])
    training = TrainQuantized(LOADER, epochs=2, lr=1e-3, freeze_norms=0.5, reestimate=6)
    again = compiled(model, training, passes=())
    detail = again.report.passes[1].rewrites[0].detail
    assert detail["norms"] == 1 and detail["reestimated_on"] == 6
    with torch.no_grad():
        conv1 = again.module.get_submodule("conv1")
        seen = nn.functional.gelu(conv1(again.module.get_submodule("x_quantizer")(IMAGES)))
    torch.testing.assert_close(again.module.get_buffer("norm.running_mean"), seen.mean((0, 2, 3)), atol=2e-2, rtol=2e-2)


def test_zeros_stay_zeros(model):
    made = compiled(
        model, TrainQuantized(LOADER, lr=1e-2), passes=(FuseModules(), SparsifyWeights(sparsity=0.75))
    ).module
    layer = made.get_submodule("conv2")
    assert isinstance(layer, QuantizedConv2d)
    assert int((layer.weight == 0).sum()) >= round(0.75 * layer.weight.numel())


def test_resumes_exactly(model, tmp_path):
    def stop(run):
        if run.step == 8:
            raise KeyboardInterrupt

    for grids in ("learned", "observed"):
        options = {"epochs": 2, "lr": 1e-2, "grids": grids}
        whole = compiled(model, TrainQuantized(LOADER, **options)).module.state_dict()
        options |= {"checkpoint": str(tmp_path / grids), "checkpoint_every": 4}
        with pytest.raises(KeyboardInterrupt):
            compiled(model, TrainQuantized(LOADER, callback=stop, **options))
        resumed = compiled(model, TrainQuantized(LOADER, **options)).module.state_dict()
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_needs_calibrated_stubs(model):
    with pytest.raises(PreconditionError, match="no quantization stubs"):
        fxc.compile(model, [TrainQuantized(LOADER)], (X,))
    with pytest.raises(PreconditionError, match="not calibrated"):
        fxc.compile(model, [FuseModules(), InsertQuantStubs(), TrainQuantized(LOADER)], (X,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_bits": 1}, "outside 2 to 8"),
        ({"freeze_grids": 1.5}, "outside"),
        ({"alpha": -0.1}, "outside"),
        ({"reestimate": -1}, "below 0"),
        ({"temperature": 0.0}, "not above 0"),
        ({"grids": "guessed"}, "not valid"),
        ({"teacher": nn.Linear(2, 2)}, "no part in the loss"),
        ({"temperature": 2.0}, "no part in the loss"),
        ({"alpha": 0.5, "match": "mse", "temperature": 2.0}, "of match='soft_targets'"),
        ({"ends": "same"}, "of weight_bits"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(OptionError, match=message):
        TrainQuantized(LOADER, **options)
