"""Where in the model a circuit, or a method's scores, are: heat maps of layers by heads."""

from __future__ import annotations

import os

import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from tl_edgeprune.circuits.circuit import Circuit
from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.report.figures import saved_figure


def plot_heads(
    found: Circuit | EdgeScores,
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
    dpi: int = 200,
) -> None:
    """Draw two heat maps, layers by heads with the MLP as the last column, and write them.

    Left: edges out of each head and MLP; right: edges into it. For a Circuit, edges are counted;
    for EdgeScores, the magnitudes of scores are summed. A shared key or value counts for each head.

    Args:
        found: what to draw.
        path: the file (.png, .svg or .pdf), replaced as a whole.
        title: a line above the maps.
        dpi: dots per inch, for a .png.

    Raises:
        ValueError: the path has another ending than .png, .svg or .pdf.
    """
    graph = found.graph
    if isinstance(found, Circuit):
        weights, unit = found.mask.double(), "edges"
    else:
        weights, unit = found.tensor.detach().cpu().double().abs(), "sum of |score|"
    out_of, into = flows(graph, weights)
    columns = graph.sources_per_layer
    width = 2 * max(2.6, 0.9 + 0.26 * columns) + 0.8
    height = max(2.6, 1.3 + 0.2 * graph.n_layers)
    with saved_figure(path, width, height, dpi) as figure:
        figure.set_layout_engine("constrained", h_pad=0.08, w_pad=0.08)
        left_axes, right_axes = figure.subplots(1, 2, sharey=True)
        _heat_map(figure, left_axes, graph, out_of, f"Out of a head or MLP ({unit})")
        _heat_map(figure, right_axes, graph, into, f"Into it ({unit})")
        left_axes.set_ylabel("Layer")
        if title:
            figure.suptitle(title, x=0.02, ha="left", fontsize=13, fontweight="bold")


def flows(
    graph: EdgeGraph, weights: Float[Tensor, " edge"]
) -> tuple[Float[Tensor, "layer part"], Float[Tensor, "layer part"]]:
    """The weights of the edges out of and into every head and MLP, the MLP last in its layer."""
    source, destination = torch.tensor(graph.pairs).T
    out_of = torch.zeros(graph.n_sources, dtype=weights.dtype).index_add(0, source, weights)
    arriving = torch.zeros(len(graph.destinations), dtype=weights.dtype)
    arriving.index_add_(0, destination, weights)
    source_index = {name: index for index, name in enumerate(graph.sources)}
    into = torch.zeros(graph.n_sources, dtype=weights.dtype)
    for index, name in enumerate(graph.destinations):
        for owner in graph.owner(name):
            into[source_index[owner]] += arriving[index]
    shape = (graph.n_layers, graph.sources_per_layer)
    return out_of[graph.n_inputs :].view(shape), into[graph.n_inputs :].view(shape)


def _heat_map(
    figure: Figure, axes: Axes, graph: EdgeGraph, values: Float[Tensor, "layer part"], title: str
) -> None:
    picture = axes.imshow(values.numpy(), origin="lower", aspect="auto", cmap="Blues", vmin=0)
    axes.set_title(title, fontsize=10.5, loc="left")
    axes.set_xlabel("Head, MLP" if graph.has_mlp else "Head")
    step = 1 if graph.n_heads <= 16 else 4
    heads = list(range(0, graph.n_heads, step))
    mlp = [graph.n_heads] if graph.has_mlp else []
    axes.set_xticks(heads + mlp, [*map(str, heads), *(["MLP"] if mlp else [])], fontsize=9)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    axes.tick_params(axis="y", labelsize=9)
    axes.grid(False)
    if mlp:
        axes.axvline(graph.n_heads - 0.5, color="white", linewidth=2)
    figure.colorbar(picture, ax=axes, fraction=0.05, pad=0.02).outline.set_visible(False)
