"""Checkpoints: whole or not there, of this model and this run, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from fxcompress.capture import capture
from fxcompress.errors import PreconditionError
from fxcompress.training import checkpoint
from fxcompress.training.loop import train
from fxcompress.training.objective import Objective
from tests.training import runs


def test_directory_holds_two_and_no_remains(tmp_path: Path) -> None:
    (tmp_path / ".part-old").mkdir()
    runs.run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000018", "step-00000020"]
    for path in tmp_path.iterdir():
        assert sorted(file.name for file in path.iterdir()) == ["state.json", "tensors.safetensors"]


@pytest.mark.parametrize("kind", [OSError, SafetensorError])
def test_write_that_fails_leaves_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    runs.run(tmp_path, steps=2)
    before = sorted(tmp_path.rglob("*"))

    def full(*_: object) -> None:
        raise kind("no space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    kept = checkpoint.Checkpoints(tmp_path, {})
    with pytest.raises(PreconditionError, match="no space left"):
        kept.save(9, {}, {})
    monkeypatch.undo()
    assert sorted(tmp_path.rglob("*")) == before


def test_other_weights_are_another_model(tmp_path: Path) -> None:
    runs.run(tmp_path, epochs=1)
    graph = runs.graph()
    with torch.no_grad():
        graph.get_parameter("0.weight").mul_(2)
    with pytest.raises(PreconditionError, match="of another model: it had other weights"):
        train(graph, runs.loader(), Objective(), runs.options(tmp_path, epochs=1))


def test_other_shapes_are_another_model(tmp_path: Path) -> None:
    runs.run(tmp_path, epochs=1)
    graph = capture(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).eval(), (torch.zeros(2, 1, 6, 6),))
    with pytest.raises(PreconditionError, match="parameters of other names or shapes"):
        train(graph, runs.loader(), Objective(), runs.options(tmp_path, epochs=1))


def test_other_options_are_another_run(tmp_path: Path) -> None:
    runs.run(tmp_path, epochs=1)
    with pytest.raises(PreconditionError, match=r"another run: lr was 0.02, is 0.01"):
        runs.run(tmp_path, epochs=1, lr=0.01)
    with pytest.raises(PreconditionError, match=r"steps_per_epoch was 5, is 3"):
        runs.run(tmp_path, epochs=1, data=runs.loader(batch_size=32))


@pytest.mark.parametrize("name", ["state.json", "tensors.safetensors"])
def test_damaged_one_is_refused(tmp_path: Path, name: str) -> None:
    runs.run(tmp_path, epochs=1)
    newest = max(tmp_path.iterdir())
    (newest / name).write_bytes(b"{")
    with pytest.raises(PreconditionError, match="cannot be read"):
        runs.run(tmp_path, epochs=1)


def test_tied_and_cut_tensors_are_saved_as_they_are(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    kept = checkpoint.Checkpoints(tmp_path, {})
    kept.save(1, {}, {"a": whole, "b": whole, "c": whole[:, 1], "d": whole[1:], "e": torch.zeros(0)})
    found = kept.latest()
    assert found is not None
    for name, expected in {"a": whole, "b": whole, "c": whole[:, 1], "d": whole[1:], "e": torch.zeros(0)}.items():
        assert torch.equal(found.tensors[name], expected)


def test_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PreconditionError, match="cannot be written"):
        runs.run(tmp_path / "file" / "inside", epochs=1)
