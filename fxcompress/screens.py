"""What the command line shows beside the report: errors, bundles, costs, latencies, lists of passes and backends."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import inspect
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, JustifyMethod
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fxcompress.analysis.cost import Cost, NodeCost
from fxcompress.backends.bundle import Manifest, read_manifest
from fxcompress.compiled import Compiled
from fxcompress.errors import FxCompressError, OptionError, PreconditionError
from fxcompress.model_specs import ModelSource
from fxcompress.reporting.console import print_report
from fxcompress.reporting.figures import count, size

__all__ = [
    "bundle_screen",
    "check_report",
    "compiled_json",
    "compiled_screen",
    "console",
    "cost_screen",
    "costs_by_kind",
    "error_screen",
    "fail",
    "listing",
    "pairs",
    "print_json",
    "quiet",
    "table",
    "weights_screen",
    "working",
]


def console(*, stderr: bool = False) -> Console:
    """A console that takes text as it is: ``[batch, 3]`` is a shape, no markup."""
    return Console(stderr=stderr, markup=False, highlight=False, emoji=False)


def print_json(document: Any) -> None:
    """The one document of ``--json``."""
    sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Other packages' warnings and logs are kept away: what a user must know is in the report or in the error."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextlib.contextmanager
def working(what: str | None = None) -> Iterator[None]:
    """Work whose chatter goes to standard error; a terminal shows ``what`` is being done, if that is told."""
    with contextlib.ExitStack() as stack:
        if what is not None and sys.stderr.isatty():
            stack.enter_context(console(stderr=True).status(Text(what)))
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield


def fail(error: Exception, as_json: bool) -> int:
    """Say what went wrong, as a panel or as JSON.

    Returns:
        the exit code: 2 where the command or its input is to blame, else 1.
    """
    code = 2 if isinstance(error, PreconditionError) else 1
    if not isinstance(error, FxCompressError):
        if hasattr(error, "format_message"):  # of typer: an unknown option and the like
            code, told = int(getattr(error, "exit_code", 2)), "fxcompress --help lists the commands and their options"
            error = OptionError(error.format_message(), remedy=told)
        else:
            told = "run it again with --debug and report the traceback: this is a mistake in fxcompress"
            error = FxCompressError(f"unexpected {type(error).__name__}: {error}", remedy=told)
    if as_json:
        parts = {"problem": error.problem, "where": error.where, "remedy": error.remedy}
        print_json({"error": {"type": type(error).__name__} | parts})
    else:
        error_screen(error, console(stderr=True))
    return code


def check_report(path: Path) -> None:
    """Refuse a report's file that could not be written, before any work is done.

    Raises:
        OptionError: the suffix says neither JSON nor HTML.
        PreconditionError: its directory is not there, or HTML lacks its package.
    """
    if path.suffix not in (".json", ".html"):
        raise OptionError(
            f"a report is .json or .html, not {path.suffix or 'without a suffix'}",
            where=str(path),
            remedy=f"name it {path.with_suffix('.json').name} or {path.with_suffix('.html').name}",
        )
    if not path.absolute().parent.is_dir():
        raise PreconditionError("the report's directory is not there", where=str(path), remedy="make it first")
    if path.suffix == ".html" and importlib.util.find_spec("jinja2") is None:
        raise PreconditionError("HTML needs Jinja2", where=str(path), remedy="pip install 'fxcompress[report]'")


def compiled_screen(compiled: Compiled, source: ModelSource, output: Path | None, reports: Sequence[Path]) -> None:
    """The report, where the weights came from, and what was written."""
    out = console()
    print_report(compiled.report, out)
    weights_screen(source, out)
    if output is None:
        out.print("nothing was written: --output DIR saves the graph, --backend NAME builds an engine there")
    elif compiled.engine is None:
        files = read_manifest(output).files.values()
        out.print(f"saved graph  {size(sum(record.bytes for record in files))}\n  {output.absolute()}", soft_wrap=True)
    for report in reports:
        out.print(f"report  {report}", soft_wrap=True)


def compiled_json(compiled: Compiled, source: ModelSource, output: Path | None, reports: Sequence[Path]) -> None:
    """The same as JSON."""
    files = read_manifest(output).files if output is not None else {}
    print_json(
        {
            "model": source.spec,
            "weights": source.weights,
            "output": str(output.absolute()) if output is not None else None,
            "files": {name: record.bytes for name, record in files.items()},
            "reports": [str(report) for report in reports],
            "report": compiled.report.to_dict(),
        }
    )


def weights_screen(source: ModelSource, console: Console) -> None:
    """Where the weights come from; random ones loudly."""
    if source.random:
        told = "random weights: sizes and times mean something, outputs do not; give --checkpoint FILE.safetensors"
        console.print(Text(told, style="bold yellow"))
    else:
        console.print(source.weights)


def error_screen(error: FxCompressError, console: Console) -> None:
    """What is wrong, where, and what to do."""
    text = Text(error.problem)
    for label, part in (("where", error.where), ("to do", error.remedy)):
        if part:
            text.append(f"\n{label}  ", style="bold").append(part)
    console.print(Panel(text, title=type(error).__name__, title_align="left", border_style="red", padding=(0, 1)))


def bundle_screen(path: str, manifest: Manifest, console: Console) -> None:
    """What a bundle takes, gives, and is made of."""
    total = sum(record.bytes for record in manifest.files.values())
    what = f"{manifest.backend} engine" if manifest.kind == "engine" else "saved graph"
    facts = table(show_header=False)
    facts.add_row("made by", f"fxcompress {manifest.fxcompress}, {manifest.created}, format {manifest.format_version}")
    facts.add_row("inputs", "\n".join(map(str, manifest.inputs)))
    facts.add_row("outputs", "\n".join(map(str, manifest.outputs)))
    facts.add_row("passes", "\n".join(_called(done.name, done.options) for done in manifest.passes) or "none")
    if manifest.options:
        facts.add_row("options", pairs(manifest.options))
    for name, figure in manifest.measurements.items():
        facts.add_row(name, pairs(figure) if isinstance(figure, Mapping) else str(figure))
    facts.add_row("versions", pairs(manifest.versions))
    files = table("file", ">bytes", ">", "sha256")
    for name, record in sorted(manifest.files.items()):
        files.add_row(name, f"{record.bytes:,}", size(record.bytes), record.sha256[:16] + "…")
    console.print(Text.assemble((path, "bold"), f"  {what}, {size(total)}, every file as its manifest says"))
    console.print(facts, files)


def costs_by_kind(costs: Sequence[NodeCost]) -> list[dict[str, Any]]:
    """Costs summed over the nodes of one kind, the dearest first; JSON values."""
    rows: dict[str, dict[str, Any]] = {}
    for item in costs:
        if item.kind in ("placeholder", "get_attr") and not item.bytes:
            continue
        kind = "weights used directly" if item.kind == "get_attr" else item.kind
        row = rows.setdefault(kind, {"kind": kind, "count": 0, "macs": 0, "parameters": 0, "bytes": 0})
        row["count"] += 1
        row["macs"] = None if item.macs is None or row["macs"] is None else row["macs"] + item.macs
        row["parameters"] += item.parameters
        row["bytes"] += item.bytes
    return sorted(rows.values(), key=lambda row: (-(row["macs"] or 0), -row["bytes"], -row["count"], row["kind"]))


def cost_screen(rows: Sequence[Mapping[str, Any]], total: Cost, batch: int, console: Console) -> None:
    """Costs per kind of layer or operator, and of the whole."""
    shown = table("layer or operator", ">count", ">MACs", ">%", ">parameters", ">weights")
    free = [row for row in rows if not row["macs"] and not row["bytes"]]
    for row in rows:
        if row not in free:
            share = f"{100 * row['macs'] / total.macs:.1f}" if row["macs"] and total.macs else ""
            held = size(row["bytes"]) if row["bytes"] else ""
            shown.add_row(row["kind"], str(row["count"]), _count(row["macs"]), share, _count(row["parameters"]), held)
    if free:
        names = ", ".join(row["kind"].removeprefix("aten.") for row in free)
        shown.add_row(Text(names, style="dim"), str(sum(row["count"] for row in free)))
    shown.add_section()
    nodes = str(sum(row["count"] for row in rows))
    shown.add_row("total", nodes, _count(total.macs), "", _count(total.parameters), size(total.bytes), style="bold")
    console.print(shown)
    if total.activation_peak_bytes is not None:
        console.print(f"at batch {batch}; activations take {size(total.activation_peak_bytes)} at their peak")


def listing(what: str, classes: Mapping[str, type], as_json: bool) -> None:
    """Passes or backends by name, what they are for, and their options."""
    rows: list[dict[str, Any]] = []
    for name, cls in sorted(classes.items()):
        rows.append({"name": name, "summary": _summary(cls), "options": _options(cls)})
    if as_json:
        print_json(rows)
        return
    shown = table(what, "what it does", "options")
    for row in rows:
        options = [f"{item['name']}: {item['type']} = {item['default']}" for item in row["options"]]
        shown.add_row(Text(row["name"], style="bold"), row["summary"], "\n".join(options) or "none")
    console().print(shown)


def _summary(cls: type) -> str:
    """The first paragraph of a class's docstring, its formulas' columns kept."""
    return inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0]


def _options(cls: type) -> list[dict[str, Any]]:
    assert dataclasses.is_dataclass(cls)
    return [
        {
            "name": item.name,
            "type": item.type if isinstance(item.type, str) else getattr(item.type, "__name__", str(item.type)),
            "default": "required" if item.default is dataclasses.MISSING else repr(item.default),
        }
        for item in dataclasses.fields(cls)
    ]


def table(*columns: str, show_header: bool = True) -> Table:
    """A table in the house's style; a column whose title begins with > is aligned to the right."""
    shown = Table(box=box.SIMPLE_HEAD if show_header else None, show_header=show_header, pad_edge=True)
    for column in columns:
        justify: JustifyMethod = "right" if column.startswith(">") else "left"
        shown.add_column(column.removeprefix(">"), justify=justify, overflow="fold")
    if not columns:
        shown.add_column(style="bold")
        shown.add_column(overflow="fold")
    return shown


def _count(number: int | None) -> str:
    return "" if number == 0 else count(number)


def _called(name: str, options: Mapping[str, Any]) -> str:
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in options.items())})" if options else name


def pairs(values: Mapping[str, Any]) -> str:
    """Names and figures in one line."""
    return ", ".join(f"{key} {_figure(value)}" for key, value in values.items())


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"({pairs(value)})" if isinstance(value, Mapping) else str(value)
