"""The objective of distillation against the formulas, and what it must refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxcompress as fxc
from fxcompress.capture import capture
from fxcompress.errors import OptionError, PreconditionError
from fxcompress.graph.batches import as_batch
from fxcompress.graph.printer import format_graph
from fxcompress.training.distillation import Weights, distillation
from fxcompress.training.features import attention, fitnets, relational

functional = nn.functional


def convnet(width: int, seed: int = 0, classes: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)
    ).eval()


class Tokens(nn.Module):
    """``[batch, tokens]`` to ``[batch, tokens, 5]``."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.head = nn.Embedding(7, width), nn.Linear(width, 5)

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.head(self.embed(ids).relu())}


class Segmenter(nn.Module):
    """``[batch, 1, h, w]`` to ``[batch, 4, h, w]``."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


IMAGES = torch.randn(6, 1, 5, 5, generator=torch.Generator().manual_seed(5))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def value(student: nn.Module, teachers: Any, batch: Any, inputs: Any, pairs: Any = None, **weights: Any) -> float:
    """The objective on one batch."""
    graph = capture(student, inputs)
    told = {"alpha": 0.7, "temperature": 3.0, "match": "soft_targets", "feature": 1.0, "feature_loss": "fitnets"}
    text = format_graph(graph)
    with distillation(graph, teachers, "auto", Weights(**{**told, **weights}), pairs or {}) as objective:
        taken = as_batch(graph, batch)
        objective.start(lambda: taken, torch.device("cpu"), 0)
        targets = objective.targets(taken)
        outputs = graph(*inputs) if not isinstance(inputs, dict) else graph(**inputs)
        found = float(objective(outputs, taken, targets).detach())
    assert format_graph(graph) == text
    return found


def near(expected: torch.Tensor) -> Any:
    """Within rounding of float32; divergences are small differences of logarithms."""
    return pytest.approx(float(expected.detach()), rel=1e-5, abs=1e-6)


def divergence(student: torch.Tensor, teacher: torch.Tensor, heat: float) -> torch.Tensor:
    wanted = (teacher / heat).softmax(-1)
    return heat**2 * (wanted * (wanted.log() - (student / heat).log_softmax(-1))).sum(-1).mean()


def test_soft_targets_and_labels() -> None:
    student, teacher = convnet(4), convnet(8, 1)
    s, t = student(IMAGES), teacher(IMAGES)
    expected = 0.7 * divergence(s, t, 3.0) + 0.3 * functional.cross_entropy(s, LABELS)
    assert value(student, [teacher], (IMAGES, LABELS), (IMAGES,)) == near(expected)
    # without labels the teacher's part counts whole
    assert value(student, [teacher], IMAGES, (IMAGES,)) == pytest.approx(
        float(divergence(s, t, 3.0).detach()), rel=1e-5
    )


def test_itself_costs_nothing() -> None:
    student = convnet(4)
    assert value(student, [student], IMAGES, (IMAGES,)) == pytest.approx(0, abs=1e-6)


def test_several_teachers_are_their_mean() -> None:
    student, first, second = convnet(4), convnet(8, 1), convnet(6, 2)
    wanted = ((first(IMAGES) / 3).softmax(-1) + (second(IMAGES) / 3).softmax(-1)) / 2
    expected = divergence(student(IMAGES), 3 * wanted.log(), 3.0)
    assert value(student, [first, second], IMAGES, (IMAGES,)) == near(expected)


@pytest.mark.parametrize("match", ["mse", "cosine"])
def test_outputs_that_are_no_classes(match: str) -> None:
    student, teacher = convnet(4), convnet(8, 1)
    s, t = student(IMAGES), teacher(IMAGES)
    expected = functional.mse_loss(s, t) if match == "mse" else 1 - functional.cosine_similarity(s, t, -1).mean()
    assert value(student, [teacher], IMAGES, (IMAGES,), match=match) == pytest.approx(
        float(expected.detach()), rel=1e-5
    )


def test_tokens_without_label_do_not_count() -> None:
    student, teacher = Tokens(6, 0).eval(), Tokens(9, 1).eval()
    ids = torch.randint(0, 7, (3, 4), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0, 1, -100, -100], [2, 3, 4, -100], [1, -100, 0, 2]])
    s, t = student(ids)["logits"], teacher(ids)["logits"]
    kept = labels >= 0
    expected = 0.7 * divergence(s[kept], t[kept], 3.0) + 0.3 * functional.cross_entropy(s[kept], labels[kept])
    found = value(student, [teacher], {"ids": ids, "labels": labels}, {"ids": ids})
    assert found == near(expected)


def test_a_batch_without_any_label_costs_nothing() -> None:
    student, teacher = Tokens(6, 0).eval(), Tokens(9, 1).eval()
    ids, labels = torch.zeros(2, 4, dtype=torch.int64), torch.full((2, 4), -100)
    assert value(student, [teacher], {"ids": ids, "labels": labels}, {"ids": ids}) == 0.0


def test_classes_of_pixels() -> None:
    student, teacher = Segmenter(0).eval(), Segmenter(1).eval()
    s, t = student(IMAGES).movedim(1, -1), teacher(IMAGES).movedim(1, -1)
    assert value(student, [teacher], IMAGES, (IMAGES,)) == pytest.approx(
        float(divergence(s, t, 3.0).detach()), rel=1e-5
    )


def test_features_of_other_width_get_an_adapter() -> None:
    student, teacher = capture(convnet(4), (IMAGES,)), convnet(8, 1)
    weights = Weights(1.0, 1.0, "mse", 1.0, "fitnets")
    with distillation(student, [teacher, convnet(4, 2)], "auto", weights, {"relu": "1"}) as objective:
        batch = as_batch(student, IMAGES)
        objective.start(lambda: batch, torch.device("cpu"), 0)
        kinds = [type(item).__name__ for item in objective.adapters]
        assert kinds == ["Conv2d", "Identity"]
        assert objective.adapters[0].weight.shape == (8, 4, 1, 1)


def test_feature_losses() -> None:
    a, b = torch.randn(5, 3, 4, 4), torch.randn(5, 3, 4, 4)
    assert fitnets(a, a) == attention(a, a) == relational(a, a) == 0
    assert fitnets(a, b) == functional.mse_loss(a, b)
    torch.testing.assert_close(attention(a, 5 * a), torch.tensor(0.0))
    maps = [functional.normalize(x.square().sum(1).flatten(1), dim=1) for x in (a, b)]
    torch.testing.assert_close(attention(a, b), (maps[0] - maps[1]).square().sum(1).mean())
    rows = torch.randn(4, 6)
    torch.testing.assert_close(relational(rows, 2.5 * rows), torch.tensor(0.0), atol=1e-6, rtol=0)
    turned = rows @ torch.linalg.qr(torch.randn(6, 6)).Q  # distances and angles survive a rotation
    torch.testing.assert_close(relational(rows, turned), torch.tensor(0.0), atol=1e-6, rtol=0)
    assert relational(rows, torch.randn(4, 9)) > 0.01


def test_relational_has_finite_gradients_where_samples_coincide() -> None:
    rows = torch.zeros(3, 2, requires_grad=True)
    relational(rows, torch.randn(3, 2)).backward()
    assert rows.grad is not None and bool(rows.grad.isfinite().all())


def data() -> DataLoader[Any]:
    return DataLoader(TensorDataset(IMAGES, LABELS), batch_size=3)


def distil(teacher: Any, **options: Any) -> fxc.Compiled:
    return fxc.distill(teacher, convnet(4), data(), (IMAGES,), progress=False, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"features": ("nowhere",)}, "nowhere"),
        ({"features": {"relu": "11"}}, "11"),
        ({"alfa": 1}, "did you mean 'alpha'"),
        ({"feature_loss": "attention", "features": {"4": "4"}}, "no places"),
        ({"feature_loss": "atention"}, "did you mean 'attention'"),
        ({"features": {"relu": "4"}}, "do not correspond"),
        ({"alpha": 0.0}, "outside"),
        ({"temperature": 0.0}, "above 0"),
        ({"match": "mse", "temperature": 2.0}, "of match='soft_targets'"),
        ({"feature_weight": 2.0}, "of features"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(PreconditionError, match=words):
        distil(convnet(8, 1), **options)


def test_outputs_that_do_not_match() -> None:
    with pytest.raises(PreconditionError, match=r"the teacher gives \[3, 4\], the student \[3, 3\]"):
        distil(convnet(8, 1, classes=4))


def test_a_teacher_of_other_inputs() -> None:
    with pytest.raises(PreconditionError, match="cannot be called with the inputs of the student"):
        distil(nn.Linear(7, 3).eval())


class Idle(nn.Module):
    """Its second layer is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = convnet(4, 1), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def test_a_feature_of_a_layer_that_does_not_run() -> None:
    with pytest.raises(PreconditionError, match="'unused' gave no tensor"):
        distil(Idle().eval(), features={"0": "unused"})


def test_the_whole_teacher_is_no_name_of_a_layer() -> None:
    with pytest.raises(OptionError, match="known: 0,"):
        distil(convnet(8, 1), features={"0": "zzz"})


@pytest.mark.parametrize("teacher", [None, "resnet", convnet(4, 1).train()], ids=["none", "text", "training"])
def test_what_is_no_teacher(teacher: Any) -> None:
    with pytest.raises((OptionError, PreconditionError), match="teacher"):
        distil(teacher)


def test_teacher_and_students_model_stay_as_they_were() -> None:
    teacher, student = convnet(8, 1), convnet(4)
    before = [{k: v.clone() for k, v in model.state_dict().items()} for model in (teacher, student)]
    result = fxc.distill(teacher, student, data(), (IMAGES,), epochs=2, lr=0.1, features={"relu": "1"}, progress=False)
    for model, state in zip((teacher, student), before, strict=True):
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
        assert not any(module._forward_hooks for module in model.modules())
    assert not torch.equal(result.module.state_dict()["0.weight"], student.state_dict()["0.weight"])
    assert not result.module.training


def test_teacher_is_the_model_before_any_pass() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    inputs = torch.randn(64, 6)
    passes = [fxc.passes.PruneChannels(ratio=0.5)]
    pruned = fxc.compile(model, passes, (inputs[:2],), progress=False)
    distill = fxc.passes.Distill(inputs.split(16), epochs=60, lr=0.03, alpha=1.0, match="mse")
    taught = fxc.compile(model, [*passes, distill], (inputs[:2],), progress=False)
    errors = [float(functional.mse_loss(found(inputs), model(inputs)).detach()) for found in (pruned, taught)]
    assert errors[1] < errors[0] / 4


def test_soft_targets_of_one_class_teach_nothing_and_are_refused() -> None:
    x = torch.randn(4, 1, 6, 6)
    with pytest.raises(PreconditionError, match="have one class") as caught:
        fxc.compile(convnet(4, classes=1), [fxc.passes.Distill([x], steps=1, alpha=1.0)], (x,))
    assert "mse" in str(caught.value.remedy)
