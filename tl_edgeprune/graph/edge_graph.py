"""The graph of a transformer's residual stream: sources, destinations and the edges between them.

1. A source adds to the residual stream: the input, each head, each MLP, in the order of writing.
2. A destination reads it: the query, key and value input of each head, each MLP, the logits.
3. A destination reads every source before it, so it reads a *prefix* of the list of sources, and
   the graph is a list of reads: dense blocks [destination, source] laid end to end in one flat
   vector of `n_edges`. Every mask and every score in the package is such a vector.
4. With spans (named parts of the prompt) each destination is one destination a span: it reads there
   and nowhere else, and its edges are named `a0.h3->a5.h2<q>@S2`.

Edge Pruning, Bhaskar et al. 2024, section 3; the names are those of EAP-IG and of the MIB
benchmark.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

from tl_edgeprune.graph.names import MOST_LETTERS, _nearest, check_span_names
from tl_edgeprune.utils.lazy import late

MOST_EDGES, MOST_DESTINATIONS = 2**26, 2**20
"""Of a graph that a file describes. A Llama of 70 B parameters has 2**24 edges."""
_graph_of = late("tl_edgeprune.hooks.find", "graph_of")


class Read(NamedTuple):
    """One dense block of edges: `n_destinations` destinations that read the same prefix of
    sources.
    """

    kind: Literal["attention", "mlp", "logits"]
    layer: int
    first_destination: int
    n_destinations: int
    n_sources: int
    first_edge: int

    @property
    def edges(self) -> slice:
        """The block's place in the flat vector of edges, row-major [destination, source]."""
        return slice(self.first_edge, self.first_edge + self.n_destinations * self.n_sources)


@dataclass(frozen=True)
class EdgeGraph:
    """Sources, destinations and edges of one transformer. Equal graphs have the same edges.

    n_kv_heads is n_heads unless keys and values are shared by groups of heads. `split_qkv=False`
    gives each head one destination; `split_embeddings=True` gives token and position embeddings a
    source each. Parallel blocks' MLPs read what their attention reads. spans: names of the parts of
    the prompt that have edges of their own; none: an edge is the same at every position.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    has_mlp: bool = True
    parallel: bool = False
    split_qkv: bool = True
    split_embeddings: bool = False
    spans: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "spans", tuple(self.spans))
        check_span_names(self.spans)
        if min(self.n_layers, self.n_heads, self.n_kv_heads) < 1:
            raise ValueError(f"{self!r}: layers and heads must be 1 or more.")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"{self.n_heads} heads cannot share {self.n_kv_heads} key and value heads: the "
                "number of heads must be a multiple of the number of groups."
            )
        if not self.split_qkv and self.grouped:
            raise ValueError(
                "split_qkv=False needs a key and a value per head, but this model's "
                f"{self.n_heads} heads share {self.n_kv_heads} of each (grouped-query attention): "
                "a head's one input would decide other heads' keys. Use split_qkv=True."
            )

    @classmethod
    def from_model(
        cls, model: Any, *, split_qkv: bool = True, split_embeddings: bool = False
    ) -> EdgeGraph:
        """The graph of a HookedTransformer or TransformerBridge.

        Raises NotImplementedError, naming the part, where the model's residual stream cannot be
        split into these sources and destinations.
        """
        return _graph_of(model, split_qkv=split_qkv, split_embeddings=split_embeddings)

    def at(self, spans: Iterable[str]) -> EdgeGraph:
        """This graph with edges of their own in each of these spans (none: the same everywhere)."""
        return replace(self, spans=tuple(spans))

    @property
    def n_spans(self) -> int:
        """Masks that an edge of the model has: one a span, or one."""
        return max(1, len(self.spans))

    @property
    def by_position(self) -> bool:
        """Whether each position is a span, named by its number."""
        return bool(self.spans) and self.spans == tuple(map(str, range(len(self.spans))))

    @property
    def grouped(self) -> bool:
        """Whether groups of heads share their keys and values (GQA, MQA)."""
        return self.n_kv_heads != self.n_heads

    @property
    def n_inputs(self) -> int:
        """Sources before block 0: 1, or 2 with split embeddings."""
        return 2 if self.split_embeddings else 1

    @property
    def sources_per_layer(self) -> int:
        return self.n_heads + int(self.has_mlp)

    @property
    def n_sources(self) -> int:
        return self.n_inputs + self.n_layers * self.sources_per_layer

    @property
    def attention_destinations(self) -> int:
        """Destinations of one layer's attention."""
        return self.n_heads + 2 * self.n_kv_heads if self.split_qkv else self.n_heads

    def first_head(self, layer: int) -> int:
        """Index of the source a{layer}.h0, which is also how many sources that attention reads."""
        return self.n_inputs + layer * self.sources_per_layer

    def mlp_source(self, layer: int) -> int:
        """Index of the source m{layer}."""
        return self.first_head(layer) + self.n_heads

    def sources_written(self, read: Read) -> range:
        """The sources that the attention or MLP of this read writes: its heads, or itself."""
        first = self.mlp_source(read.layer) if read.kind == "mlp" else self.first_head(read.layer)
        return range(first, first + (1 if read.kind == "mlp" else self.n_heads))

    @cached_property
    def reads(self) -> tuple[Read, ...]:
        """Every block of edges in flat order: attention and MLP of each layer, then the logits."""
        reads: list[Read] = []
        destination = edge = 0

        def add(
            kind: Literal["attention", "mlp", "logits"], layer: int, rows: int, sources: int
        ) -> None:
            nonlocal destination, edge
            rows *= self.n_spans
            reads.append(Read(kind, layer, destination, rows, sources, edge))
            destination += rows
            edge += rows * sources

        for layer in range(self.n_layers):
            n_sources = self.first_head(layer)
            add("attention", layer, self.attention_destinations, n_sources)
            if self.has_mlp:
                add("mlp", layer, 1, n_sources if self.parallel else n_sources + self.n_heads)
        add("logits", self.n_layers, 1, self.n_sources)
        return tuple(reads)

    @cached_property
    def n_edges(self) -> int:
        return self.reads[-1].edges.stop

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources, in the order in which they write."""
        names = ["tok", "pos"] if self.split_embeddings else ["input"]
        for layer in range(self.n_layers):
            names += [f"a{layer}.h{head}" for head in range(self.n_heads)]
            names += [f"m{layer}"] if self.has_mlp else []
        return tuple(names)

    @cached_property
    def destinations(self) -> tuple[str, ...]:
        """Names of the destinations, in the order of their blocks."""
        names: list[str] = []
        for layer in range(self.n_layers):
            names += self._attention_names(layer)
            names += [f"m{layer}"] if self.has_mlp else []
        names.append("logits")
        if self.spans:
            names = [f"{name}@{span}" for name in names for span in self.spans]
        return tuple(names)

    def _attention_names(self, layer: int) -> list[str]:
        heads = [f"a{layer}.h{head}" for head in range(self.n_heads)]
        if not self.split_qkv:
            return heads
        shared = (
            [f"a{layer}.kv{group}" for group in range(self.n_kv_heads)] if self.grouped else heads
        )
        return (
            [f"{head}<q>" for head in heads]
            + [f"{name}<k>" for name in shared]
            + [f"{name}<v>" for name in shared]
        )

    @cached_property
    def edges(self) -> tuple[str, ...]:
        """Names of the edges, `source->destination`, in flat order."""
        return tuple(
            f"{self.sources[source]}->{self.destinations[destination]}"
            for source, destination in self.pairs
        )

    @cached_property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """(source, destination) of every edge as indices, in flat order."""
        return tuple(
            (source, read.first_destination + row)
            for read in self.reads
            for row in range(read.n_destinations)
            for source in range(read.n_sources)
        )

    def block_shape(self, read: Read) -> tuple[int, ...]:
        """Of a read's part of a mask: [destination, source], or [destination, span, source]."""
        spans = (self.n_spans,) if self.spans else ()
        return (-1, *spans, read.n_sources)

    @cached_property
    def _place(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.sources)}

    @cached_property
    def _rows(self) -> dict[str, range]:
        """Of each destination, the places of its edges: from every source before it."""
        starts = (
            range(read.edges.start, read.edges.stop)[row * read.n_sources :][: read.n_sources]
            for read in self.reads
            for row in range(read.n_destinations)
        )
        return dict(zip(self.destinations, starts, strict=True))

    def index(self, name: str) -> int:
        """Place of an edge in the flat vector. Raises KeyError with the nearest names."""
        source, arrow, destination = name.partition("->")
        column, row = self._place.get(source), self._rows.get(destination)
        if not arrow or column is None or row is None or column >= row.stop - row.start:
            raise KeyError(self._unknown_edge(name))
        return row.start + column

    def _unknown_edge(self, name: str) -> str:
        source, arrow, destination = name.partition("->")
        first = f"{self.sources[0]}->{self.destinations[0]}"
        if len(name) > MOST_LETTERS:
            name = f"{name[:MOST_LETTERS]} …"
        if not arrow:
            return f"{name!r} is no edge: one is written 'source->destination', as {first!r}."
        span = destination.rpartition("@")[2] if "@" in destination else ""
        if bool(span) != bool(self.spans) or (span and span not in self.spans):
            problem = f"no span {span!r}" if span else "edges in spans only"
            return (
                f"unknown edge {name!r}: this graph has {problem}. Its spans are "
                f"{', '.join(self.spans) or 'none'}"
                f"{f', as in {first!r}' if self.spans else ''}."
            )
        sources = _nearest(source, self.sources)
        destinations = _nearest(destination, self.destinations)
        suggestions = [
            f"{s}->{d}"
            for s in sources
            for d in destinations
            if self._place[s] < len(self._rows[d])
        ][:4]
        if source in self.sources and destination in self.destinations:
            reason = f"{destination} comes before {source} writes"
        else:
            missing = [
                n
                for n, names in ((source, self.sources), (destination, self.destinations))
                if n not in names
            ]
            reason = f"this graph has no {' and no '.join(missing)}"
        return f"unknown edge {name!r}: {reason}. Nearest: {', '.join(suggestions) or 'none'}."

    def owner(self, destination: str) -> tuple[str, ...]:
        """Sources that a destination's input flows into: its head, its group's heads, its MLP."""
        node = destination.partition("@")[0].partition("<")[0]
        if node == "logits":
            return ()
        layer, _, head = node.partition(".")
        if not head.startswith("kv"):
            return (node,)
        size = self.n_heads // self.n_kv_heads
        group = int(head[2:])
        return tuple(f"{layer}.h{head}" for head in range(group * size, (group + 1) * size))

    @cached_property
    def flows_into(self) -> tuple[frozenset[int], ...]:
        """For each destination, the nodes that its input may flow into.

        A node is a source at a span, source * n_spans + span. Queries and MLPs act where they read;
        keys and values may be read from any span.
        """
        flows = []
        for row, name in enumerate(self.destinations):
            starts_read = re.fullmatch(r"m\d+|[^<]*<q>", name.partition("@")[0]) is not None
            at = (row % self.n_spans,) if starts_read else range(self.n_spans)
            owners = [self._place[owner] * self.n_spans for owner in self.owner(name)]
            flows.append(frozenset(first + span for first in owners for span in at))
        return tuple(flows)

    @cached_property
    def outputs(self) -> range:
        """The logits' places among the destinations, one a span."""
        last = self.reads[-1]
        return range(last.first_destination, last.first_destination + last.n_destinations)

    def to_dict(self) -> dict[str, Any]:
        fields = asdict(self) | {"spans": list(self.spans)}
        return fields if self.spans else {k: v for k, v in fields.items() if k != "spans"}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> EdgeGraph:
        """The graph that `to_dict` described. Raises ValueError for unknown, missing or wrong
        fields, and for a graph of more than MOST_EDGES edges or MOST_DESTINATIONS destinations,
        before anything is made of it.
        """
        try:
            values = {"spans": [], **fields}
            wrong = [name for name, value in values.items() if not _fits(name, value)]
            if wrong:
                raise TypeError(f"{', '.join(f'{n}={values[n]!r:.100}' for n in wrong)}")
            graph = cls(**values | {"spans": tuple(values["spans"])})
        except TypeError as error:
            raise ValueError(f"not the description of an edge graph: {error}") from None
        _check_size(graph)
        return graph


def _fits(name: str, value: Any) -> bool:
    """Whether a field of a file has the type of the graph's."""
    if name == "spans":
        return isinstance(value, list) and all(isinstance(span, str) for span in value)
    return type(value) is (int if name in ("n_layers", "n_heads", "n_kv_heads") else bool)


def _check_size(graph: EdgeGraph) -> None:
    """Raise ValueError for a graph that is too large to be a file's, from its fields alone."""
    layers, mlps = graph.n_layers, int(graph.has_mlp)
    destinations = (layers * (graph.attention_destinations + mlps) + 1) * graph.n_spans
    n_pairs = layers * graph.n_inputs + graph.sources_per_layer * layers * (layers - 1) // 2
    edges = (graph.attention_destinations + mlps) * n_pairs + graph.n_sources
    edges += 0 if graph.parallel else mlps * layers * graph.n_heads
    edges *= graph.n_spans
    if destinations > MOST_DESTINATIONS or edges > MOST_EDGES:
        raise ValueError(
            f"it says a graph of more than {MOST_EDGES:,} edges or {MOST_DESTINATIONS:,} "
            "destinations, which no file may"
        )
