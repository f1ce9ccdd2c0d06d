"""A circuit as text for Graphviz: `dot -Tsvg circuit.dot > circuit.svg`.

Layers are ranks, from the input at the bottom to the logits at the top. Dotted lines without arrows
join a group's key-value node to its heads.
"""

from __future__ import annotations

from tl_edgeprune.circuits.circuit import Circuit
from tl_edgeprune.graph.names import Node
from tl_edgeprune.report.circuit.labels import title_of
from tl_edgeprune.report.circuit.layout import circuit_layout
from tl_edgeprune.report.palette import KIND_COLORS

_SHAPES = {"input": "oval", "head": "box", "kv": "box", "mlp": "box", "logits": "oval"}
_STYLES = {"head": "rounded", "mlp": "filled", "input": "filled", "logits": "filled"}


def to_dot(circuit: Circuit) -> str:
    """The circuit in Graphviz's DOT language; dead edges are dashed."""
    layout = circuit_layout(circuit)
    alive = set(circuit.without_dead_edges().edges)
    lines = [
        "digraph circuit {",
        f"  graph [rankdir=BT, label={quoted(title_of(circuit))}, labelloc=t];",
        '  node [fontname="Helvetica", fontsize=11, height=0.3, fillcolor="#f1f3f7"];',
        "  edge [arrowsize=0.6];",
    ]
    lines += [f"  {quoted(node.name)} [{_node_style(node)}];" for node in layout.nodes]
    rows: dict[tuple[str, int], list[str]] = {}
    for node in layout.nodes:
        row = "head" if node.kind == "kv" else node.kind
        rows.setdefault((row, node.layer), []).append(quoted(node.name))
    lines += [
        f"  {{ rank=same; {'; '.join(names)}; }}" for names in rows.values() if len(names) > 1
    ]
    for edge in layout.edges:
        style = "" if edge.name in alive else ", style=dashed"
        lines.append(
            f"  {quoted(edge.source)} -> {quoted(edge.destination)} "
            f"[color={quoted(KIND_COLORS[edge.kind])}, tooltip={quoted(edge.name)}{style}];"
        )
    for first, *linked in layout.links:
        lines += [
            f"  {quoted(first)} -> {quoted(name)} [style=dotted, arrowhead=none, constraint=false];"
            for name in linked
        ]
    return "\n".join([*lines, "}", ""])


def quoted(text: str) -> str:
    """A DOT string literal of this text; its backslashes are not escapes."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _node_style(node: Node) -> str:
    style = f", style={_STYLES[node.kind]}" if node.kind in _STYLES else ""
    return f"label={quoted(node.name)}, shape={_SHAPES[node.kind]}{style}"
