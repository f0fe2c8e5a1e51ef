"""The report as data: JSON both ways, files, records, engines."""

import json
import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from fxcompress.analysis.cost import Cost
from fxcompress.capture import capture
from fxcompress.errors import FxCompressError, OptionError, PreconditionError
from fxcompress.passes.base import Numerics, Pass, PassResult, Rewrite, Skip
from fxcompress.reporting.model import EngineReport, PassReport, Report

COST = Cost(parameters=10, macs=100, bytes=40, activation_peak_bytes=8)


@dataclass(frozen=True)
class Halve(Pass):
    name: ClassVar[str] = "halve"
    numerics: ClassVar[Numerics] = Numerics.LOSSY
    ratio: float = 0.5
    dtype: torch.dtype = torch.float16

    def run(self, graph_module, context):
        return PassResult(graph_module)


@dataclass
class Record:
    """As the pass manager makes them."""

    pass_: Pass
    result: PassResult
    seconds: float = 0.5
    before: Cost = COST
    after: Cost = COST
    error: float | None = 0.25
    tolerance: float | None = None
    extra: list = field(default_factory=list)


def record(detail):
    rewrites = (Rewrite("conv", "halved", detail),)
    return Record(Halve(ratio=0.25), PassResult(None, rewrites, (Skip("fc", "tied_weight", "it is tied", ("a",)),)))


def test_a_pass_report_from_a_record():
    made = PassReport.from_record(record({"rank": 3}))
    assert (made.name, made.text, made.numerics) == ("halve", "halve(ratio=0.25)", "lossy")
    assert made.options == {"ratio": 0.25, "dtype": "float16"}
    assert made.rewrites[0].detail == {"rank": 3}
    assert type(made.rewrites[0].detail) is dict
    assert made.skipped[0].blocking == ("a",)
    assert (made.seconds, made.error, made.tolerance, made.note) == (0.5, 0.25, None, "")


def test_details_become_plain_values():
    detail = {
        "shape": torch.Size([2, 3]),
        "kept": {"conv.weight": {0: torch.tensor([0, 2]), 1: (np.int64(1),)}},
        "scale": np.float32(0.5),
        "worst": float("inf"),
        "names": {"b", "a"},
        "dtype": torch.int8,
        "layer": nn.Linear,
    }
    made = PassReport.from_record(record(detail)).rewrites[0].detail
    assert made == {
        "shape": [2, 3],
        "kept": {"conv.weight": {0: [0, 2], 1: [1]}},
        "scale": 0.5,
        "worst": "inf",
        "names": ["a", "b"],
        "dtype": "int8",
        "layer": "Linear",
    }


def test_json_and_back(report):
    told = json.loads(report.to_json())
    assert told == report.to_dict()
    assert told["passes"][1]["rewrites"][0]["detail"]["kept"]["layer1.0.conv1.weight"]["0"] == [0, 2, 5]
    back = Report.from_dict(told)
    assert back == report
    assert back.passes[1].rewrites[0].detail["kept"] == {"layer1.0.conv1.weight": {0: [0, 2, 5], 1: [1]}}
    assert isinstance(back.passes[0].rewrites[0], Rewrite)
    assert isinstance(back.passes[0].skipped[0], Skip)
    assert isinstance(back.passes[0].before, Cost)


def test_errors_that_are_no_numbers_survive(report):
    report.passes[0].error = float("inf")
    report.capture.errors["batch=4"] = float("nan")
    back = Report.from_dict(json.loads(report.to_json()))
    assert back.passes[0].error == float("inf")
    assert math.isnan(back.capture.errors["batch=4"])


def test_a_graph_without_shapes_has_no_macs(report):
    report.passes[0].before = Cost(10, None, 40, None)
    assert Report.from_dict(report.to_dict()).passes[0].before.macs is None
    assert "?" in str(report)


def test_files(report, tmp_path):
    path = report.save(tmp_path / "report.json")
    assert Report.load(path) == report
    assert report.save(str(tmp_path / "report.html")).read_text(encoding="utf-8").startswith("<!doctype html>")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_files_that_cannot_be(report, tmp_path):
    with pytest.raises(OptionError, match=r"no \.pdf"):
        report.save(tmp_path / "report.pdf")
    with pytest.raises(OptionError, match="without a suffix"):
        report.save(tmp_path / "report")
    with pytest.raises(FxCompressError, match="cannot be written") as caught:
        report.save(tmp_path / "missing" / "report.json")
    assert "missing" in str(caught.value.where)
    (tmp_path / "taken.json").mkdir()
    with pytest.raises(FxCompressError, match="cannot be written"):
        report.save(tmp_path / "taken.json")
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken.json"]


def test_what_is_no_report_is_refused(report, tmp_path):
    with pytest.raises(PreconditionError, match="not a report"):
        Report.from_dict({"model": "x"})
    with pytest.raises(PreconditionError, match="not a report"):
        Report.from_dict([1])
    with pytest.raises(PreconditionError, match="format 99"):
        Report.from_dict(report.to_dict() | {"format_version": 99})
    told = report.to_dict()
    told["passes"][0]["seconds"] = "soon"
    with pytest.raises(PreconditionError, match="damaged") as caught:
        Report.from_dict(told)
    assert caught.value.where == "passes.0.seconds"
    with pytest.raises(PreconditionError, match="cannot be read"):
        Report.load(tmp_path / "none.json")
    (tmp_path / "cut.json").write_text(report.to_json()[:50])
    with pytest.raises(PreconditionError, match="cannot be read"):
        Report.load(tmp_path / "cut.json")


def engine(verification):
    manifest = SimpleNamespace(
        backend="onnxruntime",
        files={"model.onnx": SimpleNamespace(bytes=100), "model.onnx.data": SimpleNamespace(bytes=900)},
        options={"opset": 20},
        inputs=[SimpleNamespace(name="x"), SimpleNamespace(name="y")],
        measurements={"verification": verification} if verification is not None else {},
    )
    return SimpleNamespace(manifest=manifest, path="/tmp/bundle")


def test_an_engine_report():
    made = EngineReport.from_engine(
        engine({"relative_error": {"out": 1e-6}, "tolerance": 1e-4, "input_shapes": [[[2, 3], [2]], [[3, 3], [3]]]})
    )
    assert (made.backend, made.path, made.size_bytes) == ("onnxruntime", "/tmp/bundle", 1000)
    assert (made.errors, made.tolerance, made.unverified) == ({"out": 1e-6}, 1e-4, "")
    assert made.verified == ["x[2, 3], y[2]", "x[3, 3], y[3]"]
    made.add_timings(SimpleNamespace(timings=[SimpleNamespace(name="engine", median_ms=1.0, p95_ms=2.0)]), batch=4)
    assert (made.latency[0].name, made.latency[0].p95_ms, made.latency[0].batch) == ("engine", 2.0, 4)


def test_an_engine_that_was_not_verified_says_why():
    assert EngineReport.from_engine(engine({"skipped": "no GPU here"})).unverified == "no GPU here"
    assert "verify=False" in EngineReport.from_engine(engine(None)).unverified


def test_describe_fills_in_the_graph():
    graph_module = capture(nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval(), (torch.randn(2, 4),))
    made = Report("Sequential")
    made.describe(graph_module)
    assert made.inputs == ["input_1: f32[batch, 4]"]
    assert made.outputs == ["relu: f32[batch, 3]"]
    assert sum(row.macs for row in made.layers) == 12
    assert Report.from_dict(made.to_dict()) == made


def test_totals(report):
    assert report.before is report.passes[0].before
    assert report.after is report.passes[-1].after
    assert report.rewrites == 3
    assert (Report("empty").before, Report("empty").after, Report("empty").rewrites) == (None, None, 0)
    assert Report("empty").versions["torch"]
