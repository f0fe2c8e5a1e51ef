"""The HTML page: self-contained, escaped, and a clear error without Jinja2."""

import re
import sys
from html.parser import HTMLParser

import pytest

from fxcompress.errors import PreconditionError
from fxcompress.passes.base import Rewrite, Skip
from fxcompress.reporting.model import Latency, Report

jinja2 = pytest.importorskip("jinja2")

from fxcompress.reporting.html import render_html  # noqa: E402

HOSTILE = "<script>alert(1)</script>\"'&"


class Balanced(HTMLParser):
    """Every element is closed, in order."""

    void = ("meta", "br", "img", "link", "input", "hr")

    def __init__(self):
        super().__init__()
        self.open, self.tags = [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parsed(page):
    parser = Balanced()
    parser.feed(page)
    parser.close()
    assert not parser.open
    return parser


def test_the_page_has_everything_and_needs_nothing(report):
    page = render_html(report)
    tags = parsed(page).tags
    assert not tags & {"script", "link", "img", "iframe", "object"}
    assert not re.search(r"https?://|@import|url\(", page)
    for text in (
        "ResNet",
        "prune_channels(ratio=0.5)",
        "−73.8%",
        "tied_weight",
        "onnxruntime",
        "3.00× faster",
        "conv1",
        "relative",
        "torch 2.13.0",
        "64 → 32 channels",
        "fine-tune to recover accuracy",
    ):
        assert text in page


def test_all_text_is_escaped(report):
    report.model = HOSTILE
    report.capture.notes = [HOSTILE]
    report.capture.errors = {HOSTILE: 0.0}
    report.inputs, report.outputs = [HOSTILE], [HOSTILE]
    report.versions = {HOSTILE: HOSTILE}
    item = report.passes[0]
    item.text = item.note = item.numerics = HOSTILE
    item.rewrites = [Rewrite(HOSTILE, HOSTILE, {HOSTILE: HOSTILE})]
    item.skipped = [Skip(HOSTILE, HOSTILE, HOSTILE)]
    engine = report.engine
    engine.backend = engine.path = HOSTILE
    engine.errors, engine.verified, engine.latency = {HOSTILE: 0.1}, [HOSTILE], [Latency(HOSTILE, 1.0, 2.0)]
    page = render_html(report)
    assert "script" not in parsed(page).tags
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&#34;&#39;&amp;" in page


def test_a_report_of_nothing():
    page = render_html(Report("Model"))
    parsed(page)
    assert "Passes" not in page
    assert "Engine" not in page


def test_long_lists_are_cut_and_say_so(report):
    report.passes[0].rewrites = [Rewrite(f"layer{n}", "folded", {"long": "x" * 1000}) for n in range(1000)]
    page = render_html(report)
    assert "and 800 more" in page
    assert "x" * 200 not in page
    assert len(page) < 200_000


def test_without_jinja2_the_remedy_is_named(report, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(PreconditionError, match="Jinja2") as caught:
        report.save(tmp_path / "report.html")
    assert "pip install 'fxcompress[report]'" in str(caught.value.remedy)
    assert not list(tmp_path.iterdir())
