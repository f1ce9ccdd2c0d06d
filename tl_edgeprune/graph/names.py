"""Names of a graph's nodes, destinations and edges: the one place that parses them.

- A source is a node: `input`, `a0.h3` (head 3 of layer 0), `m0` (the MLP of layer 0).
- A destination is a node with, for a head's query, key or value input, its port: `a5.h2<q>`. Heads
  that share keys and values read them at their group's node: `a5.kv1<k>`.
- An edge is `a0.h3->a5.h2<q>`. In a graph with spans, `a0.h3->a5.h2<q>@S2` is that edge at the
  positions of span S2.
"""

from __future__ import annotations

import difflib
import re
from typing import NamedTuple

KINDS = ("q", "k", "v", "attn", "mlp", "logits")
KIND_LABELS = {
    "q": "query",
    "k": "key",
    "v": "value",
    "attn": "head",
    "mlp": "MLP",
    "logits": "logits",
}
MOST_LETTERS, MOST_NAMES = 200, 20_000  # limits of the search for similar names
_NODE = re.compile(
    r"a(?P<head_layer>\d+)\.(?P<part>h|kv)(?P<index>\d+)"
    r"|m(?P<mlp_layer>\d+)"
    r"|(?P<end>input|tok|pos|logits)"
)
_PORT = re.compile(r"<([qkv])>$")
_SPAN_NAME = re.compile(r"[\w+\-.']{1,100}")


class Node(NamedTuple):
    """A parsed node name; kind is input, head, kv, mlp or logits."""

    name: str
    kind: str
    layer: int  # -1 for inputs and the logits
    number: int  # of the head or the group; 1 for pos, the second input
    span: str | None = None

    @property
    def label(self) -> str:
        """The name without the span."""
        return self.name.partition("@")[0]


class Destination(NamedTuple):
    """A parsed destination name: its node, "q", "k", "v" or "" for its port, and its span."""

    node: str
    port: str
    span: str | None


class Edge(NamedTuple):
    """A parsed edge name: the names of its two nodes and its kind, one of KINDS."""

    name: str
    source: str
    destination: str
    kind: str


def parse_node(name: str) -> Node:
    """Parse the name of a source, or of a destination without its `<q>`, `<k>` or `<v>`.

    Raises:
        ValueError: the name is not a node's.
    """
    label, at, span = name.partition("@")
    match = _NODE.fullmatch(label)
    if match is None:
        raise ValueError(
            f"node name {name!r}: expected input, tok, pos, logits, a<layer>.h<head>, "
            "a<layer>.kv<group> or m<layer>, as EdgeGraph names them."
        )
    span_name = span if at else None
    if match["end"]:
        kind = "logits" if label == "logits" else "input"
        return Node(name, kind, -1, int(label == "pos"), span_name)
    if match["mlp_layer"]:
        return Node(name, "mlp", int(match["mlp_layer"]), 0, span_name)
    kind = "head" if match["part"] == "h" else "kv"
    return Node(name, kind, int(match["head_layer"]), int(match["index"]), span_name)


def parse_destination(name: str) -> Destination:
    """Split `a5.h2<q>@S2` into its node, port and span."""
    label, at, span = name.partition("@")
    port = _PORT.search(label)
    return Destination(_PORT.sub("", label), port[1] if port else "", span if at else None)


def kind_of(destination: str) -> str:
    """What an edge into this destination enters, one of KINDS; attn is a head with one input."""
    node, port, _ = parse_destination(destination)
    kind = parse_node(node).kind
    return port or {"head": "attn", "kv": "attn"}.get(kind, kind)


def split_edge(name: str) -> tuple[str, str]:
    """The names of an edge's source and destination.

    Raises:
        ValueError: the name has no arrow.
    """
    source, arrow, destination = name.partition("->")
    if not arrow:
        raise ValueError(f"edge name {name!r}: expected 'source->destination', as in 'm0->logits'.")
    return source, destination


def parse_edge(name: str) -> Edge:
    """Parse an edge name such as `a0.h3->a5.h2<q>`, with or without a span.

    Raises:
        ValueError: the name has no arrow, or its destination is not a node's.
    """
    source, destination = split_edge(name)
    node, _, span = parse_destination(destination)
    kind = kind_of(destination)
    if span is None:
        return Edge(name, source, node, kind)
    start = source if "@" in source else f"{source}@{span}"
    return Edge(name, start, f"{node}@{span}", kind)


def check_span_names(spans: tuple[str, ...]) -> None:
    """Raise ValueError for span names that are repeated or cannot be part of an edge's name."""
    bad = [name for name in spans if not isinstance(name, str) or not _SPAN_NAME.fullmatch(name)]
    if bad or len(set(spans)) < len(spans):
        raise ValueError(
            f"spans {', '.join(map(repr, bad or spans))}: expected names that differ, of letters, "
            "digits and any of +-_.', 100 at most (as in a0.h3->a5.h2<q>@S1+1)."
        )


def nearest_names(name: str, known: tuple[str, ...]) -> list[str]:
    """The name itself if it is known, else up to three known names that are similar to it."""
    if name in known or len(name) > MOST_LETTERS or len(known) > MOST_NAMES:
        return [name] if name in known else []
    return difflib.get_close_matches(name, known, n=3, cutoff=0.4)
