"""The table of the noisiest layers, in every form of the report."""

import math

import torch
from torch import nn

import fxcompress as fxc
from fxcompress.passes import CorrectBias, FuseModules, Quantize
from fxcompress.reporting.noise import noise_lines


def test_noisiest_first_in_every_form(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    data = [torch.randn(16, 8)]
    report = fxc.compile(model, [FuseModules(), Quantize(data), CorrectBias(data)], (data[0],), progress=False).report
    fused, quantized, corrected = (noise_lines(item) for item in report.passes)
    assert not fused and len(quantized) == len(corrected) == 3
    decibels = [line.decibels for line in quantized]
    assert decibels == sorted(decibels) and all(math.isfinite(value) for value in decibels)
    assert quantized[0].formats == "int8, per channel · uint8" and "→" in corrected[0].text
    assert "noisiest layers after quantize" in str(report) and quantized[0].text in str(report)
    page = report.save(tmp_path / "report.html").read_text()
    assert "Signal to noise of 3 layers" in page and quantized[0].text in page
    loaded = fxc.reporting.Report.load(report.save(tmp_path / "report.json"))
    assert noise_lines(loaded.passes[1]) == quantized
