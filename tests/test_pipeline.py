"""The whole way in one call: distil, prune, distil again, fuse, quantize, train quantized, engine; as a recipe too."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import fxcompress as fxc
from fxcompress.cli import app
from fxcompress.model_specs import load_value
from fxcompress.recipes import read_recipe

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PASSES = ["distill", "prune_channels", "distill", "fuse_modules", "quantize", "train_quantized"]


@pytest.fixture
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The examples with a few epochs, in a folder of their own."""
    pytest.importorskip("sklearn")
    (tmp_path / "examples").mkdir()
    for name in ("pipeline.py", "pipeline.yaml"):
        text = (EXAMPLES / name).read_text(encoding="utf-8")
        text = re.sub(r"epochs(=|: )(\d+)", lambda found: f"epochs{found[1]}{max(1, int(found[2]) // 5)}", text)
        (tmp_path / "examples" / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_recipe_ends_in_an_integer_engine(short: Path) -> None:
    arguments = ["compile", "--recipe", "examples/pipeline.yaml", "--output", "digits.bundle", "--json"]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    told: dict[str, Any] = json.loads(found.stdout)
    assert [item["name"] for item in told["report"]["passes"]] == PASSES
    engine = fxc.load_engine(short / "digits.bundle")
    counts = engine.optimized_op_counts()
    assert counts["QLinearConv"] == 3 and "Conv" not in counts
    test = load_value("examples/pipeline.py:test").dataset
    images, labels = test.tensors
    assert (torch.as_tensor(engine(images)).argmax(1) == labels).float().mean() > 0.8  # after a fifth of the epochs
    first = told["report"]["passes"][0]["before"]["macs"]
    assert told["report"]["passes"][1]["after"]["macs"] <= 0.4 * first


def test_recipe_and_script_are_one(short: Path) -> None:
    recipe = read_recipe(Path("examples/pipeline.yaml"))
    options = {next(iter(item)) if isinstance(item, dict) else item for item in recipe.passes}
    script = (EXAMPLES / "pipeline.py").read_text(encoding="utf-8")
    assert options == set(PASSES)
    for text in ("macs=0.4, round_to=8", "batches=4", "epochs=5, lr=3e-4, alpha=0.9"):
        assert text in script


def test_values_from_files(tmp_path: Path) -> None:
    path = tmp_path / "data.py"
    path.write_text(
        "calls = []\ndef loader():\n    calls.append(1)\n    return [1, 2]\ndef loss(outputs, batch):\n    return 0\n"
    )
    assert load_value(f"{path}:loader") == [1, 2]
    assert load_value(f"{path}:loader") == [1, 2] and load_value(f"{path}:calls") == [1, 1]
    assert load_value(f"{path}:loss")(1, 2) == 0
    with pytest.raises(fxc.errors.OptionError, match="did you mean loader"):
        load_value(f"{path}:loade")
    with pytest.raises(fxc.errors.PreconditionError, match="no such file"):
        load_value(f"{tmp_path}/date.py:loader")
    path.write_text("def broken():\n    raise ValueError('no data')\n")
    with pytest.raises(fxc.errors.PreconditionError, match="no data"):
        load_value(f"{path}:broken")
