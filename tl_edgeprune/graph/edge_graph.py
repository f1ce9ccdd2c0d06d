"""The graph of a transformer's residual stream: sources, destinations and the edges between them.

1. A source adds to the residual stream: the input, each head, each MLP, in the order of writing.
2. A destination reads it: the query, key and value input of each head, each MLP, the logits.
3. A destination reads every source before it, so it reads a *prefix* of the list of sources, and
   the graph is a list of reads: dense blocks [destination, source] laid end to end in one flat
   vector of `n_edges`. Every mask and every score in the package is such a vector.
4. With spans (named parts of the prompt), each destination is split into one per span: it reads
   only there, and its edges are named `a0.h3->a5.h2<q>@S2`.

Edge Pruning, Bhaskar et al. 2024, section 3; the names are those of EAP-IG and of the MIB
benchmark.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

from tl_edgeprune.graph.names import (
    MOST_LETTERS,
    check_span_names,
    kind_of,
    nearest_names,
    parse_destination,
    parse_node,
)
from tl_edgeprune.utils.lazy import late

MOST_EDGES, MOST_DESTINATIONS = 2**26, 2**20
"""Limits of a graph that a file describes. A Llama of 70 B parameters has 2**24 edges."""
_graph_of = late("tl_edgeprune.hooks.find", "graph_of")


class Read(NamedTuple):
    """One dense block of edges: `n_destinations` destinations that read the same sources."""

    kind: Literal["attention", "mlp", "logits"]
    layer: int
    first_destination: int
    n_destinations: int
    n_sources: int
    first_edge: int

    @property
    def edges(self) -> slice:
        """The block's slice of the flat vector of edges, row-major [destination, source]."""
        return slice(self.first_edge, self.first_edge + self.n_destinations * self.n_sources)


@dataclass(frozen=True)
class EdgeGraph:
    """Sources, destinations and edges of one transformer. Equal graphs have the same edges.

    Args:
        n_layers: transformer blocks.
        n_heads: query heads per layer.
        n_kv_heads: key and value heads per layer; fewer than n_heads if groups of heads share them.
        has_mlp: whether blocks have an MLP.
        parallel: whether a block's MLP reads what its attention reads.
        split_qkv: a destination for each of a head's query, key and value; False: one per head.
        split_embeddings: a source each for token and position embeddings; False: one for both.
        spans: named parts of the prompt, each with a mask of every edge; empty: one mask for all
            positions.

    Raises:
        ValueError: sizes that do not fit together, or span names that cannot be used.
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
                "a head's one input would change other heads' keys. Use split_qkv=True."
            )

    @classmethod
    def from_model(
        cls, model: Any, *, split_qkv: bool = True, split_embeddings: bool = False
    ) -> EdgeGraph:
        """The graph of a HookedTransformer or TransformerBridge.

        Raises:
            NotImplementedError: the model's residual stream cannot be split into these sources and
                destinations; the message names the part.
        """
        return _graph_of(model, split_qkv=split_qkv, split_embeddings=split_embeddings)

    def at(self, spans: Iterable[str]) -> EdgeGraph:
        """This graph with a mask per span; without spans, one mask for all positions."""
        return replace(self, spans=tuple(spans))

    @property
    def n_spans(self) -> int:
        """Masks that an edge of the model has: one per span, or one."""
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
            n_before = self.first_head(layer)
            add("attention", layer, self.attention_destinations, n_before)
            if self.has_mlp:
                add("mlp", layer, 1, n_before if self.parallel else n_before + self.n_heads)
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
        """Shape of a read's edges in a mask: [destination, source], or with a span dimension."""
        spans = (self.n_spans,) if self.spans else ()
        return (-1, *spans, read.n_sources)

    @cached_property
    def _source_index(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.sources)}

    @cached_property
    def _incoming(self) -> dict[str, range]:
        """The flat indices of each destination's edges, one per source that it reads."""
        starts = (
            range(read.edges.start, read.edges.stop)[row * read.n_sources :][: read.n_sources]
            for read in self.reads
            for row in range(read.n_destinations)
        )
        return dict(zip(self.destinations, starts, strict=True))

    def index(self, name: str) -> int:
        """Index of an edge in the flat vector. Raises KeyError with the nearest names."""
        source, arrow, destination = name.partition("->")
        column, row = self._source_index.get(source), self._incoming.get(destination)
        if not arrow or column is None or row is None or column >= row.stop - row.start:
            raise KeyError(self._unknown_edge(name))
        return row.start + column

    def _unknown_edge(self, name: str) -> str:
        source, arrow, destination = name.partition("->")
        first = f"{self.sources[0]}->{self.destinations[0]}"
        if len(name) > MOST_LETTERS:
            name = f"{name[:MOST_LETTERS]} …"
        if not arrow:
            return f"{name!r} is no edge: an edge is written 'source->destination', as {first!r}."
        span = destination.rpartition("@")[2] if "@" in destination else ""
        if bool(span) != bool(self.spans) or (span and span not in self.spans):
            reason = f"no span {span!r}" if span else "edges in spans only"
            return (
                f"unknown edge {name!r}: this graph has {reason}. Its spans are "
                f"{', '.join(self.spans) or 'none'}"
                f"{f', as in {first!r}' if self.spans else ''}."
            )
        sources = nearest_names(source, self.sources)
        destinations = nearest_names(destination, self.destinations)
        nearest = [
            f"{s}->{d}"
            for s in sources
            for d in destinations
            if self._source_index[s] < len(self._incoming[d])
        ][:4]
        if source in self.sources and destination in self.destinations:
            reason = f"{destination} comes before {source} writes"
        else:
            missing = [
                end
                for end, names in ((source, self.sources), (destination, self.destinations))
                if end not in names
            ]
            reason = f"this graph has no {' and no '.join(missing)}"
        return f"unknown edge {name!r}: {reason}. Nearest: {', '.join(nearest) or 'none'}."

    def owner(self, destination: str) -> tuple[str, ...]:
        """Names of the sources that a destination's input flows into: heads, or an MLP, or none."""
        node = parse_node(parse_destination(destination).node)
        if node.kind != "kv":
            return () if node.kind == "logits" else (node.name,)
        size = self.n_heads // self.n_kv_heads
        heads = range(node.number * size, (node.number + 1) * size)
        return tuple(f"a{node.layer}.h{head}" for head in heads)

    @cached_property
    def flows_into(self) -> tuple[frozenset[int], ...]:
        """For each destination, the nodes that its input may flow into.

        A node is a source at a span, source * n_spans + span. Queries and MLPs act where they read;
        keys and values may be read from any span.
        """
        flows = []
        for row, name in enumerate(self.destinations):
            same_span = kind_of(name) in ("q", "mlp")
            at = (row % self.n_spans,) if same_span else range(self.n_spans)
            owners = [self._source_index[owner] * self.n_spans for owner in self.owner(name)]
            flows.append(frozenset(first + span for first in owners for span in at))
        return tuple(flows)

    @cached_property
    def outputs(self) -> range:
        """Indices of the logits among the destinations, one per span."""
        last = self.reads[-1]
        return range(last.first_destination, last.first_destination + last.n_destinations)

    def to_dict(self) -> dict[str, Any]:
        """The graph's fields as JSON values."""
        fields = asdict(self) | {"spans": list(self.spans)}
        return fields if self.spans else {k: v for k, v in fields.items() if k != "spans"}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> EdgeGraph:
        """The graph that `to_dict` described.

        Raises:
            ValueError: unknown, missing or wrong fields, or a graph of more than MOST_EDGES edges
                or MOST_DESTINATIONS destinations (checked before anything is allocated).
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
    """Whether a field that was read from a file has the right type."""
    if name == "spans":
        return isinstance(value, list) and all(isinstance(span, str) for span in value)
    return type(value) is (int if name in ("n_layers", "n_heads", "n_kv_heads") else bool)


def _check_size(graph: EdgeGraph) -> None:
    """Raise ValueError for a graph too large to come from a file, from its sizes only."""
    layers, mlps = graph.n_layers, int(graph.has_mlp)
    destinations = (layers * (graph.attention_destinations + mlps) + 1) * graph.n_spans
    sources_read = layers * graph.n_inputs + graph.sources_per_layer * layers * (layers - 1) // 2
    edges = (graph.attention_destinations + mlps) * sources_read + graph.n_sources
    edges += 0 if graph.parallel else mlps * layers * graph.n_heads
    edges *= graph.n_spans
    if destinations > MOST_DESTINATIONS or edges > MOST_EDGES:
        raise ValueError(
            f"its graph has more than {MOST_EDGES:,} edges or {MOST_DESTINATIONS:,} destinations, "
            "the most that a file may have"
        )
