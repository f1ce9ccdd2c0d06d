"""The names of a graph's edges, read: nodes, what an edge enters, and at which position.

`a0.h3->a5.h2<q>` enters the query of head 2 in layer 5. `a0.h3->a5.h2<q>@S2` does so at the
position (the span) S2, where both ends then are.
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
_NODE = re.compile(
    r"a(?P<head_layer>\d+)\.(?P<part>h|kv)(?P<index>\d+)"
    r"|m(?P<mlp_layer>\d+)"
    r"|(?P<end>input|tok|pos|logits)"
)
_PORT = re.compile(r"<([qkv])>$")


class Node(NamedTuple):
    """A parsed node name; kind is input, head, kv, mlp or logits."""

    name: str
    kind: str
    layer: int  # -1 for inputs and the logits
    number: int  # head, group, or the place among the inputs
    span: str | None = None

    @property
    def label(self) -> str:
        """The name without the span."""
        return self.name.partition("@")[0]


class Edge(NamedTuple):
    """A parsed edge name: the names of its two nodes and its kind, one of KINDS."""

    name: str
    source: str
    destination: str
    kind: str


def parse_node(name: str) -> Node:
    """Parse a source's or a destination's node name, without its `<q>`, `<k>` or `<v>`."""
    label, at, span = name.partition("@")
    match = _NODE.fullmatch(label)
    if match is None:
        raise ValueError(
            f"node name {name!r}: expected input, tok, pos, logits, a<layer>.h<head>, "
            "a<layer>.kv<group> or m<layer>, as EdgeGraph names them."
        )
    where = span if at else None
    if match["end"]:
        kind = "logits" if label == "logits" else "input"
        return Node(name, kind, -1, int(label == "pos"), where)
    if match["mlp_layer"]:
        return Node(name, "mlp", int(match["mlp_layer"]), 0, where)
    kind = "head" if match["part"] == "h" else "kv"
    return Node(name, kind, int(match["head_layer"]), int(match["index"]), where)


def kind_of(destination: str) -> str:
    """What an edge enters there, one of KINDS: attn is a head with one input."""
    target = destination.partition("@")[0]
    port, kind = _PORT.search(target), parse_node(_PORT.sub("", target)).kind
    return port[1] if port else {"head": "attn", "kv": "attn"}.get(kind, kind)


def parse_edge(name: str) -> Edge:
    """Parse an edge name such as `a0.h3->a5.h2<q>`, with `@` and a span or without."""
    source, arrow, target = name.partition("->")
    if not arrow:
        raise ValueError(f"edge name {name!r}: expected 'source->destination', as in 'm0->logits'.")
    target, at, span = target.partition("@")
    kind, destination = kind_of(target), _PORT.sub("", target)
    if not at:
        return Edge(name, source, destination, kind)
    start = source if "@" in source else f"{source}@{span}"
    return Edge(name, start, f"{destination}@{span}", kind)


MOST_LETTERS, MOST_NAMES = 200, 20_000  # of what nearest names are looked for, and among


def check_span_names(spans: tuple[str, ...]) -> None:
    """Raise ValueError for names that edges could not be told apart by."""
    bad = [name for name in spans if not isinstance(name, str) or not _SPAN_NAME.fullmatch(name)]
    if bad or len(set(spans)) < len(spans):
        raise ValueError(
            f"spans {', '.join(map(repr, bad or spans))}: expected names that differ, of letters, "
            "digits and any of +-_.', 100 at most (as in a0.h3->a5.h2<q>@S1+1)."
        )


_SPAN_NAME = re.compile(r"[\w+\-.']{1,100}")


def _nearest(name: str, known: tuple[str, ...]) -> list[str]:
    if len(name) > MOST_LETTERS or len(known) > MOST_NAMES:
        return [name] if name in known else []
    return [name] if name in known else difflib.get_close_matches(name, known, n=3, cutoff=0.4)
