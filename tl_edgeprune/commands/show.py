"""`tl-edgeprune show`: a circuit as a page for the browser, as a picture, as text for Graphviz."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tl_edgeprune.commands.common.errors import with_error_messages
from tl_edgeprune.commands.common.run_folder import EVALUATION
from tl_edgeprune.utils.reading import check_type, read_json, reporting_damage
from tl_edgeprune.utils.writing import write_whole


@with_error_messages
def show(
    circuit: Annotated[Path, typer.Argument(help="A circuit.json.")],
    out: Annotated[
        Path | None, typer.Option(help="The .html file; else beside the circuit, by its name.")
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(
            help="A scores.safetensors: strong edges are drawn wider, a slider shows them alone."
        ),
    ] = None,
    other: Annotated[
        Path | None,
        typer.Option(help="A second circuit.json, laid over the first: shared, only in either."),
    ] = None,
    svg: Annotated[Path | None, typer.Option(help="Also draw it as this .svg.")] = None,
    png: Annotated[Path | None, typer.Option(help="Also draw it as this .png.")] = None,
    dot: Annotated[Path | None, typer.Option(help="Also write it as text for Graphviz.")] = None,
    title: Annotated[str | None, typer.Option(help="The page's heading.")] = None,
) -> None:
    """Write a circuit as a page of HTML that opens without a network.

    Figures come from evaluation.json beside the circuit, where there is one.

    Example: tl-edgeprune show runs/ioi/circuit.json --out ioi.html --scores
    runs/ioi/scores.safetensors --other runs/eap/circuit.json
    """
    from tl_edgeprune.circuits.scores import EdgeScores
    from tl_edgeprune.commands.evaluate import load_circuit

    for path, ending in ((svg, ".svg"), (png, ".png")):
        if path is not None and path.suffix.lower() != ending:
            raise ValueError(f"--{ending[1:]} {path}: its name must end in {ending}.")
    loaded = load_circuit(circuit)
    second = None if other is None else load_circuit(other)
    ranked = None if scores is None else EdgeScores.load(scores)
    for path, result in ((scores, ranked), (other, second)):
        if result is not None and result.graph != loaded.graph:
            raise ValueError(
                f"{path} is of another graph than {circuit}: {result.graph}, the circuit's is "
                f"{loaded.graph}."
            )
    figures = [_figures(circuit), *([] if other is None else [_figures(other)])]
    out = _page(out, circuit)
    loaded.report(out, title=title, scores=ranked, other=second, measures=figures)
    for path in (svg, png):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            loaded.draw(path, other=second, title=title)
    if dot is not None:
        dot.parent.mkdir(parents=True, exist_ok=True)
        write_whole(dot, loaded.to_dot().encode("utf-8", "replace"))
    print(f"{out}: {loaded.n_edges:,} of {loaded.graph.n_edges:,} edges. Open it in a browser.")
    pictures = [str(path) for path in (svg, png, dot) if path is not None]
    if pictures:
        print(f"Also written: {', '.join(pictures)}.")


def _page(out: Path | None, circuit: Path) -> Path:
    """Where the page goes. Raises ValueError for no page's name, and FileExistsError for the page
    that a run wrote itself.
    """
    if out is not None:
        if out.suffix.lower() not in (".html", ".htm"):
            raise ValueError(f"--out {out}: its name must end in .html.")
        return out
    out = circuit.with_suffix(".html")
    if out.exists():
        raise FileExistsError(f"{out} is there already: open it, or give --out for another page.")
    return out


def _figures(circuit: Path) -> dict[str, Any] | None:
    """The figures that the circuit's run left beside it."""
    path = circuit.with_name(EVALUATION)
    if not path.is_file():
        return None
    hint = "Write it anew by tl-edgeprune evaluate --out."
    figures = read_json(path, "file of figures", hint)
    with reporting_damage(path, hint):
        for name, value in check_type(figures, dict, "the whole").items():
            if value is not None:
                check_type(value, float, name)
    return figures
