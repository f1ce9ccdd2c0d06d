"""Circuits and scores in EAP-IG's files, which the MIB benchmark's leaderboard accepts.

EAP-IG's graph has one input, an MLP in every layer, and a query, key and value input for every
head. Its files hold each edge's score and whether it is in the circuit:

- .json: {"cfg": …, "nodes": {name: {"in_graph"}}, "edges": {name: {"score", "in_graph"}}}; in older
  files, a node is only a bool.
- .pt: {"cfg", "src_nodes", "dst_nodes", "edges_scores", "edges_in_graph" [source, destination],
  "nodes_in_graph" [source]}, saved by torch; read here with weights_only=True: only tensors and
  plain values.

If heads share keys and values, MIB counts an edge for each query head. Writing gives each head its
group's edge, and warns how many edges the circuit then has in MIB's count. Reading folds the heads'
edges back into one, and they must agree. The same holds for the q, k and v edges if a graph has one
input per head
(split_qkv=False).

MIB takes circuits of highest scores (for CPR) and of highest magnitudes (for CMD). Scores that rank
edges as they are (log alphas: the lowest go first) are written shifted to above 0 where any is
below, so that both are the ranking itself; `mib_faithfulness` predicts the figures of such a file.

A budget of n edges in MIB's count can end inside a group: EAP-IG's top n of our scores is exactly n
edges, with any of the equal ones at the border. Such a circuit cannot be run here.
`Circuit.from_mib(shared="all")` reads it without the incomplete groups, which is exactly
`scores.top(n, convention="mib")`; `shared="any"` keeps them whole. Both say how many.

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
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_edgeprune.circuits.mib_table import (
    FOLDED,
    SHARED,
    Table,
    check_graph,
    destinations,
    edge_names,
    fold_mask,
    fold_scores,
    positive_ranking,
    real_edges,
    spread,
)
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.graph.names import parse_destination
from tl_edgeprune.utils.reading import check_file, first_line, read_json, reporting_damage
from tl_edgeprune.utils.writing import write_whole

FILE = "file of EAP-IG's"
SHOWN = 3  # names that an error lists


# ------------------------------------------------------------------------------------------ public


def write_scores(
    path: str | os.PathLike[str],
    graph: EdgeGraph,
    scores: Float[Tensor, " edge"],
    by_magnitude: bool,
    metadata: Mapping[str, Any],
    d_model: int | None,
) -> None:
    """Write scores to a .json or .pt file of EAP-IG's; no edge is marked as in the circuit.

    Args:
        path: the file.
        graph: the scores' graph.
        scores: [edge].
        by_magnitude: effects are written as they are. If False, scores are shifted to above 0 if
            any is below, so that their magnitudes have the same order.
        metadata: the scores' metadata.
        d_model: the model's width, which the file records; None: from the metadata.

    Raises:
        ValueError: another ending, a graph that the format cannot hold (split embeddings, no MLPs),
            an unknown d_model.
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
    """Write a circuit as `write_scores` writes scores: its edges with score 1, others with 0.

    Warns if EAP-IG counts more edges.
    """
    check_graph(graph)
    table = spread(graph, mask.float())
    _write(path, graph, Table(table, table > 0), metadata, d_model)
    n_mib_edges, n_edges = int((table > 0).sum()), int(mask.sum())
    if n_mib_edges != n_edges:
        warnings.warn(
            f"{path}: the circuit's {n_edges:,} edges are {n_mib_edges:,} in EAP-IG's and MIB's "
            "count, which has one for every query head if heads share an input. For a circuit "
            f"of at most {n_edges:,} there, take scores.top({n_edges}, "
            "convention='mib').",
            stacklevel=3,
        )


def read_scores(
    path: str | os.PathLike[str], graph: EdgeGraph, shared: str = "same"
) -> tuple[Float[Tensor, " edge"], dict[str, Any]]:
    """The scores in a .json or .pt file of EAP-IG's, as those of `graph`, and their metadata.

    Args:
        path: the file.
        graph: the graph of the model that the file was made with.
        shared: how to combine the scores of an edge that the file has once per head: "same" refuses
            different ones; "sum" is what attribution gives for removing all of them, to first
            order; "mean".

    Raises:
        FileNotFoundError: no file.
        ValueError: a damaged file, one of another graph, unknown or missing edges, different scores
            under "same".
    """
    if shared not in SHARED:
        raise ValueError(f"shared={shared!r}: expected one of {', '.join(SHARED)}.")
    table, origin = _read(path, graph)
    bad = (real_edges(graph) & ~torch.isfinite(table.scores)).nonzero().tolist()
    if bad:
        source, destination = bad[0]
        name = f"{graph.sources[source]}->{destinations(graph)[destination]}"
        raise ValueError(
            f"{path}: the score of {name} is NaN or infinite. Score the edges again, in float32."
        )
    return fold_scores(graph, table.scores, shared), origin


def read_circuit(
    path: str | os.PathLike[str], graph: EdgeGraph, shared: str = "same"
) -> tuple[Bool[Tensor, " edge"], dict[str, Any]]:
    """The circuit in a .json or .pt file of EAP-IG's, as a mask over `graph`, and its metadata.

    Args:
        path: the file.
        graph: the graph of the model that the file was made with.
        shared: what to do with an edge that the file keeps for only some heads of a group: "same"
            refuses it, "all" leaves it out, "any" keeps it; the last two warn how many there are.

    Raises:
        FileNotFoundError: no file.
        ValueError: as `read_scores`; heads of a group that disagree under "same"; a file that has
            only scores.
    """
    if shared not in FOLDED:
        raise ValueError(f"shared={shared!r}: expected one of {', '.join(FOLDED)}.")
    table, origin = _read(path, graph)
    mask = fold_mask(graph, table.kept, shared)
    touched, complete = (fold_mask(graph, table.kept, kind) for kind in ("any", "all"))
    split = int((touched & ~complete).sum())
    if split:
        warnings.warn(
            f"{path} has {int(table.kept.sum()):,} edges in the graph, and keeps {split:,} of this "
            f"graph's edges for only some of their heads. shared={shared!r} "
            f"{'leaves them out' if shared == 'all' else 'keeps them whole'}: the circuit has "
            f"{int((spread(graph, mask.float()) > 0).sum()):,} of the file's kind of edges.",
            stacklevel=3,
        )
    if not bool(table.kept.any()):
        raise ValueError(
            f"{path} has no edge in the graph: it holds only scores. Use "
            "EdgeScores.from_mib(path, graph).top(k)."
        )
    return mask, origin


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
            "EAP-IG's files record the model's width, which is not in this metadata: give "
            "to_mib(path, d_model=model.cfg.d_model)."
        )
    config = {
        "n_layers": graph.n_layers,
        "n_heads": graph.n_heads,
        "parallel_attn_mlp": graph.parallel,
        "d_model": int(width),
    }
    nodes = _nodes_in_graph(graph, table.kept)
    write = _json if suffix == ".json" else _pt
    content = write(graph, config, table, nodes)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)


def _nodes_in_graph(
    graph: EdgeGraph, in_circuit: Bool[Tensor, "source destination"]
) -> Bool[Tensor, " source"]:
    """Sources that an edge leaves and, except for the input, an edge enters, as EAP-IG marks."""
    enters = torch.zeros(graph.n_sources, dtype=torch.bool)
    enters[0] = True
    source_index = {name: index for index, name in enumerate(graph.sources)}
    for column, name in enumerate(destinations(graph)[:-1]):
        enters[source_index[parse_destination(name).node]] |= in_circuit[:, column].any()
    return enters & in_circuit.any(1)


def _json(graph: EdgeGraph, config: dict[str, Any], table: Table, nodes: Tensor) -> bytes:
    real = real_edges(graph)
    scores, in_circuit = table.scores[real].tolist(), table.kept[real].tolist()
    marks = dict(zip(graph.sources, nodes.tolist(), strict=True)) | {"logits": True}
    document = {
        "cfg": config,
        "nodes": {name: {"in_graph": mark} for name, mark in marks.items()},
        "edges": {
            name: {"score": score, "in_graph": keep}
            for name, score, keep in zip(edge_names(graph), scores, in_circuit, strict=True)
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


# ----------------------------------------------------------------------------------------- reading


def _read(path: str | os.PathLike[str], graph: EdgeGraph) -> tuple[Table, dict[str, Any]]:
    """A file's table, checked against `graph`, and the metadata that it gives."""
    check_graph(graph)
    check_file(path, "circuit")
    document = read_json(path, FILE) if _suffix(path) == ".json" else _load_pt(path)
    config = document.get("cfg") if isinstance(document, dict) else None
    if not isinstance(config, dict):
        raise ValueError(f"{path} is no file of EAP-IG's: it has no 'cfg'.")
    read = _table_of_json if _suffix(path) == ".json" else _table_of_pt
    width = {"d_model": config["d_model"]} if "d_model" in config else {}
    with reporting_damage(path):
        _check_config(path, config, graph)
        origin = {"imported_from": Path(path).name, **width}
        return read(path, document, graph), origin


def _suffix(path: str | os.PathLike[str]) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in (".json", ".pt"):
        raise ValueError(f"{os.fspath(path)!r}: EAP-IG's and MIB's files end in .json or .pt.")
    return suffix


def _load_pt(path: str | os.PathLike[str]) -> Any:
    """The tensors and plain values of an uncompressed file; no code in it is run.

    The file is memory-mapped: otherwise torch reads as far as a tensor claims, past its end.
    """
    try:
        with zipfile.ZipFile(path) as file:
            entries = file.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is compressed")  # and could expand to any size
        document = torch.load(os.fspath(path), map_location="cpu", weights_only=True, mmap=True)
        sizes = {entry.file_size for entry in entries}
        for name, value in document.items():
            if isinstance(value, Tensor) and value.untyped_storage().nbytes() not in sizes:
                raise ValueError(f"{name} is cut short")
        return document
    except Exception as error:  # torch raises many kinds for damaged files
        raise ValueError(
            f"{path} is no .pt file of tensors and plain values, or a damaged one "
            f"({first_line(error)})."
        ) from None


def _check_config(path: str | os.PathLike[str], config: dict[str, Any], graph: EdgeGraph) -> None:
    expected = {
        "n_layers": graph.n_layers,
        "n_heads": graph.n_heads,
        "parallel_attn_mlp": graph.parallel,
    }
    for key, value in expected.items():
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
    for key, expected in (("src_nodes", list(graph.sources)), ("dst_nodes", destinations(graph))):
        value = document.get(key)
        if value is None:
            raise ValueError(f"{path} is no file of EAP-IG's: it has no {key!r}.")
        _check_names(path, key, value, expected)
        _check_complete(path, key, value, expected)
        if list(value) != expected:
            raise ValueError(f"{path}: its {key} are not in EAP-IG's order, {expected[:SHOWN]} ….")
    tensors = []
    for key in ("edges_scores", "edges_in_graph"):
        tensor = document.get(key)
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape:
            value = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{path} is damaged: {key} is {value}, expected a tensor {shape}.")
        tensors.append(tensor)
    neurons = document.get("neurons_in_graph")
    _check_neurons(path, neurons.tolist() if isinstance(neurons, Tensor) else [])
    real = real_edges(graph)  # EAP-IG also marks cells that are no edges, if it keeps whole nodes
    return Table(torch.where(real, tensors[0].float(), 0.0), tensors[1].bool() & real)


def _check_names(
    path: str | os.PathLike[str], what: str, names: Iterable[str], expected: Iterable[str]
) -> None:
    """Raise ValueError for names that the graph does not have."""
    known_names = set(expected)
    unknown = [name for name in names if name not in known_names]
    if unknown:
        raise ValueError(
            f"{path}: {what} that this graph does not have: {_listed(unknown)}. Give the graph of "
            "the model that the file was made with, EdgeGraph.from_model."
        )


def _check_complete(
    path: str | os.PathLike[str], what: str, names: Iterable[str], expected: Iterable[str]
) -> None:
    """Raise ValueError if names of the graph are missing."""
    present = set(names)
    missing = [name for name in expected if name not in present]
    if missing:
        raise ValueError(
            f"{path}: {what} missing: {_listed(missing)}. Every edge of the graph must be in the "
            "file, in the circuit or not: write it again with EAP-IG's Graph.to_json or to_pt."
        )


def _listed(names: list[str]) -> str:
    remainder = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + remainder


def _check_neurons(path: str | os.PathLike[str], rows: list[Any]) -> None:
    if any(0 < sum(map(bool, row)) < len(row) for row in rows):
        raise ValueError(
            f"{path} is a circuit of neurons (dimensions of a node's output). EAP-IG's evaluation "
            "cuts no edge of a node that keeps neurons, only its other dimensions; here "
            "edges have masks in addition, so this would be another circuit. Save "
            "EAP-IG's graph without neurons, or build a Circuit and Neurons of kind 'dimensions'."
        )
