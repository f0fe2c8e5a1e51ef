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
        """""",
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
