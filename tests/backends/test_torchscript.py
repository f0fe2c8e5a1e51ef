"""The TorchScript backend: sizes stay dynamic, constants stay the engine's, and programs that do more are refused."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress.backends import TorchScript
from fxcompress.errors import BackendError, BundleError, OptionError


def built(model: nn.Module, inputs: Any, output: Path | None = None, **options: Any) -> Any:
    return fxc.compile(model.eval(), example_inputs=inputs, progress=False).export(TorchScript(**options), output)


@pytest.mark.parametrize("options", [{"freeze": 1}, {"optimize": "yes"}, {"freeze": False, "optimize": True}])
def test_options_are_checked_when_given(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError) as caught:
        TorchScript(**options)
    assert str(caught.value.where).startswith("TorchScript.") and caught.value.remedy


@pytest.mark.parametrize("options", [{}, {"freeze": False}, {"optimize": True}], ids=str)
@torch.no_grad()
def test_sizes_and_numbers(options: dict[str, Any]) -> None:
    """Arithmetic on sizes, numbers in the place of tensors, several results, keyword-only arguments."""

    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            count, width = x.shape
            first, second = x.split([1, width - 1], 1)
            padded = nn.functional.pad(x, (0, 1), value=0.5)
            mask = torch.full((count, count), float("-inf")).triu(1)
            return {
                "sizes": (count * 2 - 1, count // 2),
                "half": x / count + 2 * x**2,
                "parts": (first, second.max(1)),
                "padded": padded.to(torch.float64),
                "mask": mask,
                "where": torch.where(x > 0, x, 0.0),
                "steps": torch.arange(0, count * 3, 3, dtype=torch.int32),
            }

    model = Model()
    engine = built(model, (torch.randn(3, 4),), **options)
    for batch in (1, 2, 6):
        x = torch.randn(batch, 4)
        got, want = engine(x), model(x)
        assert [int(size) for size in got["sizes"]] == list(want["sizes"])
        assert torch.equal(got["mask"], want["mask"]) and got["steps"].dtype is torch.int32
        for key in ("half", "padded", "where", "steps"):
            torch.testing.assert_close(got[key], want[key])
        torch.testing.assert_close(got["parts"][1].values, want["parts"][1].values)
        assert torch.equal(got["parts"][1].indices, want["parts"][1].indices)


def test_loads_with_torch_alone(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    engine = built(model, (torch.randn(2, 3, 6, 6),), tmp_path / "b")
    module = torch.jit.load(str(tmp_path / "b" / "model.ts"))
    x = torch.randn(3, 3, 6, 6)
    (output,) = module(x)
    torch.testing.assert_close(output, engine(x))
    assert "batch_norm" in str(module.inlined_graph), "the file is not frozen"
    assert "batch_norm" not in str(engine.module.graph), "folded into the convolution"


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(1000, 64), nn.Linear(64, 1000, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(x))

    built(Tied(), (torch.zeros(2, 3, dtype=torch.int64),), tmp_path / "b")
    assert (tmp_path / "b" / "model.ts").stat().st_size < 1.5 * 1000 * 64 * 4


@pytest.mark.parametrize("mode", ["linear", "nearest", "nearest-exact"])
@pytest.mark.parametrize("wanted", [{"size": 13}, {"scale_factor": 1.7}, {"scale_factor": 2.5}], ids=str)
def test_resampling_in_one_dimension(mode: str, wanted: dict[str, Any]) -> None:
    """By size or by scale: TorchScript chooses between two overloads by what is None."""

    class Resampled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.interpolate(x, mode=mode, **wanted)

    model = Resampled()
    engine = built(model, (torch.randn(2, 3, 8),))
    x = torch.randn(5, 3, 8)
    torch.testing.assert_close(engine(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "text", ["def __setstate__(self)", "torch.save(x, 'f')", "torch.from_file('f')", "ops.image.write_file(x)"]
)
def test_programs_that_do_more_than_compute(tmp_path: Path, text: str) -> None:
    engine = built(nn.Linear(3, 2), (torch.randn(2, 3),), tmp_path / "b")
    with zipfile.ZipFile(engine.path / "model.ts", "a") as archive:
        archive.writestr("model/code/__torch__/other.py", text)
    with pytest.raises(BundleError, match="no need of"):
        TorchScript.load(engine.path, engine.manifest)


def test_files_that_are_no_programs(tmp_path: Path) -> None:
    engine = built(nn.Linear(3, 2), (torch.randn(2, 3),), tmp_path / "b")
    (engine.path / "model.ts").write_bytes(b"nothing")
    with pytest.raises(BackendError, match="no TorchScript program"):
        TorchScript.load(engine.path, engine.manifest)
    with zipfile.ZipFile(engine.path / "model.ts", "w") as archive:
        archive.writestr("model/data.pkl", b"nothing")
    with pytest.raises(BackendError, match="cannot load the TorchScript program"):
        TorchScript.load(engine.path, engine.manifest)


def test_an_operation_of_another_package_is_named() -> None:
    library = torch.library.Library("fxcompress_test_ops", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
    library.impl("twice", lambda x: torch.empty_like(x), "Meta")

    class Custom(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.fxcompress_test_ops.twice(x)

    with pytest.raises(BackendError, match=r"cannot run fxcompress_test_ops\.twice") as caught:
        built(Custom(), (torch.randn(2, 3),))
    assert "test_torchscript.py" in str(caught.value.where) and "torch_export" in str(caught.value.remedy)
    library._destroy()
