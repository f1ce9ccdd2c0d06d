"""A circuit as one HTML page that opens from disk, without installation or network.

1. `page_data.py` decides what the page shows, `layout.py` where; both go into the page as JSON.
2. The page's markup, style and scripts are the files of `page/`, joined into one. The page loads
   nothing: its content security policy forbids it.
"""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tl_edgeprune.circuits.circuit import Circuit
from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.report.circuit.labels import title_of
from tl_edgeprune.report.circuit.page_data import Page, page_of
from tl_edgeprune.utils.writing import write_whole

SCRIPTS = ("model", "scene", "camera", "pointer", "panel", "charts", "tools", "save", "main")
PICTURES = (".png", ".svg", ".pdf")
IN_A_CELL = 3000  # largest circuit drawn in a notebook's cell, at about 200 bytes per edge


def write_html(
    circuit: Circuit,
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
    scores: EdgeScores | Float[Tensor, " edge"] | None = None,
    other: Circuit | None = None,
    circuits: Sequence[Circuit] = (),
    names: Sequence[str] | None = None,
    result: Any = None,
    history: Sequence[Mapping[str, Any]] | None = None,
    measures: Any = None,
    settings: Mapping[str, Any] | None = None,
    explanation: Any = None,
) -> None:
    """Write the circuit as an interactive page: one file that opens from disk in any browser.

    Args:
        circuit: any Circuit; usable up to about 10,000 edges.
        path: the .html file, replaced as a whole; its folder is created.
        title: the page's heading; by default the task, the model and the number of edges.
        scores: a score for every edge of the *graph*: EdgeScores, ranked as by their `top`, or a
            tensor in flat order, ranked by value. Strong edges are drawn wider, and a slider
            restricts the drawing to the strongest edges.
        other: a second circuit of the same graph, overlaid on the first.
        circuits: more circuits of the same graph; the slider then selects one of all of them.
        names: of the circuits, in the given order; by default their methods or sizes.
        result: a PruneResult, for its scores and history.
        history: of a training run, as for `plot_history`.
        measures: an Evaluation, or any mapping of names to values; a list with one per circuit if
            there are several. By default those in the circuit's metadata.
        settings: by default the circuit's metadata.
        explanation: an object whose `by_edge()` gives facts about each edge, by the edge's name.

    Raises:
        ValueError: circuits of different graphs; `other` together with `circuits`; scores of
            another length or graph, or not finite; a path with a picture's ending.
    """
    if Path(path).suffix.lower() in PICTURES:
        raise ValueError(
            f"{path}: a page is HTML, so end its name in .html (circuit.draw: pictures)."
        )
    page = page_of(
        circuit,
        title=title,
        scores=scores,
        other=other,
        circuits=circuits,
        names=names,
        result=result,
        history=history,
        measures=measures,
        settings=settings,
        explanation=explanation,
    )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, html_of(page).encode("utf-8", "replace"))


def html_of(page: Page) -> str:
    """The page as the text of one file."""
    contents = {
        "TITLE": html.escape(page.title),
        "STYLE": _file("style.css"),
        "DATA": json_for_html(page),
        "SCRIPT": "\n".join(_file(f"{name}.js") for name in SCRIPTS),
    }
    return re.sub(
        "@@(TITLE|STYLE|DATA|SCRIPT)@@",
        lambda match: contents[match[1]],
        _file("template.html"),
    )


def html_of_cell(circuit: Circuit) -> str:
    """The page in a frame, for a notebook's cell; for a large circuit, a line of text."""
    if circuit.n_edges > IN_A_CELL:
        return (
            f"<p><b>{html.escape(title_of(circuit))}</b>, too many for a cell: "
            "<code>circuit.report(&quot;circuit.html&quot;)</code> draws them.</p>"
        )
    page = html.escape(html_of(page_of(circuit)), quote=True)
    return (
        f'<iframe srcdoc="{page}" sandbox="allow-scripts allow-downloads" loading="lazy" '
        f'title="{html.escape(title_of(circuit), quote=True)}" '
        'style="width:100%;height:640px;border:1px solid #8884;border-radius:8px"></iframe>'
    )


def json_for_html(page: Page) -> str:
    """JSON that no HTML parser can mistake for markup: `<`, `>` and `&` are escaped."""
    text = json.dumps(page, default=vars, separators=(",", ":"), allow_nan=False)
    return re.sub("[<>&]", lambda match: f"\\u{ord(match[0]):04x}", text)


def _file(name: str) -> str:
    return (resources.files("tl_edgeprune.report") / "page" / name).read_text("utf-8")
