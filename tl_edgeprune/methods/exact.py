"""Exact activation patching of every edge: the rise of the objective if only this edge is removed.

A score is objective(full model without the edge) - objective(full model), mean over the task's
pairs: what EAP and its kin approximate by gradients. Wang et al. 2022 (path patching of one edge);
Conmy et al. 2023.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tl_edgeprune.ablation.constants import Ablation
from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.methods.registry import register
from tl_edgeprune.objectives import Objective
from tl_edgeprune.runs.resume import Saved
from tl_edgeprune.runs.session import open_session
from tl_edgeprune.runs.targets import BAR_AFTER
from tl_edgeprune.search.cuts import find_cuts
from tl_edgeprune.search.edge_effects import each_effect
from tl_edgeprune.tasks.task import Task
from tl_edgeprune.utils.reading import check_type
from tl_edgeprune.utils.tensor_files import floats


@register("exact")
def exact(
    model: Any,
    task: Task,
    *,
    objective: str | Objective | None = None,
    graph: EdgeGraph | None = None,
    positions: str | None = None,
    ablation: Ablation = "counterfactual",
    batch_size: int = 8,
    edges: Iterable[str] | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
) -> EdgeScores:
    """The rise of the objective if only one edge is removed from the full model, for each edge.

    Args:
        objective: the task's own by default.
        positions: "span" or "position" for edges with a mask in each.
        batch_size: pairs per forward pass.
        edges: names of the edges to score, all by default; the others' scores are 0.
        checkpoint: a file that the state is saved to every half minute; if it exists, the run
            continues from it.

    Returns scores in units of the objective: above 0 if removing the edge raises the loss. Raises
    KeyError for an unknown edge, and ValueError as `find_objective` does and for the checkpoint of
    another run.
    """
    if isinstance(edges, str):
        raise ValueError(f"edges={edges!r}: expected a list of names, such as [{edges!r}].")
    names = None if edges is None else sorted(edges)
    settings = {"objective": objective, "ablation": ablation, "batch_size": batch_size}
    with open_session(
        model,
        task,
        graph=graph,
        positions=positions,
        objective=objective,
        ablation=ablation,
        batch_size=batch_size,
        metadata={"method": "exact"},
        settings=settings | {"edges": names},
        checkpoint=checkpoint,
        max_bytes=0,
    ) as session:
        scored = list(range(session.graph.n_edges))
        if names is not None:
            scored = sorted({session.graph.index(edge) for edge in names})
        scores, n_scored, runs = _saved_scores(session.saved, session.graph, len(scored))
        cuts = find_cuts(session.run, session.targets, session.loss_of, batch_size=batch_size)
        cuts.set(torch.ones(session.graph.n_edges, dtype=torch.bool))
        cuts.runs += runs
        bar = tqdm(
            total=len(scored), desc="patching", unit="edge", disable=not progress, delay=BAR_AFTER
        )
        with bar:
            bar.update(n_scored)
            for some_edges, effects in each_effect(cuts, scored[n_scored:]):
                scores[some_edges] = effects
                bar.update(len(some_edges))
                n_scored += len(some_edges)
                session.saved.save({"scores": scores}, {"done": n_scored, "runs": cuts.runs})
    return EdgeScores(session.graph, scores.float(), session.metadata | {"runs": cuts.runs})


def _saved_scores(saved: Saved, graph: EdgeGraph, n_edges: int) -> tuple[Tensor, int, int]:
    """The scores so far, how many of `n_edges` they are of, and the runs that they took."""
    state = saved.load()
    if state is None:
        return torch.zeros(graph.n_edges, dtype=torch.float64), 0, 0
    tensors, values = state
    with saved.damaged():
        scores = floats(tensors, "scores", (graph.n_edges,)).double()
        n_scored, runs = (check_type(values[name], int, name) for name in ("done", "runs"))
        if not 0 <= n_scored <= n_edges or runs < 0:
            raise ValueError(f"it says {n_scored} edges in {runs} runs")
    return scores, n_scored, runs
