"""The loop: what trains and what does not, hooks, averages, stopping, and what it refuses."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader

import fxcompress as fxc
from fxcompress.capture import capture
from fxcompress.errors import OptionError, PreconditionError, TrainingError
from fxcompress.graph.verify import verify
from fxcompress.training.history import History
from fxcompress.training.hooks import Hook, Run
from fxcompress.training.loop import train
from fxcompress.training.objective import Objective
from fxcompress.training.options import TrainingOptions
from tests.training import runs


def plain(model: nn.Module, data: Any, inputs: Any, **options: Any) -> History:
    graph = capture(model, inputs)
    return train(graph, data, Objective(options.get("loss", "auto")), TrainingOptions(**options))


def test_same_steps_as_a_loop_by_hand() -> None:
    """Forward, backward, clipping, momentum, decay of matrices alone, and a linear schedule."""
    data = [(torch.randn(4, 6), torch.randint(0, 3, (4,))) for _ in range(5)]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()
    graph = capture(model, (torch.zeros(2, 6),))
    options = TrainingOptions(
        epochs=2, optimizer="sgd", lr=0.1, weight_decay=0.01, schedule="linear", clip=0.5, loss="cross_entropy"
    )
    history = train(graph, data, Objective("cross_entropy"), options)
    model.train()
    named = list(model.named_parameters())
    optimizer = torch.optim.SGD(
        [
            {"params": [p for _, p in named if p.dim() > 1], "weight_decay": 0.01},
            {"params": [p for _, p in named if p.dim() == 1]},
        ],
        lr=0.1,
        momentum=0.9,
        nesterov=True,
    )
    losses = []
    for step in range(10):
        inputs, labels = data[step % 5]
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - step / 10)
        loss = nn.functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    assert history.losses == pytest.approx(losses)  # the norm of all gradients is summed in another order
    expected = model.state_dict()
    for name, tensor in graph.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], msg=name)


def test_accumulated_batches_are_one_large_batch() -> None:
    inputs, labels = torch.randn(10, 5), torch.randint(0, 3, (10,))
    graphs = []
    for data, accumulate in (([(inputs, labels)], 1), ([(inputs[:6], labels[:6]), (inputs[6:], labels[6:])], 2)):
        torch.manual_seed(0)
        graph = capture(nn.Linear(5, 3).eval(), (torch.zeros(2, 5),))
        history = train(graph, data, Objective(), TrainingOptions(epochs=3, lr=0.1, accumulate=accumulate))
        assert history.steps == 3
        graphs.append(graph)
    for name, tensor in graphs[0].state_dict().items():
        torch.testing.assert_close(graphs[1].state_dict()[name], tensor)


def test_graph_ends_as_others_want_it_and_random_numbers_go_on() -> None:
    graph = runs.graph()
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    train(graph, runs.loader(), Objective(), runs.options(None, epochs=1))
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert (np.random.get_state()[1] == state[2]).all()
    assert not any(module.training for module in graph.modules())
    assert all(parameter.grad is None for parameter in graph.parameters())
    verify(graph, shapes=True)


def test_seeding_queues_nothing_for_devices_that_are_not_in_use() -> None:
    """PyTorch keeps a call with its stack trace for each of them, until the device is used."""
    if torch.cuda.is_initialized():
        pytest.skip("a GPU is in use")
    queued = len(torch.cuda._queued_calls)
    plain(nn.Linear(3, 2).eval(), [(torch.randn(4, 3), torch.zeros(4, dtype=torch.int64))] * 3, (torch.randn(2, 3),))
    assert len(torch.cuda._queued_calls) == queued


def test_seeds_decide() -> None:
    first, second, third = (runs.run(None, seed=seed)[0].state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], third[name]) for name in first)


def test_frozen_parameters_stay() -> None:
    model = runs.network()
    model[0].requires_grad_(False)
    data = runs.loader()
    compiled = fxc.compile(model, [fxc.passes.FineTune(data, lr=0.1)], (torch.zeros(2, 1, 6, 6),), progress=False)
    trained = compiled.module.state_dict()
    assert torch.equal(trained["0.weight"], model.state_dict()["0.weight"])
    assert not torch.equal(trained["6.weight"], model.state_dict()["6.weight"])
    skips = [(skip.site, skip.code) for skip in compiled.report.passes[0].skipped]
    assert skips == [("0", "frozen")]


class Recorder(Hook):
    """Writes down what happens, and keeps a count."""

    name = "recorder"

    def __init__(self) -> None:
        self.events: list[str] = []
        self.count = torch.zeros((), dtype=torch.int64)

    def start(self, run: Run) -> None:
        self.events.append(f"start {run.step}")

    def before_step(self, run: Run) -> None:
        self.events.append(f"before {run.step}")

    def after_step(self, run: Run) -> None:
        self.count += 1
        self.events.append(f"after {run.step}")

    def after_epoch(self, run: Run) -> None:
        self.events.append("epoch")

    def finish(self, run: Run) -> None:
        self.events.append("finish")

    def state(self) -> Mapping[str, torch.Tensor]:
        return {"count": self.count}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.count = state["count"].clone()


def test_hooks_are_called_in_order_and_keep_their_state(tmp_path: Path) -> None:
    hook = Recorder()
    runs.run(tmp_path, hooks=[hook], steps=2)
    assert hook.events == ["start 0", "before 0", "after 1", "before 1", "after 2", "epoch", "finish"]
    again = Recorder()
    runs.run(tmp_path, hooks=[again], steps=2)
    assert (again.events, int(again.count)) == (["start 2", "finish"], 2)


def test_stops_where_the_metric_is_no_longer_better() -> None:
    figures = iter([0.5, 0.6, 0.7, 0.65, 0.7, 0.9])
    seen: list[dict[str, torch.Tensor]] = []

    def figure(module: nn.Module) -> float:
        seen.append({name: tensor.clone() for name, tensor in module.state_dict().items()})
        return next(figures)

    graph, history = runs.run(None, epochs=9, validation=figure, better="higher", patience=2, ema=None)
    assert len(history.epochs) == 4
    assert (history.best_epoch, history.stopped) == (2, "no better figure in 2 epochs")
    assert all(torch.equal(tensor, seen[2][name]) for name, tensor in graph.state_dict().items())


def test_bfloat16_computes_in_half_and_keeps_weights_whole() -> None:
    kinds: list[torch.dtype] = []

    def loss(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        kinds.append(outputs.dtype)
        return nn.functional.cross_entropy(outputs, batch[1])

    graph, half = runs.run(None, precision="bfloat16")
    _, whole = runs.run(None)
    assert {tensor.dtype for tensor in graph.parameters()} == {torch.float32}
    assert half.losses != whole.losses
    assert half.losses[0] == pytest.approx(whole.losses[0], rel=0.02)
    train(runs.graph(), runs.loader(), Objective(loss), runs.options(None, precision="bfloat16", epochs=1))
    assert set(kinds) == {torch.float32}


def test_dict_batches_and_other_losses() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 1)

        def forward(self, left: torch.Tensor, right: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"value": self.linear(left * right)}

    inputs = {"left": torch.ones(2, 4), "right": torch.ones(2, 4)}
    left = torch.randn(16, 4)
    data = [{"right": torch.ones(16, 4), "left": left, "ids": torch.arange(16), "target": left.sum(1)}]
    history = plain(Two().eval(), data, inputs, steps=200, lr=0.05, loss="mse", validation=data, metric="mse")
    assert history.after == pytest.approx(0, abs=1e-3)


def test_in_a_dict_only_what_is_named_so_is_a_label() -> None:
    """A mask or the number of a sample would be learned without a word."""
    model = nn.Linear(4, 3).eval()
    x, y = torch.randn(8, 4), torch.randint(0, 3, (8,))
    with pytest.raises(PreconditionError, match=r"none under 'labels', .*only 'input', 'index', 'klass'"):
        plain(model, [{"input": x, "index": torch.arange(8) % 3, "klass": y}], (x,))
    named = plain(model, [{"input": x, "index": torch.arange(8) % 3, "label": y}], (x,))
    beside = plain(model, [({"input": x, "index": torch.arange(8) % 3}, y)], (x,))
    assert named.losses == beside.losses == plain(model, [(x, y)], (x,)).losses


def test_accuracy_of_what_is_no_class_is_refused() -> None:
    x = torch.randn(8, 4)
    data = [(x, x.sum(1))]
    with pytest.raises(PreconditionError, match="are no classes"):
        plain(nn.Linear(4, 1).eval(), data, (x,), loss="mse", validation=data, metric="accuracy")


def test_a_function_that_gives_no_number_is_refused() -> None:
    with pytest.raises(PreconditionError, match="NoneType, which is no number"):
        runs.run(None, validation=lambda _: None, better="higher")
    with pytest.raises(TrainingError, match="is NaN after step"):
        runs.run(None, validation=lambda _: math.nan, better="higher")
    with pytest.raises(PreconditionError, match="the schedule gives nan at step 1"):
        runs.run(None, schedule=lambda _: math.nan, warmup=0.0)
    with pytest.raises(PreconditionError, match="not less than the run's 20"):
        runs.run(None, warmup=100)


def test_callback_and_progress_are_told() -> None:
    steps: list[int] = []
    told: list[tuple[int, int, str]] = []
    options = runs.options(None, callback=lambda run: steps.append(run.step), epochs=1)
    train(runs.graph(), runs.loader(), Objective(), options, progress=lambda *said: told.append(said))
    assert steps == [1, 2, 3, 4, 5]
    assert told and told[0][:2] == (1, 5) and "loss" in told[0][2] and "left" in told[0][2]


def generator() -> Iterator[Any]:
    yield from runs.loader()


class Liar:
    """Fewer batches than its length."""

    def __len__(self) -> int:
        return 9

    def __iter__(self) -> Iterator[Any]:
        return iter([next(iter(runs.loader()))] * 4)


class Shrinking:
    """No length, and nothing the second time."""

    def __init__(self) -> None:
        self.batches = list(runs.loader())

    def __iter__(self) -> Iterator[Any]:
        found, self.batches = self.batches, []
        return iter(found)


@pytest.mark.parametrize(
    ("data", "changes", "words"),
    [
        (list, {}, "no batch"),
        (lambda: DataLoader(runs.samples(), batch_size=100, drop_last=True), {}, "no batch"),
        (generator, {}, "only once"),
        (generator, {"epochs": 1}, "no length"),
        (generator, {"steps": 50, "epochs": 9}, "exhausted: it gave no batch in epoch 1"),
        (Shrinking, {"schedule": "constant", "warmup": 0.0}, "exhausted"),
        (Liar, {}, "ended after 4 of 9 steps"),
        (lambda: 5, {}, "a int, not a series"),
        (lambda: [torch.zeros(4, 1, 6, 6)], {}, "needs labels"),
        (lambda: [(torch.zeros(4, 1, 6, 6), torch.zeros(4))], {}, "do not tell the loss"),
        (lambda: [(torch.zeros(4, 1, 7, 7), torch.zeros(4).long())], {}, "batch 0 of epoch 0"),
        (runs.loader, {"validation": []}, "nothing to measure"),
        (runs.loader, {"validation": iter([])}, "only once"),
    ],
)
def test_data_that_will_not_do(data: Callable[[], Any], changes: dict[str, Any], words: str) -> None:
    with pytest.raises(PreconditionError, match=words):
        runs.run(None, data=data(), **{"ema": None, "keep_best": False, "validation": None, **changes})


def test_generator_serves_for_one_reading() -> None:
    _, history = runs.run(None, data=generator(), steps=4)
    assert history.steps == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimizer": "adamm"}, "did you mean 'adam'"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"loss": "cross_entropie"}, "did you mean 'cross_entropy'"),
        ({"metric": "acuracy"}, "did you mean 'accuracy'"),
        ({"epochs": 0}, "epochs"),
        ({"lr": -1.0}, "lr"),
        ({"accumulate": 0}, "accumulate"),
        ({"ema": 1.0}, "ema"),
        ({"milestones": (2.0,)}, "milestones"),
        ({"patience": 2}, "validation"),
        ({"checkpoint_every": 5}, "checkpoint"),
        ({"precision": "int8"}, "precision"),
        ({"epochs": math.inf}, "epochs"),
        ({"metric": "accuracy"}, "needs data"),
        ({"momentum": 0.5}, "of optimizer='sgd'"),
        ({"gamma": 0.5}, "of schedule='step'"),
    ],
)
def test_options_that_will_not_do(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        fxc.passes.FineTune([], **options)


def test_nan_loss_stops_with_the_step_and_the_last_good_checkpoint(tmp_path: Path) -> None:
    batches = [(images.clone(), labels) for images, labels in runs.loader()]
    batches[3][0][0] = math.nan
    with pytest.raises(TrainingError, match="the loss is nan at step 4") as caught:
        runs.run(tmp_path, data=batches)
    assert str(tmp_path / "step-00000002") in str(caught.value.remedy)
    good = runs.run(tmp_path / "other", data=batches[:2] * 2, steps=2)[0].state_dict()
    assert all(bool(tensor.isfinite().all()) for tensor in good.values())
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000002"]
    passes = [fxc.passes.FineTune(batches)]
    with pytest.raises(TrainingError, match="step 4"):
        fxc.compile(runs.network(), passes, (torch.zeros(2, 1, 6, 6),), progress=False)


def test_weights_that_are_not_finite_are_no_checkpoint(tmp_path: Path) -> None:
    def spoil(run: Run) -> None:
        if run.step == 4:
            run.graph_module.get_parameter("0.weight").data[0] = math.inf

    with pytest.raises(TrainingError, match=r"'0.weight' is not finite after step 4"):
        runs.run(tmp_path, callback=spoil)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000002"]


def test_loss_that_depends_on_nothing() -> None:
    with pytest.raises(PreconditionError, match="does not depend on any weight"):
        train(runs.graph(), runs.loader(), Objective(lambda outputs, _: outputs.detach().sum()), runs.options(None))


def test_nothing_that_trains() -> None:
    model = runs.network().requires_grad_(False)
    with pytest.raises(PreconditionError, match="nothing trains"):
        fxc.compile(model, [fxc.passes.FineTune(runs.loader())], (torch.zeros(2, 1, 6, 6),), progress=False)
    half = [fxc.passes.ConvertPrecision("float16"), fxc.passes.FineTune(runs.loader())]
    with pytest.raises(PreconditionError, match="train before ConvertPrecision"):
        fxc.compile(runs.network(), half, (torch.zeros(2, 1, 6, 6),), progress=False)


def test_without_accelerate_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(PreconditionError, match=r"fxcompress\[train\]"):
        runs.run(None)


def test_others_who_use_accelerate_find_it_as_they_left_it() -> None:
    accelerate = pytest.importorskip("accelerate")
    theirs = accelerate.Accelerator(gradient_accumulation_steps=3)
    runs.run(None, precision="bfloat16", epochs=1)
    assert theirs.mixed_precision == "no"
    assert theirs.gradient_accumulation_steps == 3
    runs.run(None, epochs=1)


def test_float16_needs_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(PreconditionError, match="float16"):
        runs.run(None, precision="float16")
