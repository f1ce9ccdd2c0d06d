"""A circuit's page of HTML, with what its file and its evaluation tell."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from tl_edgeprune.circuit import Circuit
from tl_edgeprune.evaluate import Evaluation


def title_of(circuit: Circuit) -> str:
    """What a circuit's pictures are called."""
    known = [str(circuit.metadata[k]) for k in ("task", "model") if k in circuit.metadata]
    return f"{' in '.join(known) or 'Circuit'}: {circuit.n_edges:,} edges"


def write_page(
    path: Path,
    circuit: Circuit,
    *,
    title: str | None = None,
    figures: Evaluation | None = None,
    weights: Tensor | None = None,
) -> None:
    """Write the page, whole or not at all. `weights`: a number for each edge of the graph."""
    from tl_edgeprune.report import write_html

    summary = {"edges kept": f"{circuit.n_edges:,} of {circuit.graph.n_edges:,}"}
    for key in ("model", "task", "method"):
        if key in circuit.metadata:
            summary[key] = str(circuit.metadata[key])
    if figures is not None:
        summary |= {
            "KL, held out": f"{figures.kl:.3f}",
            "exact match": f"{100 * figures.exact_match:.1f} %",
        }
    write_html(circuit, path, title=title or title_of(circuit), summary=summary, weights=weights)
