"""Circuits and scores in EAP-IG's files, which the MIB benchmark's leaderboard takes.

EAP-IG's graph has one input, an MLP in every layer, and a query, key and value input for every
head. Its files hold a score and a place in the circuit for each edge:

- .json: {"cfg": …, "nodes": {name: {"in_graph"}}, "edges": {name: {"score", "in_graph"}}}; in older
  files a node is a bare bool.
- .pt: {"cfg", "src_nodes", "dst_nodes", "edges_scores", "edges_in_graph" [source, destination],
  "nodes_in_graph" [source]}, saved by torch; read here with weights_only=True, so tensors and plain
  values alone.

Where heads share keys and values, MIB counts an edge for each query head. Writing gives each head
its group's edge, and warns how many edges a circuit then has over there; reading folds the heads'
edges back into one, which must agree. So do the q, k and v edges where a graph has one input a head
(split_qkv=False).

MIB takes circuits of highest scores (for CPR) and of highest magnitudes (for CMD). Scores that rank
edges as they are (log alphas: the lowest go first) are written shifted to above 0 where any is
below, so that both are the ranking itself; `mib_faithfulness` predicts the figures of such a file.

A budget of n edges over there can end inside a group: EAP-IG's top n of our scores is exactly n
edges, with any of the equal ones at the border. Such a circuit cannot be run here.
`Circuit.from_mib(shared="all")` reads it without the edges that are not whole, which is
`scores.top(n, convention="mib")` to the edge, and `shared="any"` with them; both say how many.

Hanna, Pezzelle and Belinkov 2024 (EAP-IG); Mueller et al. 2025, "MIB: A Mechanistic
Interpretability Benchmark".
"""

from __future__ import annotations

import json
import os
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.graph.spans import refuse_spans
from tl_edgeprune.utils.reading import check_file, damaged, first_line, read_json
from tl_edgeprune.utils.writing import write_whole

SHARED = ("same", "sum", "mean")
FOLDED = ("same", "all", "any")
FILE = "file of EAP-IG's"
SHOWN = 3  # names that an error lists


class Table(NamedTuple):
    """EAP-IG's view of a graph: every source by every destination, real edges or not."""

    scores: Float[Tensor, "source destination"]
    kept: Bool[Tensor, "source destination"]


# -------------------------------------------------------------------------------------- the surface


def write_scores(
    path: str | os.PathLike[str],
    graph: EdgeGraph,
    scores: Float[Tensor, " edge"],
    by_magnitude: bool,
    metadata: Mapping[str, Any],
    d_model: int | None,
) -> None:
    """Write scores to a .json or .pt file of EAP-IG's; no edge is marked as in the circuit.

    Effects (EAP and its kin) are written as they are. Scores that rank edges as they are and not by
    magnitude (`by_magnitude` is False) are shifted to above 0 where any is below: the order of all
    edges stays, and their magnitudes have it too.

    d_model: of the model, which such files record; None takes it from the metadata (every method
    notes it there). Raises ValueError for another ending, a graph that the format cannot hold
    (split embeddings, no MLPs), an unknown d_model.
    """
    check_graph(graph)
    values = scores.detach().cpu()
    table = spread(graph, values.float() if by_magnitude else positive_ranking(values))
    _write(path, graph, Table(table, torch.zeros_like(table, dtype=torch.bool)), metadata, d_model)


def write_circuit(
    path: str | os.PathLike[str],
    graph: EdgeGraph,
    mask: Bool[Tensor, " edge"],
    metadata: Mapping[str, Any],
    d_model: int | None,
) -> None:
    """Write a circuit as `write_scores` does scores: its edges in the graph, with score 1, others
    with 0. Warns where EAP-IG counts more of them, with its number.
    """
    check_graph(graph)
    table = spread(graph, mask.float())
    _write(path, graph, Table(table, table > 0), metadata, d_model)
    theirs, n_edges = int((table > 0).sum()), int(mask.sum())
    if theirs != n_edges:
        warnings.warn(
            f"{path}: the circuit's {n_edges:,} edges are {theirs:,} in EAP-IG's and MIB's "
            "count, which has one for every query head where heads share an input. For a circuit "
            f"of at most {n_edges:,} there, take scores.top({n_edges}, "
            "convention='mib').",
            stacklevel=3,
        )


def read_scores(
    path: str | os.PathLike[str], graph: EdgeGraph, shared: str = "same"
) -> tuple[Float[Tensor, " edge"], dict[str, Any]]:
    """The scores in a .json or .pt file of EAP-IG's, as those of `graph`, and their metadata.

    shared: the score of an edge that the file has several times, for each head of a group: "same"
    refuses different ones; "sum" adds them, which is what attribution gives for the removal of all
    together, to first order; "mean".

    Raises FileNotFoundError, and ValueError for a damaged file, one of another graph, unknown or
    missing edges, different scores under "same".
    """
    if shared not in SHARED:
        raise ValueError(f"shared={shared!r}: expected one of {', '.join(SHARED)}.")
    table, origin = _read(path, graph)
    bad = (real_edges(graph) & ~torch.isfinite(table.scores)).nonzero().tolist()
    if bad:
        source, destination = bad[0]
        name = f"{graph.sources[source]}->{destinations(graph)[destination]}"
        raise ValueError(
            f"{path}: the score of {name} is NaN or infinite. Score the edges anew, in float32."
        )
    return fold_scores(graph, table.scores, shared), origin


def read_circuit(
    path: str | os.PathLike[str], graph: EdgeGraph, shared: str = "same"
) -> tuple[Bool[Tensor, " edge"], dict[str, Any]]:
    """The edges that are in the graph of a .json or .pt file of EAP-IG's, as a mask over `graph`,
    and their metadata.

    shared: an edge that the file has several times, for each head of a group, and keeps for some of
    them alone: "same" refuses it; "all" leaves it out, "any" keeps it, and both warn how many edges
    there are of either kind.

    Raises as `read_scores` does; ValueError too where heads of a group disagree on an edge under
    "same", and for a file without any edge in the graph, which holds scores alone.
    """
    if shared not in FOLDED:
        raise ValueError(f"shared={shared!r}: expected one of {', '.join(FOLDED)}.")
    table, origin = _read(path, graph)
    mask = fold_mask(graph, table.kept, shared)
    touched, whole = (fold_mask(graph, table.kept, kind) for kind in ("any", "all"))
    split = int((touched & ~whole).sum())
    if split:
        warnings.warn(
            f"{path} has {int(table.kept.sum()):,} edges in the graph, and keeps {split:,} of this "
            f"graph's edges for some of their heads alone. shared={shared!r} "
            f"{'leaves them out' if shared == 'all' else 'keeps them whole'}: the circuit has "
            f"{int((spread(graph, mask.float()) > 0).sum()):,} of the file's kind of edges.",
            stacklevel=3,
        )
    if not bool(table.kept.any()):
        raise ValueError(
            f"{path} has no edge in the graph: it holds scores alone. Use "
            "EdgeScores.from_mib(path, graph).top(k)."
        )
    return mask, origin


def positive_ranking(values: Float[Tensor, " edge"]) -> Float[Tensor, " edge"]:
    """The values, shifted to above 0 where any is below, in the same order as float32.

    A shift rounds, and might so make equal what was not: such a value goes up by as many of
    float32's smallest steps as keep it above those below it (bits of positive floats are in order).
    """
    levels, place = values.double().unique(return_inverse=True)  # rising
    if levels[0] < 0:
        levels = levels - levels[0] + ((levels[-1] - levels[0]) / len(levels) or 1.0)
    steps = torch.arange(len(levels), dtype=torch.int32)
    bits = (levels.float().view(torch.int32) - steps).cummax(0).values + steps
    return bits.view(torch.float32)[place]


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
        names += [f"a{layer}.h{h}<{part}>" for part in "qkv" for h in range(graph.n_heads)]
        names.append(f"m{layer}")
    return [*names, "logits"]


def columns(graph: EdgeGraph) -> list[list[int]]:
    """Of each of our destinations, its places among EAP-IG's: several where it is shared."""
    place = {name: index for index, name in enumerate(destinations(graph))}
    found = []
    for name in graph.destinations:
        node, _, part = name.partition("<")
        if node[0] != "a":
            theirs = [name]
        else:
            parts = [f"<{part}"] if part else ["<q>", "<k>", "<v>"]
            theirs = [owner + end for end in parts for owner in graph.owner(name)]
        found.append([place[name] for name in theirs])
    return found


def spread(graph: EdgeGraph, values: Float[Tensor, " edge"]) -> Float[Tensor, "source destination"]:
    """Our flat vector as EAP-IG's table; 0 where there is no edge."""
    places = columns(graph)
    table = torch.zeros(graph.n_sources, len(destinations(graph)))
    for read in graph.reads:
        block = values[read.edges].view(read.n_destinations, read.n_sources)
        for row in range(read.n_destinations):
            table[: read.n_sources, places[read.first_destination + row]] = block[row].unsqueeze(1)
    return table


def fold_scores(
    graph: EdgeGraph, table: Float[Tensor, "source destination"], shared: str
) -> Float[Tensor, " edge"]:
    """EAP-IG's table as our flat vector; `shared` as for `read_scores`."""
    flat = torch.zeros(graph.n_edges)
    for edges, destination, copies in _copies(graph, table):
        if shared == "same" and bool((copies != copies[:, :1]).any()):
            source = int((copies != copies[:, :1]).any(1).nonzero()[0])
            raise ValueError(
                f"the file has different scores for the {copies.shape[1]} copies of "
                f"{graph.sources[source]}->{destination}, which is one edge in {graph}. Say how to "
                "put them together: shared='sum' (what attribution would give for removing all of "
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
    for edges, destination, copies in _copies(graph, table):
        differ = copies.any(1) & ~copies.all(1)
        if shared == "same" and bool(differ.any()):
            source = graph.sources[int(differ.nonzero()[0])]
            raise ValueError(
                f"the file keeps {source}->{destination} for some of its {copies.shape[1]} copies "
                f"and not for others, but it is one edge in {graph}, so such a circuit cannot be "
                "run here. Leave such edges out (shared='all'), keep them whole (shared='any'), or "
                "read the file's scores, EdgeScores.from_mib(path, graph, shared='sum'), and "
                "choose the edges anew."
            )
        mask[edges] = copies.any(1) if shared == "any" else copies.all(1)
    return mask


def _copies(graph: EdgeGraph, table: Tensor) -> list[tuple[slice, str, Tensor]]:
    """Of each destination: its flat edges, its name and its columns [source, copy]."""
    places, found = columns(graph), []
    for read in graph.reads:
        for row in range(read.n_destinations):
            first = read.edges.start + row * read.n_sources
            destination = read.first_destination + row
            block = table[: read.n_sources, places[destination]]
            edges = slice(first, first + read.n_sources)
            found.append((edges, graph.destinations[destination], block))
    return found


# ----------------------------------------------------------------------------------------- writing


def _write(
    path: str | os.PathLike[str],
    graph: EdgeGraph,
    table: Table,
    metadata: Mapping[str, Any],
    d_model: int | None,
) -> None:
    suffix = _suffix(path)
    width = d_model if d_model is not None else metadata.get("d_model")
    if width is None:
        raise ValueError(
            "EAP-IG's files record the model's width, which is not in the metadata here: give "
            "to_mib(path, d_model=model.cfg.d_model)."
        )
    config = {
        "n_layers": graph.n_layers,
        "n_heads": graph.n_heads,
        "parallel_attn_mlp": graph.parallel,
        "d_model": int(width),
    }
    nodes = _nodes(graph, table.kept)
    write = _json if suffix == ".json" else _pt
    content = write(graph, config, table, nodes)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)


def _nodes(graph: EdgeGraph, kept: Bool[Tensor, "source destination"]) -> Bool[Tensor, " source"]:
    """Sources that an edge leaves and (but for the input) an edge enters, as EAP-IG marks them."""
    enters = torch.zeros(graph.n_sources, dtype=torch.bool)
    enters[0] = True
    place = {name: index for index, name in enumerate(graph.sources)}
    for column, name in enumerate(destinations(graph)[:-1]):
        enters[place[name.partition("<")[0]]] |= kept[:, column].any()
    return enters & kept.any(1)


def _json(graph: EdgeGraph, config: dict[str, Any], table: Table, nodes: Tensor) -> bytes:
    real = real_edges(graph)
    scores, kept = table.scores[real].tolist(), table.kept[real].tolist()
    marks = dict(zip(graph.sources, nodes.tolist(), strict=True)) | {"logits": True}
    document = {
        "cfg": config,
        "nodes": {name: {"in_graph": mark} for name, mark in marks.items()},
        "edges": {
            name: {"score": score, "in_graph": keep}
            for name, score, keep in zip(edge_names(graph), scores, kept, strict=True)
        },
    }
    return json.dumps(document).encode()


def _pt(graph: EdgeGraph, config: dict[str, Any], table: Table, nodes: Tensor) -> bytes:
    document = {
        "cfg": config,
        "src_nodes": list(graph.sources),
        "dst_nodes": destinations(graph),
        "edges_scores": table.scores,
        "edges_in_graph": table.kept,
        "nodes_in_graph": nodes,
    }
    content = BytesIO()
    torch.save(document, content)
    return content.getvalue()


def real_edges(graph: EdgeGraph) -> Bool[Tensor, "source destination"]:
    """Which cells of EAP-IG's table are edges."""
    return spread(graph, torch.ones(graph.n_edges)) > 0


def edge_names(graph: EdgeGraph) -> list[str]:
    """Names of EAP-IG's edges, source by source, as `real_edges` marks them."""
    names = destinations(graph)
    return [f"{graph.sources[s]}->{names[d]}" for s, d in real_edges(graph).nonzero().tolist()]


# ----------------------------------------------------------------------------------------- reading


def _read(path: str | os.PathLike[str], graph: EdgeGraph) -> tuple[Table, dict[str, Any]]:
    """A file's table, checked to be one of `graph`, and what metadata it gives."""
    check_graph(graph)
    check_file(path, "circuit")
    document = read_json(path, FILE) if _suffix(path) == ".json" else _load_pt(path)
    config = document.get("cfg") if isinstance(document, dict) else None
    if not isinstance(config, dict):
        raise ValueError(f"{path} is no file of EAP-IG's: it has no 'cfg'.")
    read = _table_of_json if _suffix(path) == ".json" else _table_of_pt
    width = {"d_model": config["d_model"]} if "d_model" in config else {}
    with damaged(path):
        _check_config(path, config, graph)
        origin = {"imported_from": Path(path).name, **width}
        return read(path, document, graph), origin


def _suffix(path: str | os.PathLike[str]) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in (".json", ".pt"):
        raise ValueError(f"{os.fspath(path)!r}: EAP-IG's and MIB's files end in .json or .pt.")
    return suffix


def _load_pt(path: str | os.PathLike[str]) -> Any:
    """Tensors and plain values that lie in the file as they are; no code of it is run.

    Mapped, since torch otherwise reads as far as a tensor says, beyond what there is of it.
    """
    try:
        with zipfile.ZipFile(path) as file:
            parts = file.infolist()
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
            raise ValueError("it is packed")  # to any size
        document = torch.load(os.fspath(path), map_location="cpu", weights_only=True, mmap=True)
        sizes = {part.file_size for part in parts}
        for name, value in document.items():
            if isinstance(value, Tensor) and value.untyped_storage().nbytes() not in sizes:
                raise ValueError(f"{name} is cut short")
        return document
    except Exception as error:  # a damaged one makes torch raise errors of many kinds
        raise ValueError(
            f"{path} is no .pt file of tensors and plain values, or a damaged one "
            f"({first_line(error)})."
        ) from None


def _check_config(path: str | os.PathLike[str], config: dict[str, Any], graph: EdgeGraph) -> None:
    wanted = {
        "n_layers": graph.n_layers,
        "n_heads": graph.n_heads,
        "parallel_attn_mlp": graph.parallel,
    }
    for key, value in wanted.items():
        if key not in config:
            raise ValueError(f"{path} is no file of EAP-IG's: its 'cfg' has no {key}.")
        if config[key] != value:
            raise ValueError(
                f"{path} is of another model: its {key} is {config[key]}, this graph's {value}. "
                "Give the graph of the model that the file was made with, EdgeGraph.from_model."
            )


def _table_of_json(path: str | os.PathLike[str], document: Any, graph: EdgeGraph) -> Table:
    nodes, edges = document.get("nodes"), document.get("edges")
    if not isinstance(nodes, dict) or not isinstance(edges, dict):
        raise ValueError(f"{path} is no file of EAP-IG's: it needs 'nodes' and 'edges'.")
    real = real_edges(graph)
    names = edge_names(graph)
    _check_names(path, "nodes", nodes, [*graph.sources, "logits"])
    _check_neurons(path, [n.get("neurons", ()) for n in nodes.values() if isinstance(n, dict)])
    _check_names(path, "edges", edges, names)
    _check_complete(path, "edges", edges, names)
    rows = [edges[name] for name in names]
    table = Table(torch.zeros(real.shape), torch.zeros_like(real))
    try:
        table.scores[real] = torch.tensor([float(edge["score"]) for edge in rows])
        table.kept[real] = torch.tensor([_flag(edge["in_graph"]) for edge in rows])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged: an edge needs a number 'score' and a true or false 'in_graph' "
            f"({error})."
        ) from None
    return table


def _flag(value: Any) -> bool:
    if value not in (0, 1):
        raise TypeError(f"in_graph is {value!r}")
    return bool(value)


def _table_of_pt(path: str | os.PathLike[str], document: Any, graph: EdgeGraph) -> Table:
    shape = (graph.n_sources, len(destinations(graph)))
    for key, wanted in (("src_nodes", list(graph.sources)), ("dst_nodes", destinations(graph))):
        found = document.get(key)
        if found is None:
            raise ValueError(f"{path} is no file of EAP-IG's: it has no {key!r}.")
        _check_names(path, key, found, wanted)
        _check_complete(path, key, found, wanted)
        if list(found) != wanted:
            raise ValueError(f"{path}: its {key} are not in EAP-IG's order, {wanted[:SHOWN]} ….")
    tensors = []
    for key in ("edges_scores", "edges_in_graph"):
        tensor = document.get(key)
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape:
            found = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{path} is damaged: {key} is {found}, expected a tensor {shape}.")
        tensors.append(tensor)
    neurons = document.get("neurons_in_graph")
    _check_neurons(path, neurons.tolist() if isinstance(neurons, Tensor) else [])
    real = real_edges(graph)  # EAP-IG marks cells that are no edges too, when it keeps whole nodes
    return Table(torch.where(real, tensors[0].float(), 0.0), tensors[1].bool() & real)


def _check_names(
    path: str | os.PathLike[str], what: str, found: Iterable[str], wanted: Iterable[str]
) -> None:
    """Raise ValueError for names that the graph has not."""
    known = set(wanted)
    unknown = [name for name in found if name not in known]
    if unknown:
        raise ValueError(
            f"{path}: {what} that this graph has not: {_some(unknown)}. Give the graph of the "
            "model that the file was made with, EdgeGraph.from_model."
        )


def _check_complete(
    path: str | os.PathLike[str], what: str, found: Iterable[str], wanted: Iterable[str]
) -> None:
    """Raise ValueError for names of the graph that are not there."""
    known = set(found)
    missing = [name for name in wanted if name not in known]
    if missing:
        raise ValueError(
            f"{path}: {what} missing: {_some(missing)}. Every edge of the graph must be in the "
            "file, in the circuit or not: write it again with EAP-IG's Graph.to_json or to_pt."
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + more


def _check_neurons(path: str | os.PathLike[str], rows: list[Any]) -> None:
    if any(0 < sum(map(bool, row)) < len(row) for row in rows):
        raise ValueError(
            f"{path} is a circuit of neurons (dimensions of a node's output). EAP-IG's evaluation "
            "cuts no edge of a node that keeps neurons, only the node's other dimensions; here "
            "edges have masks beside neurons, so it would be scored as another circuit. Save "
            "EAP-IG's graph without neurons, or build a Circuit and Neurons of kind 'dimensions'."
        )
