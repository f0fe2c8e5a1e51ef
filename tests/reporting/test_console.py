"""The report as text: golden at one width, whole at any other, colours only where they are wanted."""

import io

import pytest
from expecttest import assert_expected_inline
from rich.console import Console

from fxcompress.passes.base import Skip
from fxcompress.reporting import print_report
from fxcompress.reporting.console import format_report
from fxcompress.reporting.model import Report


def test_golden_text(report):
    assert_expected_inline(
        str(report),
        """\
ResNet  captured in 1.6 s, 71 nodes, relative error 0 at batch=2, 0 at batch=3
  note: the input 'x' is left alone

 pass                         time  changed  left   params     MACs   weights  activations    error
 ──────────────────────────────────────────────────────────────────────────────────────────────────
 captured                                          11.69 M   1.81 G  46.80 MB      6.42 MB
 fuse_modules               213 ms        2     6  11.68 M        =  46.74 MB      4.01 MB  1.2e-06
                                                    −0.04%              −0.1%       −37.5%  ≤ 1e-04
 prune_channels(ratio=0.5)   1.6 s        1     0   3.06 M  487.0 M  12.24 MB      2.01 MB  3.1e-01
                                                    −73.8%   −73.2%    −73.8%       −50.0%    lossy

 in all                      1.8 s        3     6   3.06 M  487.0 M  12.24 MB      2.01 MB
                                                    −73.8%   −73.2%    −73.8%       −68.8%

  prune_channels: fine-tune to recover accuracy

 left as it was   sites   reason                                        where
 ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────
 shared_value         5   the convolution's output has another reader   head.bn, blocks.0.bn, blocks.1.bn and 2 more
 tied_weight          1   the weight is also that of decoder.weight     stem.bn

engine onnxruntime  12.35 MB, relative error 3.1e-07 ≤ 1e-04 (output 'logits') at x[2, 3, 224, 224]; x[3, 3, 224, 224]
  /tmp/resnet18-engine

 latency             batch     median        95%      engine is
 ──────────────────────────────────────────────────────────────
 onnxruntime             1    4.10 ms    4.90 ms
 eager PyTorch           1   12.30 ms   15.00 ms   3.00× faster
 torch.onnx.export       1    6.15 ms    7.00 ms   1.50× faster""",
    )


@pytest.mark.parametrize("width", [80, 100, 160])
def test_no_figure_is_cut(report, width):
    text = format_report(report, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for figure in ("−73.8%", "12.24 MB", "1.2e-06", "213 ms", "3.00× faster", "11.69 M"):
        assert figure in text


def test_a_console_of_ones_own_gets_colours(report):
    stream = io.StringIO()
    print_report(report, Console(file=stream, width=100, force_terminal=True, color_system="standard"))
    assert "\x1b[" in stream.getvalue()
    assert "\x1b[" not in str(report)


def test_standard_output_is_the_default(report, capsys):
    print_report(report)
    assert "fuse_modules" in capsys.readouterr().out


def test_text_of_others_is_not_markup(report):
    report.model = "Net[/bold]"
    report.passes[0].skipped = [Skip("blocks[0]", "code[red]", "because [link=x]this[/link]")]
    text = str(report)
    for part in ("Net[/bold]", "blocks[0]", "code[red]", "because [link=x]this[/link]"):
        assert part in text


def test_skips_are_grouped_by_code_the_most_frequent_first(report):
    text = str(report)
    assert text.index("shared_value") < text.index("tied_weight")
    assert "head.bn, blocks.0.bn, blocks.1.bn and 2 more" in text


def test_a_report_of_nothing():
    text = str(Report("Model", versions={}))
    assert text.startswith("Model  captured in 0 ms")
    assert "pass" not in text


def test_an_engine_that_was_not_verified(report):
    report.engine.errors = {}
    report.engine.unverified = "no GPU here"
    assert "not verified: no GPU here" in str(report)
