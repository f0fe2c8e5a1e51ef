"""What ``compile()`` tells about itself: data classes that are also JSON.

``report.passes[i].rewrites[j].detail`` is a dict; ``str(report)`` a plain text table; ``report.save("report.html")``
one page that needs nothing beside it. Times are seconds, latencies milliseconds, sizes bytes, errors relative:
``max|a − b| / max|a|`` over an output.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pydantic
from torch import fx

from fxcompress.analysis.cost import Cost, NodeCost, node_costs
from fxcompress.backends.bundle_writer import library_versions
from fxcompress.errors import FxCompressError, OptionError, PreconditionError
from fxcompress.graph.info import info
from fxcompress.graph.printer import format_value
from fxcompress.reporting.parts import CaptureReport, EngineReport, Latency, PassReport
from fxcompress.reporting.values import from_json, to_json

__all__ = ["CaptureReport", "EngineReport", "Latency", "PassReport", "Report"]

FORMAT_VERSION = 1


@cache
def _versions() -> dict[str, str]:
    return library_versions(("fxcompress", "torch"))


@dataclass
class Report:
    """Everything that one ``compile()`` did.

    Attributes:
        model: name of the model.
        capture: how it became a graph.
        passes: what each pass did, in order.
        engine: what was built, if a backend was asked for.
        inputs: of the graph: ``["x: f32[batch, 3, 224, 224]"]``.
        outputs: of the graph, likewise.
        layers: cost of each node of the final graph at batch 1.
        versions: of fxcompress, Python, torch and the platform.
        format_version: of this report's JSON.
    """

    model: str
    capture: CaptureReport = field(default_factory=CaptureReport)
    passes: list[PassReport] = field(default_factory=list)
    engine: EngineReport | None = None
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    layers: list[NodeCost] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=lambda: dict(_versions()))
    format_version: int = FORMAT_VERSION

    @property
    def before(self) -> Cost | None:
        """What the graph cost before the first pass; None if there were no passes."""
        return self.passes[0].before if self.passes else None

    @property
    def after(self) -> Cost | None:
        """What the graph cost after the last pass; None if there were no passes."""
        return self.passes[-1].after if self.passes else None

    @property
    def rewrites(self) -> int:
        """Number of sites changed by all passes."""
        return sum(len(item.rewrites) for item in self.passes)

    def describe(self, graph_module: fx.GraphModule) -> None:
        """Fill in inputs, outputs and layers from the final graph."""
        names = info(graph_module).dim_names
        placeholders = [n for n in graph_module.graph.nodes if n.op == "placeholder" and n.meta.get("val") is not None]
        self.inputs = [f"{node.name}: {format_value(node.meta['val'], names)}" for node in placeholders]
        results = graph_module.graph.output_node().all_input_nodes
        self.outputs = [f"{n.name}: {format_value(n.meta['val'], names)}" for n in results if "val" in n.meta]
        self.layers = node_costs(graph_module)

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON values: keys are strings, infinities and NaN are ``"inf"``, ``"-inf"``, ``"nan"``."""
        made: dict[str, Any] = to_json(dataclasses.asdict(self))
        return made

    def to_json(self) -> str:
        """The same as strict JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> Report:
        """The report that :meth:`to_dict` told.

        Raises:
            PreconditionError: this is no such report, or one of a newer version of fxcompress.
        """
        if not isinstance(told, Mapping) or "format_version" not in told:
            raise PreconditionError("this is not a report of fxcompress", remedy="give the file that save() wrote")
        if told["format_version"] != FORMAT_VERSION:
            raise PreconditionError(
                f"the report has format {told['format_version']!r}; this version reads {FORMAT_VERSION}",
                remedy="read it with the fxcompress that wrote it, or a newer one",
            )
        try:
            report = _adapter().validate_python(told)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            raise PreconditionError(
                f"the report is damaged: {first['msg']}",
                where=".".join(map(str, first["loc"])),
                remedy="write it again with compile --report or Report.save()",
            ) from error
        for item in report.passes:
            item.rewrites = [dataclasses.replace(site, detail=from_json(dict(site.detail))) for site in item.rewrites]
        return report

    def save(self, path: str | Path) -> Path:
        """Write the report as JSON or as one HTML page, as the suffix of ``path`` says; all or nothing.

        Raises:
            OptionError: the suffix is neither ``.json`` nor ``.html``.
            PreconditionError: HTML needs Jinja2, which is not installed.
            FxCompressError: the file cannot be written.
        """
        path = Path(path)
        if path.suffix.lower() in (".html", ".htm"):
            from fxcompress.reporting.html import render_html

            text = render_html(self)
        elif path.suffix.lower() == ".json":
            text = self.to_json()
        else:
            raise OptionError(
                f"a report is no {path.suffix or 'file without a suffix'}", where=str(path), remedy="use .json or .html"
            )
        _write(path, text)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read the JSON that :meth:`save` wrote.

        Raises:
            PreconditionError: there is no such file, or it is no report.
        """
        try:
            told = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PreconditionError(
                f"the report cannot be read: {error}",
                where=str(path),
                remedy="give the .json file that compile --report or Report.save() wrote",
            ) from error
        return cls.from_dict(told)

    def __str__(self) -> str:
        from fxcompress.reporting.console import format_report

        return format_report(self)


@cache
def _adapter() -> pydantic.TypeAdapter[Report]:
    return pydantic.TypeAdapter(Report)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise FxCompressError(
            f"the report cannot be written: {error.strerror or error}",
            where=str(path),
            remedy="choose a directory that exists and that you may write to",
        ) from error
