"""Neurons of a circuit: which parts of a source's output are kept, in addition to its edges.

1. kind "mlp": the hidden neurons of every MLP, [n_layers, d_mlp], named m3.n17. A removed one has
   the activation h_ref that the ablation gives it: h_ref + g (h - h_ref) is what W_out reads.
2. kind "dimensions": the dimensions of the residual stream in which each source writes,
   [n_sources, d_model], named a0.h3.d5. A gate multiplies the source's difference there.
3. A gate is the same for all edges of its source and at all positions.

An MLP's output bias belongs to no neuron: only the MLP's edges remove it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.utils.reading import check_type, of_format, read_json, reporting_damage
from tl_edgeprune.utils.versions import versions
from tl_edgeprune.utils.writing import write_whole

FORMAT = 1
FILE_KIND = "tl_edgeprune neurons"
HINT = "Expected one written by Neurons.save."
MOST_NEURONS = 2**27
"""Limit of a file. A Llama of 70 B parameters has 2**25.4 dimensions of sources."""
MLP, DIMENSIONS = "mlp", "dimensions"
KINDS = {MLP: "n", DIMENSIONS: "d"}
"""The kinds, and the letter before a unit's number in a name."""


@dataclass(frozen=True, eq=False, repr=False)
class Neurons:
    """Kept neurons of one kind.

    Args:
        graph: the model's graph.
        kind: "mlp" or "dimensions".
        mask: bool [place, unit]: the MLPs in order by d_mlp, or the graph's sources by d_model.
        metadata: plain JSON values, as a Circuit's.

    Raises:
        ValueError: an unknown kind, or a mask of another shape or type.
    """

    graph: EdgeGraph
    kind: str
    mask: Bool[Tensor, "place unit"]
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_kind(self.kind)
        n_sites = len(places_of(self.graph, self.kind))
        if self.mask.dim() != 2 or len(self.mask) != n_sites or self.mask.dtype != torch.bool:
            raise ValueError(
                f"a mask of neurons of kind {self.kind!r} is bool [{n_sites}, units] in "
                f"{self.graph}, got {self.mask.dtype} {tuple(self.mask.shape)}."
            )
        object.__setattr__(self, "mask", self.mask.detach().cpu().clone())

    # ---------------------------------------------------------------------------------- making

    @classmethod
    def from_names(
        cls, graph: EdgeGraph, kind: str, names: Iterable[str], width: int, **metadata: Any
    ) -> Neurons:
        """The neurons of these names, of `width` (d_mlp or d_model) at each place.

        Raises KeyError for an unknown name.
        """
        rows = {site: row for row, site in enumerate(places_of(graph, kind))}
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for name in names:
            match = re.fullmatch(rf"(.+)\.{KINDS[kind]}(\d+)", name)
            if match is None or match[1] not in rows or int(match[2]) >= width:
                raise KeyError(
                    f"no neuron {name!r} of kind {kind!r}: expected names such as "
                    f"{next(iter(rows))}.{KINDS[kind]}0, with numbers below {width}."
                )
            mask[rows[match[1]], int(match[2])] = True
        return cls(graph, kind, mask, metadata)

    @classmethod
    def top(
        cls,
        graph: EdgeGraph,
        kind: str,
        scores: Float[Tensor, "place unit"],
        n_neurons: int,
        **metadata: Any,
    ) -> Neurons:
        """The `n_neurons` neurons of highest score; of equal ones, the first.

        Raises:
            ValueError: more neurons than there are, fewer than 1, or NaN scores.
        """
        check_budget(n_neurons, scores.numel())
        if bool(scores.isnan().any()):
            raise ValueError("scores of neurons hold NaN, which cannot be ranked.")
        flat = scores.detach().cpu().double().flatten()
        mask = torch.zeros(len(flat), dtype=torch.bool)
        mask[flat.argsort(descending=True, stable=True)[:n_neurons]] = True
        return cls(graph, kind, mask.view(scores.shape), metadata)

    # -------------------------------------------------------------------------------- describing

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the neurons that are kept, in order."""
        sites, letter = places_of(self.graph, self.kind), KINDS[self.kind]
        return tuple(f"{sites[row]}.{letter}{unit}" for row, unit in self.mask.nonzero().tolist())

    @property
    def n_neurons(self) -> int:
        return int(self.mask.sum())

    @property
    def n_neurons_full(self) -> int:
        """How many neurons the model has."""
        return self.mask.numel()

    @property
    def counts(self) -> dict[str, int]:
        """How many neurons are kept at each place that keeps any."""
        rows = zip(places_of(self.graph, self.kind), self.mask.sum(1).tolist(), strict=True)
        return {site: count for site, count in rows if count}

    def __repr__(self) -> str:
        return f"Neurons({self.kind}: {self.n_neurons:,} of {self.n_neurons_full:,})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Neurons):
            return NotImplemented
        same_graph = (self.graph, self.kind) == (other.graph, other.kind)
        return same_graph and self.mask.equal(other.mask)

    def __hash__(self) -> int:
        return hash((self.graph, self.kind, self.mask.numpy().tobytes()))

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def __len__(self) -> int:
        return self.n_neurons

    # ------------------------------------------------------------------------------------ on disk

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON atomically: the graph, the kept neurons by place, metadata and versions."""
        rows = zip(places_of(self.graph, self.kind), self.mask, strict=True)
        document = {
            "format": FORMAT,
            "kind": FILE_KIND,
            "graph": self.graph.to_dict(),
            "neurons": self.kind,
            "width": self.mask.shape[1],
            "n_neurons": self.n_neurons,
            "kept": {site: row.nonzero().flatten().tolist() for site, row in rows if row.any()},
            "metadata": self.metadata,
            "versions": versions(),
        }
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(document).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Neurons:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no file.
            ValueError: a damaged file, or one of another format.
        """
        file_type = "file of neurons"
        document = read_json(path, file_type, HINT)
        of_format(document, path, file_type, kind=FILE_KIND, format=FORMAT, hint=HINT)
        with reporting_damage(path):
            kind = check_type(document["neurons"], str, "neurons")
            check_kind(kind)
            graph = EdgeGraph.from_dict(document["graph"])
            width, listed = check_type(document["width"], int, "width"), document["kept"].items()
            if not 0 < width <= MOST_NEURONS // max(1, len(places_of(graph, kind))):
                raise ValueError(f"it says {width} neurons at each place")
            names = [f"{site}.{KINDS[kind]}{unit}" for site, units in listed for unit in units]
            metadata = check_type(document["metadata"], dict, "metadata")
            neurons = replace(cls.from_names(graph, kind, names, width), metadata=metadata)
        if neurons.n_neurons != document.get("n_neurons"):
            raise ValueError(
                f"{path} is damaged: it says {document.get('n_neurons')!s:.100} neurons and lists "
                f"{neurons.n_neurons}."
            )
        return neurons


# ------------------------------------------------------------------------------------------ checks


def places_of(graph: EdgeGraph, kind: str) -> tuple[str, ...]:
    """Names of the nodes that have neurons of a kind: the MLPs, or all sources."""
    if kind == DIMENSIONS:
        return graph.sources
    return tuple(f"m{layer}" for layer in range(graph.n_layers)) if graph.has_mlp else ()


def check_kind(kind: str | None) -> None:
    """Raise ValueError unless it is None or a kind of neurons."""
    if kind is not None and kind not in KINDS:
        raise ValueError(
            f"neurons={kind!r}: expected 'mlp' (hidden neurons of the MLPs), 'dimensions' (each "
            "source's dimensions of the residual stream) or None."
        )


def check_budget(n_neurons: int, most: int) -> None:
    """Raise ValueError unless 1 <= n_neurons <= most."""
    if isinstance(n_neurons, bool) or int(n_neurons) != n_neurons or not 1 <= n_neurons <= most:
        raise ValueError(
            f"n_neurons={n_neurons}: expected a whole number from 1 to {most}, the neurons that "
            "there are."
        )


def kind_of(neurons: Neurons | Tensor | str | None, graph: EdgeGraph) -> str | None:
    """The kind of neurons, or of gates by their number of rows, in a run on this graph.

    Raises:
        ValueError: neurons of another graph, or a kind that the model does not have.
    """
    if isinstance(neurons, Neurons):
        if neurons.graph.sources != graph.sources:
            raise ValueError(
                f"the neurons are of another model or graph: {neurons.graph}, this run's is "
                f"{graph}."
            )
        kind: str | None = neurons.kind
    elif isinstance(neurons, Tensor):
        rows = {len(places_of(graph, kind)): kind for kind in KINDS}
        kind = rows.get(len(neurons)) if neurons.dim() == 2 else None
        if kind is None:
            raise ValueError(
                f"gates of shape {tuple(neurons.shape)}: expected [{graph.n_layers}, d_mlp] for "
                f"the MLPs' neurons or [{graph.n_sources}, d_model] for sources' dimensions."
            )
    else:
        kind = neurons
        check_kind(kind)
    if kind == MLP and not graph.has_mlp:
        raise ValueError(
            "neurons='mlp' needs MLPs, and this model has none: use neurons='dimensions'."
        )
    return kind
