"""Drawings of a channel graph: Graphviz source, SVG, or a page that needs nothing but a browser."""

from __future__ import annotations

import html
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pydot

from chase_fx.errors import ArgumentError, GraphvizMissingError

if TYPE_CHECKING:
    from chase_fx.graphs.channels import ChannelGraph

__all__ = ["draw"]

_COLOURS = (
    "#8dd3c7",
    "#ffffb3",
    "#bebada",
    "#fb8072",
    "#80b1d3",
    "#fdb462",
    "#b3de69",
    "#fccde5",
    "#ccebc5",
    "#ffed6f",
)
_FROZEN = "#e0e0e0"


def draw(channels: ChannelGraph, path: str | Path) -> Path:
    """Write ``channels`` to ``path``; the suffix decides.

    Raises:
        ArgumentError: no path, or a suffix other than .dot, .svg, .html.
        GraphvizMissingError: .svg without Graphviz' ``dot`` program; the .dot is written beside it.
    """
    if not isinstance(path, (str, Path)):
        raise ArgumentError(f"the path of a drawing must be a string or a Path, found {type(path).__name__}")
    path = Path(path)
    if path.suffix == ".dot":
        path.write_text(_dot(channels).to_string(), encoding="utf-8")
    elif path.suffix == ".svg":
        source = path.with_suffix(".dot")
        if shutil.which("dot") is None:
            source.write_text(_dot(channels).to_string(), encoding="utf-8")
            raise GraphvizMissingError(
                f"Graphviz' program 'dot' is not installed, so {path} can't be drawn; wrote {source} instead. "
                "Install Graphviz, or draw to .html, which needs no program"
            )
        svg: Any = _dot(channels).create(prog="dot", format="svg")  # bytes, though its annotation says str
        path.write_bytes(svg)
    elif path.suffix == ".html":
        path.write_text("".join(_page(channels)), encoding="utf-8")
    else:
        raise ArgumentError(f"can't draw to {path}: expected a suffix .dot, .svg or .html, found {path.suffix!r}")
    return path


def _dot(channels: ChannelGraph) -> pydot.Dot:
    graph = channels.graph
    dot = pydot.Dot("channels", graph_type="graph", rankdir="LR", fontname="sans-serif")
    dot.set_node_defaults(shape="box", style="filled", fontname="sans-serif", fontsize="10")
    dot.set_edge_defaults(fontname="sans-serif", fontsize="8", color="#777777")
    colours = {group.name: _COLOURS[i % len(_COLOURS)] for i, group in enumerate(channels.groups)}
    names = {}
    for i, (axis, data) in enumerate(graph.nodes(data=True)):
        if not graph.degree(axis) and data["group"] is None:
            continue  # kernel sizes and the like: coupled to nothing
        names[axis] = f"n{i}"
        size = f"{data['size']}" if data["size"] is not None else "made here"
        tooltip = data["frozen"] or data["group"] or ""
        dot.add_node(
            pydot.Node(
                names[axis],
                label=_quote(f"{axis[0]}\\ndim {axis[1]}: {size}"),
                fillcolor=_quote(colours.get(data["group"], _FROZEN)),
                tooltip=_quote(tooltip),
            )
        )
    for a, b, data in graph.edges(data=True):
        label, tooltip = _quote(data["node"]), _quote(f"{data['op']} {data['source']}")
        dot.add_edge(pydot.Edge(names[a], names[b], label=label, tooltip=tooltip))
    return dot


def _quote(text: str) -> str:
    return '"' + text.replace('"', "'") + '"'


_HEAD = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Channel groups</title><style>
body{font:14px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem}
summary{cursor:pointer;padding:.3rem .6rem;border-radius:.3rem;margin:.2rem 0}
table{border-collapse:collapse;margin:.4rem 0 1rem 1.2rem}td,th{padding:.1rem .8rem .1rem 0;text-align:left}
code{font-size:13px}.why{color:#555}</style></head><body>"""


def _page(channels: ChannelGraph) -> Iterator[str]:
    graph = channels.graph
    yield _HEAD
    yield f"<h1>{len(channels.groups)} channel groups</h1>"
    edges: dict[str, list[str]] = {}
    for a, b, data in graph.edges(data=True):
        row = f"<tr><td>{_axis(a)}</td><td>{_axis(b)}</td><td><code>{html.escape(data['op'])}</code></td>"
        row += f"<td><code>{html.escape(data['node'])}</code></td><td class=why>{html.escape(data['source'])}</td></tr>"
        edges.setdefault(graph.nodes[a]["group"] or graph.nodes[b]["group"] or "", []).append(row)
    for i, group in enumerate(channels.groups):
        colour = _COLOURS[i % len(_COLOURS)]
        yield f'<details><summary style="background:{colour}">{html.escape(group.name)}: {group.size} units, '
        yield f"{len(group.members)} axes</summary><table><tr><th>axis</th><th>dense size</th><th>role</th></tr>"
        for member in group.members:
            size = graph.nodes[member.tensor, member.dim]["size"]
            role = "producer" if member.producer else ""
            yield f"<tr><td>{_axis((member.tensor, member.dim))}</td><td>{size}</td><td>{role}</td></tr>"
        yield "</table><table><tr><th>axis</th><th>axis</th><th>operator</th><th>node</th><th>line</th></tr>"
        yield "".join(edges.get(group.name, []))
        yield "</table></details>"
    yield "<h2>Frozen axes</h2><table>"
    for axis, reason in channels.frozen.items():
        yield f"<tr><td>{_axis(axis)}</td><td class=why>{html.escape(reason)}</td></tr>"
    yield "</table></body></html>"


def _axis(axis: tuple[str, int]) -> str:
    return f"<code>{html.escape(axis[0])}</code> dim {axis[1]}"
