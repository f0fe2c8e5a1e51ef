"""Pictures of a dependency graph: SVG and HTML without any other package, and text for Graphviz.

Operations stand from top to bottom as they run; every set of dimensions that hang together has a column. A circle is a
dimension of a value, a square one of a weight, a red cross a place where removal is stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from torch import fx

from fxcompress.analysis.dependency.dimensions import Dimension
from fxcompress.errors import OptionError

if TYPE_CHECKING:
    from fxcompress.analysis.dependency.graph import Dependencies

__all__ = ["draw"]

_ROW, _COLUMN, _TOP, _LEFT = 20, 34, 170, 250
_COLORS = ("#3557d6", "#10794a", "#b3540b", "#8b3fb8", "#0c7c8c", "#a8326b", "#5d6b13", "#6a4fd0")
_STYLE = """
svg { background: #ffffff; font: 11px ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
text { fill: #1b1f27; } .soft { fill: #667085; } .rule { stroke: #e3e6eb; } .open { fill: #ffffff; }
.tie { fill: none; stroke-width: 1.6; } .stop { stroke: #c0362c; stroke-width: 2.2; fill: none; }
@media (prefers-color-scheme: dark) {
  svg { background: #12151b; } text { fill: #e7eaf0; } .soft { fill: #97a1b3; } .rule { stroke: #2b313c; }
  .open { fill: #12151b; } .stop { stroke: #ff9d92; } }
"""


def draw(found: Dependencies, components: Sequence[set[Dimension]], path: Path) -> Path:
    """Write the picture of some components; the ending of ``path`` says in which form.

    Raises:
        OptionError: an ending other than ``.svg``, ``.html`` and ``.dot``.
    """
    if path.suffix == ".dot":
        text = _dot(found, components)
    elif path.suffix in (".svg", ".html"):
        text = _Picture(found, components).svg()
        if path.suffix == ".html":
            text = _page(found, text)
    else:
        raise OptionError(
            f"a picture cannot be written as {path.name!r}", where="path", remedy="end it in .svg, .html or .dot"
        )
    path.write_text(text, encoding="utf-8")
    return path


@dataclass(frozen=True)
class _Spot:
    x: float
    y: float
    weight: bool


class _Picture:
    """Places and draws."""

    def __init__(self, found: Dependencies, components: Sequence[set[Dimension]]) -> None:
        self.graph = found.graph
        self.nodes = {node.name: node for node in found.graph_module.graph.nodes}
        rows = _rows(found.graph_module)
        kept = [(index, part) for index, part in enumerate(components)]
        kept.sort(key=lambda item: min(rows.get((d.kind == "value", d.name), 0) for d in item[1]))
        self.columns = [sorted(part, key=lambda d: (rows.get((d.kind == "value", d.name), 0), d)) for _, part in kept]
        used = sorted({rows[d.kind == "value", d.name] for part in self.columns for d in part} | self._stops(rows))
        self.row_of = {row: place for place, row in enumerate(used)}
        order = list(self.nodes)
        self.labels = [order[row] for row in used]
        self.spots: dict[Dimension, _Spot] = {}
        for column, part in enumerate(self.columns):
            beside: dict[tuple[int, bool], int] = {}
            for item in part:
                row = self.row_of[rows[item.kind == "value", item.name]]
                weight = item.kind != "value"
                nth = beside[row, weight] = beside.get((row, weight), -1) + 1
                x = _LEFT + column * _COLUMN + (11 + 6 * nth if weight else -6 * nth)
                self.spots[item] = _Spot(x, _TOP + row * _ROW, weight)

    def _stops(self, rows: dict[tuple[bool, str], int]) -> set[int]:
        chosen = {item for part in self.columns for item in part}
        stopped = (data["node"] for a, b, data in self.graph.edges(chosen, data=True) if a == b)
        return {rows[True, name] for name in stopped}

    def svg(self) -> str:
        """The whole picture."""
        width = _LEFT + max(1, len(self.columns)) * _COLUMN + 120
        height = _TOP + max(1, len(self.labels)) * _ROW + 10
        box = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {box}>', f"<style>{_STYLE}</style>"]
        parts += [line for row, name in enumerate(self.labels) for line in self._row(row, name, width)]
        parts += [line for column, part in enumerate(self.columns) for line in self._column(column, part)]
        return "\n".join([*parts, "</svg>\n"])

    def _row(self, row: int, name: str, width: int) -> list[str]:
        y = _TOP + row * _ROW
        node = self.nodes[name]
        shown = str(node.target) if node.op == "call_module" else name
        shown = shown if len(shown) <= 34 else "…" + shown[-33:]
        return [
            f'<line class="rule" x1="{_LEFT - 14}" x2="{width - 10}" y1="{y}" y2="{y}"/>',
            f'<text x="{_LEFT - 22}" y="{y + 4}" text-anchor="end">{escape(shown)}</text>',
        ]

    def _column(self, column: int, part: list[Dimension]) -> list[str]:
        members = set(part)
        free = any(self.graph.nodes[item]["removable"] for item in part)
        color = _COLORS[column % len(_COLORS)] if free else "#98a2b3"
        first = next((item for item in part if item.kind != "value" and item.dim == 0), part[0])
        name = first.name.rpartition(".")[0] or first.name
        x = _LEFT + column * _COLUMN
        size = self.graph.nodes[first]["size"]
        lines = [
            f'<text transform="translate({x + 3},{_TOP - 14}) rotate(-55)" class="{"" if free else "soft"}">'
            f"{escape(name)} · {escape(str(size))}</text>"
        ]
        for a, b, data in self.graph.edges(part, data=True):
            if a != b and a in members:
                lines.append(self._tie(self.spots[a], self.spots[b], color, f"{data['node']}: {data['op']}"))
        for item in part:
            lines.append(self._spot(item, color))
        return lines

    @staticmethod
    def _tie(a: _Spot, b: _Spot, color: str, title: str) -> str:
        bow = 0.0 if abs(a.y - b.y) <= _ROW or a.weight or b.weight else -min(12.0, abs(a.y - b.y) / 8)
        middle = f"Q {(a.x + b.x) / 2 + 2 * bow:.1f} {(a.y + b.y) / 2:.1f}"
        path = f"M {a.x:.1f} {a.y:.1f} {middle} {b.x:.1f} {b.y:.1f}"
        return f'<path class="tie" stroke="{color}" d="{path}"><title>{escape(title)}</title></path>'

    def _spot(self, item: Dimension, color: str) -> str:
        spot, facts = self.spots[item], self.graph.nodes[item]
        stops = list((self.graph.get_edge_data(item, item) or {}).values())
        told = [f"{item}, size {facts['size']}", *(f"stopped at {stop['node']}: {stop['barrier']}" for stop in stops)]
        fill = f'fill="{color}"' if facts["removable"] else 'class="open"'
        if spot.weight:
            shape = f'<rect x="{spot.x - 3.5:.1f}" y="{spot.y - 3.5:.1f}" width="7" height="7" '
        else:
            shape = f'<circle cx="{spot.x:.1f}" cy="{spot.y:.1f}" r="4" '
        shape += f'{fill} stroke="{color}"/>'
        if stops:
            x, y = spot.x, spot.y
            shape += f'<path class="stop" d="M {x - 5} {y - 5} L {x + 5} {y + 5} M {x + 5} {y - 5} L {x - 5} {y + 5}"/>'
        return f"<g><title>{escape(chr(10).join(told))}</title>{shape}</g>"


def _rows(graph_module: fx.GraphModule) -> dict[tuple[bool, str], int]:
    """Where each node stands, and each weight: beside the first node that uses it. Keys: (is a node, name)."""
    rows: dict[tuple[bool, str], int] = {}
    for row, node in enumerate(graph_module.graph.nodes):
        rows[True, node.name] = row
        if node.op == "call_module":
            layer = graph_module.get_submodule(str(node.target))
            named = [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]
            for name, _ in named:
                rows.setdefault((False, f"{node.target}.{name}"), row)
        elif node.op == "get_attr":
            rows.setdefault((False, str(node.target)), row)
    return rows


def _page(found: Dependencies, svg: str) -> str:
    rows = "\n".join(f"<li><code>{escape(str(group))}</code></li>" for group in found.groups)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>dependencies</title>\n'
        "<style>body { font: 15px/1.5 system-ui, sans-serif; margin: 24px; color-scheme: light dark; }"
        " .picture { overflow: auto; }</style></head>\n"
        f"<body><h1>Dependencies</h1><p>{len(found.groups)} groups of channels that can be removed. "
        "A column is a set of dimensions that hang together; hover over a mark for its name.</p>"
        f'<div class="picture">{svg}</div>\n<ol>\n{rows}\n</ol></body></html>\n'
    )


def _dot(found: Dependencies, components: Sequence[set[Dimension]]) -> str:
    chosen = {item for part in components for item in part}
    names = {item: f"n{number}" for number, item in enumerate(item for item in found.graph if item in chosen)}
    lines = ["graph dependencies {", '  node [fontname="monospace", fontsize=10];']
    for item, name in names.items():
        facts = found.graph.nodes[item]
        shape = "ellipse" if item.kind == "value" else "box"
        filled = ', style=filled, fillcolor="#c9d4fb"' if facts["removable"] else ""
        label = _quoted(f"{item} · {facts['size']}")
        lines.append(f"  {name} [label={label}, shape={shape}{filled}];")
    for a, b, data in found.graph.edges(chosen, data=True):
        told = data.get("barrier")
        ends = f"{names[a]} -- {names[b]}"
        if told is not None:
            lines.append(f"  {ends} [color=red, label={_quoted(told)}];")
        else:
            lines.append(f"  {ends} [label={_quoted(data['op'])}];")
    return "\n".join([*lines, "}", ""])


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
