"""An interrupted run ends with the weights of the uninterrupted one, bit for bit."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import fx

from tests.training import runs


class _Stop(Exception):
    pass


def _stop_at(step: int) -> Any:
    def callback(run: Any) -> None:
        if run.step == step:
            raise _Stop

    return callback


def _same(a: fx.GraphModule, b: fx.GraphModule) -> None:
    theirs = b.state_dict()
    assert a.state_dict().keys() == theirs.keys()
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize(
    ("stops", "changes"),
    [
        ((1, 3, 11), {}),
        ((6,), {"accumulate": 2, "epochs": 5}),
        ((7, 8), {"optimizer": "sgd", "schedule": "one_cycle", "ema": None}),
        ((5,), {"patience": 1, "lr": 0.5}),
    ],
    ids=["adamw", "accumulate", "sgd", "patience"],
)
def test_interrupted_run_ends_as_the_other(tmp_path: Path, stops: tuple[int, ...], changes: dict[str, Any]) -> None:
    whole, told = runs.run(tmp_path / "whole", **changes)
    for step in stops:
        with pytest.raises(_Stop):
            runs.run(tmp_path / "cut", callback=_stop_at(step), **changes)
    torch.manual_seed(99)  # what other code draws in between does not matter
    resumed, again = runs.run(tmp_path / "cut", **changes)
    _same(whole, resumed)
    assert again.losses == told.losses
    assert again.resumed_at > 0
    assert (again.after, again.best_epoch, again.stopped) == (told.after, told.best_epoch, told.stopped)


def test_finished_run_is_not_run_again(tmp_path: Path) -> None:
    whole, told = runs.run(tmp_path)
    again, history = runs.run(tmp_path, callback=_stop_at(told.steps))
    _same(whole, again)
    assert history.resumed_at == history.steps == told.steps


@pytest.mark.slow
def test_killed_five_times_at_random_steps(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "tests.training.runs"]
    (tmp_path / "whole").mkdir()
    subprocess.run([*program, str(tmp_path / "whole")], check=True)
    cut = tmp_path / "cut"
    for step in sorted(random.Random(0).sample(range(1, 20), 5)):
        ended = subprocess.run([*program, str(cut), str(step)], check=False)
        assert ended.returncode == -signal.SIGKILL
    subprocess.run([*program, str(cut)], check=True)
    whole, resumed = (load_file(path / "weights.safetensors") for path in (tmp_path / "whole", cut))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
