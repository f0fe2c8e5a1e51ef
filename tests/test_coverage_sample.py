"""A fast sample of `benchmarks/coverage.py`, and the checks themselves, which must notice what they are there for."""

import copy
import importlib.util
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import coverage, zoo

SAMPLE = (
    "torchvision:mobilenet_v3_small",  # in-place activations, squeeze and excitation
    "torchvision:shufflenet_v2_x0_5",  # chunk, concatenation, channel shuffle
    "timm:pit_ti_224",  # a position table and a class token used directly
    "transformers:bert",  # a tied embedding, masks, a dataclass as output
    "transformers:gpt2",  # linear layers with transposed weights, a causal mask
    "transformers:wav2vec2",  # weight norm, group norm over time
)


@pytest.mark.parametrize("key", SAMPLE)
def test_capture_equals_eager_at_two_batch_sizes(key: str) -> None:
    suite = key.partition(":")[0]
    if any(importlib.util.find_spec(package) is None for package in {suite, "torchvision"}):
        pytest.skip(f"{suite} is not installed (the extra 'zoo' brings it)")
    row = coverage.check(zoo.find(key))
    assert row["ok"], row["failures"]
    assert row["error_2"] <= coverage.CAPTURE_TOLERANCE
    assert row["error_3"] <= coverage.CAPTURE_TOLERANCE
    assert row["layers"] > 0


def failures(entry: zoo.ZooModel) -> list[dict[str, str]]:
    row = coverage.check(entry)
    return [] if row["ok"] else row["failures"]


def entry(model: nn.Module) -> zoo.ZooModel:
    return zoo.ZooModel("sample", "torchvision", lambda: model, lambda batch: zoo.images((3, 4, 4), batch))


def test_a_sound_model_has_no_failure() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    zoo.enliven(model, zoo.images((3, 4, 4), 3))
    assert failures(entry(model)) == []


def test_a_model_that_cannot_be_captured_is_named_with_its_stage() -> None:
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.sum() > 0 else x * 3

    (failure,) = failures(entry(Branching().eval()))
    assert failure["stage"] == "capture"
    assert "CaptureError" in failure["error"]


def test_outputs_that_prove_nothing_fail() -> None:
    class Constant(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 0 + 1

    (failure,) = failures(entry(Constant().eval()))
    assert failure["stage"] == "eager"


def test_a_changed_model_is_noticed() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    before = coverage.fingerprint(model)
    assert coverage.fingerprint(model) == before
    model[0].weight.data[0, 0] += 1e-3  # past the version counter
    assert coverage.fingerprint(model) != before
    model.eval()
    assert len(coverage.fingerprint(copy.deepcopy(model))) == len(before)


@pytest.mark.parametrize(
    ("expected", "actual", "message"),
    [
        ((torch.ones(2),), [torch.ones(2)], "structure"),
        ({"a": torch.ones(2)}, {"b": torch.ones(2)}, "structure"),
        ((torch.ones(2),), (torch.ones(3),), "instead of"),
        ((torch.ones(2),), (torch.ones(2).double(),), "instead of"),
        ((torch.ones(2),), (torch.ones(2) + 1e-4,), "differs"),
        ((torch.ones(2),), (torch.full((2,), torch.nan),), "differs"),
        ((torch.tensor([1]),), (torch.tensor([2]),), "differs"),
    ],
)
def test_compare_finds_the_difference(expected: Any, actual: Any, message: str) -> None:
    with pytest.raises(coverage.Failure, match=message):
        coverage.compare(expected, actual, 1e-5)


def test_compare_is_relative_to_the_largest_value() -> None:
    assert coverage.compare((torch.tensor([100.0, 0.0]),), (torch.tensor([100.0, 1e-4]),), 1e-5) == pytest.approx(1e-6)
