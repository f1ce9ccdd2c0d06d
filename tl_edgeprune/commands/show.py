"""`tl-edgeprune show`: a circuit as a page for the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tl_edgeprune.commands.told import told


@told
def show(
    circuit: Annotated[Path, typer.Argument(help="A circuit.json.")],
    out: Annotated[
        Path | None, typer.Option(help="The .html file; else beside the circuit, by its name.")
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(help="A scores.safetensors: strong edges are drawn wider, and can be sorted."),
    ] = None,
    title: Annotated[str | None, typer.Option(help="The page's heading.")] = None,
) -> None:
    """Write a circuit as a page of HTML that opens without a network.

    Example: tl-edgeprune show runs/ioi/circuit.json --out ioi.html --scores
    runs/ioi/scores.safetensors
    """
    from tl_edgeprune.commands.evaluate import load_circuit
    from tl_edgeprune.commands.page import write_page
    from tl_edgeprune.scores import EdgeScores

    found = load_circuit(circuit)
    ranked = None if scores is None else EdgeScores.load(scores)
    if ranked is not None and ranked.graph != found.graph:
        raise ValueError(
            f"{scores} are of another graph than {circuit}: {ranked.graph}, the circuit's is "
            f"{found.graph}. Give the scores of the run that found it."
        )
    out = out or circuit.with_suffix(".html")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_page(out, found, title=title, weights=None if ranked is None else ranked.ranking())
    print(f"{out}: {found.n_edges:,} of {found.graph.n_edges:,} edges. Open it in a browser.")
