"""Two processes on the CPU, as ``accelerate launch`` starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training import processes

pytest.importorskip("accelerate")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path: Path) -> None:
    """Both end with the same weights: those of one process that takes two batches for every step."""
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(_free_port())]
    program = [sys.executable, *launch, "-m", "tests.training.processes", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    ended = subprocess.run(program, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 0, ended.stderr
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    single, history = processes.run(norm=False, clip=1.0, accumulate=2)
    for name, tensor in single.state_dict().items():
        torch.testing.assert_close(first[f"plain.{name}"], tensor, msg=name)
    assert first["metric"] == pytest.approx(history.after)
    assert len(list((tmp_path / "checkpoints").glob("step-*"))) == 2
