"""A circuit: a set of edges of one graph, and its origin. JSON on disk.

An edge is *alive* if it lies on a path of kept edges from the input to the logits, and *dead*
otherwise. A head is reached through any of its query, key and value inputs. In a graph with spans,
a path passes from span to span only through keys and values.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_edgeprune.circuits.metadata import SCORED_BY, values_in_metadata
from tl_edgeprune.circuits.mib import read_circuit, write_circuit
from tl_edgeprune.circuits.networkx_graph import to_networkx
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.graph.names import split_edge
from tl_edgeprune.graph.reachability import alive_edges
from tl_edgeprune.utils.lazy import late
from tl_edgeprune.utils.reading import AGAIN, check_type, of_format, read_json, reporting_damage
from tl_edgeprune.utils.versions import versions
from tl_edgeprune.utils.writing import write_whole

FORMAT = 1
KIND = "tl_edgeprune circuit"
HINT = "Expected one written by Circuit.save."
_write_html = late("tl_edgeprune.report", "write_html")
_draw_circuit = late("tl_edgeprune.report", "draw_circuit")
_to_dot = late("tl_edgeprune.report", "to_dot")
_html_of_cell = late("tl_edgeprune.report.circuit.html_page", "html_of_cell")


@dataclass(frozen=True, eq=False, repr=False)
class Circuit:
    """Edges of a graph, as a mask over `graph.edges`, and their origin.

    `|`, `&` and `-` combine circuits. They keep the metadata on which both agree. Ablation and
    folding are kept from either; if two circuits were found under different ablations, both are
    listed, and running the combination needs an explicit ablation=….

    Args:
        graph: the edges to choose from.
        mask: which edges are kept, bool [edge].
        metadata: plain JSON values, such as model, task, seed, ablation and settings.

    Raises:
        ValueError: the mask has another shape or type.
    """

    graph: EdgeGraph
    mask: Bool[Tensor, " edge"]
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.mask.shape != (self.graph.n_edges,) or self.mask.dtype != torch.bool:
            raise ValueError(
                f"a circuit's mask is bool [{self.graph.n_edges}], got {self.mask.dtype} "
                f"{tuple(self.mask.shape)}."
            )
        object.__setattr__(self, "mask", self.mask.detach().cpu().clone())

    # ------------------------------------------------------------------------------ constructors

    @classmethod
    def from_edges(cls, graph: EdgeGraph, edges: Iterable[str], **metadata: Any) -> Circuit:
        """The circuit of these edges. Raises KeyError, with similar names, for an unknown one."""
        mask = torch.zeros(graph.n_edges, dtype=torch.bool)
        mask[[graph.index(edge) for edge in edges]] = True
        return cls(graph, mask, metadata)

    @classmethod
    def top(
        cls, graph: EdgeGraph, scores: Float[Tensor, " edge"], n_edges: int, **metadata: Any
    ) -> Circuit:
        """The `n_edges` edges of highest score; of equal ones, the first in the graph.

        Args:
            graph: the graph.
            scores: a score per edge, in flat order.
            n_edges: from 1 to the graph's edges.
            metadata: of the circuit.

        Raises:
            ValueError: a size outside the graph; scores of another length, NaN or infinite.
        """
        check_budget(n_edges, graph)
        check_scores(scores, graph)
        order = torch.argsort(scores.detach().cpu().double(), descending=True, stable=True)
        mask = torch.zeros(graph.n_edges, dtype=torch.bool)
        mask[order[:n_edges]] = True
        return cls(graph, mask, metadata)

    # -------------------------------------------------------------------------------- describing

    @property
    def edges(self) -> tuple[str, ...]:
        """Names of the edges, in the graph's order."""
        names = self.graph.edges
        return tuple(names[index] for index in self.mask.nonzero().flatten().tolist())

    @property
    def n_edges(self) -> int:
        return int(self.mask.sum())

    @property
    def sparsity(self) -> float:
        """Share of the graph's edges that are removed."""
        return 1 - self.n_edges / self.graph.n_edges

    @property
    def nodes(self) -> tuple[str, ...]:
        """Sources that an edge leaves, or that an edge's destination belongs to, in graph order."""
        nodes: set[str] = set()
        for edge in self.edges:
            source, destination = split_edge(edge)
            nodes |= {source, *self.graph.owner(destination)}
        return tuple(name for name in self.graph.sources if name in nodes)

    def without_dead_edges(self) -> Circuit:
        """The edges on some path of kept edges from the input to the logits.

        Under counterfactual ablation, dead edges have no effect. Under zero, mean and constant
        ablation, a source that nothing reaches still writes something else than what removed edges
        carry. There, the circuit without its dead edges is a different circuit: evaluate it again.
        """
        return Circuit(self.graph, alive_edges(self.graph, self.mask), dict(self.metadata))

    def __repr__(self) -> str:
        task = self.metadata.get("task", "")
        return (
            f"Circuit({self.n_edges:,} of {self.graph.n_edges:,} edges, {100 * self.sparsity:.2f} "
            f"% pruned{', ' + str(task) if task else ''})"
        )

    # --------------------------------------------------------------------------------- set algebra

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Circuit):
            return NotImplemented
        return self.graph == other.graph and bool((self.mask == other.mask).all())

    def __hash__(self) -> int:
        return hash((self.graph, self.mask.numpy().tobytes()))

    def __contains__(self, edge: str) -> bool:
        return bool(self.mask[self.graph.index(edge)])

    def __len__(self) -> int:
        return self.n_edges

    def __and__(self, other: Circuit) -> Circuit:
        return self._combined(other, self.mask & self._same(other).mask)

    def __or__(self, other: Circuit) -> Circuit:
        return self._combined(other, self.mask | self._same(other).mask)

    def __sub__(self, other: Circuit) -> Circuit:
        return self._combined(other, self.mask & ~self._same(other).mask)

    def iou(self, other: Circuit) -> float:
        """Edges in both over edges in either; 1 for two empty circuits."""
        either = (self | other).n_edges
        return (self & other).n_edges / either if either else 1.0

    def _combined(self, other: Circuit, mask: Tensor) -> Circuit:
        shared = {k: v for k, v in self.metadata.items() if other.metadata.get(k) == v}
        for name in SCORED_BY:
            values = {
                *values_in_metadata(self.metadata, name),
                *values_in_metadata(other.metadata, name),
            }
            if values:
                shared[name] = sorted(values) if len(values) > 1 else values.pop()
        return Circuit(self.graph, mask, shared)

    def _same(self, other: Circuit) -> Circuit:
        if other.graph != self.graph:
            raise ValueError(f"circuits of different graphs: {self.graph} and {other.graph}.")
        return other

    # ------------------------------------------------------------------------------------ on disk

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON atomically: the graph, the edges by name, metadata and versions."""
        document = {
            "format": FORMAT,
            "kind": KIND,
            "graph": self.graph.to_dict(),
            "n_edges": self.n_edges,
            "edges": self.edges,
            "metadata": self.metadata,
            "versions": versions(),
        }
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(document, indent=1).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Circuit:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no file.
            ValueError: a damaged file, or one of another format.
        """
        file_type, advice = "circuit file", f"{AGAIN}, or find the circuit again"
        document = read_json(path, file_type, HINT)
        of_format(document, path, file_type, kind=KIND, format=FORMAT, hint=HINT, again=advice)
        with reporting_damage(path):
            graph = EdgeGraph.from_dict(document["graph"])
            edges = check_type(document["edges"], list, "edges")
            metadata = check_type(document["metadata"], dict, "metadata")
            circuit = cls(graph, cls.from_edges(graph, edges).mask, metadata)
        if circuit.n_edges != document.get("n_edges"):
            raise ValueError(
                f"{path} is damaged: it says {document.get('n_edges')!s:.100} edges and lists "
                f"{circuit.n_edges}."
            )
        return circuit

    # -------------------------------------------------------------------------------- pictures

    def report(self, path: str | os.PathLike[str], **shown: Any) -> None:
        """Write an interactive HTML page that opens from disk.

        `report.write_html` lists what it can show: scores=, other=, circuits=, result=, measures=,
        explanation=, ….
        """
        _write_html(self, path, **shown)

    def draw(self, path: str | os.PathLike[str], **shown: Any) -> None:
        """Draw the circuit as .svg, .png or .pdf: see `report.draw_circuit`."""
        _draw_circuit(self, path, **shown)

    def to_dot(self) -> str:
        """The circuit as text for Graphviz: see `report.to_dot`."""
        return _to_dot(self)

    def _repr_html_(self) -> str:
        return _html_of_cell(self)

    # ------------------------------------------------------------------------------ other formats

    def to_mib(self, path: str | os.PathLike[str], *, d_model: int | None = None) -> None:
        """Write the circuit as EAP-IG and the MIB benchmark read it: see `circuits.mib`."""
        write_circuit(path, self.graph, self.mask, self.metadata, d_model)

    @classmethod
    def from_mib(
        cls, path: str | os.PathLike[str], graph: EdgeGraph, *, shared: str = "same"
    ) -> Circuit:
        """Read the circuit in a file of EAP-IG or MIB: see `circuits.mib.read_circuit`."""
        return cls(graph, *read_circuit(path, graph, shared))

    def to_networkx(self) -> Any:
        """The circuit as a networkx DiGraph: see `circuits.networkx_graph`."""
        return to_networkx(self.graph, self.edges)


def check_budget(n_edges: int, graph: EdgeGraph, most: int | None = None) -> None:
    """Raise ValueError unless 1 <= n_edges <= graph.n_edges (or `most`, in MIB's count)."""
    most = graph.n_edges if most is None else most
    if isinstance(n_edges, bool) or int(n_edges) != n_edges or not 1 <= n_edges <= most:
        raise ValueError(
            f"n_edges={n_edges}: expected a whole number from 1 to {most}, the graph's edges."
        )


def check_scores(scores: Tensor, graph: EdgeGraph) -> None:
    """Raise ValueError unless there is one number for each edge of the graph."""
    if scores.shape != (graph.n_edges,):
        raise ValueError(
            f"scores of shape {tuple(scores.shape)} for {graph.n_edges} edges: expected "
            f"({graph.n_edges},), one number for each edge of {graph}, in the order of graph.edges."
        )
    bad = (~torch.isfinite(scores)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"scores hold NaN or infinite values for {len(bad)} of {graph.n_edges} edges (first "
            f"{graph.edges[bad[0]]}: {float(scores[bad[0]])}), which cannot be ranked. Look for "
            "NaN in the model's logits and gradients, and score the edges again."
        )
