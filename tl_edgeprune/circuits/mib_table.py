"""EAP-IG's view of a graph, a table [source, destination], and its relation to our flat vector.

A column of the table is one query, key or value input of one head, an MLP or the logits. If heads
share an input, or a head has only one, several columns are copies of one of our destinations:
`spread` copies our values into them, `fold_scores` and `fold_mask` combine them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.graph.names import kind_of
from tl_edgeprune.graph.spans import refuse_spans

SHARED = ("same", "sum", "mean")
FOLDED = ("same", "all", "any")


class Table(NamedTuple):
    """Scores and kept edges in EAP-IG's layout: every source by every destination."""

    scores: Float[Tensor, "source destination"]
    kept: Bool[Tensor, "source destination"]


def positive_ranking(values: Float[Tensor, " edge"]) -> Float[Tensor, " edge"]:
    """The values as float32 in the same order, shifted to above 0 if any is below.

    The shift rounds and could make different values equal. Such a value is raised by the fewest of
    float32's smallest steps that keep it above the values below it (the bits of positive floats are
    ordered as their values).
    """
    levels, level_of_edge = values.double().unique(return_inverse=True)  # rising
    if levels[0] < 0:
        levels = levels - levels[0] + ((levels[-1] - levels[0]) / len(levels) or 1.0)
    steps = torch.arange(len(levels), dtype=torch.int32)
    bits = (levels.float().view(torch.int32) - steps).cummax(0).values + steps
    return bits.view(torch.float32)[level_of_edge]


# ----------------------------------------------------------------------------- one graph, two views


def check_graph(graph: EdgeGraph) -> None:
    """Raise ValueError for a graph that EAP-IG's files cannot hold."""
    refuse_spans(graph, "EAP-IG's and MIB's format")
    if graph.split_embeddings:
        raise ValueError(
            "EAP-IG's and MIB's graphs have one input, this one has two (split_embeddings=True): "
            "find the circuit in a graph with split_embeddings=False."
        )
    if not graph.has_mlp:
        raise ValueError(
            "EAP-IG's and MIB's graphs have an MLP in every layer, this model has none: keep the "
            "circuit with Circuit.save instead."
        )


def destinations(graph: EdgeGraph) -> list[str]:
    """Names of EAP-IG's destinations, in its order: q, k, v of a layer's heads, its MLP; logits."""
    names: list[str] = []
    for layer in range(graph.n_layers):
        names += [f"a{layer}.h{h}<{port}>" for port in "qkv" for h in range(graph.n_heads)]
        names.append(f"m{layer}")
    return [*names, "logits"]


def columns(graph: EdgeGraph) -> list[list[int]]:
    """EAP-IG's column (several, if heads share an input) of each of our destinations."""
    column = {name: index for index, name in enumerate(destinations(graph))}
    columns_of_destination = []
    for name in graph.destinations:
        ports = {"attn": "qkv", "mlp": "", "logits": ""}.get(kind_of(name), kind_of(name))
        names = [f"{owner}<{port}>" for port in ports for owner in graph.owner(name)] or [name]
        columns_of_destination.append([column[name] for name in names])
    return columns_of_destination


def spread(graph: EdgeGraph, values: Float[Tensor, " edge"]) -> Float[Tensor, "source destination"]:
    """Our flat vector as EAP-IG's table; 0 where there is no edge."""
    mib_columns = columns(graph)
    table = torch.zeros(graph.n_sources, len(destinations(graph)))
    for read in graph.reads:
        block = values[read.edges].view(read.n_destinations, read.n_sources)
        for row in range(read.n_destinations):
            indices = mib_columns[read.first_destination + row]
            table[: read.n_sources, indices] = block[row].unsqueeze(1)
    return table


def fold_scores(
    graph: EdgeGraph, table: Float[Tensor, "source destination"], shared: str
) -> Float[Tensor, " edge"]:
    """EAP-IG's table as our flat vector; `shared` as for `read_scores`."""
    flat = torch.zeros(graph.n_edges)
    for edges, destination, copies in _copies_by_destination(graph, table):
        if shared == "same" and bool((copies != copies[:, :1]).any()):
            source = int((copies != copies[:, :1]).any(1).nonzero()[0])
            raise ValueError(
                f"the file has different scores for the {copies.shape[1]} copies of "
                f"{graph.sources[source]}->{destination}, which is one edge in {graph}. Say how to "
                "combine them: shared='sum' (what attribution would give for removing all of "
                "them) or shared='mean'."
            )
        if shared == "same":
            flat[edges] = copies[:, 0]
        else:
            flat[edges] = copies.sum(1) if shared == "sum" else copies.mean(1)
    return flat


def fold_mask(
    graph: EdgeGraph, table: Bool[Tensor, "source destination"], shared: str = "same"
) -> Bool[Tensor, " edge"]:
    """EAP-IG's table of kept edges as our mask; `shared` as for `read_circuit`."""
    mask = torch.zeros(graph.n_edges, dtype=torch.bool)
    for edges, destination, copies in _copies_by_destination(graph, table):
        differ = copies.any(1) & ~copies.all(1)
        if shared == "same" and bool(differ.any()):
            source = graph.sources[int(differ.nonzero()[0])]
            raise ValueError(
                f"the file keeps {source}->{destination} for some of its {copies.shape[1]} copies "
                f"and not for others, but it is one edge in {graph}, so such a circuit cannot be "
                "run here. Leave such edges out (shared='all'), keep them whole (shared='any'), or "
                "read the file's scores, EdgeScores.from_mib(path, graph, shared='sum'), and "
                "choose the edges again."
            )
        mask[edges] = copies.any(1) if shared == "any" else copies.all(1)
    return mask


def _copies_by_destination(graph: EdgeGraph, table: Tensor) -> list[tuple[slice, str, Tensor]]:
    """For each of our destinations: its flat edges, its name and its columns [source, copy]."""
    mib_columns, copies = columns(graph), []
    for read in graph.reads:
        for row in range(read.n_destinations):
            first = read.edges.start + row * read.n_sources
            destination = read.first_destination + row
            block = table[: read.n_sources, mib_columns[destination]]
            edges = slice(first, first + read.n_sources)
            copies.append((edges, graph.destinations[destination], block))
    return copies


def real_edges(graph: EdgeGraph) -> Bool[Tensor, "source destination"]:
    """Which cells of EAP-IG's table are edges."""
    return spread(graph, torch.ones(graph.n_edges)) > 0


def edge_names(graph: EdgeGraph) -> list[str]:
    """Names of EAP-IG's edges, source by source, as `real_edges` marks them."""
    names = destinations(graph)
    return [f"{graph.sources[s]}->{names[d]}" for s, d in real_edges(graph).nonzero().tolist()]
